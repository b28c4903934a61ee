"""The entry point of the diagnostics: who is measured, the time it takes, and its failures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from prelort import diagnostics
from prelort.config import Config
from prelort.methods import Method, ServerState, build
from prelort.methods.prelort import PreLort
from random_adapters import same_bits
from rounds import aggregate, clients_of, replies, start

Make = Callable[..., Config]


def observed(config: Config, method: Method) -> tuple[dict[str, Any], float, ServerState]:
    """A round: its numbers, the seconds of measuring it, and the state after it."""
    state, clients = start(), clients_of([2, 5, 8])
    observe = diagnostics.observer(config)
    assert observe is not None
    observer = observe(method, state, clients)
    updates = replies(method, state, clients)
    for update in updates:
        observer.add(method.broadcast(state, update.client), update)
    after = aggregate(method, state, updates)
    return observer.result(after), observer.seconds, after


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_failure_is_reported_once_and_the_run_goes_on(
    make_config: Make, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    """At the beginning of a round, at its end, and in the middle of the end."""

    class Failing(PreLort):
        left = calls

        def global_adapter(self, *arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no adapter today")
            return super().global_adapter(*arguments)

    config = make_config()
    with caplog.at_level(logging.ERROR, logger="prelort"):
        numbers, _, after = observed(config, Failing(config.method, config.seed))
    assert numbers == {"failed": "RuntimeError: no adapter today"}
    assert caplog.text.count("RuntimeError: no adapter today") == 1
    expected = aggregate(
        build(config.method, 0),
        start(),
        replies(build(config.method, 0), start(), clients_of([2, 5, 8])),
    )
    assert same_bits(after.adapter, expected.adapter)
