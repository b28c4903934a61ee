"""Tasks by name: one file each, or a class of one's own, named ``package.module:Class``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from prelort.errors import ConfigError
from prelort.extensions import TASKS, imported, unknown_name

if TYPE_CHECKING:
    from prelort.tasks.interface import Task

__all__ = ["TASKS", "get"]


def get(name: str) -> Task:
    """The task of that name, or of ``package.module:Class``.

    Raises `ConfigError` with the nearest known name, or with what the class lacks to be a `Task`.
    """
    if name in TASKS:
        module, _, attribute = TASKS[name].partition(":")
        task: Task = getattr(import_module(module), attribute)()
        return task
    if ":" not in name:
        raise ConfigError(unknown_name("task", name, TASKS))
    from prelort.tasks.interface import Task, built

    own = imported(name, "task", Task, ("name", "kind"))
    return built(own, name)
