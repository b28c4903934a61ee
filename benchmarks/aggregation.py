"""What does the server's arithmetic cost, against moving the bytes and against a dense SVD?

Three tables. *Factors*: a round of the methods that average slots against copying the replies into
buffers that exist already, and the memory that it needs. *Products*: a layer of the methods that
average products against the SVD of the dense mean, and how far the results differ. *Peers*: a
layer of published aggregation code, imported from checkouts that are given on the command line.

    python benchmarks/aggregation.py [--short] [--flora PATH] [--florist PATH] [--flexlora PATH]
                                     [--nvflare PATH]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from common import high_water_mib, machine, paired, ratio, report, set_high_water_back

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import MethodConfig
from prelort.methods import Client, ServerState, Update, build

SLOT_METHODS = ("prelort", "zero-padding", "replication", "fed-plora")
SEED = 7


@dataclass(frozen=True)
class Size:
    """Square layers, and clients that have the ranks in equal numbers and in drawn order."""

    layers: int
    side: int
    ranks: tuple[int, ...]
    clients: int

    def adapter(self, rank: int, value: float | None = None) -> LoraAdapter:
        """Normal numbers, or one value, in one buffer as they come from a message."""
        numbers = torch.empty(2 * self.layers * self.side * rank)
        if value is None:
            numbers.normal_(generator=torch.Generator().manual_seed(rank))
        else:
            numbers.fill_(value)
        layers = {}
        for k, part in enumerate(numbers.chunk(self.layers)):
            a, b = part.chunk(2)
            layers[f"layer {k}"] = Factors(a.view(rank, self.side), b.view(self.side, rank))
        return LoraAdapter(layers, ScaleRule())

    def order(self) -> list[int]:
        """The rank of each client."""
        ranks = [self.ranks[k % len(self.ranks)] for k in range(self.clients)]
        random.Random(SEED).shuffle(ranks)
        return ranks


def update(adapter: LoraAdapter, number: int) -> Update:
    examples = 10 + number
    return Update(Client(f"client {number}", adapter.rank, examples), adapter, examples)


def aggregator(name: str, size: Size, state: ServerState) -> Any:
    return build(MethodConfig(name=name), size.ranks, SEED).aggregator(state)


# Factors


def slot_methods(size: Size, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of each method, in turns with copying the same replies."""
    torch.set_num_threads(threads)
    state = ServerState(size.adapter(max(size.ranks)))
    replies = {rank: size.adapter(rank) for rank in size.ranks}
    updates = [update(replies[rank], k) for k, rank in enumerate(size.order())]
    buffers = {rank: size.adapter(rank, 0.0).tensors() for rank in size.ranks}

    def copying() -> float:
        started = time.perf_counter()
        for one in updates:
            into = buffers[one.adapter.rank]
            for name, tensor in one.adapter.tensors().items():
                into[name].copy_(tensor)
        return time.perf_counter() - started

    def method(name: str) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            round_ = aggregator(name, size, state)
            for one in updates:
                round_.add(one)
            round_.result()
            return time.perf_counter() - started

        return run

    sides = {"copying": copying, **{name: method(name) for name in SLOT_METHODS}}
    taken = paired(sides, repeats)
    rows = []
    for name in sides:
        ratios = ratio(taken, name, "copying")
        rows.append(
            {
                "method": name,
                "threads": threads,
                "seconds a round": statistics.median(taken[name]),
                "x copying (median)": ratios["median"],
                "min": ratios["min"],
                "max": ratios["max"],
            }
        )
    return rows


def peak_mib(name: str, size: Size) -> float:
    """What a round adds to the process at its peak (Linux; in a new process).

    That is the old state, the aggregator, one reply at a time and the new state.
    """
    torch.set_num_threads(1)
    one_round(name, Size(1, 64, size.ranks, 8))  # what the process loads at its first round
    set_high_water_back()
    before = high_water_mib()
    one_round(name, size)
    return high_water_mib() - before


def one_round(name: str, size: Size) -> None:
    """A round in which each reply exists only while it is added."""
    state = ServerState(size.adapter(max(size.ranks), 1.0))
    round_ = aggregator(name, size, state)
    for number, rank in enumerate(size.order()):
        round_.add(update(size.adapter(rank, 2.0), number))
    round_.result()


def peaks(size: Size) -> dict[str, float]:
    """Method -> its peak in global adapters."""
    whole = 2 * size.layers * size.side * max(size.ranks) * 4 / 2**20
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name in SLOT_METHODS:
        # Each in a process of its own: an allocator does not give back what it once had.
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found[name] = pool.submit(peak_mib, name, size).result() / whole
    return found


def factors(size: Size, repeats: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    memory = peaks(size)
    rows = [row for count in threads for row in slot_methods(size, count, repeats)]
    return [{**row, "peak (adapters)": memory.get(row["method"], "")} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="smaller layers: about a minute")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    ranks = (8, 16, 32, 64)
    size = Size(8, 2048, ranks, 40) if arguments.short else Size(64, 4096, ranks, 100)
    facts = {**vars(arguments), **machine(), "command": "python benchmarks/aggregation.py"}
    rows = factors(size, arguments.repeats, arguments.threads)
    report("aggregation_factors", "A round of the server, against copying its replies", rows, facts)


if __name__ == "__main__":
    main()
