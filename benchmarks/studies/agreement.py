"""How prelort-sorted should measure whether clients agree, on validation rows of other seeds.

    python benchmarks/studies/agreement.py [--seeds 9 10]

Four settings of the studies, perplexity over the ranks (AURAC), with the agreement rho of whole
changes, along the adapter as it was broadcast (the method's), and 1 (raFLoRA's aggregation); and
the mean of rho over the rounds after the first. Needs the files that prepare.py makes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prelort.adapters import LoraAdapter
from prelort.aggregation.products import Segment
from prelort.config import Config
from prelort.experiment.run import run
from prelort.methods import prelort_sorted
from prelort.metrics.scores import aurac
from prelort.study.definition import load

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import report

Means = Sequence[tuple[Segment, LoraAdapter]]
HERE = Path(__file__).parent
SETTINGS = (
    ("Python, natural clients", "sorted-python", "natural clients"),
    ("Python, iid, all", "sorted-python", "iid, all"),
    ("E2E, Dirichlet 0.5", "settings-e2e", "Dirichlet 0.5"),
    ("E2E, Dirichlet 0.1", "settings-e2e", "Dirichlet 0.1"),
)
ALONG = prelort_sorted.agreement


def whole(means: Means) -> float:
    """Rho of the whole changes, as in a first round."""
    return ALONG(
        [
            (Segment(s.low, s.high, s.before, s.products, s.squares, s.moved), mean)
            for s, mean in means
        ]
    )


def full(means: Means) -> float:
    """Rho of raFLoRA's aggregation."""
    return 1.0


MEASURES: dict[str, Callable[[Means], float]] = {
    "whole changes": whole,
    "along the adapter": ALONG,
    "1": full,
}


def measured(config: Config, measure: Callable[[Means], float]) -> tuple[float, list[float]]:
    """AURAC with this measure; the agreement of each round after the first."""
    found: list[float] = []

    def recorded(means: Means) -> float:
        found.append(measure(means))
        return found[-1]

    prelort_sorted.agreement = recorded
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder) / "run")
    return aurac({rank: m["perplexity"] for rank, m in result.metrics.items()}), found[1:]


def rows(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each setting and measure."""
    made = []
    for title, study, setting in SETTINGS:
        overrides = ["evaluation.on=validation"]
        cells = load(HERE / f"{study}.toml", overrides, methods=["prelort-sorted"], seeds=seeds,
                     reference="prelort-sorted").cells  # fmt: skip
        for name, measure in MEASURES.items():
            runs = [measured(c.config, measure) for c in cells if c.setting == setting]
            scores = {f"seed {seed}": score for seed, (score, _) in zip(seeds, runs, strict=True)}
            rho = statistics.fmean(value for _, found in runs for value in found)
            made.append({"setting": title, "rho": name, "its mean": rho, **scores})
            print(made[-1], flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[9, 10])
    arguments = parser.parse_args()
    command = "python benchmarks/studies/agreement.py"
    title = "perplexity over the ranks (AURAC), validation rows"
    report("studies_agreement", title, rows(arguments.seeds), {"command": command})


if __name__ == "__main__":
    main()
