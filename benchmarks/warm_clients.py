"""Seconds that a warm trainer saves across real sites.

Seconds of a round with and without it: one SuperLink and two SuperNodes on this machine, two
optimiser steps per round, so that messages and loading take almost all of it. The first round is
listed separately: with warm trainers only that one loads the model.

    python benchmarks/warm_clients.py [--rounds 5] [--model embedded]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sites"))

from loopback import Federation


def seconds_of_rounds(warm: bool, rounds: int, model: str) -> list[float]:
    """Seconds of each round, measured by the server."""
    changes = {
        "model": {"name": model},
        "partition": {"clients": 2},
        "ranks": {"mix": "4, 8"},
        "evaluation": {"every": 0},
        "federation": {"rounds": rounds, "min_clients": 2, "timeout": 600.0},
    }
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder), changes) as federation:
        federation.start_superlink()
        for number in (1, 2):
            site = f"site-{number}"
            federation.set_site(site, partition=number - 1, trainer={"warm": warm})
            federation.start_node(site)
        federation.run(seconds=3000)
        records = federation.history().rounds.values()
        stats = [record.stats for record in records if record.stats is not None]
        assert len(stats) == rounds, federation.shown()
        return [one.seconds.total for one in stats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="embedded")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for warm in (True, False):
        first, *later = seconds_of_rounds(warm, options.rounds, options.model)
        rows.append(
            {
                "trainer": "warm" if warm else "none",
                "first round, s": first,
                "later, median s": statistics.median(later),
                "min": min(later),
                "max": max(later),
            }
        )
    facts = {"model": Path(options.model).name, "rounds": options.rounds, **machine()}
    facts["saved"] = rows[1]["later, median s"] / rows[0]["later, median s"]
    report("warm_clients", "Seconds of a round over two real sites", rows, facts)


if __name__ == "__main__":
    main()
