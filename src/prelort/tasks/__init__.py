"""Tasks: one file each, found by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from prelort.errors import ConfigError

if TYPE_CHECKING:
    from prelort.tasks.interface import Task

# Where each task is; imported when asked for, so that reading a name costs no torch.
TASKS = {
    "causal-lm": ("causal_lm", "CausalLM"),
    "instruction": ("instruction", "Instruction"),
    "chat": ("chat", "Chat"),
    "classification": ("classification", "Classification"),
}


def get(name: str) -> Task:
    """The task of that name; raises `ConfigError` listing the names if there is none."""
    if name not in TASKS:
        raise ConfigError(f"task = {name!r} is not allowed: the tasks are {', '.join(TASKS)}")
    module, attribute = TASKS[name]
    task: Task = getattr(import_module(f"{__name__}.{module}"), attribute)()
    return task
