"""One adapter cut at each rank, against adapters trained at that rank alone: the study's table.

    python benchmarks/studies/cut.py

Reads the results of `run.py cut-python claim-python`. Passes are relative to those of four
trainings at the four ranks.
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, report

STUDIES = RESULTS / "studies"
RANKS = (4, 8, 16, 32)
ONE_FOR_ALL = ("nested", "nested, mean", "plain")


def values(study: str, method: str) -> dict[int, dict[int, float]]:
    """Rank -> seed -> perplexity after the last round."""
    found: dict[int, dict[int, float]] = {}
    with (STUDIES / study / "measurements.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["method"], row["metric"]) == (method, "perplexity") and row["rank"].isdigit():
                found.setdefault(int(row["rank"]), {})[int(row["seed"])] = float(row["value"])
    return found


def passes(study: str, method: str) -> float:
    """Forward and backward passes of a run, mean over the seeds."""
    with (STUDIES / study / "cells.csv").open(encoding="utf-8") as file:
        rows = [int(row["passes"]) for row in csv.DictReader(file) if row["method"] == method]
    return statistics.mean(rows)


def main() -> None:
    alone = {rank: values("cut-python", f"alone at {rank}")[rank] for rank in RANKS}
    separately = sum(passes("cut-python", f"alone at {rank}") for rank in RANKS)
    rows: list[dict[str, Any]] = [_row("alone at each rank (4 trainings)", alone, alone, 1.0)]
    for method in ONE_FOR_ALL:
        spent = passes("cut-python", method)
        rows.append(_row(f"{method}, cut", values("cut-python", method), alone, spent / separately))
    for method in ("prelort", "prelort-sorted"):
        spent = passes("claim-python", method)
        mixed = values("claim-python", method)
        rows.append(_row(f"{method}, mixed ranks, cut", mixed, alone, spent / separately))
    facts = {"command": "python benchmarks/studies/cut.py"}
    title = "perplexity, mean over seeds (paired difference to 'alone' in %)"
    report("studies_cut", title, rows, facts)


def _row(
    name: str, curve: dict[int, dict[int, float]], alone: dict[int, dict[int, float]], cost: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"adapter": name}
    for rank in RANKS:
        seeds = sorted(curve[rank].keys() & alone[rank].keys())
        mean = statistics.mean(curve[rank][seed] for seed in seeds)
        apart = statistics.mean(100 * (curve[rank][s] / alone[rank][s] - 1) for s in seeds)
        row[f"rank {rank}"] = f"{mean:.2f}" + (f" ({apart:+.1f})" if curve is not alone else "")
    row["passes"] = f"{cost:.2f}"
    return row


if __name__ == "__main__":
    main()
