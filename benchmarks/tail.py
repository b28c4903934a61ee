"""The tail problem: whose metric improves with rank, and is best at every prefix?

Tasks on the package's own base model, 20 clients of ranks 2, 4, 8 and 16, five per round:

  python    perplexity of Python source (packages of the standard library, natural clients)
  answers   perplexity of Dolly 15k's answers to instructions (Dirichlet 0.3 over the categories)
  questions accuracy on TREC's six kinds of questions (Dirichlet 0.5 over the kinds)

Each method's learning rate is chosen first, on validation rows and with a separate seed: rates a
factor 1.5 apart, from 8e-3 on, as long as the next one is better. Then the test rows are evaluated
over --seeds seeds, which set data, ranks, clients of each round and batches. Finished runs are kept
and not run again.

    python benchmarks/tail.py --data FOLDER [--tasks python answers questions] [--seeds 5]
        [--jobs 2] [--rows N] [--family] [--out runs/tail]

FOLDER holds dolly15k/dolly15k.jsonl and trec/TREC.{train,test}.all (Li & Roth's coarse labels: a
number, then the text).
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common import machine, report
from studies.prepare import linked, trec

from prelort.config import Config, load
from prelort.metrics.scores import aurac

METHODS = {
    "prelort-sorted": [],
    "raflora": [],
    "prelort": [],
    "flexlora": [],
    "zero-padding": [],
    "homogeneous-min": [],
    "fed-plora": [],
    "homogeneous-max": [],
    "fedex-lora": [],
    "replication": [],
    "hetlora": [],
    "prelort, plain": ["method.name=prelort", "method.objective=plain"],
    "prelort, full+one": ["method.name=prelort", "method.objective=full+one"],
}
"""Row -> overrides (none: the method of this name unchanged)."""

SORTED = "method.options.prelort-sorted"
FAMILY = {
    "as it is": [],
    "one rate for all": ["training.rank_exponent=0"],
    "step=0.25": [f"{SORTED}.step=0.25"],
    "step=0.5": [f"{SORTED}.step=0.5"],
    "unchanged=1": [f"{SORTED}.unchanged=1"],
    "momentum=0.5": [f"{SORTED}.momentum=0.5"],
    "averaging=0.5": [f"{SORTED}.averaging=0.5"],
    "presence=0.3": [f"{SORTED}.presence=0.3"],
    "nested, 3/4 full": ["method.objective=example", "method.full_share=0.75"],
}
"""With --family: the options of prelort-sorted, one at a time."""

COMMON = [
    "training.batch_size=8",
    "training.local_steps=8",
    "federation.clients_per_round=5",
    "data.validation_fraction=0.15",
    "evaluation.batch_size=64",
]
PYTHON = ["data.max_length=64", "data.max_test_examples=192", "federation.rounds=12"]
ANSWERS = [
    "task=instruction",
    "data.prompt_template={instruction}\n\n{context}\n\nAnswer:",
    "data.completion_column=response",
    "data.max_train_examples=4000",
    "data.max_length=96",
    "data.max_test_examples=256",
    "evaluation.metrics=['perplexity']",
    "partition.by=dirichlet",
    "partition.column=category",
    "partition.clients=20",
    "partition.alpha=0.3",
    "partition.min_examples=20",
    "federation.rounds=12",
]
QUESTIONS = [
    "task=classification",
    "data.text_column=text",
    "data.label_column=label",
    "partition.by=dirichlet",
    "partition.clients=20",
    "partition.alpha=0.5",
    "partition.min_examples=20",
    "data.max_length=48",
    "data.max_test_examples=500",
    "training.batch_size=16",
    "federation.rounds=16",
]
TASKS = ("python", "answers", "questions")
FIRST_RATE, FACTOR = 8e-3, 1.5
TUNING_SEED = 1000


def settings(task: str, row: str, rate: float, seed: int, data: Path, tuning: bool) -> Config:
    """The configuration of one run."""
    if row in FAMILY:
        own = ["method.name=prelort-sorted", *FAMILY[row]]
    else:
        own = METHODS[row] or [f"method.name={row}"]
    train, test = data / "trec" / "train.csv", data / "trec" / "test.csv"
    particular = {
        "python": PYTHON,
        "answers": [*ANSWERS, f"data.source={data / 'dolly15k' / 'dolly15k.jsonl'}"],
        "questions": [*QUESTIONS, f"data.source={train}", f"data.test={test}"],
    }[task]
    on = ["evaluation.on=validation"] if tuning else []
    return load(
        None, [*COMMON, *particular, *own, *on, f"training.learning_rate={rate}", f"seed={seed}"]
    )


def curve_of(job: tuple[Config, Path]) -> dict[int, float]:
    """Rank -> the task's metric after the last round; a run that diverged is as bad as can be."""
    from prelort.errors import QuorumError
    from prelort.experiment.run import run

    config, path = job
    result = path / "curve.json"
    metric = "accuracy" if config.task == "classification" else "perplexity"
    if not result.exists():
        try:
            found = run(config, path, resume=(path / "config.toml").exists()).metrics
            curve = {rank: values[metric] for rank, values in found.items()}
        except QuorumError:
            curve = dict.fromkeys((2, 4, 8, 16), 0.0 if metric == "accuracy" else 1000000000.0)
        result.write_text(json.dumps(curve))
    curve = {int(rank): value for rank, value in json.loads(result.read_text()).items()}
    return {rank: value for rank, value in curve.items() if rank <= 16}


def badness(task: str, row: str, curve: dict[int, float]) -> float:
    """The value that tuning minimises: the area over all ranks; for a reference, its own rank."""
    own = {"homogeneous-min": 2, "homogeneous-max": 16}.get(row)
    value = curve[own] if own else aurac(curve)
    return -value if task == "questions" else value


def tuned(task: str, row: str, data: Path, out: Path) -> float:
    """The best rate on the validation rows."""

    def tried(rate: float) -> float:
        path = out / "tuning" / f"{task}-{row}-{rate:.1e}".replace(" ", "")
        config = settings(task, row, rate, TUNING_SEED, data, tuning=True)
        return badness(task, row, curve_of((config, path)))

    best, value = FIRST_RATE, tried(FIRST_RATE)
    for factor in (1 / FACTOR, FACTOR):
        rate, moved = best * factor, False
        while 1e-3 < rate < 0.2 and (found := tried(rate)) < value:
            best, value, moved, rate = rate, found, True, rate * factor
        if moved:
            break
    return best


def one_row(
    job: tuple[str, str, int, Path, Path],
) -> tuple[str, str, float, list[dict[int, float]]]:
    """A method on a task: its rate, and its curve for each seed."""
    task, row, seeds, data, out = job
    rate = tuned(task, row, data, out)
    curves = []
    for seed in range(seeds):
        path = out / f"{task}-{row}-{rate:.1e}-seed{seed}".replace(" ", "")
        curves.append(curve_of((settings(task, row, rate, seed, data, tuning=False), path)))
        print(f"{task}, {row}, rate {rate:g}, seed {seed}: {curves[-1]}", flush=True)
    return task, row, rate, curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--family", action="store_true", help="the options of prelort-sorted")
    parser.add_argument("--out", type=Path, default=Path("runs/tail"))
    arguments = parser.parse_args()
    data = arguments.out.resolve() / "data"
    prepare(arguments.data.resolve(), data)
    names = list(FAMILY if arguments.family else METHODS)[: arguments.rows]
    jobs = [
        (task, row, arguments.seeds, data, arguments.out)
        for task in arguments.tasks
        for row in names
    ]
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in arguments.tasks}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for task, name, rate, curves in pool.map(one_row, jobs):
            row: dict[str, Any] = {"method": name, "rate": f"{rate:.2g}"}
            factor = 100 if task == "questions" else 1
            for rank in curves[0]:
                row[f"rank {rank}"] = _spread([factor * curve[rank] for curve in curves])
            row["AURAC"] = _spread([factor * aurac(curve) for curve in curves])
            rows[task].append(row)
    metric = {"questions": "accuracy in %, higher is better"}
    for task, found in rows.items():
        command = f"python benchmarks/tail.py --tasks {task}" + " --family" * arguments.family
        facts = {**machine(), "command": command, "seeds": arguments.seeds}
        title = f"{task}: {metric.get(task, 'perplexity, lower is better')}; mean (s.d. over seeds)"
        report(f"tail_{task}" + "_family" * arguments.family, title, found, facts)


def prepare(source: Path, target: Path) -> None:
    """A folder with Dolly unchanged, and TREC as CSV files with the columns text, label."""
    linked(source / "dolly15k", target / "dolly15k")
    for part in ("train", "test"):
        trec(source / "trec" / f"TREC.{part}.all", target / "trec" / f"{part}.csv")


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ({deviation:.2f})"


if __name__ == "__main__":
    main()
