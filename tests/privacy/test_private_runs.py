"""Whole runs under differential privacy: what is spent, also when a run is stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crash import Stopped, stop_after_round

import prelort
from prelort.config import Config
from prelort.errors import CheckpointError, ConfigError, PrelortError
from prelort.events import BudgetSpent
from prelort.methods import Client, build
from prelort.privacy import PrivateRun
from rounds import start
from run_files import adapters_of, events_of

Make = Callable[..., Config]
CLIENTS = [Client(f"site-{number}", 8, 1) for number in range(200)]
PRIVACY = {"epsilon": 4.0, "delta": 1e-3, "clip": 0.1}


@pytest.fixture
def config(make_config: Make) -> Config:
    return make_config(privacy=PRIVACY)


@pytest.fixture(params=["at the server", "at the clients"])
def either(request: pytest.FixtureRequest, make_config: Make, config: Config) -> Config:
    """Noise that the server adds, or the clients."""
    if request.param == "at the server":
        return config
    return make_config(
        privacy={**PRIVACY, "secure_aggregation": True, "adaptive_clipping": False},
        ranks={"mix": "8*1"},
        federation={"rounds": 3, "clients_per_round": 6},
    )


def releases(run: Path) -> int:
    return int(json.loads((run / "privacy.json").read_text())["releases"])


def test_a_run_spends_its_budget_and_not_more(tmp_path: Path, either: Config) -> None:
    result = prelort.run(either, tmp_path / "run")
    spent = [record.stats.epsilon for record in result.history.rounds.values()]
    assert spent == sorted(spent)
    assert 0.95 * 4.0 < spent[-1] <= 4.0
    assert releases(tmp_path / "run") == 3
    card = (tmp_path / "run" / "adapters" / "rank-8" / "README.md").read_text()
    assert f"epsilon = {spent[-1]:.3g}, delta = 0.001" in card


def test_noise_and_cohorts_do_not_come_from_the_seed(tmp_path: Path, either: Config) -> None:
    for name in ("one", "two"):
        prelort.run(either, tmp_path / name)
    assert adapters_of(tmp_path / "one") != adapters_of(tmp_path / "two")


def test_a_round_that_a_crash_repeats_is_paid_twice_and_the_run_ends_earlier(
    tmp_path: Path, either: Config
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        prelort.run(either, out, listeners=[stop_after_round(2)])
    assert releases(out) == 2
    result = prelort.run(either, out, resume=True)
    assert releases(out) == 3
    assert result.history.done == 2
    (spent,) = [event for event in events_of(out) if isinstance(event, BudgetSpent)]
    assert spent.epsilon <= 4.0
    assert max(result.history.evaluations) == 2
    assert adapters_of(out)


def test_a_release_is_paid_before_its_noise_is_drawn(tmp_path: Path, config: Config) -> None:
    def crash(shape: torch.Size) -> torch.Tensor:
        raise Stopped

    private, method = PrivateRun(config, tmp_path, normal=crash), build(config.method, config.seed)
    private.start(method, start(), CLIENTS)
    with pytest.raises(Stopped):
        private.aggregator(method, start(), [Client("a", 8, 1)]).result()
    assert releases(tmp_path) == 1


def test_a_sum_that_the_budget_does_not_cover_is_not_opened(tmp_path: Path, config: Config) -> None:
    private = PrivateRun(config, tmp_path)
    private.start(build(config.method, config.seed), start(), CLIENTS)
    for _ in range(3):
        private.count_release()
    with pytest.raises(PrelortError, match=r"privacy\.epsilon = 4 is spent"):
        private.count_release()
    assert releases(tmp_path) == 3


def test_more_rounds_than_were_paid_for_are_not_trained(tmp_path: Path, config: Config) -> None:
    out = tmp_path / "run"
    prelort.run(config, out)
    more = config.model_copy(
        update={"federation": config.federation.model_copy(update={"rounds": 5})}
    )
    assert prelort.run(more, out, resume=True).history.done == 3
    assert releases(out) == 3


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_without_its_ledger_a_run_is_not_resumed(tmp_path: Path, config: Config, harm: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        prelort.run(config, out, listeners=[stop_after_round(2)])
    ledger = out / "privacy.json"
    ledger.unlink() if harm == "missing" else ledger.write_text('{"epsilon": 4.0')
    with pytest.raises(CheckpointError, match=f"privacy.json' is {harm}, so what has been spent"):
        prelort.run(config, out, resume=True)


def test_attempts_at_a_round_have_one_sample(tmp_path: Path, config: Config) -> None:
    """Over several samples a client would take part with more than the probability of one."""
    private = PrivateRun(config, tmp_path)
    private.start(build(config.method, config.seed), start(), CLIENTS)
    clients = {f"site-{number}": number for number in range(200)}
    first = private.sample(clients)
    assert private.sample({**clients, "new": -1})[: len(first)] == first
    resumed = PrivateRun(config, tmp_path)
    assert resumed.sample(clients) == first
    private.count_release()
    assert private.sample(clients) != first


@pytest.mark.parametrize("epsilon", [0.0, 101.0, float("inf")])
def test_a_budget_that_means_nothing_is_refused(make_config: Make, epsilon: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = .* is not allowed"):
        make_config(privacy={"epsilon": epsilon})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"method": {"name": "flexlora"}}, "not possible with method 'flexlora'"),
        ({"ranks": {"allocation": "by-loss"}}, "not possible with ranks.allocation = 'by-loss'"),
        ({"robustness": {"rule": "median"}}, "not possible with robustness.rule"),
        (
            {"privacy": {"epsilon": 4.0, "secure_aggregation": True}},
            "not possible with privacy.secure_aggregation",
        ),
        ({"privacy": {"epsilon": 4.0, "delta": 0.2}}, "privacy.delta = 0.2 would allow"),
    ],
)
def test_what_has_no_guarantee_is_refused_and_leaves_nothing(
    tmp_path: Path, make_config: Make, changes: dict[str, dict[str, object]], sentence: str
) -> None:
    given = {"privacy": PRIVACY, "data": {"validation_fraction": 0.2}} | changes
    with pytest.raises(PrelortError, match=sentence) as refused:
        prelort.run(make_config(**given), tmp_path / "run")
    assert isinstance(refused.value, ConfigError)
    assert not (tmp_path / "run").exists()
