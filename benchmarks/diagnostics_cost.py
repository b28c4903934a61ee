"""Cost of a round's diagnostics, against the round's aggregation alone.

A 7B-sized adapter (q and v of 32 layers, 4096 x 4096, rank 16) and ten clients of ranks 4, 8 and
16: the same replies are aggregated with and without the collector, in turns, on one thread. Seconds
are CPU time, so that other work on the machine matters little. The goal is at most 1.1 times the
aggregation. Two small rows show the cost of all layers of a small adapter.

    OMP_NUM_THREADS=1 python benchmarks/diagnostics_cost.py [--repeats 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import machine, paired, ratio, report

from prelort import methods
from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import MethodConfig
from prelort.diagnostics.collector import Collector
from prelort.diagnostics.sample import Budget
from prelort.methods.averaging import by_examples
from prelort.methods.interface import Broadcast, Client, Method, ServerState, Update

GOAL = 1.1
RANKS = (4, 4, 4, 4, 8, 8, 8, 16, 16, 16)
LEVELS = (4, 8, 16)
LARGE = {f"model.layers.{i}.self_attn.{p}": (4096, 4096) for i in range(32) for p in "qv"}
SMALL = {f"layers.{i}.{p}": (96, 96 if p in "qkvo" else 256) for i in range(4) for p in "qkvogud"}
ROWS = (
    ("prelort", "7B", LARGE),
    ("zero-padding", "7B", LARGE),
    ("hetlora", "7B", LARGE),
    ("fed-plora", "7B", LARGE),
    ("flexlora", "7B", LARGE),
    ("prelort", "tiny", SMALL),
    ("flexlora", "tiny", SMALL),
)
FEW = 3
"""Turns of a method whose aggregation takes seconds."""


@dataclass(frozen=True)
class Given:
    """A round before its aggregation: the state, what was sent, and what came back."""

    method: Method
    state: ServerState
    clients: list[Client]
    sent: list[Broadcast]
    updates: list[Update]


def given(name: str, shapes: dict[str, tuple[int, int]]) -> Given:
    """Replies that differ slightly from what their clients received."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * size

    layers = {
        layer: Factors(normal(LEVELS[-1], d_in, size=d_in**-0.5), normal(d_out, 16, size=0.02))
        for layer, (d_in, d_out) in shapes.items()
    }
    method = methods.build(MethodConfig(name=name), 0)
    state = ServerState(LoraAdapter(layers, ScaleRule()), round=3, levels=LEVELS)
    clients = [Client(f"site-{i}", rank, 100 + i) for i, rank in enumerate(RANKS)]
    sent = [method.broadcast(state, client) for client in clients]

    def trained(received: LoraAdapter) -> LoraAdapter:
        moved = {
            layer: Factors(
                f.A + normal(*f.A.shape, size=0.1 * f.A.shape[1] ** -0.5),
                f.B + normal(*f.B.shape, size=0.002),
            )
            for layer, f in received.layers.items()
        }
        return LoraAdapter(moved, received.scale)

    updates = [
        Update(client, trained(one.trainable), client.examples)
        for client, one in zip(clients, sent, strict=True)
    ]
    return Given(method, state, clients, sent, updates)


def plain(known: Given) -> float:
    """Seconds of the aggregation."""
    started = time.process_time()
    aggregated(known)
    return time.process_time() - started


def aggregated(known: Given) -> ServerState:
    aggregator = known.method.aggregator(known.state)
    for update in known.updates:
        aggregator.add(update)
    return aggregator.result()


def diagnosed(known: Given, numbers: dict[str, Any]) -> float:
    """Seconds of the aggregation with the diagnostics, whose result goes to ``numbers``."""
    started = time.process_time()
    collector = Collector(known.method, known.state, known.clients, by_examples, 0)
    for sent, update in zip(known.sent, known.updates, strict=True):
        collector.add(sent, update)
    numbers.update(collector.result(aggregated(known)))
    return time.process_time() - started


def row(name: str, size: str, shapes: dict[str, tuple[int, int]], repeats: int) -> dict[str, Any]:
    known = given(name, shapes)
    numbers: dict[str, Any] = {}
    rounds = iter(range(10**6))

    def with_diagnostics() -> float:
        # Another round each time, so that other layers are measured.
        state = replace(known.state, round=next(rounds))
        return diagnosed(replace(known, state=state), numbers)

    sides = {"alone": lambda: plain(known), "diagnosed": with_diagnostics}
    taken = paired(sides, min(repeats, FEW) if plain(known) > 1 else repeats)
    ratios = ratio(taken, "diagnosed", "alone")
    layers = Budget().sample(known.state.adapter, RANKS, 0, 0)
    alone = statistics.median(taken["alone"])
    return {
        "adapter, method": f"{size}, {name}",
        "layers": f"{len(layers)} of {len(shapes)}",
        "ms alone": 1000 * alone,
        "ms more": 1000 * (statistics.median(taken["diagnosed"]) - alone),
        "x alone (median)": ratios["median"],
        "min": ratios["min"],
        "max": ratios["max"],
        "goal": "–" if size != "7B" else "met" if ratios["median"] <= GOAL else "missed",
        "noise": numbers["aggregation_noise"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(name, size, shapes, arguments.repeats) for name, size, shapes in ROWS]
    command = "OMP_NUM_THREADS=1 python benchmarks/diagnostics_cost.py"
    facts = {**vars(arguments), **machine(), "command": command}
    title = f"A round's diagnostics against its aggregation (goal: x {GOAL} at most)"
    report("diagnostics_cost", title, rows, facts)


if __name__ == "__main__":
    main()
