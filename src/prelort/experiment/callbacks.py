"""What is called at the end of each round, and can end a run early."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from prelort.config import Config
from prelort.errors import ConfigError
from prelort.events import Metrics
from prelort.extensions import calling
from prelort.history import RunHistory
from prelort.report.formatting import metric_format

Callback = Callable[[RunHistory], bool | None]
"""Called with the history when a round, and its evaluation if one is due, is done. True ends the
run: it is evaluated and exported as after its last round, and can be resumed."""


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Ends a run that has stopped improving: a callback.

    Needs an evaluation in the rounds, hence ``evaluation.every`` of at least 1.

    Args:
        metric: the metric to follow; default: the task's first.
        patience: number of evaluations without a better value after which the run ends.
        min_delta: a value counts as better if it is by more than this.
        rank: the rank at which to follow it; default: the highest.
    """

    metric: str | None = None
    patience: int = 2
    min_delta: float = 0.0
    rank: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError(f"patience = {self.patience!r} is not allowed: 1 or more")

    def __call__(self, history: RunHistory) -> bool:
        """Whether the run should end."""
        if history.round not in history.evaluations:
            return False
        evaluations = [event.prefixes for _, event in sorted(history.evaluations.items())]
        values = [self._value(prefixes, history) for prefixes in evaluations]
        best, waited = values[0], 0
        for value in values[1:]:
            better = value > best + self.min_delta or math.isnan(best)
            best, waited = (value, 0) if better else (best, waited + 1)
        return waited >= self.patience

    def _value(self, prefixes: dict[int, Metrics], history: RunHistory) -> float:
        """The followed value, with its sign changed where lower is better."""
        metric, rank = self.metric or history.metrics()[0], self.rank or max(prefixes)
        if metric not in prefixes.get(rank, {}):
            measured = ", ".join(dict.fromkeys(name for one in prefixes.values() for name in one))
            raise ConfigError(
                f"EarlyStopping follows {metric!r} at rank {rank}, which is not measured: there "
                f"are {measured} at ranks {', '.join(map(str, prefixes))}"
            )
        value = prefixes[rank][metric]
        return value if metric_format(metric).higher_is_better else -value


def end_run(callbacks: Sequence[Callback], history: RunHistory) -> bool:
    """Call each with the history: whether one of them ends the run.

    Raises `ExtensionError` for what they raise, `ConfigError` for another answer than yes or no.
    """
    with calling("callbacks", "a function"):
        answers = [callback(history) for callback in callbacks]
    for answer in answers:
        if not isinstance(answer, bool | np.bool_ | None):
            raise ConfigError(f"callbacks must return True, False or None, not {answer!r}")
    return any(answers)


def check_callbacks(callbacks: Sequence[Callback], config: Config) -> None:
    """Raise `ConfigError` for callbacks that are none or could never do their work."""
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ConfigError("callbacks must be a list of functions")
    if not any(isinstance(callback, EarlyStopping) for callback in callbacks):
        return
    if config.evaluation.every == 0:
        raise ConfigError("EarlyStopping needs evaluations in the rounds: set evaluation.every = 1")
    on_clients_rows = config.data.test is None or config.evaluation.on == "validation"
    if config.privacy.epsilon is not None and on_clients_rows:
        raise ConfigError(
            "EarlyStopping with privacy.epsilon would end the run by what is measured on clients' "
            "rows, without noise: set data.test, and evaluation.on = 'test'"
        )
