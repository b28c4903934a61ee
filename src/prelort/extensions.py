"""Methods and tasks by name: those of the package, and ``package.module:Class`` of a user."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prelort.errors import ConfigError, ExtensionError, PrelortError

TASKS = {
    "causal-lm": "prelort.tasks.causal_lm:CausalLM",
    "instruction": "prelort.tasks.instruction:Instruction",
    "chat": "prelort.tasks.chat:Chat",
    "classification": "prelort.tasks.classification:Classification",
}
"""The package's tasks. They are imported when asked for: a configuration needs no torch."""


def unknown_name(what: str, name: str, known: Collection[str]) -> str:
    """A sentence about the ``name`` of a method or task that is not ``known``."""
    close = difflib.get_close_matches(name, known, n=1)
    own = "or 'package.module:Class' for one of your own"
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}, {own}"
    return f"unknown {what} {name!r}: {hint}"


def imported(name: str, what: str, interface: type, attributes: Sequence[str]) -> type:
    """The class ``name``, whose module is also searched in the current folder.

    Args:
        name: ``package.module:Class``.
        what: ``method`` or ``task``, for errors.
        interface: the protocol whose functions the class must have, with their parameters.
        attributes: the texts that it must have.

    Raises:
        ConfigError: for what cannot be imported, and naming what the class lacks.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not search it by itself
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ConfigError(
            f"{what} {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, type):
        raise ConfigError(f"{what} {name!r} is not a class")
    parts = {n: f for n, f in inspect.getmembers(interface, inspect.isfunction) if n[0] != "_"}
    lacking = [part for part in parts if not callable(getattr(found, part, None))]
    lacking += [one for one in attributes if not isinstance(getattr(found, one, None), str)]
    if lacking:
        raise ConfigError(
            f"{what} {name!r} is no {what}: it lacks {', '.join(lacking)}, which a class derived "
            f"from one in prelort.{what}s has"
        )
    for part, definition in parts.items():
        parameters = inspect.signature(definition).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty]
        optional = {p.name: p.default for p in parameters if p.default is not p.empty}
        try:
            inspect.signature(getattr(found, part)).bind(*required, **optional)
        except TypeError as error:
            call = ", ".join([*required, *(f"{n}={value}" for n, value in optional.items())])
            raise ConfigError(
                f"{what} {name!r} is no {what}: it must allow {part}({call}), but {error}"
            ) from None
    return found


def reference(kind: object, what: str) -> str:
    """The name by which a run finds a class. Raises `ConfigError` unless a module has it."""
    if not isinstance(kind, type):
        raise ConfigError(f"{what} {kind!r} is neither a name nor a class")
    module, name = kind.__module__, kind.__qualname__
    if getattr(sys.modules.get(module), name, None) is not kind:
        raise ConfigError(
            f"{what} {name!r} must be a class at the top of a module, so that a run can name it"
        )
    return f"{module}:{name}"


@contextmanager
def calling(what: str, part: str) -> Iterator[None]:
    """Raise `ExtensionError` for what ``part`` of a method or task raises, with its code's line.

    Errors of this package's own kinds pass unchanged, and so does a lack of GPU memory.
    """
    try:
        yield
    except PrelortError as error:
        if type(error) is PrelortError:
            raise ExtensionError(str(error)) from error
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ExtensionError(
            f"{what}: {part} raised {type(error).__name__}: {error} "
            f"({Path(place.filename).name}, line {place.lineno})"
        ) from error
