"""Choose each method's learning rate for a study, on validation rows with a separate seed.

    python benchmarks/studies/tune.py benchmarks/studies/claim-agnews.toml [--method M ...]

Every method runs with the study's own configuration at half, once and twice its learning rate, and
at further rates while the best one is at either end. The rates are compared by the study's metric
on the rows that `data.validation_fraction` holds out, over all ranks (AURAC; for the homogeneous
references at their own rank). Prints the chosen rates as lines for `[compare.overrides]` and writes
them to benchmarks/results. Finished runs are kept and not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from prelort import tasks
from prelort.metrics.scores import HIGHER_IS_BETTER, aurac

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, report

SEED = 1000
FACTORS = (0.5, 1.0, 2.0)
MOST, LEAST = 16.0, 1 / 16
RATE = "training.learning_rate="
Curves = dict[tuple[str, float], dict[int, float]]


def name_of(factor: float) -> str:
    """The name of a setting, also that of its folder."""
    return f"rate x {factor:g}"


def study_of(values: dict[str, Any], factors: list[float]) -> dict[str, Any]:
    """The study with a setting per factor and without per-method rates."""
    compare = values["compare"]
    rate = values["training"]["learning_rate"]
    overrides = {
        method: [line for line in lines if not line.startswith(RATE)]
        for method, lines in compare.get("overrides", {}).items()
    }
    changed: dict[str, Any] = {
        **values,
        "evaluation": {**values.get("evaluation", {}), "on": "validation", "diagnostics": False},
        "compare": {
            "methods": compare["methods"],
            "seeds": [SEED],
            "settings": {name_of(factor): [f"{RATE}{rate * factor:g}"] for factor in factors},
            "overrides": {method: lines for method, lines in overrides.items() if lines},
        },
    }
    metric = metric_of(values)
    changed["evaluation"]["metrics"] = [metric]  # ROUGE-L of short runs is noise, and slow
    return changed


def metric_of(values: dict[str, Any]) -> str:
    """The metric by which rates are chosen: the task's first."""
    return tasks.get(values["task"]).metrics[0]


def run(
    values: dict[str, Any], factors: list[float], methods: list[str], out: Path, jobs: int
) -> Curves:
    """Rank -> metric for each method and factor; runs what is not finished."""
    file = out.with_suffix(".toml")
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tomli_w.dumps(study_of(values, factors)))
    chosen = [argument for method in methods for argument in ("--method", method)]
    command = ["prelort", "compare", str(file), "--out", str(out), "--jobs", str(jobs), *chosen]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1):  # 1: a cell failed, which may be a rate that diverges
        raise SystemExit(code)
    curves: Curves = {}
    with (out / "measurements.csv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            factor = next(f for f in factors if name_of(f) == row["setting"])
            if row["metric"] == metric_of(values) and row["rank"].isdigit():
                curves.setdefault((row["method"], factor), {})[int(row["rank"])] = float(
                    row["value"]
                )
    return curves


def value_of(method: str, curve: dict[int, float], metric: str) -> float:
    """The value that tuning maximises."""
    curve = {rank: value for rank, value in curve.items() if rank > 0}
    own = {"homogeneous-min": min, "homogeneous-max": max}.get(method)
    value = curve[own(curve)] if own else aurac(curve)
    return value if HIGHER_IS_BETTER[metric] else -value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--method", action="append", help="only this method; repeatable")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/tuning"))
    arguments = parser.parse_args()
    values = tomllib.loads(arguments.study.read_text())
    metric, methods = metric_of(values), arguments.method or list(values["compare"]["methods"])
    unknown = [method for method in methods if method not in values["compare"]["methods"]]
    if unknown:
        parser.error(f"{unknown[0]!r} is no row of {arguments.study}")
    found: dict[str, dict[float, float]] = {method: {} for method in methods}
    asked = [(list(FACTORS), methods)]
    while asked:
        for factors, some in asked:
            out = arguments.out / arguments.study.stem
            curves = run(values, factors, some, out, arguments.jobs)
            for method in some:
                for factor in factors:  # a rate at which a run fails is as bad as can be
                    curve = curves.get((method, factor))
                    found[method][factor] = value_of(method, curve, metric) if curve else -math.inf
        outer = {method: beyond(found[method]) for method in methods}
        asked = [
            ([factor], [method for method in methods if outer[method] == factor])
            for factor in sorted({factor for factor in outer.values() if factor is not None})
        ]
    rate = values["training"]["learning_rate"]
    rows = []
    for method in methods:
        best = max(found[method], key=found[method].__getitem__)
        tried = {f"{rate * f:g}": round(abs(v), 4) for f, v in sorted(found[method].items())}
        rows.append({"method": method, "rate": f"{rate * best:g}", "tried": tried})
    facts = {**machine(), "command": f"python benchmarks/studies/tune.py {arguments.study}"}
    report(f"rates_{arguments.study.stem}", f"{metric} on validation rows", rows, facts)
    for row in rows:
        print(f'"{row["method"]}" = ["{RATE}{row["rate"]}"]')


def beyond(values: dict[float, float]) -> float | None:
    """The next factor to try if the best one is at either end, else None."""
    best = max(values, key=values.__getitem__)
    if best == max(values) and best < MOST:
        return best * 2
    if best == min(values) and best > LEAST:
        return best / 2
    return None


if __name__ == "__main__":
    main()
