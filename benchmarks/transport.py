"""Cost of sending large adapters over Flower's SuperLink and SuperNodes.

A SuperLink and four SuperNodes on this machine, each a process, without TLS and without a model:
clients send back adapters with the shapes of Llama-2-7B at ranks 16, 32, 64 and 64. ``qv``
adapts two layers of each block (33.6 million numbers at rank 64), ``all`` all seven (160 million),
``none`` next to nothing, so that its time is that of the processes, which Flower starts for every
message.

    python benchmarks/transport.py [--case none qv all] [--dtype float32 bfloat16 int8] [--rounds 1]
        [--ranks 16 32 64 64] [--keep]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from common import RESULTS, machine, report

BIN, HERE = Path(sys.executable).parent, Path(__file__).parent
FLOWER = (sys.executable, "-m", "prelort.deployment.flower_commands")
MIB, SPARE = 2**20, 4 * 2**30
APP = {
    "project": {"name": "transport", "version": "1.0.0", "license": "Apache-2.0"},
    "tool": {
        "hatch": {"build": {"targets": {"wheel": {"packages": ["."]}}}},
        "flwr": {
            "app": {
                "publisher": "prelort",
                "components": {"serverapp": "server_app:app", "clientapp": "client_app:app"},
                "config": {"case": "", "dtype": "", "rounds": 1, "nodes": 1, "out": ""},
            }
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=["qv"], choices=["none", "qv", "all"])
    dtypes = ["float32", "bfloat16", "int8"]
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=dtypes)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 64, 64])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="the rows of earlier commands too")
    arguments = parser.parse_args()
    rows = _earlier() if arguments.keep else []
    for case in arguments.case:
        for dtype in arguments.dtype:
            row = measured(case, dtype, arguments.ranks, arguments.rounds)
            key = list(row.values())[:3]
            rows = [r for r in rows if list(r.values())[:3] != key] + [row]
            facts = {**machine(), "memory GiB": _memory()}
            facts["command"] = "python benchmarks/transport.py"
            title = "A round of large adapters over a SuperLink (peaks: resident MiB)"
            report("transport", title, rows, facts)


def measured(case: str, dtype: str, ranks: Sequence[int], rounds: int) -> dict[str, Any]:
    """The row of one case, from processes started for it."""
    with tempfile.TemporaryDirectory(prefix="transport-") as folder:
        out = Path(folder) / "out.json"
        settings = f'case="{case}" dtype="{dtype}" rounds={rounds} nodes={len(ranks)} out="{out}"'
        with federation(Path(folder), ranks) as (superlink, nodes, environment):
            command = ["flwr", "run", "app", "federation", "--stream", "--run-config", settings]
            run = _start(command, Path(folder), environment)
            peaks = _watch(run, superlink, nodes)
            _end([run])
        shown = (Path(folder) / f"{Path(FLOWER[0]).name}.log").read_text()
        if not out.is_file():
            logs = "\n".join(log.read_text()[-3000:] for log in Path(folder).glob("*.log"))
            raise SystemExit(f"no result:\n{logs}")
        found = json.loads(out.read_text())
    done = [event for event in found["events"] if event["event"] == "round_finished"]
    if len(done) < rounds:
        raise SystemExit(f"only {len(done)} rounds were finished: {found['events']}")
    return {
        "case": case,
        "dtype": dtype,
        "ranks": " ".join(map(str, ranks)),
        "M numbers": found["parameters"] / 1e6,
        "MiB down": sum(event["stats"]["bytes_down"] for event in done) / rounds / MIB,
        "MiB up": sum(event["stats"]["bytes_up"] for event in done) / rounds / MIB,
        "MB/s down": _rate(shown, "Received"),
        "MB/s up": _rate(shown, "Sent"),
        "s a round": sum(sum(event["stats"]["seconds"].values()) for event in done) / rounds,
        "server before": found["before"] // MIB,
        "server peak": peaks["server"] // MIB,
        "SuperLink peak": peaks["superlink"] // MIB,
        "SuperNode peak": peaks["node"] // MIB,
        "client peak": peaks["client"] // MIB,
    }


@contextlib.contextmanager
def federation(
    folder: Path, ranks: Sequence[int]
) -> Iterator[tuple[psutil.Process, list[psutil.Process], dict[str, str]]]:
    """A SuperLink and a SuperNode for each rank; they end with the block."""
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(tomli_w.dumps(APP))
    for side in ("server", "client"):
        text = f"import transport_app\n\napp = transport_app.{side}\n"
        (app / f"{side}_app.py").write_text(text)
    port = _free_port()
    home = folder / ".flower"
    home.mkdir()
    address = {"address": f"127.0.0.1:{port}", "insecure": True}
    links = {"superlink": {"default": "federation", "federation": address}}
    (home / "config.toml").write_text(tomli_w.dumps(links))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        link = [*FLOWER, "superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        link += ["--database", str(home / "superlink.db")]
        link += ["--disable-runtime-dependency-installation"]
        started.append(_start(link, folder, environment))
        _until_listening(port)
        for number, rank in enumerate(ranks):
            node = [*FLOWER, "supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--host", "127.0.0.1", "--port", str(_free_port())]
            node += ["--node-config", f"partition-id={number} rank={rank}"]
            started.append(_start(node, folder, environment))
        superlink, *nodes = (psutil.Process(process.pid) for process in started)
        yield superlink, nodes, environment
    finally:
        _end(started)


def _watch(
    run: subprocess.Popen[bytes], superlink: psutil.Process, nodes: Sequence[psutil.Process]
) -> dict[str, int]:
    """Peak resident memory, in bytes, of each kind of process until the run ends."""
    peaks = {"server": 0, "superlink": 0, "node": 0, "client": 0}
    while run.poll() is None:
        if psutil.virtual_memory().available < SPARE:
            raise SystemExit("stopped: less than 4 GiB of memory are left")
        _note(peaks, "superlink", superlink)
        with contextlib.suppress(psutil.Error):
            for process in superlink.children(recursive=True):
                if "flwr-serverapp" in " ".join(process.cmdline()):
                    _note(peaks, "server", process)
        for node in nodes:
            _note(peaks, "node", node)
            with contextlib.suppress(psutil.Error):
                for process in node.children(recursive=True):
                    _note(peaks, "client", process)
        time.sleep(0.1)
    return peaks


def _rate(shown: str, done: str) -> float | None:
    """The median rate of whole messages between SuperLink and SuperNodes, in MB/s."""
    rates = [float(rate) for rate in re.findall(rf"{done} \d+ MB \(100 %\), ([\d.]+) MB/s", shown)]
    return statistics.median(rates) if rates else None


def _note(peaks: dict[str, int], kind: str, process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        peaks[kind] = max(peaks[kind], process.memory_info().rss)


def _start(
    command: Sequence[str], folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    with (folder / f"{Path(command[0]).name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send SIGKILL to these processes and their descendants."""
    for process in reversed(processes):
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_listening(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the SuperLink does not listen")


def _earlier() -> list[dict[str, Any]]:
    file = RESULTS / "transport.json"
    return list(json.loads(file.read_text())["rows"]) if file.is_file() else []


def _memory() -> int:
    return round(psutil.virtual_memory().total / 2**30)


if __name__ == "__main__":
    main()
