"""Rounds in which adapters travel in a lossy type: the server's state keeps its precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prelort.adapters import LoraAdapter
from prelort.config import FederationConfig
from prelort.errors import UpdateRefused
from prelort.federation import wire
from prelort.federation.encoding import change_of, decode, encode
from prelort.federation.replies import checked
from prelort.federation.transport import Engine
from prelort.methods import Broadcast
from small_federation import (
    AGREEMENT,
    DIMENSIONS,
    SCALE,
    answer,
    clients_of,
    in_process,
    make_adapter,
    make_config,
    make_reply_header,
    make_state,
    make_strategy,
    run_rounds,
    same_bits,
    small_client_app,
)

CLIENTS = clients_of([4, 4, 2, 8])
LOSSY = ["bfloat16", "float16", "int8"]
every_lossy = pytest.mark.parametrize("dtype", LOSSY)


def rounds_of(dtype: str, step: float, rounds: int) -> LoraAdapter:
    """The global adapter when every client has added ``step`` to all of it so often."""

    def training(index: int) -> Any:
        def trained(received: LoraAdapter, request: wire.TrainRequest) -> LoraAdapter:
            tensors = {n: t.float() + step for n, t in received.tensors().items()}
            return LoraAdapter.from_tensors(tensors, received.scale)

        return trained

    config = make_config(rounds=rounds, wire_dtype=dtype)
    strategy, events = make_strategy(CLIENTS, config)
    app = small_client_app(CLIENTS, training)
    run_rounds(strategy, Engine(in_process(app, 4), 1, 60.0), lambda state: None)
    assert not [e for e in events if e["event"] == "client_failed"]
    return strategy.state.adapter


@every_lossy
def test_changes_below_the_step_of_the_value_add_up(dtype: str) -> None:
    """Half a step at 1.0 is 4e-3 in bfloat16 and int8: as values they would lose most of it."""
    step, rounds = 1e-4, 30
    found, exact = rounds_of(dtype, step, rounds), rounds_of("float32", step, rounds)
    # A change is rounded relative to itself: at most 1 / 254 of it. The difference and the sum
    # are rounded to float32's step at values up to 4, as they are without a wire.
    allowed = rounds * (step / 254 + 2**-21)
    for name, tensor in exact.tensors().items():
        assert float((found.tensors()[name] - tensor).abs().max()) <= allowed, name
    before = values = decode(encode(make_state().adapter.tensors(), dtype), dtype)
    for _ in range(rounds):
        moved = {name: tensor.float() + step for name, tensor in values.items()}
        values = decode(encode(moved, dtype), dtype)
    for name, tensor in values.items():
        lost = before[name].float() + rounds * step - tensor.float()
        assert float(lost.abs().mean()) > 10 * allowed, name


@every_lossy
def test_where_nothing_is_learnt_the_state_keeps_its_bits(dtype: str) -> None:
    config = make_config(rounds=2, wire_dtype=dtype)
    strategy, _ = make_strategy(CLIENTS, config)
    before = strategy.state.adapter
    app = small_client_app(CLIENTS, lambda index: lambda received, request: received)
    run_rounds(strategy, Engine(in_process(app, 4), 1, 60.0), lambda state: None)
    assert same_bits(strategy.state.adapter, before)


def test_int8_is_a_quarter_of_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIMENSIONS, "model.q_proj", (6000, 5000))
    adapter = make_adapter(8)

    def size(dtype: str) -> int:
        return wire.size(wire.pack(make_reply_header(CLIENTS[3], dtype=dtype), adapter))

    assert 3.9 < size("float32") / size("int8") < 4
    assert 1.95 < size("bfloat16") / size("int8") < 2


# What the server takes


SENT = make_adapter(4, seed=6)
REPLY = make_adapter(4, seed=7)


def take(head: wire.TrainReply, adapter: LoraAdapter, asked: Any, **how: Any) -> LoraAdapter:
    limits = FederationConfig(wire_dtype=asked, max_abs_value=how.pop("max_rank", 1e4))
    sent = how.pop("sent", Broadcast(SENT))
    content = wire.pack(head, adapter, without=how.pop("without", ()))
    update, _ = checked(answer(content), CLIENTS[0], 0, AGREEMENT, limits, sent, **how)
    return update.adapter


def head_of(dtype: str, **changes: Any) -> wire.TrainReply:
    return make_reply_header(CLIENTS[0], dtype=dtype, **changes)


@every_lossy
def test_an_update_is_what_was_sent_with_the_change(dtype: str) -> None:
    found = take(head_of(dtype), change_of(REPLY, SENT), dtype).tensors()
    for name, tensor in REPLY.tensors().items():
        change = tensor - SENT.tensors()[name]
        decoded = decode(encode({name: change}, dtype), dtype)[name].float()
        assert torch.equal(found[name], SENT.tensors()[name] + decoded)
        assert found[name].dtype == torch.float32


@every_lossy
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_pruned_reply_changes_the_first_slots(dtype: str, rank: int) -> None:
    change = change_of(REPLY.prefix(rank), SENT)
    found = take(head_of(dtype, rank=rank), change, dtype, may_prune=True)
    assert found.rank == rank
    for name, tensor in REPLY.prefix(rank).tensors().items():
        assert torch.allclose(found.tensors()[name], tensor, atol=0.05), name


@every_lossy
def test_a_value_is_not_taken_for_a_change_nor_a_change_for_a_value(dtype: str) -> None:
    with pytest.raises(UpdateRefused, match=f"with values, but {dtype} carries a change"):
        take(head_of(dtype, change=False), REPLY, dtype)
    with pytest.raises(UpdateRefused, match="with a change, but float32 carries values"):
        take(head_of("float32", change=True), REPLY, "float32")


@pytest.mark.parametrize("asked", ["float32", *LOSSY])
def test_another_type_than_was_asked_is_refused(asked: str) -> None:
    for dtype in {"float32", *LOSSY} - {asked}:
        with pytest.raises(UpdateRefused, match=f"answers in {dtype}, asked was {asked}"):
            take(head_of(dtype), REPLY, asked)


@every_lossy
def test_absurd_changes_and_absurd_results_are_refused(dtype: str) -> None:
    name = "model.q_proj.lora_A.weight"
    largest = SENT.tensors()[name].abs().argmax()
    base = float(SENT.tensors()[name].flatten()[largest])

    def of(value: float) -> LoraAdapter:
        tensors = {n: torch.zeros_like(t) for n, t in SENT.tensors().items()}
        tensors[name].view(-1)[largest] = value
        return LoraAdapter.from_tensors(tensors, SCALE)

    max_rank = 10 * abs(base)
    take(head_of(dtype), of(-9.5 * base), dtype, max_rank=max_rank)
    for change in (-10.5 * base, 9.5 * base):  # the change is too large; only the sum is
        with pytest.raises(UpdateRefused, match=r"above federation\.max_abs_value"):
            take(head_of(dtype), of(change), dtype, max_rank=max_rank)
    with pytest.raises(UpdateRefused, match="not finite"):
        take(head_of(dtype), of(torch.inf), dtype)
