"""Runs prelort in forked processes and kills them there by SIGKILL, as told on standard input.

A script of its own, so that torch is imported once and not for each of many killed processes.
Each line in is a JSON object with ``task`` "run" or "cli"; each line out says how it ended:
``{"signal": 9}`` or ``{"code": 0}``. What the forked process prints goes to ``output``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401  imported before the forks, for speed
from torch.optim.optimizer import register_optimizer_step_pre_hook

import prelort
import prelort.experiment.run
from prelort.events import Event, EventLog, encode, name_of


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_count(count: int) -> Callable[..., None]:
    """Kills the process when it is called for the ``count``-th time."""
    seen = iter(range(1, count))
    return lambda *_: None if next(seen, None) else die()


def at_event(name: str, number: int, count: int) -> Callable[[Event], None]:
    """A listener that kills its process at the ``count``-th event of this name and round."""
    dying = at_count(count)
    return lambda event: dying() if is_event(event, name, number) else None


def is_event(event: Event, name: str, number: int) -> bool:
    return name_of(type(event)) == name and event.round == number


def before_rename(path_ends: str) -> None:
    """Kill the process before a file or folder gets its name."""
    real = os.replace

    def rename(source: Any, target: Any) -> None:
        if str(target).endswith(path_ends):
            die()
        real(source, target)

    os.replace = rename


def half_deleted(folder: str) -> None:
    """Kill the process when the first file of a folder is deleted."""
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok)
        if path.parent.name == folder:
            die()

    Path.unlink = unlink  # type: ignore[method-assign]


def half_written(path_ends: str) -> None:
    """Kill the process when half of a file is written."""
    real = Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        if str(path).endswith(path_ends):
            real(path, data[: len(data) // 2])
            die()
        return real(path, data)

    Path.write_bytes = write  # type: ignore[method-assign]


def half_an_event(name: str, number: int) -> None:
    """Kill the process when half of an event's line is in the log."""
    real = EventLog.append

    def append(log: EventLog, event: Event) -> None:
        if is_event(event, name, number):
            with log.path.open("a") as file:
                file.write(encode(event)[:20])
            die()
        real(log, event)

    EventLog.append = append  # type: ignore[method-assign]


def prepare(kill: dict[str, Any]) -> list[Callable[[Event], None]]:
    """Set the trap; the listeners for those traps that are events."""
    match kill:
        case {"trap": "event", "name": name, "round": number}:
            return [at_event(name, number, kill.get("count", 1))]
        case {"trap": "step", "count": count}:
            register_optimizer_step_pre_hook(at_count(count))
        case {"trap": "rename", "ends": ends}:
            before_rename(ends)
        case {"trap": "deleting", "name": name}:
            half_deleted(name)
        case {"trap": "half file", "ends": ends}:
            half_written(ends)
        case {"trap": "half event", "name": name, "round": number}:
            half_an_event(name, number)
        case other if other:
            raise ValueError(other)
    return []


def carry_out(order: dict[str, Any]) -> None:
    os.chdir(order["folder"])
    if order["task"] == "run":
        sys.path.append(order["folder"])
        config = prelort.load_config(Path(order["config"]))
        listeners = prepare(order["kill"])
        prelort.run(config, order["out"], resume=order.get("resume", False), listeners=listeners)
    else:
        from prelort import cli

        sys.argv = ["prelort", *order["arguments"]]
        if order.get("largest_file") is not None:
            limit = order["largest_file"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        cli.main()


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            try:
                carry_out(order)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        print(json.dumps({"signal": -ended} if ended < 0 else {"code": ended}), flush=True)


if __name__ == "__main__":
    main()
