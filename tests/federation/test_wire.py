"""Messages as bytes: what travels of an adapter, what comes back, and what is refused."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

from prelort.adapters import Factors, LoraAdapter
from prelort.config import TrainingConfig
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.encoding import DTYPES
from prelort.federation.flower import RecordDict
from prelort.federation.messages import EvaluateReply, TrainReply, TrainRequest
from prelort.methods.objective import TailPenalty
from prelort.training.settings import LocalTraining
from random_adapters import same_bits
from small_federation import (
    DIMENSIONS,
    SCALE,
    SPEC,
    blob_of,
    clients_of,
    make_adapter,
    make_reply_header,
    raw_content,
    with_header,
)

CLIENT = clients_of([4])[0]
ADAPTER = make_adapter(4, seed=3)
MODULES = "modules to save"
KINDS = {"A": 2, "B": 2, MODULES: 1}
"""How many tensors of each kind the adapter has."""
rounded = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def request(**changes: Any) -> TrainRequest:
    values = {
        **SPEC.header(4).model_dump(),
        "dtype": "float32",
        "round": 2,
        "rounds": 7,
        "seed": 11,
        "training": LocalTraining.of(TrainingConfig(optimizer="sgd", learning_rate=0.1)),
        "objective": "example",
        "levels": (2, 4),
        "level_weights": (0.25, 0.75),
        "timeout": 60.0,
        **changes,
    }
    return TrainRequest(**values)


def reply(adapter: LoraAdapter = ADAPTER, **changes: Any) -> RecordDict:
    return wire.pack(make_reply_header(CLIENT, **changes), adapter)


def frozen(*ranks: int, seed: int = 5) -> LoraAdapter:
    """Factors of any rank, one for each layer; no modules to save."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: Factors(
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator),
        )
        for (name, (d_in, d_out)), rank in zip(DIMENSIONS.items(), ranks, strict=True)
    }
    return LoraAdapter(layers, SCALE)


# Headers


def test_every_field_of_a_request_comes_back() -> None:
    sent = request(
        seeded_factors="A and B",
        factor_seed=2**62,
        personal=True,
        scale_multiplier=8 / 3,
        tail=TailPenalty(1e-3, 0.99, 2),
        trains="B",
        with_validation=True,
        requires=("something",),
    )
    got = wire.header(wire.pack(sent), TrainRequest)
    assert got == sent
    assert got.to_objective().tail == TailPenalty(1e-3, 0.99, 2)


def test_metrics_come_back_and_what_is_no_number_is_none() -> None:
    values = {"perplexity": math.inf, "accuracy": math.nan, "loss": 0.1}
    facts = SPEC.header(4).model_dump()
    sent = EvaluateReply(**facts, client="a", round=3, examples=7, weight=70, metrics=values)
    got = wire.header(wire.pack(sent), EvaluateReply)
    assert got.metrics == {"perplexity": None, "accuracy": None, "loss": 0.1}
    assert (got.client, got.round, got.examples) == ("a", 3, 7)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"text"', "{}", "\x00", '{"rank": 1' + "0" * 9, "[" * 100_000],
    ids=lambda text: repr(text[:10]),
)
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(UpdateRefused, match="malformed header"):
        wire.header(raw_content(text, None), TrainReply)


@pytest.mark.parametrize(
    "kind, key, value",
    [
        (TrainReply, "rank", 0),
        (TrainReply, "scale", math.nan),
        (TrainReply, "scale_rule", "alpha / r"),
        (TrainReply, "dtype", "float64"),
        (TrainReply, "examples", 1.5),
        (TrainReply, "next_rank", 0),
        (TrainRequest, "seeded_factors", "B"),
        (TrainRequest, "scale_multiplier", math.inf),
        (TrainRequest, "trains", ""),
        (TrainRequest, "tail", {"weight": 1.0}),
        (TrainRequest, "requires", "something"),
    ],
)
def test_impossible_values_are_refused_by_key(kind: Any, key: str, value: object) -> None:
    content = reply() if kind is TrainReply else wire.pack(request())
    with pytest.raises(UpdateRefused, match=f"malformed header: {key}"):
        wire.header(with_header(content, **{key: value}), kind)


# Adapters


class TestAdapter:
    @rounded
    def test_arrives_as_it_was_rounded_to_the_wire_type(self, dtype: str) -> None:
        for sent in (ADAPTER, make_adapter(4, seed=3, dtype=DTYPES[dtype])):
            content = reply(sent, dtype=dtype)
            received, second = wire.adapter(content, wire.header(content, TrainReply))
            assert same_bits(received, sent.to(DTYPES[dtype]))
            assert second is None

    def read(self, blob: bytes | None, stype: str = "safetensors") -> LoraAdapter:
        return wire.adapter(raw_content(None, blob, stype), request())[0]

    @pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
    def test_truncated_or_surplus_bytes_are_refused(self, kept: int) -> None:
        for blob in (blob_of(reply())[:kept], blob_of(reply()) + b"\x00"):
            with pytest.raises(UpdateRefused, match="adapter cannot be read"):
                self.read(blob)

    def test_pickle_is_never_read(self) -> None:
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

    def test_no_adapter_and_another_serialisation_are_refused(self) -> None:
        for blob, stype in ((None, "safetensors"), (blob_of(reply()), "numpy.ndarray")):
            with pytest.raises(UpdateRefused, match="carries no adapter"):
                self.read(blob, stype)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
    def test_a_type_that_was_not_stated_is_refused(self, dtype: torch.dtype) -> None:
        tensors = {n: t.to(dtype) for n, t in ADAPTER.tensors().items()}
        with pytest.raises(UpdateRefused, match=r"is torch\.\w+, stated was float32"):
            self.read(safetensors.torch.save(tensors))


class TestWhatTravels:
    @pytest.mark.parametrize("without", [("A",), ("A", "B"), ("B", MODULES), ("B", "A", "B")])
    @rounded
    def test_the_receiver_completes_the_adapter_bit_for_bit(
        self, without: tuple[str, ...], dtype: str
    ) -> None:
        head = request(dtype=dtype)
        content = wire.pack(head, ADAPTER, without=without)
        known = wire.of_kinds(ADAPTER, without)
        assert len(known) == sum(KINDS[kind] for kind in set(without))
        received, _ = wire.adapter(content, head, known)
        sent = set(safetensors.torch.load(blob_of(content)))
        assert sent == set(ADAPTER.tensors()) - set(known)
        expected = ADAPTER.to(DTYPES[dtype]).tensors() | known
        assert same_bits(received, LoraAdapter.from_tensors(expected, SCALE))


class TestFrozen:
    @rounded
    @pytest.mark.parametrize("ranks", [(1, 1), (9, 2), (40, 7)])
    def test_adapters_of_any_ranks_arrive(self, dtype: str, ranks: tuple[int, int]) -> None:
        second, head = frozen(*ranks), request(dtype=dtype)
        received, found = wire.adapter(wire.pack(head, ADAPTER, second), head)
        assert same_bits(received, ADAPTER.to(DTYPES[dtype]))
        assert found is not None
        assert same_bits(found, second.to(DTYPES[dtype]))
        wire.check_frozen(found, SPEC.schema)

    def test_some_layers_and_views_of_others_arrive(self) -> None:
        """As a method's own state is: safetensors alone refuses tensors that share memory."""
        second = frozen(40, 40)
        one = replace(second, layers={"model.k_proj": second.layers["model.k_proj"]})
        shared = LoraAdapter(ADAPTER.prefix(2).layers, SCALE)
        for given in (one, second.prefix(2), shared, LoraAdapter(ADAPTER.layers, SCALE)):
            content = wire.pack(request(), ADAPTER, given)
            received, found = wire.adapter(content, request())
            assert same_bits(received, ADAPTER)
            assert found is not None
            assert same_bits(found, given)
            assert wire.size(content) < wire.size(wire.pack(request(), ADAPTER, second))

    @pytest.mark.parametrize(
        "layer, factors, modules, said",
        [
            ("model.o_proj", (6, 5), {}, r"frozen layer 'model\.o_proj' .*does not fit"),
            ("model.q_proj", (7, 5), {}, r"'model\.q_proj' of \[7, 5\]"),
            ("model.q_proj", (6, 4), {}, r"'model\.q_proj' of \[6, 4\]"),
            ("model.q_proj", (6, 5), {"head": torch.ones(2, 4)}, "frozen tensor 'head' is surplus"),
        ],
    )
    def test_what_does_not_fit_the_model_is_refused(
        self, layer: str, factors: tuple[int, int], modules: Any, said: str
    ) -> None:
        d_in, d_out = factors
        layers = {**frozen(2, 2).layers, layer: Factors(torch.ones(2, d_in), torch.ones(d_out, 2))}
        with pytest.raises(UpdateRefused, match=said):
            wire.check_frozen(LoraAdapter(layers, SCALE, modules), SPEC.schema)


class TestCheckAdapter:
    def check(self, **changes: torch.Tensor | None) -> None:
        tensors = {**ADAPTER.tensors(), **changes}
        found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        adapter = LoraAdapter.from_tensors(found, SCALE)
        wire.check_adapter(adapter, SPEC.schema, 4, 1e4)

    @pytest.mark.parametrize("name", ["model.q_proj.lora_B.weight", "head.weight"])
    @pytest.mark.parametrize(
        "value, said",
        [
            (math.nan, "holds a value that is not finite"),
            (math.inf, "holds a value that is not finite"),
            (-math.inf, "holds a value that is not finite"),
            (1e30, r"above federation\.max_abs_value = 10000"),
            (-1.0001e4, r"above federation\.max_abs_value = 10000"),
            (-1e4, ""),
        ],
    )
    def test_numbers_that_are_none_or_absurd_are_refused(
        self, name: str, value: float, said: str
    ) -> None:
        changed = ADAPTER.tensors()[name].clone()
        changed.view(-1)[-1] = value
        if not said:
            self.check(**{name: changed})
            return
        with pytest.raises(UpdateRefused, match=f"'{name}' holds .*{said.removeprefix('holds ')}"):
            self.check(**{name: changed})
