"""Seconds until `prelort --help` prints, and until the first round of a run starts.

Fresh processes. A run is measured up to its first `round_started`: the embedded default, with the
overrides of --set. `model` is importing Transformers and PEFT, loading tokenizer and base model and
attaching the adapter; `beyond the model` is the rest, including the import of torch and Flower.

    python benchmarks/startup.py [--helps 10] [--runs 5] [--set KEY=VALUE ...] [--short]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

CHILD = "--child"
PARTS = (
    "import torch",
    "import transformers, peft",
    "other imports",
    "data",
    "load model",
    "tokenisation",
)
PARTS += ("pictures", "evaluation", "other")


class _Begun(BaseException):
    """The first round starts; no `except Exception` reports it as a failed client."""


def child(born: float, overrides: list[str]) -> None:
    """Print the seconds of each part of start-up as JSON. ``born``: `time.time`."""
    from prelort.library_logging import quiet_libraries

    quiet_libraries()
    spent: dict[str, float] = {}

    @contextlib.contextmanager
    def into(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[part] = spent.get(part, 0.0) + time.perf_counter() - started

    with into("import torch"):
        import torch  # noqa: F401
    with into("import transformers, peft"):
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    # What `prelort run` imports.
    from prelort import cli, tasks
    from prelort.events import Evaluated, Event, RoundStarted
    from prelort.experiment import assemble
    from prelort.experiment import run as running
    from prelort.report import live
    from prelort.study import run as _  # noqa: F401

    spent["other imports"] = time.time() - born - sum(spent.values())

    def timed(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            with into(part):
                return function(*arguments, **named)

        setattr(owner, name, wrapper)

    timed(assemble.federated, "load", "data")
    timed(assemble.base, "load_tokenizer", "load model")
    timed(assemble, "prepare_model", "load model")
    timed(running, "_describe", "pictures")
    for name in tasks.TASKS:
        timed(type(tasks.get(name)), "encode", "tokenisation")

    def listen(self: Any, name: str, event: Event) -> None:
        if isinstance(event, Evaluated):
            spent["evaluation"] = event.seconds
        if isinstance(event, RoundStarted):
            raise _Begun

    live.Display.event = listen  # type: ignore[method-assign]
    options = [part for override in overrides for part in ("--set", override)]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(_Begun):
            cli.app(["run", "--quiet", "--out", f"{folder}/run", *options], standalone_mode=False)
        total = time.time() - born
    spent["other"] = total - sum(spent.values())
    print(json.dumps({"total": total, **spent}))


def help_seconds() -> float:
    """Seconds of one `prelort --help` in its own process."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "prelort", "--help"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def run_seconds(overrides: list[str]) -> dict[str, float]:
    """The parts of one run's start-up, in its own process."""
    command = [sys.executable, __file__, CHILD, repr(time.time()), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    from common import machine, report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--helps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--short", action="store_true", help="3 helps, 2 runs")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.helps, arguments.runs = 3, 2
    help_seconds(), run_seconds(arguments.overrides)  # fills the disk's cache
    helps = [help_seconds() for _ in range(arguments.helps)]
    runs = [run_seconds(arguments.overrides) for _ in range(arguments.runs)]
    for run in runs:
        model = run["import transformers, peft"] + run["load model"]
        run["beyond the model"] = run["total"] - model
    taken = {"prelort --help": helps}
    for part in ("total", "beyond the model", *PARTS):
        taken[f"run: {part}"] = [run[part] for run in runs]
    rows = [
        {"what": what, "s (median)": statistics.median(s), "min": min(s), "max": max(s)}
        for what, s in taken.items()
    ]
    report("startup", "start-up", rows, {**vars(arguments), **machine()})


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
