"""Write the kept results into the pages that show them, so that no table is typed by hand.

    python benchmarks/studies/tables.py [--check]

In README.md and docs/ a table stands between two comments, the first of which names its source:

  <!-- study: claim-python | SETTING | METRIC -->   from benchmarks/results/studies/claim-python
  <!-- results: studies_noise -->                   from benchmarks/results/studies_noise.json
  <!-- end -->

SETTING is empty if the study has none. A further bar selects rows of a study's table:
`| prelort; zero-padding`. --check writes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from pathlib import Path

from prelort.metrics.scores import HIGHER_IS_BETTER

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- (study|results): (.*?) -->\n.*?<!-- end -->", re.DOTALL)
PERCENT = {"accuracy", "macro_f1"}
GAP = "\u00a0"
"""A non-breaking space."""


def study_table(name: str, setting: str = "", metric: str = "perplexity", only: str = "") -> str:
    """Means and spread at each rank and over all, the difference to the reference, the costs."""
    rows = _read(RESULTS / "studies" / name / "summary.csv", setting)
    rows = [row for row in rows if row["metric"] == metric]
    costs = _read(RESULTS / "studies" / name / "cells.csv", setting)
    chosen = [one.strip() for one in only.split(";") if one.strip()]
    methods = chosen or list(dict.fromkeys(row["method"] for row in rows))
    of = {(row["method"], row["at"]): row for row in rows}
    # A rank that few methods were measured at (the size of FLoRA's stack) has no column.
    ranks = [r for r in dict.fromkeys(row["at"] for row in rows) if _common(r, rows)]
    compared = "AURAC" if "AURAC" in ranks else ranks[-1]
    scale = 100 if metric in PERCENT else 1
    best = {at: _best(at, methods, of, metric) for at in ranks}
    lines = [_line(["", *map(_head, ranks), "difference", "MB up / down", "passes"])]
    lines.append("|---" + "|---:" * (len(ranks) + 3) + "|")
    for method in methods:
        cells = [_mean(of.get((method, at)), scale, method in best[at]) for at in ranks]
        own = [row for row in costs if row["method"] == method and row["status"] == "finished"]
        traffic = f"{_cost(own, 'bytes_up', 1e6)}{GAP}/{GAP}{_cost(own, 'bytes_down', 1e6)}"
        apart = _difference(of.get((method, compared)), scale)
        name = method.replace(" ", GAP)
        lines.append(_line([name, *cells, apart, traffic, _cost(own, "passes", 1.0)]))
    return "\n".join(lines)


def results_table(name: str) -> str:
    """The rows of a benchmark's JSON."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    lines = [_line(list(rows[0])), "|---" + "|---:" * (len(rows[0]) - 1) + "|"]
    return "\n".join([*lines, *(_line([_text(v) for v in row.values()]) for row in rows)])


def _read(path: Path, setting: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [row for row in rows if row["setting"] == setting]
    if not found:
        known = sorted({row["setting"] for row in rows})
        raise SystemExit(f"{path} has no setting {setting!r}: there are {known}")
    return found


def _common(at: str, rows: list[dict[str, str]]) -> bool:
    measured = {row["method"] for row in rows if row["at"] == at and row["seeds"] != "0"}
    return 2 * len(measured) > len({row["method"] for row in rows})


def _head(at: str) -> str:
    return f"rank {at}" if at.isdigit() else at


def _best(
    at: str, methods: list[str], of: dict[tuple[str, str], dict[str, str]], metric: str
) -> set[str]:
    means = {m: float(of[m, at]["mean"]) for m in methods if (m, at) in of and of[m, at]["mean"]}
    if not means:
        return set()
    best = (max if HIGHER_IS_BETTER[metric] else min)(means.values())
    return {method for method, mean in means.items() if mean == best}


def _mean(row: dict[str, str] | None, scale: float, best: bool) -> str:
    if row is None or not row["mean"]:
        return "–"
    value = scale * float(row["mean"])
    digits = 1 if abs(value) >= 10 else 2
    mean = f"{value:.{digits}f}"
    spread = f"{GAP}±{GAP}{scale * float(row['deviation']):.{digits}f}" if row["deviation"] else ""
    return (f"**{mean}**" if best else mean) + spread


def _difference(row: dict[str, str] | None, scale: float) -> str:
    if row is None or not row["difference"]:
        return "–"
    mean, *interval = (scale * float(row[key]) for key in ("difference", "low", "high") if row[key])
    digits = 1 if abs(mean) >= 10 else 2
    shown = ""
    if interval:
        shown = f"{GAP}[{interval[0]:+.{digits}f},{GAP}{interval[1]:+.{digits}f}]"
    return f"{mean:+.{digits}f}{shown}"


def _cost(rows: list[dict[str, str]], key: str, unit: float) -> str:
    values = [float(row[key]) / unit for row in rows if row[key]]
    if not values:
        return "–"
    mean = statistics.mean(values)
    return f"{mean:.3g}" if unit > 1 else f"{mean:.0f}"


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def filled(text: str) -> str:
    """A page's text with its tables from the kept results."""

    def table(match: re.Match[str]) -> str:
        kind, what = match.groups()
        parts = [part.strip() for part in what.split("|")]
        body = study_table(*parts) if kind == "study" else results_table(*parts)
        return f"<!-- {kind}: {what} -->\n{body}\n<!-- end -->"

    return BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    print("\n".join(stale) or "all tables are up to date")
    if stale and arguments.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
