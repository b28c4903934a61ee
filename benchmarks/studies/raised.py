"""The clients that allocation by loss raises to the high rank, from byun-lee-allocation.

    python benchmarks/studies/raised.py [runs/studies/byun-lee-allocation]
        [--rows runs/studies/data/ag_news/clients.jsonl]

For each seed: how many clients were raised, how many of them are among the ten of balanced topics,
and the mean share of a client's commonest topic among the raised, the balanced ten, and all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from prelort.events import RankChanged
from prelort.experiment.folder import RunFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
import prepare
from common import report

BALANCED = {prepare.client(number) for number in range(prepare.BALANCED)}


def table(study: Path, rows: Path, balanced: Set[str] = BALANCED) -> list[dict[str, Any]]:
    """A row per seed."""
    topics: dict[str, Counter[str]] = {}
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        topics.setdefault(row["client"], Counter())[row["label"]] += 1
    found = []
    for run in sorted((study / "by-loss").glob("seed-*")):
        incidents = RunFolder(run).history().incidents
        raised = [event.client for event in incidents if isinstance(event, RankChanged)]
        row = {
            "seed": run.name.removeprefix("seed-"),
            "raised": len(raised),
            "of them balanced": len(balanced & set(raised)),
            "commonest topic of the raised, %": commonest(topics, raised),
            "of the balanced": commonest(topics, balanced),
            "of all": commonest(topics, topics),
        }
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study = Path("runs/studies/byun-lee-allocation")
    parser.add_argument("study", type=Path, nargs="?", default=study)
    parser.add_argument(
        "--rows", type=Path, default=Path("runs/studies/data/ag_news/clients.jsonl")
    )
    arguments = parser.parse_args()
    rows = table(arguments.study, arguments.rows)
    if not rows:
        raise SystemExit(f"{str(arguments.study)!r} has no cells of 'by loss': run it first")
    facts = {"command": f"python benchmarks/studies/raised.py {arguments.study}"}
    report("studies_raised", "Clients raised by loss", rows, facts)


def commonest(topics: dict[str, Counter[str]], clients: Iterable[str]) -> str:
    """The mean share of a client's commonest topic."""
    shares = [max(topics[name].values()) / topics[name].total() for name in clients]
    return f"{100 * statistics.mean(shares):.0f}"


if __name__ == "__main__":
    main()
