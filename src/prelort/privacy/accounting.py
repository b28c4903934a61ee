"""From a privacy budget to noise, and from noise to what has been spent.

A release is the Gaussian mechanism on a sum over clients (a round) or over examples (a step of
DP-SGD), of which each takes part with probability ``rate``, independently (Poisson sampling).
Releases are composed by their privacy loss distributions (Koskela et al. 2020; Google's
dp-accounting), which is tighter than Renyi differential privacy and rounds to the safe side.
Neighbouring data differ in one client, or example, that adds to the sum or adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prelort.errors import ConfigError

INTERVAL = 1e-3
"""Width of the cells in which privacy losses are counted, for budgets up to 1; for larger ones it
grows with epsilon: as accurate in proportion, and as fast."""
TOLERANCE = 1e-3
"""Of the noise multiplier, which is rounded up."""


@dataclass(frozen=True, slots=True)
class Releases:
    """``count`` releases with one noise multiplier and one rate."""

    noise_multiplier: float
    rate: float
    count: int


@dataclass(frozen=True, slots=True)
class Budget:
    """(epsilon, delta) for ``releases`` in each of which one takes part with ``rate``."""

    epsilon: float
    delta: float
    releases: int
    rate: float

    def noise_multiplier(self) -> float:
        """The least standard deviation, in units of the clip norm, that keeps to the budget."""
        return _noise_multiplier(self)

    def spent(self, noise_multiplier: float, releases: int) -> float:
        """The epsilon of so many releases at the budget's delta."""
        one = Releases(noise_multiplier, self.rate, releases)
        return epsilon_of([one], self.epsilon, self.delta)


def epsilon_of(releases: Iterable[Releases], budget: float, delta: float) -> float:
    """The epsilon of all these releases together; ``budget``: what it is compared to.

    Rounded up, by less than 1 % of the budget.
    """
    return _epsilon_of(tuple(one for one in releases if one.count > 0), budget, delta)


# Each takes a tenth of a second or more, and clients with equally many examples share the result.
@lru_cache(1024)
def _noise_multiplier(budget: Budget) -> float:
    accounting = _dp_accounting()

    def event(noise: float) -> Any:
        return _event(accounting, Releases(noise, budget.rate, budget.releases))

    def accountant() -> Any:
        return _accountant(accounting, budget.epsilon)

    noise: float = accounting.calibrate_dp_mechanism(
        accountant, event, budget.epsilon, budget.delta, tol=TOLERANCE
    )
    return noise


@lru_cache(1024)
def _epsilon_of(releases: tuple[Releases, ...], budget: float, delta: float) -> float:
    if not releases:
        return 0.0
    accounting = _dp_accounting()
    accountant = _accountant(accounting, budget)
    for one in releases:
        accountant.compose(_event(accounting, one))
    return float(accountant.get_epsilon(delta))


def _accountant(accounting: Any, epsilon: float) -> Any:
    interval = INTERVAL * max(epsilon, 1.0)
    return accounting.pld.PLDAccountant(value_discretization_interval=interval)


def _event(accounting: Any, releases: Releases) -> Any:
    gaussian = accounting.GaussianDpEvent(releases.noise_multiplier)
    sampled = accounting.PoissonSampledDpEvent(releases.rate, gaussian)
    return accounting.SelfComposedDpEvent(sampled, releases.count)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
    except ImportError:
        raise ConfigError(
            "[privacy] needs the package dp-accounting: pip install 'prelort[privacy]'"
        ) from None
    return dp_accounting
