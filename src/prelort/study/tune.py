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
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any

import psutil
from filelock import FileLock
from pydantic import Field, model_validator

from prelort import config as configuration
from prelort import tasks
from prelort.config import Config, Section
from prelort.errors import ConfigError, PrelortError
from prelort.events import Evaluated, Event, Metrics
from prelort.experiment.backend import Backend, Connect, InProcess
from prelort.experiment.folder import RunFolder, is_taken
from prelort.experiment.run import run
from prelort.files import write_atomically
from prelort.methods import build, find, trait
from prelort.metrics.scores import aurac, higher_is_better
from prelort.seeds import derive
from prelort.study import definition
from prelort.study.definition import Compare, Study
from prelort.study.worker import begin

try:
    import optuna
except ImportError:
    raise ConfigError("`prelort tune` needs Optuna: pip install 'prelort[tune]'") from None
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

Value = bool | int | float | str
Print = Callable[[str], None]
JOURNAL = "trials.log"


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

    search: dict[str, Range | Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(
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
    """What to tune: a study and the values of its file, what to search, and the metric."""

    study: Study
    values: Mapping[str, Any]
    tune: Tune
    search: Mapping[str, BaseDistribution]
    metric: str

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every method in every setting."""
        return tuple(Target(s, m) for s in self.study.settings for m in self.study.methods)

    def tuned(self, target: Target, chosen: Mapping[str, Value]) -> tuple[str, ...]:
        """The overrides of ``[compare.tuned]``: the study's own of other keys, and the chosen."""
        own = self.study.compare.tuned.get(target.setting, {}).get(target.method, ())
        kept = (o for o in own if o.partition("=")[0].strip() not in chosen)
        return (*kept, *(f"{k}={json.dumps(v)}" for k, v in sorted(chosen.items())))

    def configs(self, target: Target, chosen: Mapping[str, Value]) -> list[Config]:
        """The configurations of one trial, one for each seed. Raises `ConfigError`."""
        compare = self.study.compare
        measured = (  # last, so that nothing of the study's own leads to test rows
            "evaluation.on=validation",
            "evaluation.diagnostics=false",
            f'evaluation.metrics=["{self.metric}"]',
            f"evaluation.every={max(1, self.study.base.federation.rounds // 4)}",
        )
        one = {
            "methods": (target.method,),
            "seeds": self.tune.seeds,
            "settings": {s: o for s, o in compare.settings.items() if s == target.setting},
            "overrides": {m: o for m, o in compare.overrides.items() if m == target.method},
            "tuned": {target.setting: {target.method: (*self.tuned(target, chosen), *measured)}},
        }
        trial = configuration.validated(Compare, one, "tune")
        return [cell.config for cell in definition.study_of(self.values, trial).cells]


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
    section = values.pop("tune", {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"tune = {section!r} is not allowed: it is a section, [tune]")
    more = {} if trials is None else {"trials": trials}
    tune = configuration.validated(Tune, {**section, **more}, "tune")
    if study.base.data.validation_fraction == 0:
        raise ConfigError(
            "data.validation_fraction = 0.0 leaves no rows to tune on, and test rows are never "
            "used: set it to 0.1"
        )
    metric = study.compare.metric or tasks.get(study.base.task).metrics[0]
    plan = Plan(study, values, tune, _search(tune, study), metric)
    for target in plan.targets:
        config = plan.configs(target, {})[0]
        if trait(find(config.method.name), "personal"):
            raise ConfigError(
                f"method {target.method!r} has no global adapter to measure: leave it out"
            )
        for chosen in _every_value(plan.search):
            try:
                config = plan.configs(target, chosen)[0]
                build(config.method, config.seed)
            except ConfigError as error:
                raise ConfigError(f"tune.search: {error}") from None
    return plan


def tune(plan: Plan, out: Path, *, jobs: int = 1, say: Print = print) -> Path:
    """Run the trials that are missing in ``out``, and write the tuned study's file there.

    Args:
        plan: from `load`.
        out: the folder; the same call again continues, also while another process works on it.
        jobs: number of processes.
        say: called with a line for each trial; with several jobs a function that can be pickled.

    Returns:
        ``out/study.toml``, for `prelort compare`.

    Raises:
        ConfigError: ``out`` belongs to another study, or no trial of a method has a value.
        PrelortError: one of several processes was killed.
    """
    _claim(plan, out)
    if jobs > 1:
        _work_side_by_side(plan, out, jobs, say)
    _work(plan, out, say)
    while any(_is_running(trial) for target in plan.targets for trial in _trials(target, out)):
        time.sleep(1.0)  # another call's last trials
        _work(plan, out, say)  # which are run here if it ends
    tuned: dict[str, dict[str, tuple[str, ...]]] = {}
    for target in plan.targets:
        best = _best(_trials(target, out), target)
        tuned.setdefault(target.setting, {})[target.method] = plan.tuned(target, best.params)
        say(f"{target.name}: {_text(best.params)}")
    changes = {"methods": plan.study.methods, "tuned": tuned}
    compare = plan.study.compare.model_copy(update=changes)
    file = out / definition.STUDY_FILE
    write_atomically(file, Study(plan.study.base, compare, ()).to_toml().encode())
    return file


def loss_of(method: str, metric: str, prefixes: Mapping[int, Metrics]) -> float:
    """The value to minimise: the area under the rank curve, of log perplexity or minus a score.

    For the homogeneous references: the value at their own rank.
    """
    sign = -1.0 if higher_is_better(metric) else 1.0
    curve = {
        rank: sign * (math.log(values[metric]) if metric == "perplexity" else values[metric])
        for rank, values in prefixes.items()
    }
    pick = {"homogeneous-min": min, "homogeneous-max": max}.get(method)
    return curve[pick(curve)] if pick is not None else aurac(curve)


def _work_side_by_side(plan: Plan, out: Path, jobs: int, say: Print) -> None:
    """Run trials in several processes, which end with this one, and when one of them fails."""
    earlier = active_children()
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=begin, initargs=(os.getpid(), jobs)
    ) as pool:
        try:
            for future in as_completed([pool.submit(_work, plan, out, say) for _ in range(jobs)]):
                future.result()
        except BaseException as error:
            for process in active_children():
                if process not in earlier:
                    process.kill()
            if isinstance(error, BrokenProcessPool):
                raise PrelortError(
                    "a process that ran trials was killed, perhaps for its memory: the same call "
                    "continues; use fewer jobs"
                ) from None
            raise


def _work(plan: Plan, out: Path, say: Print) -> None:
    """Run trials until every target has its number of them."""
    backend = _bare(InProcess())  # reads rows that trials share once
    for target in plan.targets:
        study = _open(target, out)
        while (trial := _next_trial(study, plan, target, out)) is not None:
            _run_trial(study, trial, plan, target, out, backend)
            trials = study.get_trials(deepcopy=False)
            finished = trials[trial.number]
            complete = finished.state == TrialState.COMPLETE
            value = f"loss {finished.value:.4g}" if complete else "pruned"
            done = sum(one.state in (TrialState.COMPLETE, TrialState.PRUNED) for one in trials)
            reason = finished.user_attrs.get("reason", "")
            say(
                f"{target.name}, trial {done} of {plan.tune.trials}: "
                f"{_text(finished.params)}: {reason or value}"
            )


def _bare(connect: Connect) -> Connect:
    """A backend for runs of which only the metrics count.

    Their data are not drawn, and their adapters not checked, for which the base is loaded again.
    """

    @contextmanager
    def bare(config: Config, folder: Path) -> Generator[Backend]:
        with connect(config, folder) as backend:
            yield replace(backend, rows=None, check_exported=None)

    return bare


def _open(target: Target, out: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalFileBackend(str(out / JOURNAL))
    return optuna.create_study(
        study_name=target.name,
        storage=optuna.storages.JournalStorage(backend),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )


def _trials(target: Target, out: Path) -> list[FrozenTrial]:
    return _open(target, out).get_trials(deepcopy=False)


def _next_trial(study: optuna.Study, plan: Plan, target: Target, out: Path) -> Trial | None:
    """A new trial with its values; None if there are enough.

    A trial whose process has ended is repeated, and its run continues from its last checkpoint.
    """
    with FileLock(out / ".lock"):
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and not _is_running(trial):
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params, {"folders": _folders_of(trial)})
        trials = study.get_trials(deepcopy=False)
        if not trials:
            study.enqueue_trial(_defaults(plan, target))
        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        if sum(trial.state in counted for trial in trials) >= plan.tune.trials:
            return None
        # A seed for each trial, so that processes do not draw the same values.
        seed = derive(0, "tune", target.name, len(trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        new = study.ask(dict(plan.search))
        new.set_user_attr("process", [socket.gethostname(), os.getpid()])
        return new


def _run_trial(
    study: optuna.Study, trial: Trial, plan: Plan, target: Target, out: Path, backend: Connect
) -> None:
    """Run one trial's seeds; a trial that fails, or is worse than the median, is pruned."""
    losses: list[float] = []
    folders: list[Path] = []
    method = ""

    def listener(event: Event) -> None:
        if isinstance(event, Evaluated) and event.round > 0 and event.prefixes:
            so_far = [*losses, loss_of(method, plan.metric, event.prefixes)]
            trial.report(statistics.fmean(so_far), len(losses) * 10**6 + event.round)
            if trial.should_prune():
                raise optuna.TrialPruned

    try:
        for config in plan.configs(target, trial.params):
            method = config.method.name
            key = derive(config.seed, target.name, _folders_of(trial))
            folder = RunFolder(out / "runs" / f"{key:x}")
            folders.append(folder.path)
            resume = folder.config_file.is_file()
            result = run(config, folder.path, resume=resume, listeners=[listener], backend=backend)
            losses.append(loss_of(method, plan.metric, result.metrics))
        if not math.isfinite(statistics.fmean(losses)):
            raise PrelortError(f"{plan.metric} is not finite")
        study.tell(trial, statistics.fmean(losses))
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except ConfigError:
        raise
    except PrelortError as error:  # for example, training diverges at this rate
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=TrialState.PRUNED)
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def _search(tune: Tune, study: Study) -> dict[str, BaseDistribution]:
    """What to search, by default the rate; a range such as 0 to 1 of a float key has floats."""
    rate = study.base.training.learning_rate
    default = {"training.learning_rate": Range(low=rate / 4, high=rate * 4, log=True)}
    own = configuration.flat(study.base)
    search: dict[str, BaseDistribution] = {}
    for key, space in (tune.search or default).items():
        if not isinstance(space, Range):
            search[key] = CategoricalDistribution(space)
        elif isinstance(own.get(key), float) or isinstance(space.low + space.high, float):
            search[key] = FloatDistribution(space.low, space.high, log=space.log)
        else:
            search[key] = IntDistribution(int(space.low), int(space.high), log=space.log)
    return search


def _defaults(plan: Plan, target: Target) -> dict[str, Value]:
    """The first trial: the study's own values, of the keys whose search includes them."""
    values = configuration.flat(plan.configs(target, {})[0])
    return {k: values[k] for k, space in plan.search.items() if _has(space, values.get(k))}


def _has(space: BaseDistribution, value: Any) -> bool:
    values = _values(space)
    if isinstance(space, CategoricalDistribution):
        return value in values
    return isinstance(value, int | float) and values[0] <= value <= values[1]


def _values(space: BaseDistribution) -> tuple[Any, ...]:
    """Each listed value, or both ends of a range."""
    if isinstance(space, FloatDistribution | IntDistribution):
        return space.low, space.high
    return tuple(space.choices) if isinstance(space, CategoricalDistribution) else ()


def _every_value(search: Mapping[str, BaseDistribution]) -> Iterator[dict[str, Value]]:
    """Choices in which each listed value, and both ends of each range, occur."""
    values = {key: _values(space) for key, space in search.items()}
    for place in range(max(map(len, values.values()))):
        yield {key: some[min(place, len(some) - 1)] for key, some in values.items()}


def _text(params: Mapping[str, Value]) -> str:
    """Chosen values in a line."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in sorted(params.items())
    )


def _folders_of(trial: FrozenTrial | Trial) -> int:
    """The number of the trial that began the runs: this one, or that which it repeats."""
    return int(trial.user_attrs.get("folders", trial.number))


def _best(trials: Sequence[FrozenTrial], target: Target) -> FrozenTrial:
    """The complete trial with the lowest value; that of a pruned one is from its last evaluation.

    Raises `ConfigError` if there is none.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        reasons = [t.user_attrs["reason"] for t in trials if "reason" in t.user_attrs]
        raise ConfigError(f"{target.name}: no trial has a value: {(reasons or ['all pruned'])[-1]}")
    return min(complete, key=lambda trial: trial.value or 0.0)


def _claim(plan: Plan, out: Path) -> None:
    """Create the folder, or check that its trials belong to the same study."""
    try:
        if is_taken(out) and not (out / JOURNAL).is_file():
            raise ConfigError(f"{str(out)!r} exists and holds no tuning: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock"):
            for target in plan.targets:
                configs = [config.model_dump_json() for config in plan.configs(target, {})]
                search = [f"{k} {distribution_to_json(s)}" for k, s in plan.search.items()]
                own = json.dumps([*configs, *search])
                study = _open(target, out)
                if study.user_attrs.get("tunes", own) != own:
                    raise ConfigError(
                        f"{str(out)!r} tunes {target.name} of another study: choose another --out"
                    )
                study.set_user_attr("tunes", own)
    except OSError as error:
        raise ConfigError(f"{str(out)!r} cannot be written: {error.strerror or error}") from None


def _is_running(trial: FrozenTrial) -> bool:
    """Whether another process runs a trial; those of other machines count as alive.

    This process runs one trial at a time, so that it runs none while it looks.
    """
    host, pid = trial.user_attrs.get("process", ("", 0))
    if trial.state != TrialState.RUNNING or not host or pid == os.getpid():
        return False
    return bool(host != socket.gethostname() or psutil.pid_exists(int(pid)))
