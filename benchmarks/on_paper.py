"""Estimate for 100,000 clients and adapters of a 70B model, with measured constants.

Computed: the numbers in an adapter of Llama-2-70B, from its shapes; bytes, seconds on a link of
1 Gbit/s. Measured here: how fast a server reads, checks and adds a reply (one thread). Measured by
transport.py: how fast adapters pass through Flower's SuperLink, whose database has one writer at a
time (the median over its cases, seconds beyond those of a federation without adapters).

    python benchmarks/on_paper.py [--short]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from common import RESULTS, machine, report

from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.federation import wire
from prelort.federation.messages import AdapterSpec

BLOCKS, WIDTH, KEYS, INNER = 80, 8192, 1024, 28672
"""Llama-2-70B: 64 heads of 128, 8 of them for keys and values."""
ATTENTION = {"q": (WIDTH, WIDTH), "k": (WIDTH, KEYS), "v": (WIDTH, KEYS), "o": (WIDTH, WIDTH)}
INSIDE = {"gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
CASES = {"q, v": {n: ATTENTION[n] for n in "qv"}, "all linear": ATTENTION | INSIDE}
RANKS = (8, 16, 32, 64)
SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
LINK = 1e9 / 8
"""Bytes per second of 1 Gbit/s."""
CLIENTS = 100_000
SHARES = (0.001, 0.01, 0.1, 1.0)
GB = 1e9


def numbers(case: str, rank: int) -> int:
    """Numbers in an adapter of this rank."""
    return BLOCKS * rank * sum(d_in + d_out for d_in, d_out in CASES[case].values())


def adding_rate(repeats: int) -> float:
    """Float32 bytes per second that one thread decodes, checks and adds to a mean."""
    scale, rank = ScaleRule("constant", 2.0), 16
    layers = {f"layers.{i}": (WIDTH, WIDTH, rank) for i in range(16)}
    schema = AdapterSchema(layers, {})
    factors = {n: Factors(torch.randn(rank, WIDTH), torch.randn(WIDTH, rank)) for n in layers}
    adapter = LoraAdapter(factors, scale)
    head = wire.TrainReply(
        **AdapterSpec("none", schema, scale).header(rank).model_dump(),
        dtype="float32",
        change=False,
        client="one",
        round=0,
        examples=1,
        steps=1,
        loss=0.0,
        seconds=0.0,
    )
    content, mean = wire.pack(head, adapter), RankwiseMean(adapter)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        found, _ = wire.adapter(content, wire.header(content, wire.TrainReply))
        wire.check_adapter(found, schema, rank, 1e4)
        mean.add(found, 1.0)
        seconds.append(time.perf_counter() - started)
    return 4 * sum(t.numel() for t in adapter.tensors().values()) / statistics.median(seconds[1:])


def superlink_rate() -> float:
    """Bytes per second, down and up together, from the committed results of transport.py."""
    rows = json.loads((RESULTS / "transport.json").read_text())["rows"]
    rows = [row for row in rows if row["ranks"] == "16 32 64 64"]  # of which there are all types
    idle = {row["dtype"]: row["s a round"] for row in rows if row["case"] == "none"}
    rates = [
        (row["MiB down"] + row["MiB up"]) * 2**20 / (row["s a round"] - idle[row["dtype"]])
        for row in rows
        if row["case"] != "none"
    ]
    return statistics.median(rates)


def adapters() -> list[dict[str, object]]:
    """One adapter: its size, and its seconds on the link."""
    return [
        {
            "adapted": case,
            "rank": rank,
            "M numbers": numbers(case, rank) / 1e6,
            **{f"GB {name}": numbers(case, rank) * size / GB for name, size in SIZES.items()},
            **{f"s {name}": numbers(case, rank) * size / LINK for name, size in SIZES.items()},
        }
        for case in CASES
        for rank in RANKS
    ]


def rounds(adding: float, superlink: float) -> list[dict[str, object]]:
    """A round of a share of the clients, ranks in equal parts, in bfloat16: hours of each part."""
    rows: list[dict[str, object]] = []
    for case in CASES:
        mean = statistics.mean(numbers(case, rank) for rank in RANKS)
        for share in SHARES:
            asked = round(share * CLIENTS)
            one_way = 2 * mean * asked
            rows.append(
                {
                    "adapted": case,
                    "clients a round": asked,
                    "TB down + up": 2 * one_way / 1e12,
                    "h link": one_way / LINK / 3600,
                    "h adding": 4 * mean * asked / adding / 3600,
                    "h SuperLink": 2 * one_way / superlink / 3600,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer measurements")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adding, superlink = adding_rate(3 if arguments.short else 15), superlink_rate()
    facts = {
        "GB/s read, checked and added": adding / GB,
        "MB/s through a SuperLink": superlink / 1e6,
        "short": arguments.short,
        "GB global adapter, float32": {c: 4 * numbers(c, max(RANKS)) / GB for c in CASES},
        **machine(),
    }
    report("on_paper_adapters", "adapters of Llama-2-70B", adapters(), facts)
    report("on_paper_rounds", "rounds of 100,000 clients", rounds(adding, superlink), facts)


if __name__ == "__main__":
    main()
