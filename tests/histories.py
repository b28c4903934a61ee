"""Made-up runs as typed events, for the tests of tables, pages, live displays and trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from prelort.events import (
    ClientFailed,
    ClientFinished,
    ClientJoined,
    ClientLeft,
    ClientMetrics,
    ClientRefused,
    ClientSample,
    ClientsEvaluated,
    DimensionsLeftOut,
    Evaluated,
    Event,
    Metrics,
    RankChanged,
    RoundFinished,
    RoundRepeated,
    RoundSeconds,
    RoundStarted,
    RoundStats,
    RunFinished,
    RunStarted,
    Waiting,
)
from prelort.history import RunHistory

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
FINALS = {2: 27.0, 4: 24.0, 8: 22.0, 16: 21.0}
CLIENTS = ("asyncio", "email", "json", "unittest", "xml")
HOSTILE = "<script>alert(1)</script>"
HOSTILE_REASON = '"><img src=x onerror=alert(2)>\u202e {{ 7 * 7 }} &amp; | \x1b[31m' + "long " * 200


def run_events(
    method: str = "prelort",
    finals: Mapping[int, float] = FINALS,
    *,
    seed: int = 0,
    rounds: int = 4,
    stop: int | None = None,
    every: int = 0,
    metric: str = "perplexity",
    base: float | None = 150.0,
    task: str = "causal-lm",
    clients: Sequence[str] = CLIENTS,
    failures: Mapping[int, Iterable[str]] | None = None,
    own: Mapping[str, float] | None = None,
    diagnostics: Callable[[int], dict[str, Any]] | None = None,
    loss: Callable[[int, int, int], float] | None = None,
    epsilon: float | None = None,
) -> list[Event]:
    """The events of a run, a second apart.

    ``finals``: rank -> the metric after the last round; none for a method without a global model.
    ``stop``: the last round that is done, of a run that did not finish. ``every``: rounds between
    evaluations (0: one after the last round). ``failures``: round -> clients without a usable
    reply. ``own``: client -> the metric on its own examples, after the last round.
    ``diagnostics``: round -> what was measured. ``loss``: (round, client, rank) -> training loss.
    ``epsilon``: what has been spent of a privacy budget.
    """
    levels = tuple(sorted(finals)) or (2, 8)
    done = rounds if stop is None else stop
    events: list[Event] = []

    def now() -> datetime:
        return START + timedelta(seconds=len(events))

    def evaluated(number: int, untuned: Metrics | None = None) -> Evaluated:
        """On the way from the base to the final values."""
        share = (number / rounds) ** 0.35
        first = base if base is not None else 2.0 * max(finals.values(), default=1.0)
        prefixes = {
            rank: {metric: first * (1 - share) + final * share, "loss": 7 - 4 * share}
            for rank, final in finals.items()
        }
        return Evaluated(number, prefixes, 0.5, untuned, time=now())

    def trained(number: int, place: int, rank: int) -> float:
        return 3.0 + 3.2 * 0.7**number + place / 10

    events.append(
        RunStarted(0, method, task, seed, rounds, len(clients), levels, time=now()),
    )
    untuned = None if base is None else {metric: base, "loss": 6.55}
    events.append(evaluated(0, untuned))
    for number in range(1, done + 1):
        events.append(RoundStarted(number, tuple(clients), time=now()))
        lost = set((failures or {}).get(number, ()))
        losses = []
        for place, client in enumerate(clients):
            rank = levels[place % len(levels)]
            if client in lost:
                events.append(ClientFailed(number, client, rank, "did not answer", time=now()))
                continue
            losses.append((loss or trained)(number, place, rank))
            events.append(
                ClientFinished(
                    number, client, rank, losses[-1], 100 + place, 8, 8, 0.4, 1000, time=now()
                )
            )
        stats = RoundStats(
            replies=len(losses),
            failures=len(lost),
            loss=sum(losses) / len(losses) if losses else float("nan"),
            bytes_up=1000 * len(losses),
            bytes_down=1500 * len(clients),
            seconds=RoundSeconds(2.0, 0.1, 0.25 if diagnostics else 0.0),
            diagnostics=diagnostics(number) if diagnostics else None,
            epsilon=epsilon,
        )
        events.append(RoundFinished(number, stats, time=now()))
        if number == rounds or (every and number % every == 0):
            if finals:
                events.append(evaluated(number))
            if own:
                measured = {
                    client: ClientMetrics(levels[place % len(levels)], 20, {metric: own[client]})
                    for place, client in enumerate(clients)
                    if client in own
                }
                events.append(ClientsEvaluated(number, measured, {}, 0.3, time=now()))
    if stop is None:
        events.append(RunFinished(rounds, time=now()))
    return events


def run_history(
    method: str = "prelort", finals: Mapping[int, float] = FINALS, **more: Any
) -> RunHistory:
    """The history of `run_events`."""
    return RunHistory.of(run_events(method, finals, **more))


def round_diagnostics(
    number: int, noise: float = 0.5, collapse: float = 1.0, layers: int = 28
) -> dict[str, Any]:
    """A round's diagnostics at ranks 2 to 16: noise falls, and ranks collapse below 1."""
    levels, first = ("2", "4", "8", "16"), number == 1
    cuts = [0.9 * collapse**number, 0.8 * collapse**number, 0.6 * collapse**number, 0.0]
    return {
        "layers": {"measured": layers, "of": 28},
        "aggregation_noise": noise * 0.9**number,
        "client_dispersion": 0.7,
        "initialization_noise": {"mean": None if first else 0.3, "max": None if first else 0.9},
        "client_drift": {"mean": None if first else 0.4 * 0.8**number, "deviation": None},
        "truncation_noise": dict(zip(levels, cuts, strict=True)),
        "least_truncation_noise": {
            level: 0.7 * cut for level, cut in zip(levels, cuts, strict=True)
        },
        "effective_rank": 1 + 6 * collapse**number,
        "energy_share": dict(zip(levels, [0.7, 0.15, 0.1, 0.05], strict=True)),
        "dimension_energy": [0.5 * collapse ** (number * dimension / 4) for dimension in range(16)],
        "tail_kept": dict(zip(levels, [1.0, 0.9, 0.5, 0.0625], strict=True)),
    }


def troubled_events() -> list[Event]:
    """Three rounds of six with everything that can go wrong, and the run waits; hostile names."""
    names = ("clinic-north", HOSTILE, "clinic-south")
    time = {"time": START}
    events: list[Event] = [
        ClientRefused(0, "old-site", "has another base model", **time),
        RunStarted(0, "prelort", "classification", 3, 6, 5, (2, 4, 8), **time),
        Evaluated(0, {2: {"accuracy": 0.21}, 8: {"accuracy": 0.21}}, 0.5,
                  {"accuracy": 0.21, "loss": 1.9}, **time),
        ClientJoined(1, "late-comer", 4, **time),
    ]  # fmt: skip
    for number in (1, 2, 3):
        events.append(RoundStarted(number, names, **time))
        for place, name in enumerate(names):
            rank = 2 * 2**place
            if name == HOSTILE or (number == 2 and place == 2):
                reason = HOSTILE_REASON if name == HOSTILE else "did not answer"
                events.append(ClientFailed(number, name, rank, reason, **time))
            else:
                loss = float("nan") if (number, place) == (3, 2) else 2.0 / number + place
                events.append(ClientFinished(number, name, rank, loss, 40, 5, 5, 0.5, 1000, **time))
        stats = RoundStats(
            2, 1, 2 / number, 2000, 3600, RoundSeconds(1.2, 0.01, 0.0), {"failed": "no memory"}
        )
        prefixes = {2: {"accuracy": 0.3 + number / 10}, 8: {"accuracy": 0.5}}
        samples = {2: ClientSample(3, 120), 8: ClientSample(1, 40)}
        own = {names[0]: ClientMetrics(2, 9, {"accuracy": 0.5})}
        events += [
            RoundFinished(number, stats, **time),
            Evaluated(number, prefixes, 0.4, None, samples, **time),
            ClientsEvaluated(number, own, {"clinic-south": "no test examples"}, 0.1, **time),
        ]
    return [
        *events,
        RankChanged(3, names[0], 2, 4, "the client's offer", **time),
        RoundStarted(4, names, **time),
        RoundRepeated(4, 2, "too few replies", **time),
        DimensionsLeftOut(4, (9, 10, 11, 16), 3, **time),
        ClientLeft(4, "clinic-south", **time),
        Waiting(4, ("clinic-north",), (HOSTILE,), 2, START + timedelta(minutes=5), **time),
    ]


def large_events(clients: int = 100, rounds: int = 500) -> list[Event]:
    """A run in which every client takes part in every round, and some of them fail."""
    names = [f"hospital-{place:03d}" for place in range(clients)]
    lost = {
        number: [
            name for place, name in enumerate(names) if (place * 7919 + number * 104729) % 199 == 0
        ]
        for number in range(1, rounds + 1)
    }
    return run_events(
        finals={2: 30.0, 4: 28.0, 8: 26.0, 16: 25.0, 32: 24.0},
        rounds=rounds,
        every=1,
        clients=names,
        failures=lost,
        loss=lambda number, place, rank: 2 + 3 * 0.99**number + place % 7 / 20 - 0.01 * rank,
    )
