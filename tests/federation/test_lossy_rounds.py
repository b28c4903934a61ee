"""Rounds in which adapters travel in a lossy type: the server's state keeps its precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prelort.adapters import Factors, LoraAdapter
from prelort.events import ClientFailed
from prelort.federation import wire
from prelort.federation.encoding import decode, encode
from prelort.federation.messages import TrainRequest
from random_adapters import same_bits
from small_federation import (
    SCALE,
    clients_of,
    make_config,
    make_reply_header,
    make_run,
    make_state,
    small_client_app,
)

CLIENTS = clients_of([4, 4, 2, 8])
every_lossy = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])


def rounds_of(dtype: str, step: float, rounds: int) -> LoraAdapter:
    """The global adapter when every client has added ``step`` to all of it so often."""

    def training(index: int) -> Any:
        def trained(received: LoraAdapter, request: TrainRequest) -> LoraAdapter:
            tensors = {n: t.float() + step for n, t in received.tensors().items()}
            return LoraAdapter.from_tensors(tensors, received.scale)

        return trained

    run = make_run(
        small_client_app(CLIENTS, training), make_config(rounds=rounds, wire_dtype=dtype)
    )
    run.train()
    assert not run.of(ClientFailed)
    return run.state.adapter


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
    assert same_bits(rounds_of(dtype, 0.0, 2), make_state().adapter)


@pytest.mark.parametrize("dtype, ratio", [("bfloat16", 2), ("float16", 2), ("int8", 4)])
def test_a_large_adapter_takes_its_share_of_the_bytes(dtype: str, ratio: float) -> None:
    factors = Factors(torch.ones(8, 6000), torch.ones(5000, 8))
    adapter = LoraAdapter({"model.q_proj": factors}, SCALE)

    def size(dtype: str) -> int:
        return wire.size(wire.pack(make_reply_header(CLIENTS[3], dtype=dtype), adapter))

    assert 0.97 * ratio < size("float32") / size(dtype) < ratio
