"""Tuning a study: keys of each method in each setting, chosen on validation rows with Optuna.

Every method gets the same number of trials in every setting. A trial runs the method with all
seeds of ``[tune]``; its value is the mean of `loss_of` over seeds, on the rows that
`data.validation_fraction` holds out. Test rows are never used. Trials are in a journal, so that
several processes share them and a stopped tuning continues.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
from filelock import FileLock
from pydantic import Field, model_validator

from prelort import config as configuration
from prelort import methods, tasks
from prelort.config import Config, Section
from prelort.errors import ConfigError, PrelortError
from prelort.events import Evaluated, Event, Metrics
from prelort.experiment.backend import InProcess
from prelort.experiment.folder import RunFolder
from prelort.experiment.run import run
from prelort.files import write_atomically
from prelort.library_logging import quiet_libraries
from prelort.metrics.scores import HIGHER_IS_BETTER, aurac
from prelort.seeds import derive
from prelort.study import definition
from prelort.study.definition import Compare, Study

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str
Print = Callable[[str], None]


class Range(Section):
    """Numbers between ``low`` and ``high``, drawn by their logarithm with ``log``."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _rising(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with log")
        return self


class Tune(Section):
    """The section ``[tune]`` of a study."""

    search: dict[str, Range | tuple[Value, ...]] = Field(
        default_factory=dict,
        description="key -> a range or a list of values; default: training.learning_rate from a "
        "quarter to four times its value",
    )
    trials: Annotated[int, Field(ge=1)] = 12
    """For each method in each setting."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1000, 1001)


@dataclass(frozen=True, slots=True)
class Target:
    """A method in a setting."""

    setting: str
    method: str

    @property
    def name(self) -> str:
        """The target in messages, and the name of its Optuna study."""
        return f"{self.setting}, {self.method}" if self.setting else self.method


@dataclass(frozen=True, slots=True)
class Plan:
    """What to tune: a study, its values with evaluation on validation rows, and the search."""

    study: Study
    values: Mapping[str, Any]
    tune: Tune
    metric: str

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every method in every setting."""
        return tuple(Target(s, m) for s in self.study.settings for m in self.study.methods)

    def configs(self, target: Target, chosen: Sequence[str]) -> list[Config]:
        """The configurations of one trial, one for each seed. Raises `ConfigError`."""
        compare = self.study.compare
        one = Compare(
            methods=(target.method,),
            seeds=self.tune.seeds,
            settings={s: o for s, o in compare.settings.items() if s == target.setting},
            overrides={m: o for m, o in compare.overrides.items() if m == target.method},
            tuned={target.setting: {target.method: tuple(chosen)}},
        )
        return [cell.config for cell in definition.study_of(self.values, one).cells]


def load(
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    trials: int | None = None,
) -> Plan:
    """Read what to tune from a study's file: its sections ``[compare]`` and ``[tune]``.

    Args:
        path: TOML file; None is the embedded default.
        overrides: ``key=value``, applied to the file.
        methods: replace the file's ``compare.methods``.
        trials: replaces ``tune.trials``.

    Raises:
        ConfigError: with one sentence; also where there are no validation rows.
    """
    study = definition.load(path, overrides, methods=methods)
    values = configuration.applied(configuration.read_values(path), overrides)
    values.pop("compare", None)
    section = dict(values.pop("tune", {}))
    if trials is not None:
        section["trials"] = trials
    tune = configuration.validated(Tune, section, "tune")
    if not tune.search:
        rate = study.base.training.learning_rate
        around = Range(low=rate / 4, high=rate * 4, log=True)
        tune = tune.model_copy(update={"search": {"training.learning_rate": around}})
    if study.base.data.validation_fraction == 0:
        raise ConfigError(
            "data.validation_fraction = 0.0 leaves no rows to tune on, and test rows are never "
            "used: set it to 0.1"
        )
    metric = study.compare.metric or tasks.get(study.base.task).metrics[0]
    on_validation = configuration.applied(
        values,
        [
            "evaluation.on=validation",
            "evaluation.diagnostics=false",
            f'evaluation.metrics=["{metric}"]',
            f"evaluation.every={max(1, study.base.federation.rounds // 4)}",
        ],
    )
    plan = Plan(study, on_validation, tune, metric)
    for target in plan.targets:
        config = plan.configs(target, _first_values(tune))[0]  # which refuses unknown keys
        if _is_personal(config):
            raise ConfigError(
                f"method {target.method!r} has no global adapter to measure: leave it out"
            )
    return plan


def tune(plan: Plan, out: Path, *, jobs: int = 1, say: Print = print) -> Path:
    """Run the trials that are missing in ``out``, and write the tuned study's file there.

    Args:
        plan: from `load`.
        out: the folder; the same call again continues, also while another process works on it.
        jobs: number of processes.
        say: called with a line for each trial (with one job).

    Returns:
        ``out/study.toml``, for `prelort compare`.

    Raises:
        ConfigError: ``out`` belongs to another study, or no trial of a method has a value.
    """
    _optuna()
    _claim(plan, out)
    if jobs == 1:
        _work(plan, out, say)
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(_work_in_process, plan, out, jobs) for _ in range(jobs)]:
                future.result()
    tuned: dict[str, dict[str, tuple[str, ...]]] = {}
    for target in plan.targets:
        best = _best(_open(target, out), target)
        tuned.setdefault(target.setting, {})[target.method] = _overrides(best.params)
        say(f"{target.name}: {', '.join(_overrides(best.params))}")
    compare = plan.study.compare.model_copy(update={"tuned": tuned})
    file = out / definition.STUDY_FILE
    write_atomically(file, Study(plan.study.base, compare, ()).to_toml().encode())
    return file


def loss_of(method: str, metric: str, prefixes: Mapping[int, Metrics]) -> float:
    """The value to minimise: the area under the rank curve, of log perplexity or minus a score.

    For the homogeneous references: the value at their own rank.
    """
    sign = -1.0 if HIGHER_IS_BETTER[metric] else 1.0
    curve = {
        rank: sign * (math.log(values[metric]) if metric == "perplexity" else values[metric])
        for rank, values in prefixes.items()
    }
    pick = {"homogeneous-min": min, "homogeneous-max": max}.get(method)
    return curve[pick(curve)] if pick is not None else aurac(curve)


def _work_in_process(plan: Plan, out: Path, jobs: int) -> None:
    """`_work` as one of several processes."""
    import torch

    quiet_libraries()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _work(plan, out, print)


def _work(plan: Plan, out: Path, say: Print) -> None:
    """Run trials until every target has its number of them."""
    backend = InProcess()  # reads rows that trials share once
    for target in plan.targets:
        study = _open(target, out)
        while (trial := _next_trial(study, plan, target, out)) is not None:
            _run_trial(study, trial, plan, target, out, backend)
            finished = study.get_trials(deepcopy=False)[trial.number]
            value = "pruned" if finished.value is None else f"loss {finished.value:.4g}"
            reason = finished.user_attrs.get("reason", "")
            say(
                f"{target.name}, trial {trial.number + 1} of {plan.tune.trials}: "
                f"{', '.join(_overrides(finished.params))}: {reason or value}"
            )


def _open(target: Target, out: Path) -> optuna.Study:
    library = _optuna()
    backend = library.storages.journal.JournalFileBackend(str(out / "trials.log"))
    study: optuna.Study = library.create_study(
        study_name=target.name,
        storage=library.storages.JournalStorage(backend),
        pruner=library.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )
    return study


def _next_trial(
    study: optuna.Study, plan: Plan, target: Target, out: Path
) -> optuna.trial.Trial | None:
    """A new trial with its values; None if there are enough.

    A trial whose process has ended is repeated, and its run continues from its last checkpoint.
    """
    optuna = _optuna()
    state = optuna.trial.TrialState
    with FileLock(out / ".lock"):
        for trial in study.get_trials(deepcopy=False):
            if trial.state == state.RUNNING and not _is_alive(trial.user_attrs.get("process")):
                study.tell(trial.number, state=state.FAIL)
                study.enqueue_trial(trial.params)
        trials = study.get_trials(deepcopy=False)
        if not trials:
            study.enqueue_trial(_defaults(plan, target))
        counted = (state.COMPLETE, state.PRUNED, state.RUNNING)
        if sum(trial.state in counted for trial in trials) >= plan.tune.trials:
            return None
        # A seed for each trial, so that processes do not draw the same values.
        seed = derive(0, "tune", target.name, len(trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        new = study.ask()
        new.set_user_attr("process", [socket.gethostname(), os.getpid()])
        for key, space in plan.tune.search.items():
            _suggest(new, key, space)
        return new


def _run_trial(
    study: optuna.Study,
    trial: optuna.trial.Trial,
    plan: Plan,
    target: Target,
    out: Path,
    backend: InProcess,
) -> None:
    """Run one trial's seeds; a trial that fails, or is worse than the median, is pruned."""
    optuna = _optuna()
    losses: list[float] = []
    folders: list[Path] = []

    def listener(event: Event) -> None:
        if isinstance(event, Evaluated) and event.round > 0 and event.prefixes:
            so_far = [*losses, loss_of(target.method, plan.metric, event.prefixes)]
            trial.report(statistics.fmean(so_far), len(losses) * 10**6 + event.round)
            if trial.should_prune():
                raise optuna.TrialPruned

    try:
        for config in plan.configs(target, _overrides(trial.params)):
            key = derive(config.seed, target.name, json.dumps(trial.params, sort_keys=True))
            folder = RunFolder(out / "runs" / f"{key:x}")
            folders.append(folder.path)
            result = run(
                config,
                folder.path,
                resume=folder.config_file.is_file(),
                listeners=[listener],
                backend=backend,
            )
            losses.append(loss_of(target.method, plan.metric, result.metrics))
        study.tell(trial, statistics.fmean(losses))
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except ConfigError:
        raise
    except PrelortError as error:  # for example, training diverges at this rate
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def _suggest(trial: optuna.trial.Trial, key: str, space: Range | tuple[Value, ...]) -> None:
    if not isinstance(space, Range):
        trial.suggest_categorical(key, space)
    elif isinstance(space.low, int) and isinstance(space.high, int):
        trial.suggest_int(key, space.low, space.high, log=space.log)
    else:
        trial.suggest_float(key, space.low, space.high, log=space.log)


def _defaults(plan: Plan, target: Target) -> dict[str, Value]:
    """The first trial: the study's own values, of the keys whose search includes them."""
    values = configuration.flat(plan.configs(target, ())[0])
    return {k: values[k] for k, space in plan.tune.search.items() if _has(space, values.get(k))}


def _has(space: Range | tuple[Value, ...], value: Any) -> bool:
    if isinstance(space, Range):
        return isinstance(value, int | float) and space.low <= value <= space.high
    return value in space


def _first_values(tune: Tune) -> tuple[str, ...]:
    return _overrides({k: s.low if isinstance(s, Range) else s[0] for k, s in tune.search.items()})


def _overrides(params: Mapping[str, Value]) -> tuple[str, ...]:
    """``key=value`` as a configuration reads it."""
    return tuple(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={_toml(value)}"
        for key, value in sorted(params.items())
    )


def _toml(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _best(study: optuna.Study, target: Target) -> optuna.trial.FrozenTrial:
    """The trial with the lowest value. Raises `ConfigError` if no trial has one."""
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.value is not None and math.isfinite(t.value)]
    if not complete:
        reasons = [t.user_attrs["reason"] for t in trials if "reason" in t.user_attrs]
        raise ConfigError(f"{target.name}: no trial has a value: {(reasons or ['all pruned'])[-1]}")
    return min(complete, key=lambda trial: trial.value or 0.0)


def _claim(plan: Plan, out: Path) -> None:
    """Create the folder, or check that it belongs to the same study."""
    text = json.dumps(
        {"values": plan.values, "tune": plan.tune.model_dump(exclude={"trials"})}, default=str
    )
    file = out / "tune.json"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{str(out)!r} tunes another study: choose another --out")
    if out.exists() and not file.is_file() and any(out.iterdir()):
        raise ConfigError(f"{str(out)!r} exists and holds no tuning: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())


def _is_alive(process: Sequence[Any] | None) -> bool:
    """Whether a process of this machine is alive; those of other machines count as alive."""
    if process is None:
        return False
    host, pid = process
    if host != socket.gethostname():
        return True
    alive: bool = psutil.pid_exists(int(pid))
    return alive


def _is_personal(config: Config) -> bool:
    return methods.trait(methods.find(config.method.name), "personal")


def _optuna() -> Any:
    """Optuna, quiet. Raises `ConfigError` where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("`prelort tune` needs Optuna: pip install 'prelort[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
