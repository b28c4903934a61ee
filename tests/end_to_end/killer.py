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

import prelort
from prelort import cli
from prelort.experiment import checkpoint, folder, run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_event(name: str, of_round: int, count: int = 1) -> Callable[[dict[str, Any]], None]:
    """A listener that kills its process at the ``count``-th event of this name and round."""
    seen = 0

    def listen(event: dict[str, Any]) -> None:
        nonlocal seen
        if event["event"] == name and event["round"] == of_round:
            seen += 1
            if seen == count:
                die()

    return listen


def before_call(owner: Any, name: str, count: int, when: Callable[..., bool]) -> None:
    """Kill the process when ``owner.name`` is called for the ``count``-th time of those meant."""
    real, seen = getattr(owner, name), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal seen
        if when(*arguments):
            seen += 1
            if seen == count:
                die()
        return real(*arguments, **named)

    setattr(owner, name, call)


def half_written(path_ends: str) -> None:
    """Kill the process when half of a file is written."""
    real = Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        if str(path).endswith(path_ends):
            real(path, data[: len(data) // 2])
            die()
        return real(path, data)

    Path.write_bytes = write  # type: ignore[method-assign]


def half_an_event(name: str, of_round: int) -> None:
    """Kill the process when half of an event's line is in the log."""
    real = folder.EventLog.__call__

    def log(self: folder.EventLog, event: dict[str, Any]) -> None:
        if event["event"] == name and event["round"] == of_round:
            with self._path.open("a") as file:
                file.write(json.dumps(event)[:20])
            die()
        real(self, event)

    folder.EventLog.__call__ = log  # type: ignore[method-assign]


def prepare(how: dict[str, Any]) -> list[Callable[[dict[str, Any]], None]]:
    """Set the trap; the listeners for those traps that are events."""
    match how.get("trap"):
        case None:
            return []
        case "event":
            return [at_event(how["name"], how["round"], how.get("count", 1))]
        case "training":
            before_call(client_module, "extract", how["count"], lambda *_: True)
        case "rename":
            ends = how["ends"]
            before_call(os, "replace", 1, lambda source, target: str(target).endswith(ends))
        case "deleting":
            real = checkpoint.remove_folder

            def remove(path: Path) -> None:
                if path.name == how["name"]:
                    next(path.iterdir()).unlink()
                    die()
                real(path)

            checkpoint.remove_folder = remove
        case "half file":
            half_written(how["ends"])
        case "half event":
            half_an_event(how["name"], how["round"])
        case "exporting":
            before_call(run.peft_folder, "save", how["count"], lambda *_: True)
        case other:
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
