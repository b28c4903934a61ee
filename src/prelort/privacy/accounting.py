"""From a privacy budget to noise, and from noise to what has been spent.

A release is the Gaussian mechanism on the clients of a round, of whom each takes part with
probability ``rate``, independently (Poisson sampling). Releases are composed by their privacy loss
distributions (Koskela et al. 2020; Google's dp-accounting), which is tighter than Renyi
differential privacy and rounds to the safe side. Neighbouring federations differ in one client that
is there or is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prelort.errors import ConfigError

INTERVAL = 1e-3
"""Width of the cells in which privacy losses are counted."""
TOLERANCE = 1e-3
"""Of the noise multiplier, which is rounded up."""


@dataclass(frozen=True, slots=True)
class Budget:
    """(epsilon, delta) for ``releases`` rounds in which a client takes part with ``rate``."""

    epsilon: float
    delta: float
    releases: int
    rate: float

    def noise_multiplier(self) -> float:
        """The least standard deviation, in units of the clip norm, that keeps to the budget."""
        accounting = _dp_accounting()

        def event(noise: float) -> Any:
            return _releases(accounting, self, noise, self.releases)

        def accountant() -> Any:
            return accounting.pld.PLDAccountant(value_discretization_interval=INTERVAL)

        noise: float = accounting.calibrate_dp_mechanism(
            accountant, event, self.epsilon, self.delta, tol=TOLERANCE
        )
        return noise

    def spent(self, noise_multiplier: float, releases: int) -> float:
        """The epsilon of so many releases at the budget's delta."""
        if releases == 0:
            return 0.0
        accounting = _dp_accounting()
        accountant = accounting.pld.PLDAccountant(value_discretization_interval=INTERVAL)
        accountant.compose(_releases(accounting, self, noise_multiplier, releases))
        return float(accountant.get_epsilon(self.delta))


def _releases(accounting: Any, budget: Budget, noise_multiplier: float, count: int) -> Any:
    gaussian = accounting.GaussianDpEvent(noise_multiplier)
    sampled = accounting.PoissonSampledDpEvent(budget.rate, gaussian)
    return accounting.SelfComposedDpEvent(sampled, count)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
    except ImportError:
        raise ConfigError(
            "[privacy] needs the package dp-accounting: pip install 'prelort[privacy]'"
        ) from None
    return dp_accounting
