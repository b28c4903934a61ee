"""A federation from Python: models, data and metrics as objects.

The same code runs as for the command line, on the same configuration, and writes the same folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prelort import config as configuration
from prelort import methods, tasks
from prelort.adapters.peft_folder import without_prefixes
from prelort.config import PYTHON, Config, DataConfig, ModelConfig, PartitionConfig
from prelort.data import ranks as rank_mix
from prelort.data.tables import Partition, Table, Tables, tables
from prelort.errors import ConfigError
from prelort.experiment.backend import InProcess
from prelort.experiment.callbacks import Callback
from prelort.experiment.folder import RunFolder
from prelort.experiment.objects import Objects
from prelort.experiment.result import RunResult
from prelort.experiment.run import run
from prelort.extensions import reference
from prelort.files import as_path
from prelort.library_logging import quiet
from prelort.methods.interface import Method
from prelort.planning import starter
from prelort.report.live import Display
from prelort.report.results import Results
from prelort.study.definition import (
    Compare,
    Study,
    check_methods,
    check_names,
    folder_name,
    study_of,
)
from prelort.study.run import run_study
from prelort.tasks.classification import Classification
from prelort.tasks.columns import class_names
from prelort.tasks.interface import Task

LORA = (
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "modules_to_save"),
    *("rank_pattern", "fan_in_fan_out", "task_type", "inference_mode", "base_model_name_or_path"),
    *("peft_type", "peft_version", "revision", "target_parameters"),
)
"""The fields of PEFT's configuration that are used, or do not change what is trained."""


class Federation:
    """A base model, and clients with their data and ranks.

    Args:
        model: a loaded model of transformers, a local folder or a hub name.
        tokenizer: a loaded tokenizer; default: the model's.
        datasets: each client's rows by its name, or all rows; as a `datasets.Dataset`, a pandas
            data frame or a list of dictionaries. Or a file or hub name.
        ranks: one rank for all clients, each client's rank by its name, a list in the clients'
            order, or a mix such as ``"4*0.5, 16*0.5"``; default: ``lora.r``, or 8.
        method: a name (`prelort methods`), a class of one's own at the top of a module, or the
            values of the section ``[method]``.
        task: ``causal-lm``, ``instruction``, ``chat``, ``classification``, or a class of one's own
            (`prelort.tasks.interface`); default: what the model's head is for.
        test: test rows; default: each client holds out a share of its rows.
        partition: of one data set: the numbers of each client's rows by its name, a function from
            the rows to that, or a `PartitionConfig`.
        lora: PEFT's configuration, for the adapted layers, the scale alpha / r and the dropout; or
            the values of the section ``[lora]``.
        compute_metrics: as in transformers' Trainer: from an `EvalPrediction` to numbers by name.
            ``predictions`` are logits [examples, classes] of a classification, or the most likely
            next tokens [examples, length] of a causal model.
        seed: of everything random.
        settings: values of further sections (docs/configuration-reference.md), such as
            ``training={"learning_rate": 1e-4}``.

    Raises:
        ConfigError: for anything that cannot work, before anything is loaded or trained.
    """

    config: Config
    """The resolved configuration; `run` records it with the number of rounds."""

    @quiet()
    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        datasets: Mapping[str, Table] | Table | str | Path = configuration.EMBEDDED,
        *,
        ranks: int | str | Sequence[int] | Mapping[str, int] | None = None,
        method: str | type[Method] | Mapping[str, Any] = "prelort",
        task: str | type[Task] | None = None,
        test: Table | None = None,
        partition: Partition | PartitionConfig | None = None,
        lora: LoraConfig | Mapping[str, Any] | None = None,
        compute_metrics: Any = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        model = str(model) if isinstance(model, Path) else model
        datasets = str(datasets) if isinstance(datasets, Path) else datasets
        loaded = model if not isinstance(model, str) else None
        dealt = partition if isinstance(partition, PartitionConfig) else None
        own = None if dealt is not None else partition
        given = None
        if not isinstance(datasets, str):
            given = tables(datasets, test, own)  # type: ignore[arg-type]
        elif test is not None or own is not None:
            raise ConfigError("test and partition are for data that are given as objects")
        self._objects = Objects(loaded, tokenizer, given, compute_metrics)
        if task is None:
            classifies = type(model).__name__.endswith("ForSequenceClassification")
            task = "classification" if classifies else "causal-lm"
        if not isinstance(task, str):
            task = reference(task, "task")
        values = _defaults(model, task)
        clients = None if given is None or given.parts is None else [p.name for p in given.parts]
        if lora is not None and not isinstance(lora, LoraConfig | Mapping):
            raise ConfigError(f"lora {lora!r} is neither a peft.LoraConfig nor a section's values")
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(f"tokenizer {tokenizer!r} is not a tokenizer of transformers")
        if compute_metrics is not None and not callable(compute_metrics):
            raise ConfigError(f"compute_metrics {compute_metrics!r} is not a function")
        if ranks is None:
            ranks = lora.r if isinstance(lora, LoraConfig) else 8
        sections: dict[str, Any] = {
            "seed": seed,
            "task": task,
            "model": {} if loaded is not None else {"name": model},
            "data": {"source": datasets if isinstance(datasets, str) else PYTHON},
            "ranks": {"mix": _mix(ranks, clients), "assign": "in-order"},
            "lora": _lora_values(lora) if isinstance(lora, LoraConfig) else dict(lora or {}),
            "method": _method_values(method),
            "federation": {"clients_per_round": 1.0},
        }
        if dealt is not None:
            sections["partition"] = dealt.model_dump(exclude_unset=True)
        elif clients is not None:
            sections["partition"] = {"by": PYTHON, "clients": len(clients)}
        for changes in (sections, settings):
            for key, value in changes.items():
                if isinstance(value, Mapping) and isinstance(values.get(key, {}), dict):
                    values[key] = {**values.get(key, {}), **value}
                else:
                    values[key] = value
        self.config = configuration.check(configuration.applied(values, []))
        if given is not None:
            _check_given(self.config.data, given)
        methods.build(self.config.method, self.config.seed)
        if clients is None:
            rank_mix.levels(self.config.ranks.mix)
        else:
            rank_mix.assign(self.config.ranks, [1] * len(clients), self.config.seed)
        kind = tasks.get(task)
        if isinstance(kind, Classification) and given is not None and not self.config.data.labels:
            names = _class_names(kind, model, given, self.config.data)
            data = self.config.data.model_copy(update={"labels": names})
            self.config = self.config.model_copy(update={"data": data})

    def __repr__(self) -> str:
        given = self._objects.tables
        clients = f"{len(given.parts)} clients, " if given is not None and given.parts else ""
        name = type(self._objects.model).__name__ if self._objects.model else self.config.model.name
        mix = self.config.ranks.mix
        return f"<Federation of {name}: {clients}ranks {mix}, {self.config.method.name}>"

    def run(
        self,
        rounds: int | None = None,
        out: Path | str | None = None,
        *,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        track: Sequence[str] = (),
        progress: bool | None = None,
    ) -> RunResult:
        """Train one adapter, and measure it at every rank.

        Args:
            rounds: the number of rounds; default: ``federation.rounds`` of the settings, or 12.
            out: the run's folder; default: ``runs/METHOD-TIME``.
            resume: continue the run in ``out`` with the same objects, or with more rounds.
            callbacks: called with the run's history at the end of each round; one that returns True
                ends the run there (`EarlyStopping`).
            track: names of experiment trackers (`prelort.report.trackers`).
            progress: show it; default: on a terminal and in a notebook.

        Raises:
            ConfigError: before any training, naming what is wrong.
            QuorumError: where too few clients reply. What was finished is kept.
        """
        name = folder_name(self.config.method.name)
        folder = as_path(out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if resume and out is None:
            raise ConfigError("resume needs out, the folder of the run to continue")
        if resume:
            RunFolder(folder).read_config()  # refuses a folder without a run
        if isinstance(track, str):
            raise ConfigError(f"track must be a list of names, such as [{track!r}]")
        results: list[RunResult] = []

        def keep(config: Config, path: Path, **options: Any) -> None:
            backend = InProcess(objects=self._objects)
            results.append(run(config, path, backend=backend, callbacks=callbacks, **options))

        self._run(self._study(rounds, folder), folder, keep, progress, new=not resume, track=track)
        return results[0]

    def compare(
        self,
        methods: Sequence[str | type[Method]],
        rounds: int | None = None,
        out: Path | str = "runs/compare",
        *,
        seeds: Sequence[int] = (0,),
        reference: str | None = None,
        progress: bool | None = None,
    ) -> Results:
        """Run several methods on the same data, clients and batches.

        Args:
            methods: names, or classes of one's own.
            rounds: the number of rounds of each run; default: as for `run`.
            out: the folder of all runs; the same call again continues.
            seeds: a run of each method for each.
            reference: the method that the others are compared to; default: prelort, or the first.
            progress: show it; default: on a terminal and in a notebook.

        Returns:
            The results. A run that failed has its reason there.
        """
        folder = as_path(out)
        for name, given in (("methods", methods), ("seeds", seeds)):
            if isinstance(given, str) or not isinstance(given, Sequence) or not given:
                raise ConfigError(f"{name} must be a list of one or more, not {given!r}")
        names = tuple(_method_values(method)["name"] for method in methods)
        values = {"methods": names, "seeds": tuple(seeds), "reference": reference}
        section = configuration.validated(Compare, values, "compare")
        check_names(section)
        backend = InProcess(objects=self._objects)
        study = self._study(rounds, folder, section)
        return self._run(study, folder, partial(run, backend=backend), progress)

    def _study(self, rounds: int | None, out: Path, section: Compare | None = None) -> Study:
        """The runs in the folder ``out``: one, or those of a comparison."""
        with quiet():
            model = self._objects.place(self.config.model, out)
        values = self.config.model_copy(update={"model": model}).model_dump()
        if rounds is not None:
            values["federation"]["rounds"] = rounds
        study = study_of(values, section or Compare(methods=(), seeds=()))
        check_methods(study)
        return study

    def _run(
        self, study: Study, out: Path, run: Any, progress: bool | None, **options: Any
    ) -> Results:
        console = Console()
        shown = console.is_terminal if progress is None else progress
        with quiet(), Display(console, len(study.cells), quiet=not shown) as display:
            return run_study(study, out, display, run=run, **options)


def _defaults(model: PreTrainedModel | str, task: str) -> dict[str, Any]:
    """The values of a starter for a model of this size."""
    kind = tasks.get(task).kind
    if isinstance(model, str):
        return starter.values_for(task, *starter.measures(ModelConfig(name=model), kind))
    if not isinstance(model, PreTrainedModel):
        return {}  # `Objects.place` refuses it
    positions = getattr(model.config, "max_position_embeddings", None)
    return starter.values_for(task, model.num_parameters(), positions)


def _check_given(config: DataConfig, given: Tables) -> None:
    """Raise `ConfigError` for a key that says which rows to read, beside rows that are given."""
    keys = ["subset", "split", "test", *(["max_train_examples"] if given.parts else [])]
    unset = DataConfig(source=PYTHON)
    for key in ("source", *keys):
        if getattr(config, key) != getattr(unset, key):
            raise ConfigError(
                f"data.{key} is for rows that are read: here they are given, as datasets and test"
            )


def _class_names(
    task: Classification, model: PreTrainedModel | str, given: Tables, config: DataConfig
) -> tuple[str, ...] | None:
    """The class names of a loaded classifier in the order of its head, if the rows have them."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    in_order = tuple(str(names[number]) for number in sorted(names))
    column = task.columns(config, given.train.column_names)[1]
    known = set(class_names(given.train, column, "datasets")) <= set(in_order)
    return in_order if known else None


def _mix(
    ranks: int | str | Sequence[int] | Mapping[str, int], clients: Sequence[str] | None
) -> str:
    """``ranks.mix``, in the clients' order."""
    if isinstance(ranks, Integral):  # NumPy's too
        return f"{ranks}*1"
    if isinstance(ranks, str):
        return ranks
    if not isinstance(ranks, Iterable):
        raise ConfigError(f"ranks {ranks!r} are neither a rank, a mix, a list nor by client name")
    if hasattr(ranks, "items"):  # a mapping, or a pandas series
        if clients is None:
            raise ConfigError("ranks by name need clients by name: in datasets or in partition")
        ranks = {str(name): rank for name, rank in ranks.items()}
        if set(ranks) != set(clients):
            raise ConfigError(
                f"ranks names the clients {', '.join(map(str, ranks))}, and the data are those of "
                f"{', '.join(clients)}"
            )
        ranks = [ranks[name] for name in clients]
    return ", ".join(map(str, ranks))


def _method_values(method: str | type[Method] | Mapping[str, Any]) -> dict[str, Any]:
    """The section ``[method]``; a class is named by its module."""
    if isinstance(method, Mapping):
        return dict(method)
    if isinstance(method, str):
        return {"name": method}
    return {"name": reference(method, "method")}


def _lora_values(lora: LoraConfig) -> dict[str, Any]:
    """The section ``[lora]``. Raises `ConfigError` for what it does not have."""
    default, reason = LoraConfig(), without_prefixes(vars(lora))
    if reason:
        raise ConfigError(f"lora: {reason}")
    for field in fields(lora):
        value = getattr(lora, field.name)
        if field.name not in LORA and value != getattr(default, field.name):
            raise ConfigError(f"lora: {field.name} = {value!r} is not supported")
    targets = lora.target_modules or ([] if lora.target_parameters else "all-linear")
    values = {
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "target_parameters": sorted(lora.target_parameters or ()),
        "scale_rule": "rslora" if lora.use_rslora else "constant",
        "scale": float(lora.lora_alpha if lora.use_rslora else lora.lora_alpha / lora.r),
        "dropout": lora.lora_dropout,
        "rank_pattern": dict(lora.rank_pattern or {}),
    }
    if lora.modules_to_save:
        values["modules_to_save"] = sorted(lora.modules_to_save)
    return values
