"""Privacy budgets against the analytic Gaussian mechanism, and their own promise."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from prelort.config import PrivacyConfig
from prelort.errors import ConfigError
from prelort.privacy.accounting import Budget
from prelort.privacy.run import ledger_of

PHI = NormalDist().cdf


def delta_of(noise: float, epsilon: float) -> float:
    """One Gaussian release (Balle & Wang, arXiv 1805.06530, theorem 8)."""
    shift = epsilon * noise
    return PHI(0.5 / noise - shift) - math.exp(epsilon) * PHI(-0.5 / noise - shift)


class TestNoise:
    @pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
    def test_one_release_has_the_analytic_gaussian_noise(self, epsilon: float) -> None:
        noise = Budget(epsilon, 1e-5, releases=1, rate=1.0).noise_multiplier()
        assert delta_of(noise, epsilon) <= 1e-5
        assert delta_of(noise * 0.99, epsilon) > 1e-5

    @pytest.mark.parametrize("budget", [Budget(1.0, 1e-5, 40, 0.1), Budget(8.0, 1e-6, 5, 0.5)])
    def test_all_releases_keep_to_the_budget_and_use_it(self, budget: Budget) -> None:
        noise = budget.noise_multiplier()
        assert 0.97 * budget.epsilon <= budget.spent(noise, budget.releases) <= budget.epsilon
        assert budget.spent(noise, budget.releases + 1) > budget.epsilon
        assert budget.spent(noise, 0) == 0

    @pytest.mark.parametrize(
        "budget", [Budget(8.0, 1e-5, 1000, 0.3), Budget(3.0, 1e-5, 20, 0.04)], ids=["many", "few"]
    )
    def test_the_noise_of_a_large_budget_is_that_of_a_finer_accountant(
        self, budget: Budget
    ) -> None:
        noise = budget.noise_multiplier()
        step = PoissonSampledDpEvent(budget.rate, GaussianDpEvent(noise))
        finer = PLDAccountant(value_discretization_interval=1e-3)
        finer.compose(SelfComposedDpEvent(step, budget.releases))
        assert 0.98 * budget.epsilon < finer.get_epsilon(budget.delta) <= budget.epsilon

    def test_sampling_needs_less_noise(self) -> None:
        noise = [Budget(3.0, 1e-5, 10, rate).noise_multiplier() for rate in (0.05, 0.3, 1.0)]
        assert noise == sorted(noise)
        assert noise[0] < 0.4 * noise[-1]


class TestLedger:
    @pytest.mark.parametrize("per_round, rate", [(5, 0.25), (0.25, 0.25), (1.0, 1.0), (40, 1.0)])
    def test_clients_per_round_is_a_probability(self, per_round: int | float, rate: float) -> None:
        assert ledger_of(PrivacyConfig(epsilon=8.0), 20, per_round, 3).budget.rate == rate

    def test_noise_at_the_clients_counts_on_no_secret_sample(self) -> None:
        privacy = PrivacyConfig(epsilon=8.0, secure_aggregation=True)
        assert ledger_of(privacy, 20, 5, 3).budget.rate == 1.0

    def test_a_delta_that_would_give_one_client_away_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"privacy\.delta = 0\.05 would allow .* 20 clients"):
            ledger_of(PrivacyConfig(epsilon=8.0, delta=0.05), 20, 5, 3)
