"""Measuring the global adapter at every rank, where the test examples are."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.events import ClientSample, Evaluated, Evaluating, Listener
from prelort.experiment.backend import Backend
from prelort.federation.server import Server
from prelort.methods import trait
from prelort.methods.calls import global_adapter
from prelort.methods.interface import Method, ServerState


def evaluate(
    config: Config,
    backend: Backend,
    server: Server,
    method: Method,
    state: ServerState,
    log: Listener,
) -> Evaluated:
    """Measure the global adapter at its ranks; before the first round the untuned base too.

    On the server's test examples, or by the clients on their own where it has none.
    """
    started = time.monotonic()
    adapters: dict[int, LoraAdapter] = {}
    if state.round == 0:
        adapters[0] = state.adapter
    if not trait(method, "personal") and (state.round > 0 or config.evaluation.every > 0):
        adapters |= global_adapters(config, method, state)
    samples = None
    if backend.evaluate is not None:
        metrics = backend.evaluate(
            adapters, lambda done, total: log(Evaluating(state.round, done, total))
        )
    else:
        pools = server.evaluate(state, adapters)
        samples = {r: ClientSample(pool.clients, pool.examples) for r, pool in pools.items()}
        metrics = {rank: pool.metrics() for rank, pool in pools.items() if pool.clients}
    base = metrics.pop(0, None)
    seconds = time.monotonic() - started
    return Evaluated(state.round, metrics, seconds, base=base, samples=samples)


def global_adapters(config: Config, method: Method, state: ServerState) -> dict[int, LoraAdapter]:
    """Rank -> the global adapter to measure and to export at that rank.

    A method whose adapter exceeds the highest level has the whole adapter among them.
    """
    whole = global_adapter(method, state)
    ranks = _ranks(config, state.levels)
    adapters = {rank: global_adapter(method, state, min(rank, whole.rank)) for rank in ranks}
    if config.evaluation.prefixes is None and whole.rank > ranks[-1]:
        adapters[whole.rank] = whole
    return adapters


def check_ranks(config: Config, rank: int) -> None:
    """Raise `ConfigError` for a rank to measure or train at above ``rank``, the adapter's."""
    for key, ranks in (
        ("evaluation.prefixes", config.evaluation.prefixes),
        ("method.truncations", config.method.truncations),
    ):
        highest = max(ranks or (0,))
        if highest > rank:
            raise ConfigError(f"{key}: {highest} is above the global adapter's rank {rank}")


def _ranks(config: Config, levels: Sequence[int]) -> tuple[int, ...]:
    trained = {*levels, *(config.method.truncations or ())}
    return tuple(sorted(set(config.evaluation.prefixes or trained)))
