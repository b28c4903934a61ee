"""The budget of a client's examples: accounting, and what is spent, also in whole runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from crash import Stopped, stop_after_round
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from pydantic import TypeAdapter, ValidationError
from scipy.integrate import quad
from scipy.stats import norm

import prelort
from prelort.config import Config, TrainingConfig
from prelort.errors import CheckpointError, ConfigError, PrelortError
from prelort.events import BudgetSpent, ClientFinished
from prelort.privacy.accounting import Releases, epsilon_of
from prelort.privacy.example import ExampleLedger, ExamplePrivacy
from prelort.training.private import budget_of
from prelort.training.settings import LocalTraining
from run_files import adapters_of, events_of

Make = Callable[..., Config]
PRIVACY = {"epsilon": 4.0, "delta": 1e-3, "clip": 0.5, "unit": "example"}
ASKED = ExamplePrivacy(epsilon=4.0, delta=1e-5, clip=1.0)
STEPS = LocalTraining.of(TrainingConfig(batch_size=4, gradient_accumulation=2, local_steps=5))


def delta_of_one_step(epsilon: float, noise: float, rate: float) -> float:
    """Of the sampled Gaussian mechanism, by its definition: the worse of both directions."""

    def mixture(x: float) -> float:
        return (1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, 1, noise)

    def gap(p: Callable[[float], float], q: Callable[[float], float]) -> float:
        value, _ = quad(
            lambda x: max(p(x) - math.exp(epsilon) * q(x), 0.0), -20, 20, points=[0, 1], limit=500
        )
        return value

    plain_ = lambda x: norm.pdf(x, 0, noise)  # noqa: E731
    return max(gap(mixture, plain_), gap(plain_, mixture))


class TestAccounting:
    @pytest.mark.parametrize("noise, rate", [(0.8, 0.1), (1.2, 0.4), (2.0, 1.0)])
    def test_one_step_has_the_epsilon_of_the_sampled_gaussian(
        self, noise: float, rate: float
    ) -> None:
        epsilon = epsilon_of([Releases(noise, rate, 1)], 1.0, 1e-4)
        assert delta_of_one_step(epsilon, noise, rate) <= 1e-4
        assert delta_of_one_step(epsilon - 0.01, noise, rate) > 1e-4

    def test_a_clients_budget_covers_all_its_steps_by_another_accountant_too(self) -> None:
        """Renyi differential privacy is an upper bound, and not far above."""
        budget = budget_of(ASKED, 100, STEPS, rounds=13)
        noise = budget.noise_multiplier()
        step = PoissonSampledDpEvent(0.08, GaussianDpEvent(noise))
        renyi = RdpAccountant().compose(SelfComposedDpEvent(step, 65)).get_epsilon(1e-5)
        assert 4.0 < renyi < 1.25 * 4.0
        assert 0.98 * 4.0 < epsilon_of([Releases(noise, 0.08, 65)], 4.0, 1e-5) <= 4.0

    def test_a_client_with_fewer_examples_than_a_batch_uses_all_of_them(self) -> None:
        assert budget_of(ASKED, 5, STEPS, rounds=1).rate == 1.0

    def test_a_delta_that_would_give_one_example_away_is_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"privacy\.delta = 0\.01 would allow .* 100 examples"
        ):
            budget_of(replace(ASKED, delta=0.01), 100, STEPS, rounds=1)


class TestLedger:
    def pay(self, ledger: ExampleLedger, privacy: ExamplePrivacy = ASKED, rounds: int = 3) -> None:
        ledger.pay(privacy, budget_of(privacy, 100, STEPS, rounds), steps=5)

    def test_rounds_are_paid_for_until_the_budget_is_spent(self, tmp_path: Path) -> None:
        for _ in range(3):
            self.pay(ExampleLedger(tmp_path / "ledger"))  # as after a restart
        ledger = ExampleLedger(tmp_path / "ledger")
        assert 3.9 < ledger.epsilon(ASKED) <= 4.0
        with pytest.raises(PrelortError, match=r"has spent its privacy budget: .* = 4,"):
            self.pay(ledger)
        assert ledger.epsilon(ASKED) <= 4.0

    def test_more_rounds_than_were_planned_exceed_it(self, tmp_path: Path) -> None:
        ledger = ExampleLedger(tmp_path / "ledger")
        for _ in range(3):
            self.pay(ledger)
        with pytest.raises(PrelortError, match="has spent its privacy budget"):
            self.pay(ledger, rounds=30)

    def test_runs_of_one_client_add_up(self, tmp_path: Path) -> None:
        ledger, more = ExampleLedger(tmp_path / "ledger"), replace(ASKED, epsilon=8.0)
        for _ in range(3):
            self.pay(ledger)
        self.pay(ledger, more)
        assert 4.0 < ledger.epsilon(ASKED) < 8.0

    @pytest.mark.parametrize("changes", [{"epsilon": 4.1}, {"delta": 1e-4}])
    def test_a_site_has_a_limit_of_its_own(self, tmp_path: Path, changes: dict[str, float]) -> None:
        ledger = ExampleLedger(tmp_path / "ledger", limit=(4.0, 1e-5))
        self.pay(ledger)
        with pytest.raises(PrelortError, match=r"allows privacy\.epsilon = 4 at"):
            self.pay(ledger, replace(ASKED, **changes))

    def test_a_damaged_one_is_not_taken_for_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "ledger").write_text('[{"rate": 0.1}]')
        with pytest.raises(CheckpointError, match="is damaged, so what has been spent"):
            self.pay(ExampleLedger(tmp_path / "ledger"))


@pytest.fixture
def config(make_config: Make) -> Config:
    return make_config(privacy=PRIVACY)


def steps_paid(run: Path) -> dict[str, int]:
    """Ledger -> the steps in it."""
    return {
        file.name: sum(one["count"] for one in json.loads(file.read_text()))
        for file in (run / "privacy").glob("*.json")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"name": "prelort", "objective": "example"}},
        {"method": {"name": "flexlora"}},
        {"robustness": {"rule": "clip"}},
        {"privacy": {**PRIVACY, "secure_aggregation": True, "min_holders": 2}},
    ],
    ids=["default", "by example", "products", "robust", "masked"],
)
def test_a_run_keeps_to_the_budget_and_states_no_losses(
    tmp_path: Path, make_config: Make, changes: dict[str, dict[str, object]]
) -> None:
    out = tmp_path / "run"
    federation = {"rounds": 2, "clients_per_round": 1.0}
    settings = {"privacy": PRIVACY, "ranks": {"mix": "8*1"}, "federation": federation} | changes
    result = prelort.run(make_config(**settings), out)
    assert 0.9 * 4.0 < result.history.epsilon <= 4.0
    finished = [event for event in events_of(out) if isinstance(event, ClientFinished)]
    assert finished
    assert all(math.isnan(event.loss) for event in finished)
    card = (out / "adapters" / "rank-8" / "README.md").read_text()
    assert f"each client's examples | epsilon = {result.history.epsilon:.3g}, delta = 0.001" in card


def test_a_repeated_round_is_paid_twice_and_the_run_ends_earlier(
    tmp_path: Path, make_config: Make
) -> None:
    config = make_config(privacy=PRIVACY, federation={"rounds": 3, "clients_per_round": 1.0})
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        prelort.run(config, out, listeners=[stop_after_round(2)])
    before = steps_paid(out)
    result = prelort.run(config, out, resume=True)
    assert {name: 3 * steps // 2 for name, steps in before.items()} == steps_paid(out)
    assert result.history.done == 2
    assert result.history.epsilon <= 4.0
    assert [type(event) for event in events_of(out)].count(BudgetSpent) == 1
    assert adapters_of(out)


def test_more_rounds_than_were_paid_for_are_not_trained(tmp_path: Path, make_config: Make) -> None:
    out, federation = tmp_path / "run", {"rounds": 2, "clients_per_round": 1.0}
    prelort.run(make_config(privacy=PRIVACY, federation=federation), out)
    paid = steps_paid(out)
    more = make_config(privacy=PRIVACY, federation={**federation, "rounds": 4})
    assert prelort.run(more, out, resume=True).history.done == 2
    assert steps_paid(out) == paid


def test_noise_and_batches_do_not_come_from_the_seed(tmp_path: Path, config: Config) -> None:
    for name in ("one", "two"):
        prelort.run(config, tmp_path / name)
    assert adapters_of(tmp_path / "one") != adapters_of(tmp_path / "two")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"ranks": {"allocation": "by-loss"}}, "not possible with ranks.allocation = 'by-loss'"),
        ({"training": {"packing": True}}, "with training.packing: examples of one row"),
        ({"training": {"batch_truncations": True}}, "with training.batch_truncations: the"),
        ({"federation": {"clients_per_batch": 2}}, "with federation.clients_per_batch = 2"),
        ({"evaluation": {"at_clients": True}}, "with evaluation.at_clients: what"),
        ({"data": {"source": "sites"}}, "with data.source = 'sites' without data.test: what"),
        ({"method": {"name": "fedsa-lora"}}, "with method 'fedsa-lora', which clients measure"),
        ({"privacy": {**PRIVACY, "delta": 0.2}}, "privacy.delta = 0.2 would allow to publish"),
        ({"lora": {"modules_to_save": ["norm"]}}, "with a LlamaRMSNorm that is trained in full"),
    ],
)
def test_what_has_no_guarantee_is_refused_and_leaves_nothing(
    tmp_path: Path, make_config: Make, changes: dict[str, dict[str, object]], sentence: str
) -> None:
    given = {"privacy": PRIVACY, "data": {"validation_fraction": 0.2}} | changes
    with pytest.raises(ConfigError, match=sentence):
        prelort.run(make_config(**given), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_lost_its_ledgers_does_not_go_on(tmp_path: Path, config: Config) -> None:
    with pytest.raises(Stopped):
        prelort.run(config, tmp_path / "run", listeners=[stop_after_round(2)])
    shutil.rmtree(tmp_path / "run" / "privacy")
    with pytest.raises(CheckpointError, match="privacy' is missing, so what has been spent"):
        prelort.run(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("clip", [1e-28, 1e7])
def test_no_client_clips_to_a_norm_that_float32_cannot_keep(clip: float) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ExamplePrivacy).validate_python({"epsilon": 1, "delta": 1e-5, "clip": clip})
