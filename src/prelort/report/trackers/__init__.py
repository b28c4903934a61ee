"""Experiment trackers that follow a run: TensorBoard, MLflow, Weights & Biases.

Each has one small file that speaks to its own library, an optional extra of the package; what is
common (which values, no round twice, trouble) is in `follow`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prelort.errors import ConfigError
from prelort.report.trackers.follow import Follower, TrackedRun, Tracker

__all__ = ["NAMES", "Follower", "TrackedRun", "check", "follower"]


@dataclass(frozen=True, slots=True)
class _Library:
    """How a tracker is called, the module that it needs, and our module for it."""

    title: str
    needs: str
    module: str


_LIBRARIES = {
    "tensorboard": _Library("TensorBoard", "tensorboard", "to_tensorboard"),
    "mlflow": _Library("MLflow", "mlflow", "to_mlflow"),
    "wandb": _Library("Weights & Biases", "wandb", "to_wandb"),
}
NAMES = tuple(_LIBRARIES)
"""What ``--track`` can be."""


def check(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a tracker that is not known or whose library is not installed."""
    for name in names:
        library = _LIBRARIES.get(name)
        if library is None:
            raise ConfigError(f"--track {name!r} is not known: allowed are {', '.join(NAMES)}")
        found = importlib.util.find_spec(library.needs)
        # A folder of that name, as W&B leaves one, would be found as a package without an origin.
        if found is None or found.origin is None:
            raise ConfigError(
                f"--track {name} needs {library.title}: pip install 'prelort[{name}]'"
            )


def follower(names: Iterable[str], run: TrackedRun) -> Follower:
    """The listener that tells these trackers about a run; use it as a context manager."""
    return Follower({name: _maker(name) for name in dict.fromkeys(names)}, run)


def _maker(name: str) -> Callable[[], Tracker]:
    def make() -> Tracker:
        module = importlib.import_module(f"{__name__}.{_LIBRARIES[name].module}")
        tracker: Tracker = module.make()
        return tracker

    return make
