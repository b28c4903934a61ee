"""The privacy of one run: who takes part, with what noise, and what has been spent.

The run's folder keeps the noise and the number of releases in ``privacy.json``. A release is
counted before its noise is drawn: a round that a crash repeats draws new noise and is paid again,
so that neither noise nor budget is used twice unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from prelort.config import Config, PrivacyConfig, cohort_size
from prelort.errors import CheckpointError, ConfigError, PrelortError
from prelort.files import write_atomically
from prelort.methods.interface import Aggregator, Client, Method, ServerState, Update
from prelort.privacy.accounting import Budget
from prelort.privacy.mean import Mechanism, PrivateMean, check_method
from prelort.privacy.noise import Normal, poisson_sample, system_normal
from prelort.secure.messages import Noise

FILE = "privacy.json"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ledger:
    """What ``privacy.json`` holds. ``releases``: the number of noisy rounds that have been made."""

    budget: Budget
    """Of the whole run."""
    noise_multiplier: float
    releases: int = 0
    takes_part: Mapping[str, bool] = field(default_factory=dict)
    """Who was drawn, and who not, for the next release."""


def ledger_of(
    privacy: PrivacyConfig, clients: int, per_round: int | float | None, rounds: int
) -> Ledger:
    """The noise that keeps to the budget with so many clients, before anything is spent.

    Raises `ConfigError` for a delta that gives a client away.
    """
    assert privacy.epsilon is not None
    if privacy.delta >= 1 / clients:
        raise ConfigError(
            f"privacy.delta = {privacy.delta:g} would allow to publish one of the {clients} "
            f"clients: use much less than {1 / clients:g}"
        )
    # With noise at the clients the server is not trusted, and it knows who takes part.
    sampled = clients_of_a_round(clients, per_round) / clients
    rate = 1.0 if privacy.secure_aggregation else sampled
    budget = Budget(privacy.epsilon, privacy.delta, rounds, rate)
    return Ledger(budget, budget.noise_multiplier())


def clients_of_a_round(clients: int, per_round: int | float | None) -> int:
    """How many of the clients take part in a round; with Poisson sampling, on average."""
    return cohort_size(per_round, clients)


def mechanism_of(privacy: PrivacyConfig, ledger: Ledger) -> Mechanism:
    """The mechanism of every round."""
    noise, rate = ledger.noise_multiplier, ledger.budget.rate
    return Mechanism(privacy.clip, noise, rate, privacy.adaptive_clipping)


class PrivateRun:
    """Client-level differential privacy of all that the server releases in a run.

    Call `start` when the clients are known.
    """

    def __init__(self, config: Config, folder: Path, normal: Normal = system_normal) -> None:
        self._config = config
        self._file = folder / FILE
        self._normal = normal
        self._ledger: Ledger | None = self._read()

    @property
    def ledger(self) -> Ledger:
        """What has been spent, once the run has started."""
        assert self._ledger is not None
        return self._ledger

    @property
    def exhausted(self) -> bool:
        """Whether another release would exceed the budget."""
        return self.ledger.releases >= self.ledger.budget.releases

    def epsilon(self) -> float:
        """The epsilon that has been spent."""
        return self.ledger.budget.spent(self.ledger.noise_multiplier, self.ledger.releases)

    def start(self, method: Method, state: ServerState, clients: Sequence[Client]) -> None:
        """Calibrate the noise, unless the run is resumed.

        Raises `ConfigError` for an unsuitable method or delta, `CheckpointError` where a resumed
        run has lost its ledger.
        """
        check_method(method, state, clients)
        if self._ledger is None and state.round > 0:
            raise CheckpointError(
                f"{str(self._file)!r} is missing, so what has been spent of the privacy budget is "
                "not known"
            )
        if self._ledger is None:
            federation = self._config.federation
            self._write(
                ledger_of(
                    self._config.privacy,
                    len(clients),
                    federation.clients_per_round,
                    federation.rounds,
                )
            )

    def sample(self, clients: Mapping[str, T]) -> list[T]:
        """The clients of a round, by name: each with the same probability, whatever the seed.

        A client is drawn for once before each release: over several attempts at a round, also of
        a resumed run, it would take part with a higher probability than is accounted for.
        """
        drawn = self.ledger.takes_part
        new = [name for name in clients if name not in drawn]
        sampled = set(poisson_sample(new, self.ledger.budget.rate))
        drawn = {**drawn, **{name: name in sampled for name in new}}
        self._write(replace(self.ledger, takes_part=drawn))
        return [client for name, client in clients.items() if drawn[name]]

    def aggregator(
        self, method: Method, state: ServerState, clients: Sequence[Client]
    ) -> Aggregator:
        """The round's aggregator, which counts its release."""
        mechanism = mechanism_of(self._config.privacy, self.ledger)
        return _Counted(self, PrivateMean(method, state, clients, mechanism, self._normal))

    def noise(self) -> Noise:
        """What clients clip to, and the noise that they add together."""
        clip = self._config.privacy.clip
        return Noise(clip=clip, deviation=self.ledger.noise_multiplier * clip)

    def count_release(self) -> None:
        """Note a release, durably. Raises `PrelortError` if it would exceed the budget."""
        if self.exhausted:
            raise PrelortError(
                f"privacy.epsilon = {self.ledger.budget.epsilon:g} is spent: repeated rounds were "
                "paid for too"
            )
        self._write(replace(self.ledger, releases=self.ledger.releases + 1, takes_part={}))

    def _read(self) -> Ledger | None:
        if not self._file.exists():
            return None
        try:
            values = json.loads(self._file.read_text(encoding="utf-8"))
            return Ledger(**{**values, "budget": Budget(**values["budget"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{str(self._file)!r} is damaged, so what has been spent of the privacy budget is "
                f"not known: {error}"
            ) from None

    def _write(self, ledger: Ledger) -> None:
        write_atomically(self._file, json.dumps(asdict(ledger), indent=2).encode())
        self._ledger = ledger


@dataclass(frozen=True, slots=True)
class _Counted:
    """An aggregator whose result is counted before it is made."""

    run: PrivateRun
    mean: PrivateMean

    def add(self, update: Update) -> None:
        self.mean.add(update)

    def result(self) -> ServerState:
        self.run.count_release()
        return self.mean.result()
