"""Nothing in a reply is believed before it is checked."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import LoraAdapter
from prelort.config import FederationConfig
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.encoding import change_of, decode, encode
from prelort.federation.flower import Error, Message, RecordDict
from prelort.federation.messages import AdapterSpec, TrainReply
from prelort.federation.replies import checked_update
from prelort.methods import Broadcast, Update
from random_adapters import same_bits
from small_federation import (
    SCALE,
    SPEC,
    answer,
    blob_of,
    clients_of,
    header_of,
    make_adapter,
    make_reply_header,
    raw_content,
    request_to,
    with_header,
)

CLIENT = clients_of([4])[0]
TRAINED, SENT = make_adapter(4, seed=5), make_adapter(4, seed=6)
LIMITS = FederationConfig()
LOSSY = ["bfloat16", "float16", "int8"]
every_lossy = pytest.mark.parametrize("dtype", LOSSY)


def reply(
    adapter: LoraAdapter = TRAINED, without: tuple[str, ...] = (), **changes: Any
) -> RecordDict:
    return wire.pack(make_reply_header(CLIENT, **changes), adapter, without=without)


def take(
    content: RecordDict,
    sent: Broadcast = Broadcast(SENT),
    *,
    spec: AdapterSpec = SPEC,
    dtype: Any = "float32",
    max_abs_value: float = 1e4,
    may_prune: bool = False,
) -> tuple[Update, TrainReply]:
    limits = FederationConfig(wire_dtype=dtype, max_abs_value=max_abs_value)
    return checked_update(answer(content), CLIENT, 0, spec, limits, sent, may_prune)


def test_a_good_reply_becomes_an_update() -> None:
    update, head = take(reply(examples=12))
    assert same_bits(update.adapter, TRAINED)
    assert (update.client, update.examples, head.loss) == (CLIENT, 12, 1.5)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"base": "base-7"}, "fingerprint base-7, expected base-0"),
        ({"layers": "0" * 16}, "adapts other layers: digest"),
        ({"scale_rule": "rslora"}, "scale rule: rslora 2, .*constant 2; set lora.scale_rule"),
        ({"scale": 2.0001}, "another scale rule: constant 2.0001"),
        ({"rank": 2}, "answers with rank 2, expected 4"),
        ({"client": "site-9"}, "answers for 'site-9'"),
        ({"round": 1}, "answers for round 2, expected 1"),
        ({"round": -1}, "answers for round 0, expected 1"),
        *[
            ({"examples": count}, f"claims {count} examples, allowed are 1 to")
            for count in (0, -1, -(10**12), 10_000_001, 10**30)
        ],
        ({"loss": math.nan}, "loss"),
        ({"loss": None}, "reports a loss of None"),
        ({"loss": math.inf}, "loss"),
        ({"next_rank": 9}, "offers rank 9, but the global adapter has 8"),
        ({"dtype": "int8", "change": True}, "answers in int8, expected float32"),
        ({"change": True}, "with a change, but float32 carries values"),
    ],
)
def test_what_was_not_asked_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UpdateRefused, match=said):
        take(reply(**changes))
    if changes.get("dtype", "float32") == "float32":  # NaN and Infinity bare, as Python writes
        with pytest.raises(UpdateRefused, match=said):
            take(with_header(reply(), **changes))


@pytest.mark.parametrize(
    "error, said",
    [
        (Error(100, "the loss became nan"), "the loss became nan"),
        (Error(17), "failed with error code 17"),
    ],
)
def test_an_error_is_refused_with_its_reason_or_its_code(error: Error, said: str) -> None:
    message = Message(error, reply_to=request_to(1000))
    with pytest.raises(UpdateRefused, match=said):
        checked_update(message, CLIENT, 0, SPEC, LIMITS, Broadcast(SENT))


class TestPartsOfAnAdapter:
    @pytest.mark.parametrize(
        "sent, without",
        [
            (Broadcast(SENT, trains="A"), ("B",)),
            (Broadcast(SENT, trains="B"), ("A",)),
            (Broadcast(SENT, trains="B", seeded_factors="A", factor_seed=3), ("A",)),
            (Broadcast(SENT, personal=True), ("B", "modules to save")),
        ],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_a_reply_leaves_out_is_as_the_server_has_it(
        self, sent: Broadcast, without: tuple[str, ...], dtype: Any
    ) -> None:
        """In the server's own precision, and not as it was rounded for the wire."""
        answered = TRAINED if dtype == "float32" else change_of(TRAINED, SENT)
        update, _ = take(reply(answered, without, dtype=dtype), sent, dtype=dtype)
        kept = wire.of_kinds(SENT, without)
        expected = dict(kept)
        for name, value in decode(encode(answered.tensors(), dtype), dtype).items():
            if name not in kept:
                change = dtype != "float32"
                expected[name] = SENT.tensors()[name] + value.float() if change else value
        assert same_bits(update.adapter, LoraAdapter.from_tensors(expected, SCALE))

    def test_what_was_not_trained_is_surplus_and_what_was_is_missed(self) -> None:
        for sent in (Broadcast(SENT, trains="A"), Broadcast(SENT, personal=True)):
            with pytest.raises(UpdateRefused, match=r"'\S+' is surplus: it is not trained"):
                take(reply(), sent)
        for kind in ("A", "B", "modules to save"):
            with pytest.raises(UpdateRefused, match="is missing"):
                take(reply(without=(kind,)))

    def test_a_frozen_adapter_is_refused(self) -> None:
        frozen = LoraAdapter(make_adapter(2).layers, SCALE)
        content = wire.pack(make_reply_header(CLIENT), TRAINED, frozen)
        for sent in (Broadcast(SENT), Broadcast(SENT, frozen=frozen)):
            with pytest.raises(UpdateRefused, match="sends a frozen adapter"):
                take(content, sent)

    @pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 100])
    def test_fewer_dimensions_are_taken_where_a_client_may_prune(self, rank: int) -> None:
        content = reply(make_adapter(rank), rank=rank)
        if rank < 4:
            update, _ = take(content, may_prune=True)
            assert same_bits(update.adapter, make_adapter(rank))
            assert update.client.rank == 4
        for may_prune in {False, rank < 4} - {rank < 4}:
            with pytest.raises(UpdateRefused, match=f"answers with rank {rank}, expected 4"):
                take(content, may_prune=may_prune)

    def test_the_rank_that_it_states_is_that_of_its_tensors(self) -> None:
        for adapter, rank in ((make_adapter(2), 4), (make_adapter(3), 2)):
            with pytest.raises(UpdateRefused, match="has shape"):
                take(reply(adapter, rank=rank), may_prune=True)

    def test_a_validation_loss_that_is_no_number_is_none(self) -> None:
        """The client has learnt something all the same, so that its reply counts."""
        for content in (
            reply(validation_loss=math.nan),
            with_header(reply(), validation_loss=math.inf),
        ):
            assert take(content)[1].validation_loss is None


class TestChanges:
    @every_lossy
    def test_an_update_is_what_was_sent_with_the_change(self, dtype: str) -> None:
        found = take(reply(change_of(TRAINED, SENT), dtype=dtype), dtype=dtype)[0].adapter.tensors()
        for name, tensor in TRAINED.tensors().items():
            change = {name: tensor - SENT.tensors()[name]}
            decoded = decode(encode(change, dtype), dtype)[name].float()
            assert torch.equal(found[name], SENT.tensors()[name] + decoded)
            assert found[name].dtype == torch.float32

    @pytest.mark.parametrize("asked", ["float32", *LOSSY])
    def test_another_type_or_values_for_a_change_are_refused(self, asked: str) -> None:
        for dtype in {"float32", *LOSSY} - {asked}:
            with pytest.raises(UpdateRefused, match=f"answers in {dtype}, expected {asked}"):
                take(reply(dtype=dtype), dtype=asked)
        if asked != "float32":
            with pytest.raises(UpdateRefused, match=f"values, but {asked} carries a change"):
                take(reply(dtype=asked, change=False), dtype=asked)

    @every_lossy
    def test_absurd_changes_and_absurd_results_are_refused(self, dtype: str) -> None:
        name = "model.q_proj.lora_A.weight"
        largest = SENT.tensors()[name].abs().argmax()
        base = float(SENT.tensors()[name].flatten()[largest])

        def take_change(value: float) -> None:
            tensors = {n: torch.zeros_like(t) for n, t in SENT.tensors().items()}
            tensors[name].view(-1)[largest] = value
            change = LoraAdapter.from_tensors(tensors, SCALE)
            take(reply(change, dtype=dtype), dtype=dtype, max_abs_value=10 * abs(base))

        take_change(-9.5 * base)
        for value in (-10.5 * base, 9.5 * base):  # the change is too large; only the sum is
            with pytest.raises(UpdateRefused, match=r"above federation\.max_abs_value"):
                take_change(value)
        with pytest.raises(UpdateRefused, match="not finite"):
            take_change(math.inf)


# Whatever bytes


def outcome(content: RecordDict) -> str:
    """'refused' or 'valid'; anything else that is raised fails the test."""
    try:
        update, _ = take(content)
    except UpdateRefused:
        return "refused"
    SPEC.schema.check(update.adapter, CLIENT.rank)
    for tensor in update.adapter.tensors().values():
        assert tensor.dtype == torch.float32
        assert float(tensor.abs().max()) <= LIMITS.max_abs_value  # and not NaN
    assert 1 <= update.examples <= LIMITS.max_client_examples
    assert (update.client, update.adapter.scale) == (CLIENT, SCALE)
    return "valid"


def mutated(data: bytes, draw: random.Random, until: int | None = None) -> bytes:
    """Some bytes changed, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        at = draw.randrange(min(until or len(changed), len(changed)) or 1)
        how = draw.randrange(5)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif how == 1 and at < len(changed):
            changed[at] = draw.randrange(256)
        elif how == 2:
            del changed[at : at + draw.choice([1, 4, 64])]
        elif how == 3:
            changed[at:at] = draw.randbytes(draw.choice([1, 4, 8]))
        else:
            changed[at:at] = changed[at : at + draw.choice([1, 8, 64])]
    return bytes(changed)


TEXT, BLOB = header_of(reply()), blob_of(reply())
STRUCTURE = 8 + int.from_bytes(BLOB[:8], "little")
"""Where the tensors begin in the blob."""


@pytest.mark.parametrize("part", ["structure", "tensors", "header"])
def test_mutated_bytes_are_refused_or_give_a_valid_update(part: str) -> None:
    draw = random.Random(f"mutations of {part}")
    outcomes = {"refused": 0, "valid": 0}
    for _ in range(1500):
        if part == "header":
            broken = mutated(TEXT.encode(), draw).decode("utf-8", errors="replace")
            content = raw_content(broken, BLOB)
        elif part == "structure":
            content = raw_content(TEXT, mutated(BLOB, draw, until=STRUCTURE))
        else:
            content = raw_content(TEXT, BLOB[:STRUCTURE] + mutated(BLOB[STRUCTURE:], draw))
        outcomes[outcome(content)] += 1
    assert outcomes["refused"] > 500  # the mutations do harm


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([10**400, -(10**400), 2**63, 1e308, "1", "NaN", "constant", "float32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([*json.loads(TEXT), "surplus"]), anything)
def test_any_value_under_any_key_is_refused_or_valid(key: str, value: object) -> None:
    outcome(with_header(reply(), **{key: value}))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*TRAINED.tensors(), "lora_A.weight", ".lora_A.weight", "x.lora_E", ""]),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([torch.float32, torch.float16, torch.int8, torch.float64]),
        ),
    )
)
def test_any_tensors_for_an_adapter_are_refused_or_valid(tensors: dict[str, Any]) -> None:
    made = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    outcome(raw_content(TEXT, safetensors.torch.save(made)))


@pytest.mark.parametrize("name", ["F8_E8M0", "F8_E4M3", "F4", "F6_E2M3", "BOOL", "U64"])
def test_types_of_few_bits_are_refused(name: str) -> None:
    """Types that safetensors knows and torch may not."""
    structure = BLOB[8:STRUCTURE].replace(b'"F32"', f'"{name}"'.encode())
    blob = len(structure).to_bytes(8, "little") + structure + BLOB[STRUCTURE:]
    assert outcome(raw_content(TEXT, blob)) == "refused"
