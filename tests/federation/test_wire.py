import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch

from prelort.adapters import LoraAdapter
from prelort.config import TrainingConfig
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.encoding import DTYPES
from small_federation import (
    AGREEMENT,
    SCALE,
    blob_of,
    clients_of,
    header_of,
    make_adapter,
    make_reply_header,
    raw_content,
    same_bits,
)

CLIENT = clients_of([4])[0]


def packed(dtype: str = "float32", adapter: LoraAdapter | None = None) -> Any:
    return wire.pack(make_reply_header(CLIENT, dtype=dtype), adapter or make_adapter(4, seed=3))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_adapter_arrives_as_it_was_rounded_to_the_wire_type(self, dtype: str) -> None:
        sent = make_adapter(4, seed=3)
        content = packed(dtype, sent)
        head = wire.header(content, wire.TrainReply)

        received, frozen = wire.adapter(content, head)

        assert same_bits(received, sent.to(DTYPES[dtype]))
        assert frozen is None

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_type_that_fits_is_not_rounded_at_all(self, dtype: str) -> None:
        kind = DTYPES[dtype]
        sent = make_adapter(4, seed=3, dtype=kind)
        content = packed(dtype, sent)

        received, _ = wire.adapter(content, wire.header(content, wire.TrainReply))

        assert same_bits(received, sent)
        assert received.modules_to_save["head.weight"].dtype == kind

    def test_special_numbers_keep_their_bits(self) -> None:
        adapter = make_adapter(4)
        special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, 1.17e-38])
        adapter.layers["model.q_proj"].A[0] = special
        content = packed("float32", adapter)

        received, _ = wire.adapter(content, wire.header(content, wire.TrainReply))

        assert same_bits(received, adapter)

    def test_prefix_views_are_sent_without_the_rest(self) -> None:
        whole = make_adapter(8)
        few = wire.pack(make_reply_header(CLIENT), whole.prefix(2))
        tensors = safetensors.torch.load(blob_of(few))

        assert tensors["model.q_proj.lora_A.weight"].shape == (2, 6)
        assert len(blob_of(few)) < len(blob_of(wire.pack(make_reply_header(CLIENT), whole)))

    def test_headers_come_back_equal(self) -> None:
        request = wire.TrainRequest(
            **AGREEMENT.header(4).model_dump(),
            dtype="bfloat16",
            round=2,
            rounds=7,
            seed=11,
            training=TrainingConfig(optimizer="sgd", learning_rate=0.1),
            objective="example",
            levels=(2, 4),
            level_weights=(0.25, 0.75),
            timeout=60.0,
        )
        assert wire.header(wire.pack(request), wire.TrainRequest) == request

        reply = wire.header(packed(), wire.TrainReply)
        assert (reply.client, reply.examples, reply.loss) == (CLIENT.name, CLIENT.examples, 1.5)
        assert reply.seconds == 0.25

    def test_reported_loss_keeps_every_digit(self) -> None:
        loss = math.pi / 3e7
        content = wire.pack(make_reply_header(CLIENT, loss=loss), make_adapter(4))
        assert wire.header(content, wire.TrainReply).loss == loss


class TestSize:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_is_header_and_blob_as_they_travel(self, dtype: str) -> None:
        content = packed(dtype)
        assert wire.size(content) == len(header_of(content).encode()) + len(blob_of(content))

    def test_counts_bytes_and_not_characters(self) -> None:
        plain = wire.pack(make_reply_header(CLIENT, client="e"))
        accented = wire.pack(make_reply_header(CLIENT, client="é"))
        assert wire.size(accented) == wire.size(plain) + 1

    def test_without_an_adapter_is_the_header(self) -> None:
        content = wire.pack(AGREEMENT.header(1))
        assert wire.size(content) == len(header_of(content))

    def test_does_not_depend_on_the_time_taken(self) -> None:
        sizes = {
            wire.size(wire.pack(make_reply_header(CLIENT, seconds=seconds)))
            for seconds in (0.0, 1e-7, 0.05, 0.049566507999, 3.0, 1234.5678, 1e5)
        }
        assert len(sizes) == 1


class TestHeader:
    def changed(self, **changes: Any) -> Any:
        values = json.loads(header_of(packed())) | changes
        return raw_content(json.dumps(values), b"")

    @pytest.mark.parametrize(
        "text",
        ["", "{", "null", "[]", "3", '"text"', "{}", "\x00", '{"rank": 1' + "0" * 9, "[" * 100_000],
        ids=lambda text: repr(text[:10]),
    )
    def test_malformed_json_is_refused(self, text: str) -> None:
        with pytest.raises(UpdateRefused, match="malformed header"):
            wire.header(raw_content(text, None), wire.TrainReply)

    def test_surplus_keys_are_refused_by_name(self) -> None:
        with pytest.raises(UpdateRefused, match=r"malformed header: backdoor: Extra inputs"):
            wire.header(self.changed(backdoor=1), wire.TrainReply)

    @pytest.mark.parametrize("key", ["base", "rank", "client", "examples", "loss", "dtype"])
    def test_missing_keys_are_refused_by_name(self, key: str) -> None:
        values = json.loads(header_of(packed()))
        del values[key]
        with pytest.raises(UpdateRefused, match=f"malformed header: {key}: Field required"):
            wire.header(raw_content(json.dumps(values), None), wire.TrainReply)

    @pytest.mark.parametrize(
        "key, value",
        [
            ("rank", 0),
            ("rank", -4),
            ("rank", "many"),
            ("scale", 0.0),
            ("scale", -2.0),
            ("scale", float("inf")),
            ("scale", float("nan")),
            ("scale_rule", "alpha / r"),
            ("dtype", "float64"),
            ("examples", None),
            ("examples", 1.5),
            ("loss", "low"),
            ("client", ["a"]),
        ],
    )
    def test_impossible_values_are_refused_by_key(self, key: str, value: object) -> None:
        with pytest.raises(UpdateRefused, match=f"malformed header: {key}: "):
            wire.header(self.changed(**{key: value}), wire.TrainReply)

    def test_another_protocol_is_told_as_such(self) -> None:
        with pytest.raises(UpdateRefused, match="speaks protocol 1, expected 3"):
            wire.header(self.changed(protocol=1), wire.TrainReply)

    def test_another_protocol_is_told_even_if_its_keys_differ(self) -> None:
        with pytest.raises(UpdateRefused, match="speaks protocol 1, expected 3"):
            wire.header(self.changed(protocol=1, compression="zstd"), wire.TrainReply)

    def test_a_kind_of_message_is_not_taken_for_another(self) -> None:
        with pytest.raises(UpdateRefused, match="malformed header"):
            wire.header(packed(), wire.TrainRequest)

    def test_no_header_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match="carries no header"):
            wire.header(raw_content(None, b"x"), wire.TrainReply)

    def test_header_that_is_no_text_is_refused(self) -> None:
        content = packed()
        content.config_records["header"]["json"] = 3
        with pytest.raises(UpdateRefused, match="carries no header"):
            wire.header(content, wire.TrainReply)


class TestAdapter:
    head = make_reply_header(CLIENT)

    def read(self, blob: bytes | None, stype: str = "safetensors") -> LoraAdapter:
        return wire.adapter(raw_content(None, blob, stype), self.head)[0]

    @pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
    def test_truncated_bytes_are_refused(self, kept: int) -> None:
        with pytest.raises(UpdateRefused, match="adapter cannot be read"):
            self.read(blob_of(packed())[:kept])

    def test_a_byte_too_many_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match="adapter cannot be read"):
            self.read(blob_of(packed()) + b"\x00")

    def test_pickle_is_never_read(self) -> None:
        import io
        import pickle

        class Bomb:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return pytest.fail, ("unpickled",)

        file = io.BytesIO()
        torch.save({"model.q_proj.lora_A.weight": torch.ones(2, 2)}, file)
        for data in (pickle.dumps(Bomb()), file.getvalue()):
            with pytest.raises(UpdateRefused, match="adapter cannot be read"):
                self.read(data)
            with pytest.raises(UpdateRefused, match="carries no adapter"):
                self.read(data, stype="pickle")

    def test_no_adapter_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match="carries no adapter"):
            self.read(None)

    def test_another_serialisation_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match="carries no adapter"):
            self.read(blob_of(packed()), stype="numpy.ndarray")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
    def test_type_that_was_not_stated_is_refused(self, dtype: torch.dtype) -> None:
        tensors = {n: t.to(dtype) for n, t in make_adapter(4).tensors().items()}
        with pytest.raises(UpdateRefused, match=r"is torch\.\w+, stated was float32"):
            self.read(safetensors.torch.save(tensors))

    def test_factor_without_its_partner_is_refused_by_name(self) -> None:
        tensors = make_adapter(4).tensors()
        del tensors["model.k_proj.lora_B.weight"]
        with pytest.raises(UpdateRefused, match=r"model\.k_proj\.lora_B\.weight' is missing"):
            self.read(safetensors.torch.save(tensors))


class TestCheckAdapter:
    def check(self, tensors: dict[str, torch.Tensor], max_rank: float = 1e4) -> None:
        adapter = LoraAdapter.from_tensors(tensors, SCALE)
        wire.check_adapter(adapter, AGREEMENT.schema, 4, max_rank)

    def test_the_right_one_passes(self) -> None:
        self.check(make_adapter(4).tensors())

    def test_whole_missing_layer_is_refused(self) -> None:
        tensors = {n: t for n, t in make_adapter(4).tensors().items() if "k_proj" not in n}
        with pytest.raises(UpdateRefused, match=r"'model\.k_proj\.lora_A\.weight' is missing"):
            self.check(tensors)

    def test_missing_head_is_refused(self) -> None:
        tensors = make_adapter(4).tensors()
        del tensors["head.weight"]
        with pytest.raises(UpdateRefused, match=r"'head\.weight' is missing"):
            self.check(tensors)

    def test_surplus_tensor_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match=r"'lm_head\.weight' is surplus"):
            self.check(make_adapter(4).tensors() | {"lm_head.weight": torch.ones(2)})

    @pytest.mark.parametrize("rank", [1, 2, 5, 8])
    def test_another_rank_is_refused(self, rank: int) -> None:
        with pytest.raises(UpdateRefused, match="has shape"):
            self.check(make_adapter(rank).tensors())

    def test_transposed_tensor_is_refused(self) -> None:
        tensors = make_adapter(4).tensors()
        tensors["head.weight"] = tensors["head.weight"].T.contiguous()
        with pytest.raises(UpdateRefused, match=r"\[4, 2\], expected \[2, 4\]"):
            self.check(tensors)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["model.q_proj.lora_B.weight", "head.weight"])
    def test_one_number_that_is_none_is_refused(self, name: str, value: float) -> None:
        tensors = make_adapter(4).tensors()
        tensors[name].view(-1)[-1] = value
        with pytest.raises(UpdateRefused, match=f"'{name}' holds a value that is not finite"):
            self.check(tensors)

    @pytest.mark.parametrize("value", [1e30, -1e30, 1.0001e4])
    def test_absurd_number_is_refused(self, value: float) -> None:
        tensors = make_adapter(4).tensors()
        tensors["model.q_proj.lora_A.weight"][0, 0] = value
        with pytest.raises(UpdateRefused, match=r"above federation\.max_abs_value = 10000"):
            self.check(tensors)

    def test_the_largest_allowed_number_passes(self) -> None:
        tensors = make_adapter(4).tensors()
        tensors["model.q_proj.lora_A.weight"][0, 0] = -1e4
        self.check(tensors)
