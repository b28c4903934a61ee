"""The noise of each round, method by method, from a study's diagnostics (docs/diagnostics.md).

    python benchmarks/studies/noise.py [runs/studies/claim-python]    (a study without settings)

Initialization noise: distance of the clients' starting points from the global function, relative to
it. Aggregation noise: distance of the new global function from the weighted mean of the clients'.
Means over the seeds at the second round (in the first the global function is still zero), in the
middle and at the end. Prints a table and writes the chart docs/pictures/results/noise.png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from prelort.experiment.folder import RunFolder
from prelort.report.drawing import save

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import report

KINDS = ("initialization_noise", "aggregation_noise")
DRAWN = ("prelort", "prelort-sorted", "zero-padding", "hetlora", "replication", "flexlora",
         "flora", "fed-plora", "fedex-lora", "ffa-lora")  # fmt: skip
PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "results" / "noise.png"
Noise = dict[int, list[float]]
"""Round -> the values of the seeds."""


def read(cells: Path) -> dict[str, dict[str, Noise]]:
    """Method -> kind of noise -> its values."""
    found: dict[str, dict[str, Noise]] = {}
    for method in sorted(path for path in cells.iterdir() if path.is_dir()):
        kinds: dict[str, Noise] = {kind: {} for kind in KINDS}
        for run in sorted(method.glob("seed-*")):
            for number, record in RunFolder(run).history().rounds.items():
                diagnostics = (record.stats.diagnostics if record.stats else None) or {}
                for kind in KINDS:
                    value = diagnostics.get(kind)
                    value = value["mean"] if isinstance(value, dict) else value
                    if value is not None:
                        kinds[kind].setdefault(number, []).append(float(value))
        found[method.name] = kinds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("runs/studies/claim-python"))
    arguments = parser.parse_args()
    found = read(arguments.study)
    rows: list[dict[str, Any]] = []
    for method, kinds in found.items():
        row: dict[str, Any] = {"method": method}
        last = max(kinds["aggregation_noise"], default=2)
        for kind in KINDS:
            for at in (2, last // 2, last):
                values = kinds[kind].get(at)
                label = f"{kind.split('_')[0]}, round {at}"
                row[label] = round(statistics.mean(values), 4) if values else "-"
        rows.append(row)
    facts = {"command": f"python benchmarks/studies/noise.py {arguments.study}"}
    report("studies_noise", "noise relative to the global function's norm", rows, facts)
    draw({name: kinds for name, kinds in found.items() if name in DRAWN})


def draw(found: dict[str, dict[str, Noise]]) -> None:
    """Both kinds by round."""
    panels = []
    for kind in KINDS:
        rows = [
            {"method": method, "round": number, "noise": statistics.mean(values)}
            for method, kinds in found.items()
            for number, values in sorted(kinds[kind].items())
            if number > 1
        ]
        colour = alt.Color("method:N", sort=list(found), title=None)
        dash = alt.StrokeDash("method:N", sort=list(found), title=None)
        chart = alt.Chart(pd.DataFrame(rows), title=kind.replace("_", " ")).mark_line()
        panels.append(
            chart.encode(x="round:Q", y=alt.Y("noise:Q", title=None), color=colour, strokeDash=dash)
        )
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    save(alt.hconcat(*(panel.properties(width=380, height=300) for panel in panels)), PICTURE)


if __name__ == "__main__":
    main()
