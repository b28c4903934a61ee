"""Run studies and keep their results in benchmarks/results/studies.

    python benchmarks/studies/prepare.py --data FOLDER --weights FOLDER
    python benchmarks/studies/run.py [claim-python ...] [--jobs 2] [--keep-only]

Without a name all studies run, in the order of `ORDER`. Each is one `prelort compare`, which
resumes if it was stopped. --keep-only copies existing results and runs nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "studies"
ORDER = (
    "claim-python", "claim-agnews", "claim-e2e", "cut-python", "ablation-python", "byun-lee-share",
    "byun-lee-allocation", "tasks-superni", "settings-python", "sorted-python", "settings-agnews",
    "settings-e2e", "privacy-e2e", "privacy-agnews", "mixed-ranks",
)  # fmt: skip
PICTURES = HERE.parents[1] / "docs" / "pictures" / "results"
KEPT = ("results.md", "*.csv", "study.toml")
"""Files kept from a study's folder, besides the charts: not the runs and the page."""


def keep(folder: Path, name: str) -> None:
    """Copy a study's tables and charts over the kept ones.

    The charts are in the documentation, which shows them; here are links to them.
    """
    target = RESULTS / name
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    here = f"{Path.cwd()}/"  # a run records absolute paths, of which others have no use
    for pattern in KEPT:
        for path in sorted(folder.glob(pattern)):
            kept = path.read_text(encoding="utf-8").replace(here, "")
            (target / path.name).write_text(kept, encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.png")):
        chart = re.sub("[ ,]+", "-", path.name)  # names of settings have spaces
        if chart.endswith("-diagnostics.png"):  # large, and on no page
            continue
        picture = PICTURES / f"{name}-{chart}"
        shutil.copy(path, picture)
        (target / chart).symlink_to(os.path.relpath(picture, target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--keep-only", action="store_true")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in ORDER]
    if unknown:
        parser.error(f"{unknown[0]!r} is no study: choose of {', '.join(ORDER)}")
    failed = []
    for name in arguments.names or ORDER:
        folder = arguments.out / name
        if not arguments.keep_only:
            command = ["prelort", "compare", str(HERE / f"{name}.toml"), "--out", str(folder)]
            done = subprocess.run([*command, "--jobs", str(arguments.jobs)], check=False)
            if done.returncode != 0:
                failed.append(name)
        if (folder / "results.md").exists():
            keep(folder, name)
    if failed:
        raise SystemExit(f"not all cells of {', '.join(failed)} have a result")


if __name__ == "__main__":
    main()
