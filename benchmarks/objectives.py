"""Nested objectives on the embedded default: perplexity at every prefix, over seeds.

Each cell is a run of the embedded default with another objective and seed (which sets data order,
clients of each round and assignment of ranks). Finished cells are kept and not run again.

    python benchmarks/objectives.py [--seeds 3] [--jobs 2]
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import machine, report

from prelort.config import load
from prelort.experiment.folder import RunFolder
from prelort.metrics.scores import aurac

CELLS = {
    "zero-padding": ["method.name=zero-padding"],
    "prelort, plain (segment-wise only)": ["method.objective=plain"],
    "prelort, example, half full": ["method.objective=example", "method.full_share=0.5"],
    "prelort, example, 3/4 full": ["method.objective=example", "method.full_share=0.75"],
    "prelort, full+one": ["method.objective=full+one"],
    "prelort, mean": ["method.objective=mean"],
}


def cell(job: tuple[str, int, Path]) -> tuple[str, dict[int, float], float]:
    """The perplexity at each rank, and the seconds spent training."""
    from prelort.experiment.run import run

    name, seed, path = job
    config = load(None, [*CELLS[name], f"seed={seed}", "data.max_test_examples=512"])
    result = run(config, path, resume=RunFolder(path).config_file.is_file())
    curve = {rank: values["perplexity"] for rank, values in result.metrics.items()}
    return name, curve, result.history.client_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the embedded default's configuration
    jobs = [
        (name, seed, arguments.out / f"{index}-seed{seed}")
        for seed in range(arguments.seeds)
        for index, name in enumerate(CELLS)
    ]
    curves: dict[str, list[dict[int, float]]] = {name: [] for name in CELLS}
    seconds: dict[str, list[float]] = {name: [] for name in CELLS}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for name, curve, taken in pool.map(cell, jobs):
            curves[name].append(curve)
            seconds[name].append(taken)
            print(f"{name}: {curve}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, found in curves.items():
        row: dict[str, Any] = {"objective": name}
        for rank in found[0]:
            row[f"ppl at {rank}"] = _spread([curve[rank] for curve in found])
        row["AURAC"] = _spread([aurac(curve) for curve in found])
        row["training s"] = round(statistics.mean(seconds[name]), 1)
        rows.append(row)
    facts = {**machine(), "command": "python benchmarks/objectives.py", "seeds": arguments.seeds}
    title = "Perplexity by prefix, mean (s.d. over seeds); lower is better"
    report("objectives", title, rows, facts)


def _spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ({spread:.2f})"


if __name__ == "__main__":
    main()
