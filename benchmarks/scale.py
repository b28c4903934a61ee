"""Seconds and memory of a round as the number of clients grows.

The embedded model with ranks 4 to 64 and one step of 4 x 32 tokens per round, to measure the
federation and not the training; each client holds four lines of text. In `fixed` the same number of
clients take part in each round, in `share` a tenth of all. Each case is a run in its own process,
with its folder, checkpoints and events; a first round of the same clients is not counted. Seconds
are from one round's start to the next one's; `server` is the server's share of them (averaging,
diagnostics); the log's bytes are those of one round.

    python benchmarks/scale.py [--clients 10 100 1000 10000] [--rounds 10] [--main 50] [--short]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = "--child"
FIXED = 10
SHARE = 0.1
LINES = 4
"""Lines of text per client."""
TEST_LINES = 64


def child(folder: str, clients: int, per_round: str, rounds: int) -> None:
    """Print the costs of one run as JSON; memory in bytes."""
    from prelort.library_logging import quiet_libraries

    quiet_libraries()
    import warnings

    from prelort.config import load
    from prelort.events import Checkpointed, Event, RoundStarted, RunStarted
    from prelort.experiment.run import run

    warnings.simplefilter("ignore")  # ranks above a layer's width add nothing, and cost as any
    where = Path(folder)
    _write(where, clients)
    config = load(
        None,
        [
            f"data.source={where / 'train.jsonl'}",
            f"data.test={where / 'test.jsonl'}",
            "data.max_length=32",
            "partition.by=iid",
            f"partition.clients={clients}",
            "ranks.mix=4*0.2, 8*0.2, 16*0.2, 32*0.2, 64*0.2",
            "training.local_steps=1",
            "training.batch_size=4",
            f"federation.rounds={rounds + 1}",
            f"federation.clients_per_round={per_round}",
        ],
    )
    began: list[float] = []
    memory: dict[str, int] = {}

    def listen(event: Event) -> None:
        match event:
            case RunStarted():
                memory["started"] = peak()
            case RoundStarted():
                began.append(time.perf_counter())
            case Checkpointed() if event.round == rounds + 1:
                began.append(time.perf_counter())

    started = time.perf_counter()
    result = run(config, where / "run", listeners=[listen])
    seconds = [after - before for before, after in itertools.pairwise(began[1:])]
    stats = [record.stats for record in result.history.rounds.values() if record.stats is not None]
    trained = [one.seconds.total - one.seconds.train for one in stats]
    print(
        json.dumps(
            {
                "start": began[0] - started,
                "seconds": statistics.median(seconds),
                "server": statistics.median(trained[1:]),
                "rounds": len(seconds),
                "memory started": memory["started"],
                "memory": peak(),
                "log": (result.path / "metrics.jsonl").stat().st_size / (rounds + 1),
            }
        )
    )


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM: this needs Linux")


def _write(folder: Path, clients: int) -> None:
    """Write text files from the lines of the embedded rows, repeated as needed."""
    from prelort.data import standard_library

    train, test = standard_library.load()
    for name, rows, number in (
        ("train", train, clients * LINES),
        ("test", test, TEST_LINES),
    ):
        text = " ".join("\n".join(rows["text"][:]).split())
        pieces = [text[i : i + 160] for i in range(0, len(text) - 160, 160)]
        lines = (json.dumps({"text": pieces[i % len(pieces)]}) + "\n" for i in range(number))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def measure(clients: int, per_round: str, rounds: int) -> dict[str, Any]:
    """One case, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, CHILD, folder, str(clients), per_round, str(rounds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    from common import machine, report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--main", type=int, default=50, help="rounds of 1000 clients, a tenth each")
    parser.add_argument("--short", action="store_true", help="10 and 1000 clients, 3 rounds")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.clients, arguments.rounds, arguments.main = [10, 1000], 3, 3
    rows = []
    for case in ("fixed", "share"):
        for clients in arguments.clients:
            asked = FIXED if case == "fixed" else max(1, round(SHARE * clients))
            rounds = arguments.main if (case, clients) == ("share", 1000) else arguments.rounds
            found = measure(clients, str(FIXED) if case == "fixed" else str(SHARE), rounds)
            rows.append(
                {
                    "case": case,
                    "clients": clients,
                    "asked": asked,
                    "rounds": found["rounds"],
                    "s a round": found["seconds"],
                    "ms a client": 1e3 * found["seconds"] / asked,
                    "s server": found["server"],
                    "s start": found["start"],
                    "MiB start": found["memory started"] / 2**20,
                    "MiB peak": found["memory"] / 2**20,
                    "KiB log": found["log"] / 2**10,
                }
            )
    report("scale", "rounds and memory by clients", rows, {**vars(arguments), **machine()})


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        main()
