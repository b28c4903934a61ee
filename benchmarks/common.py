"""Shared by the benchmarks: the machine's description, paired timings, tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prelort.experiment.folder import versions

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that the figures depend on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        **versions(),
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def no_gpu(device: str) -> bool:
    """Whether a GPU is asked for and there is none, which is said."""
    lacks = device != "cpu" and not torch.cuda.is_available()
    if lacks:
        print("skipped: there is no GPU")
    return lacks


def card_of(facts: Mapping[str, Any]) -> str:
    """The GPU in `machine`'s facts, for the end of a file's name; empty on a CPU."""
    name = re.sub(r"[^a-z0-9]+", "_", str(facts["device"]).lower())
    return f"_{name}" if torch.cuda.is_available() else ""


def local_app(clients: Sequence[Any]) -> Any:
    """The Flower `ClientApp` of clients of this process, by their ``partition-id``."""
    from prelort.federation.client import respond  # here: other benchmarks measure memory
    from prelort.federation.client_app import client_app

    return client_app(
        lambda kind, content, context: respond(
            clients[int(context.node_config["partition-id"])], kind, content
        )
    )


def paired(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, measured in turns so that disturbances affect all sides alike.

    Each side returns its own seconds. One unmeasured turn comes first.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            seconds = side()
            if repeat > 0:
                taken[name].append(seconds)
    return taken


def ratio(taken: Mapping[str, Sequence[float]], name: str, reference: str) -> dict[str, float]:
    """Median, smallest and largest of the turns' ratios to the reference's time."""
    ratios = [a / b for a, b in zip(taken[name], taken[reference], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def set_high_water_back() -> None:
    """Forget the process's largest resident size so far (Linux: a new process inherits it)."""
    Path("/proc/self/clear_refs").write_text("5")


def high_water_mib() -> float:
    """The process's largest resident size, in MiB, since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def report(name: str, title: str, rows: Sequence[Mapping[str, Any]], facts: Any) -> None:
    """Print the rows as a table and write them, with the facts, to ``results/<name>.json``.

    Short versions (``facts["short"]``) go to ``results/short``, which is not committed.
    """
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console = Console(width=110)
    console.print(table)
    console.print(facts)
    path = write(name, title, rows, facts)
    console.print(f"wrote {path.relative_to(Path(__file__).parent.parent)}")


def write(name: str, title: str, rows: Sequence[Mapping[str, Any]], facts: Any) -> Path:
    """Write what `report` also prints; the file."""
    folder = RESULTS / "short" if isinstance(facts, dict) and facts.get("short") else RESULTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"title": title, "facts": facts, "rows": rows}, indent=2) + "\n")
    return path


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
