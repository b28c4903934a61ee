"""Nothing in a reply is believed before it is checked."""

import dataclasses
import json
import math
import random
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import AdapterSchema, ScaleRule
from prelort.errors import QuorumError, UpdateRefused
from prelort.federation import wire
from prelort.federation.client_manager import AdapterSpec
from prelort.federation.flower import Context, Error, Message, RecordDict
from prelort.federation.replies import checked
from prelort.federation.transport import Engine
from prelort.methods import Broadcast
from small_federation import (
    AGREEMENT,
    LIMITS,
    SCALE,
    answer,
    blob_of,
    clients_of,
    header_of,
    in_process,
    make_adapter,
    make_config,
    make_reply_header,
    make_strategy,
    raw_content,
    request_to,
    same_bits,
)

CLIENT = clients_of([4])[0]
ADAPTER = make_adapter(4, seed=5)
SENT = Broadcast(make_adapter(4, seed=6))


def take(content: RecordDict, spec: AdapterSpec = AGREEMENT) -> Any:
    return checked(answer(content), CLIENT, 0, spec, LIMITS, SENT)


def reply(**changes: Any) -> RecordDict:
    return wire.pack(make_reply_header(CLIENT, **changes), ADAPTER)


def test_a_good_reply_becomes_an_update() -> None:
    update, head = take(reply(examples=12))

    assert same_bits(update.adapter, ADAPTER)
    assert (update.client, update.examples, head.loss) == (CLIENT, 12, 1.5)


def test_another_base_is_refused_with_both_fingerprints() -> None:
    with pytest.raises(UpdateRefused, match="fingerprint base-7, expected base-0"):
        take(reply(base="base-7"))


def test_other_layers_are_refused() -> None:
    with pytest.raises(UpdateRefused, match="adapts other layers: digest"):
        take(reply(layers="0" * 16))


@pytest.mark.parametrize(
    "rule, scale, said",
    [("rslora", 2.0, "rslora 2"), ("constant", 4.0, "constant 4"), ("constant", 2.0001, "2.0001")],
)
def test_another_scale_rule_is_refused_with_a_message_that_says_so(
    rule: str, scale: float, said: str
) -> None:
    with pytest.raises(UpdateRefused) as refused:
        take(reply(scale_rule=rule, scale=scale))

    text = str(refused.value)
    assert "another scale rule" in text
    assert said in text
    assert "constant 2" in text
    assert "lora.scale_rule" in text


def test_the_same_value_of_another_rule_is_another_rule() -> None:
    spec = dataclasses.replace(AGREEMENT, scale=ScaleRule("rslora", 2.0))
    with pytest.raises(UpdateRefused, match="another scale rule"):
        take(reply(), spec)


def test_another_rank_is_refused() -> None:
    with pytest.raises(UpdateRefused, match="answers with rank 2, expected 4"):
        take(wire.pack(make_reply_header(CLIENT, rank=2), make_adapter(2)))


def test_rank_in_header_alone_does_not_help() -> None:
    with pytest.raises(UpdateRefused, match="has shape"):
        take(wire.pack(make_reply_header(CLIENT), make_adapter(2)))


def test_answer_for_another_client_is_refused() -> None:
    with pytest.raises(UpdateRefused, match="answers for 'site-9'"):
        take(reply(client="site-9"))


@pytest.mark.parametrize("index, said", [(1, "round 2"), (-1, "round 0")])
def test_answer_for_another_round_is_refused(index: int, said: str) -> None:
    with pytest.raises(UpdateRefused, match=f"answers for {said}, asked was 1"):
        take(reply(round=index))


@pytest.mark.parametrize("claim", [0, -1, -(10**12), 10_000_001, 10**12, 10**30])
def test_impossible_number_of_examples_is_refused(claim: int) -> None:
    with pytest.raises(UpdateRefused, match=f"claims {claim} examples, allowed are 1 to"):
        take(reply(examples=claim))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(UpdateRefused, match="loss"):
        take(reply(loss=loss))
    text = json.dumps(json.loads(header_of(reply())) | {"loss": loss})  # NaN and Infinity, bare
    with pytest.raises(UpdateRefused, match="loss"):
        take(raw_content(text, blob_of(reply())))


def test_error_is_refused_with_its_reason() -> None:
    message = Message(Error(100, "the loss became nan"), reply_to=request_to(1000))
    with pytest.raises(UpdateRefused, match="the loss became nan"):
        checked(message, CLIENT, 0, AGREEMENT, LIMITS, SENT)


def test_error_without_a_reason_is_told_by_its_code() -> None:
    message = Message(Error(17), reply_to=request_to(1000))
    with pytest.raises(UpdateRefused, match="error code 17"):
        checked(message, CLIENT, 0, AGREEMENT, LIMITS, SENT)


def test_empty_content_is_refused() -> None:
    with pytest.raises(UpdateRefused, match="carries no header"):
        take(RecordDict())


def is_valid(update: Any) -> bool:
    AGREEMENT.schema.check(update.adapter, CLIENT.rank)
    tensors = update.adapter.tensors().values()
    return (
        all(t.dtype == torch.float32 for t in tensors)
        and all(bool(t.isfinite().all()) for t in tensors)
        and all(float(t.abs().max()) <= LIMITS.max_abs_value for t in tensors)
        and 1 <= update.examples <= LIMITS.max_client_examples
        and update.client == CLIENT
        and update.adapter.scale == SCALE
    )


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


def outcome(content: RecordDict) -> str:
    """'refused' or 'valid'; anything else that is raised fails the test."""
    try:
        update, _ = take(content)
    except UpdateRefused:
        return "refused"
    assert is_valid(update)
    return "valid"


@pytest.mark.parametrize("part", ["structure", "tensors", "header"])
def test_mutated_bytes_are_refused_or_give_a_valid_update(part: str) -> None:
    draw = random.Random(f"mutations of {part}")
    text, blob = header_of(reply()), blob_of(reply())
    structure = 8 + int.from_bytes(blob[:8], "little")
    outcomes = {"refused": 0, "valid": 0}
    for _ in range(1500):
        if part == "header":
            broken = mutated(text.encode(), draw).decode("utf-8", errors="replace")
            content = raw_content(broken, blob)
        elif part == "structure":
            content = raw_content(text, mutated(blob, draw, until=structure))
        else:
            tail = mutated(blob[structure:], draw)
            content = raw_content(text, blob[:structure] + tail)
        outcomes[outcome(content)] += 1
    assert outcomes["refused"] > 500  # the mutations do harm


def test_ten_thousand_mutated_replies_leave_the_global_adapter_as_it_was() -> None:
    draw = random.Random("ten thousand")
    clients = clients_of([4] * 50)
    blob = blob_of(reply())
    structure = 8 + int.from_bytes(blob[:8], "little")
    sent = 0

    def app(message: Message, context: Context) -> Message:
        nonlocal sent
        sent += 1
        client = clients[int(context.node_config["partition-id"])]
        head = make_reply_header(client).model_dump_json()
        if sent % 2:
            head = mutated(head.encode(), draw).decode("utf-8", errors="replace")
        broken = mutated(blob, draw, until=structure) if sent % 2 == 0 else blob[: -1 - sent % 9]
        return Message(raw_content(head, broken), reply_to=message)

    # All must be usable for the round to count: now and then a mutation is as good as none.
    config = make_config(rounds=1, clients_per_round=50, quorum=1.0)
    strategy, events = make_strategy(clients, config)
    state = strategy.state
    before = {name: tensor.clone() for name, tensor in state.adapter.tensors().items()}
    refused = 0
    while refused < 10_000:
        events.clear()
        with pytest.raises(QuorumError):
            strategy.run_round(1, Engine(in_process(app, 50), 1, float("inf")))
        refused += sum(event["event"] == "client_failed" for event in events)
    assert strategy.state is state
    for name, tensor in state.adapter.tensors().items():
        assert torch.equal(tensor, before[name])


def test_flipped_bits_in_the_numbers_alone_are_mostly_other_valid_numbers() -> None:
    """The check is one of plausibility: it must not be taken for one of integrity."""
    draw = random.Random(0)
    text, blob = header_of(reply()), blob_of(reply())
    structure = 8 + int.from_bytes(blob[:8], "little")
    outcomes = []
    for _ in range(300):
        changed = bytearray(blob)
        changed[draw.randrange(structure, len(blob))] ^= 1 << draw.randrange(8)
        outcomes.append(outcome(raw_content(text, bytes(changed))))
    assert {"valid", "refused"} == set(outcomes)


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
@given(st.sampled_from([*json.loads(header_of(reply())), "surplus"]), anything)
def test_any_value_under_any_key_is_refused_or_valid(key: str, value: object) -> None:
    text = json.dumps(json.loads(header_of(reply())) | {key: value})
    outcome(raw_content(text, blob_of(reply())))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_for_an_adapter_are_refused(blob: bytes) -> None:
    assert outcome(raw_content(header_of(reply()), blob)) == "refused"


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*ADAPTER.tensors(), "lora_A.weight", ".lora_A.weight", "x.lora_E", ""]),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([torch.float32, torch.float16, torch.int8, torch.float64]),
        ),
    )
)
def test_any_tensors_for_an_adapter_are_refused_or_valid(tensors: dict[str, Any]) -> None:
    made = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    outcome(raw_content(header_of(reply()), safetensors.torch.save(made)))


def test_types_of_few_bits_are_refused() -> None:
    """Types that safetensors knows and torch may not."""
    blob = blob_of(reply())
    for name in (b"F8_E8M0", b"F8_E4M3", b"F4", b"F6_E2M3", b"BOOL", b"U64"):
        size = int.from_bytes(blob[:8], "little")
        structure = blob[8 : 8 + size].replace(b'"F32"', b'"' + name + b'"')
        assert (
            outcome(
                raw_content(
                    header_of(reply()),
                    len(structure).to_bytes(8, "little") + structure + blob[8 + size :],
                )
            )
            == "refused"
        )


def test_agreement_of_other_shapes_has_another_digest() -> None:
    other = AdapterSchema({**AGREEMENT.schema.layers, "model.q_proj": (6, 7, 8)}, {})
    assert other.digest() != AGREEMENT.schema.digest()
