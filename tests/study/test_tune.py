"""Tuning: equal budgets on validation rows, resumed after a kill, written for `prelort compare`."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

optuna = pytest.importorskip("optuna", reason="needs prelort[tune]")

from prelort.config import Config, to_toml  # noqa: E402
from prelort.errors import ConfigError, PrelortError  # noqa: E402
from prelort.study import definition  # noqa: E402
from prelort.study import tune as module  # noqa: E402
from prelort.study.tune import Target, _open, load, loss_of, tune  # noqa: E402

COMPARE = '\n[compare]\nmethods = ["prelort", "zero-padding"]\nseeds = [0]\n'
SETTINGS = (
    COMPARE
    + """
[compare.settings]
short = ["federation.rounds=1"]
long = ["evaluation.on=test"]
[compare.tuned.long]
prelort = ["training.learning_rate=3e-3", "training.momentum=0.3"]
"""
)
SEARCH = """
[tune]
trials = 3
seeds = [7]
[tune.search]
"training.learning_rate" = [1e-9, 5e-2, 1e-8]
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, make_config: Callable[..., Config]) -> Write:
    def written(rest: str = COMPARE + SEARCH, fraction: float = 0.2, **changes: object) -> Path:
        config = make_config(
            data={"validation_fraction": fraction}, federation={"rounds": 2}, **changes
        )
        path = tmp_path / "study.toml"
        path.write_text(to_toml(config) + rest)
        return path

    return written


def trials_of(out: Path, target: Target) -> list[optuna.trial.FrozenTrial]:
    return _open(target, out).get_trials()


def rates(study: definition.Study) -> dict[tuple[str, str], float]:
    return {(c.setting, c.method): c.config.training.learning_rate for c in study.cells}


def test_every_method_and_setting_gets_its_trials_and_its_own_best(
    write: Write, tmp_path: Path
) -> None:
    plan = load(write(SETTINGS + SEARCH))
    for target in plan.targets:
        for config in plan.configs(target, {}):
            assert config.evaluation.on == "validation"
    tuned = tune(plan, tmp_path / "out", say=lambda line: None)
    for target in plan.targets:
        trials = trials_of(tmp_path / "out", target)
        assert len(trials) == 3
        best = min((t for t in trials if t.value is not None), key=lambda t: t.value)
        found = rates(definition.load(tuned))[target.setting, target.method]
        assert found == best.params["training.learning_rate"]
    momenta = {c.name: c.config.training.momentum for c in definition.load(tuned).cells}
    assert [name for name, momentum in momenta.items() if momentum == 0.3] == [
        "long, prelort, seed 0"  # of an earlier tuning
    ]
    assert not list((tmp_path / "out" / "runs").iterdir())


@pytest.mark.chaos
def test_a_stopped_tuning_goes_on_where_it_was(write: Write, tmp_path: Path) -> None:
    """Killed within a trial: that trial is repeated with its values, and the others are kept."""
    path, out = write(), tmp_path / "out"
    program = (
        "import os, sys\n"
        "from prelort.study import tune as module\n"
        "given = module.run\n"
        "def run(*arguments, **others):\n"
        "    module.calls = getattr(module, 'calls', 0) + 1\n"
        "    if module.calls == 2: os._exit(9)\n"
        "    return given(*arguments, **others)\n"
        "module.run = run\n"
        "module.tune(module.load(sys.argv[1]), module.Path(sys.argv[2]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path), str(out)], check=False)
    assert killed.returncode == 9
    target = Target("", "prelort")
    first, second = trials_of(out, target)
    assert first.value is not None
    assert second.state == optuna.trial.TrialState.RUNNING
    tune(load(path), out, say=lambda line: None)
    after = trials_of(out, target)
    assert after[0] == first
    assert after[1].state == optuna.trial.TrialState.FAIL
    assert after[2].params == second.params
    assert sum(t.state != optuna.trial.TrialState.FAIL for t in after) == 3


def test_a_trial_that_diverges_is_pruned_and_not_chosen(write: Write, tmp_path: Path) -> None:
    search = SEARCH.replace("1e-9, 5e-2, 1e-8", "1e30, 5e-2").replace("trials = 3", "trials = 6")
    lines: list[str] = []
    plan = load(write(COMPARE + search), methods=["prelort"])
    tuned = tune(plan, tmp_path / "out", say=lines.append)
    assert set(rates(definition.load(tuned)).values()) == {5e-2}
    assert any("1e+30: round 1 has 0 usable replies" in line for line in lines), lines


@pytest.mark.parametrize("fault", ["fails at its end", "is not finite"])
def test_only_a_complete_trial_is_chosen(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """However good it was before its end."""
    train = module.run

    def run(config: Config, *arguments: Any, **others: Any) -> Any:
        result = train(config, *arguments, **others)
        if config.training.learning_rate == 5e-2:
            if fault == "fails at its end":
                raise PrelortError(fault)
            return SimpleNamespace(metrics={2: {"perplexity": math.nan}})
        return result

    monkeypatch.setattr(module, "run", run)
    lines: list[str] = []
    tuned = tune(load(write(), methods=["prelort"]), tmp_path / "out", say=lines.append)
    assert set(rates(definition.load(tuned)).values()) < {1e-9, 1e-8}
    assert any(f"=0.05: {fault}" in line or line.endswith(fault) for line in lines), lines


@pytest.mark.chaos
def test_two_processes_share_one_budget(write: Write, tmp_path: Path) -> None:
    """Also where both draw the same values."""
    rest = COMPARE + SEARCH.replace("1e-9, 5e-2, 1e-8", "5e-2")
    plan = load(write(rest), methods=["prelort"])
    tune(plan, tmp_path / "out", jobs=2)
    trials = trials_of(tmp_path / "out", Target("", "prelort"))
    assert len(trials) == 3
    assert len({tuple(t.user_attrs["process"]) for t in trials}) == 2


@pytest.mark.parametrize(
    "rest, fraction, sentence",
    [
        (COMPARE, 0.0, "test rows are never used"),
        (COMPARE + '[tune.search]\n"training.speed" = [1]\n', 0.2, "training.speed"),
        (COMPARE + "[tune.search]\nseed = {low = 3, high = 2}\n", 0.2, "low must be below high"),
        (COMPARE + '[tune.search]\n"training.momentum" = [0.9, 1.5]\n', 0.2, "momentum = 1.5"),
        (COMPARE + '[tune.search]\n"training.momentum" = []\n', 0.2, "at least 1 item"),
        (COMPARE + "[tune]\nseeds = [7, 7]\n", 0.2, "7 is listed twice"),
        (COMPARE.replace("zero-padding", "fedsa-lora"), 0.2, "no global adapter"),
    ],
    ids=[
        "no validation rows",
        "unknown key",
        "empty range",
        "one value of several",
        "no value",
        "seeds",
        "personal",
    ],
)
def test_what_cannot_be_tuned_is_refused(
    write: Write, rest: str, fraction: float, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(write(rest, fraction))


def test_a_folder_goes_on_with_more_trials_but_not_with_another_study(
    write: Write, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "notes").touch()
    with pytest.raises(ConfigError, match="holds no tuning"):
        tune(load(write()), other)
    plan = load(write(), methods=["prelort"], trials=1)
    tune(plan, out, say=lambda line: None)
    (first,) = trials_of(out, plan.targets[0])
    changed = COMPARE + '[compare.overrides]\nprelort = ["training.momentum=0.5"]\n' + SEARCH
    with pytest.raises(ConfigError, match="tunes prelort of another study"):
        tune(load(write(changed), methods=["prelort"]), out)
    tune(load(write(), methods=["prelort"], trials=2), out, say=lambda line: None)
    again, _ = trials_of(out, plan.targets[0])
    assert again == first


def test_the_loss_weighs_ranks_evenly() -> None:
    prefixes = {1: {"perplexity": 8.0}, 2: {"perplexity": 4.0}, 4: {"perplexity": 2.0}}
    assert loss_of("prelort", "perplexity", prefixes) == pytest.approx(2 * math.log(2))
    assert loss_of("homogeneous-min", "perplexity", prefixes) == pytest.approx(math.log(8))
    assert loss_of("prelort", "accuracy", {2: {"accuracy": 0.5}}) == -0.5
