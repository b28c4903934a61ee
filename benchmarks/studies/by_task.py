"""A metric task by task, for a study in which every client holds one task.

    python benchmarks/studies/by_task.py [runs/studies/tasks-superni] [--metric rouge_l]

At the end each client evaluates the global adapter, cut to its own rank, on its own task's test
rows; a task's rank differs between seeds. Means over the seeds, standard deviations in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from prelort.experiment.folder import RunFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import report

Found = dict[str, dict[str, list[float]]]
"""Task -> method -> the values of the seeds."""


def read(cells: Path, metric: str) -> Found:
    """The last client metrics of all finished cells."""
    found: Found = {}
    for method in sorted(path for path in cells.iterdir() if path.is_dir()):
        for run in sorted(method.glob("seed-*")):
            history = RunFolder(run).history()
            if not history.finished or not history.client_evaluations:
                continue
            last = history.client_evaluations[max(history.client_evaluations)]
            for task, one in last.clients.items():
                if metric in one.metrics:
                    values = found.setdefault(task, {}).setdefault(method.name, [])
                    values.append(one.metrics[metric])
    return found


def table(found: Found) -> list[dict[str, Any]]:
    """A row per task, and one for their mean."""
    methods = sorted({method for values in found.values() for method in values})
    rows: list[dict[str, Any]] = []
    for task, values in sorted(found.items()):
        told = {method: _text(values.get(method, [])) for method in methods}
        rows.append({"task": task.replace("_", " "), **told})
    means = {m: [statistics.mean(seed) for seed in _by_seed(found, m)] for m in methods}
    return [*rows, {"task": "mean of the tasks", **{m: _text(means[m]) for m in methods}}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("runs/studies/tasks-superni"))
    parser.add_argument("--metric", default="rouge_l")
    arguments = parser.parse_args()
    found = read(arguments.study, arguments.metric)
    if not found:
        raise SystemExit(f"no client measured {arguments.metric!r} in {str(arguments.study)!r}")
    facts = {"command": f"python benchmarks/studies/by_task.py {arguments.study}"}
    report("studies_tasks", f"{arguments.metric} of each client's task", table(found), facts)


def _by_seed(found: Found, method: str) -> list[tuple[float, ...]]:
    """For each seed the values of all tasks."""
    return list(zip(*(values[method] for values in found.values()), strict=True))


def _text(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
