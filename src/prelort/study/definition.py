"""What a study runs: its cells, each with its configuration and its folder.

A study's file is a run's configuration with a section ``[compare]``. A cell's configuration is that
of the file, changed by its setting, then by its method's own overrides; the seed is the cell's.
Everything random in a run derives from its seed and its purpose, never from the method: the cells
of one setting and seed deal the same data to the same clients, sample the same clients in each
round and train them on the same batches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, field_validator

from prelort import config as configuration
from prelort import tasks
from prelort.config import Config, Section
from prelort.errors import ConfigError
from prelort.experiment.folder import RunFolder

STUDY_FILE = "study.toml"
DEFAULT_REFERENCE = "prelort"


class Compare(Section):
    """The section ``[compare]`` of a study. An empty axis is the configuration's own value."""

    methods: tuple[str, ...] = Field(
        (DEFAULT_REFERENCE, "zero-padding"),
        description="what `prelort methods` lists, 'package.module:Class', or any name whose "
        "overrides set method.name: a variant; empty: method.name",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), description="a run for each; empty: seed"
    )
    settings: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="a setting's name to its overrides, as for --set"
    )
    overrides: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="a method's name to overrides for it alone"
    )
    tuned: dict[str, dict[str, tuple[str, ...]]] = Field(
        default_factory=dict,
        description="a setting's name ('' without settings) to overrides for each method, after "
        "those above; `prelort tune` writes it",
    )
    reference: str | None = Field(
        None, description="the others are compared to it; default: prelort, or the first method"
    )
    metric: Literal["accuracy", "macro_f1", "perplexity", "rouge_l"] | None = Field(
        None, description="shown first and drawn; default: the task's first"
    )

    @field_validator("methods", "seeds")
    @classmethod
    def _no_duplicates(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        duplicate = next((value for value in values if values.count(value) > 1), None)
        if duplicate is not None:
            raise ValueError(f"{duplicate!r} is listed twice")
        return values


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study: a method under a setting with a seed.

    ``setting`` is empty where the study has none. ``folder`` is relative to the study's, and
    ``name`` unique in it.
    """

    setting: str
    method: str
    seed: int
    config: Config
    folder: Path
    name: str


@dataclass(frozen=True, slots=True)
class Study:
    """``cells`` are in order of their seeds, so that a study stopped early is balanced."""

    base: Config
    compare: Compare
    cells: tuple[Cell, ...]

    @property
    def is_run(self) -> bool:
        """Whether this is a plain run: its only cell is the study's folder itself."""
        return self.cells[0].folder == Path()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' names."""
        return self.compare.methods or (self.base.method.name,)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return self.compare.seeds or (self.base.seed,)

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings' names; one empty name where there are none."""
        return tuple(self.compare.settings) or ("",)

    @property
    def reference(self) -> str:
        """The method that the others are compared to."""
        default = DEFAULT_REFERENCE if DEFAULT_REFERENCE in self.methods else self.methods[0]
        return self.compare.reference or default

    def to_toml(self) -> str:
        """The resolved study as a file that repeats it."""
        section = self.compare.model_dump(mode="json", exclude_none=True)
        return configuration.to_toml(self.base) + "\n" + tomli_w.dumps({"compare": section})


def load(
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    reference: str | None = None,
) -> Study:
    """Read a study's file and check every cell's configuration.

    Args:
        path: TOML file; None is the embedded default's run.
        overrides: ``key=value``, applied to the file before a setting is.
        methods: replace the file's ``compare.methods``.
        seeds: replace ``compare.seeds``.
        reference: replaces ``compare.reference``.

    Raises:
        ConfigError: with one sentence.
    """
    values = configuration.applied(configuration.read_values(path), overrides)
    section = values.pop("compare", {})
    values.pop("tune", None)  # which `prelort tune` reads
    if not isinstance(section, Mapping):
        raise ConfigError(f"compare = {section!r} is not allowed: it is a section, [compare]")
    fields: dict[str, Any] = dict(section)
    if methods:
        fields["methods"] = list(dict.fromkeys(methods))
    if seeds:
        fields["seeds"] = list(dict.fromkeys(seeds))
    if reference is not None:
        fields["reference"] = reference
    compare = configuration.validated(Compare, fields, "compare")
    check_names(compare, in_file=_strings(section.get("methods")))
    own = {
        "overrides": _of_methods(compare.overrides, compare.methods),
        "tuned": {s: _of_methods(keys, compare.methods) for s, keys in compare.tuned.items()},
    }
    study = study_of(values, compare.model_copy(update=own))
    _check_metric(study)
    check_methods(study)
    return study


def of_run(
    path: Path | str | None = None, overrides: Sequence[str] = (), methods: Sequence[str] = ()
) -> Study:
    """A run's configuration as a study: one cell, or one for each of several ``methods``.

    Raises `ConfigError`.
    """
    values = configuration.applied(configuration.read_values(path), overrides)
    configuration.check(values)  # which also refuses a study's file
    names = tuple(dict.fromkeys(methods))
    if len(names) == 1:
        values = configuration.applied(values, [f"method.name={names[0]}"])
    study = study_of(values, Compare(methods=names if len(names) > 1 else (), seeds=()))
    check_methods(study)
    return study


def of_folder(out: Path) -> Study:
    """The study whose folder this is. Its methods need not be importable here.

    Raises `ConfigError` where the folder holds none.
    """
    if (out / STUDY_FILE).is_file():
        values = configuration.read_toml(out / STUDY_FILE)
        compare = configuration.validated(Compare, values.pop("compare", {}), "compare")
        return study_of(values, compare)
    folder = RunFolder(out)
    folder.read_config()
    return study_of(configuration.read_toml(folder.config_file), Compare(methods=(), seeds=()))


def check_methods(study: Study) -> None:
    """Raise `ConfigError` for a method or a task that does not exist."""
    from prelort import methods

    for cell in study.cells:
        if cell.config.task not in tasks.TASKS:
            tasks.get(cell.config.task)
        try:
            methods.find(cell.config.method.name)
        except ConfigError as error:
            if cell.config.method.name != cell.method:
                raise ConfigError(f"compare, {cell.method!r}: {error}") from None
            advice = (
                "; a variant of your own names its method in compare.overrides: "
                f"{cell.method!r} = ['method.name=prelort', ...]"
            )
            raise ConfigError(f"{error}{'' if study.is_run else advice}") from None


def folder_name(name: str) -> str:
    """A name as a folder's: ``dirichlet 0.1`` is ``dirichlet-0.1``."""
    return re.sub(r"[^\w.+=-]+", "-", name, flags=re.ASCII).strip("-.")


def study_of(values: Mapping[str, Any], compare: Compare) -> Study:
    """The study of a run's values, changed by ``compare``. Raises `ConfigError`."""
    return Study(configuration.check(values), compare, tuple(_cells(values, compare)))


def _cells(values: Mapping[str, Any], compare: Compare) -> Iterator[Cell]:
    for seed in compare.seeds or (None,):
        for setting, changes in (compare.settings or {"": ()}).items():
            where = f"compare.settings, {setting!r}:"
            _refuse(where, changes, ("seed", "method.name"))
            changed = configuration.applied(values, changes, where)
            for method in compare.methods or (None,):
                config = _config(changed, compare, method, seed, setting)
                parts = [setting or None, method, None if seed is None else f"seed {seed}"]
                levels = [part for part in parts if part is not None]
                folder = Path(*map(folder_name, levels))
                name = method or config.method.name
                yield Cell(setting, name, config.seed, config, folder, ", ".join(levels) or name)


def _config(
    values: Mapping[str, Any], compare: Compare, method: str | None, seed: int | None, setting: str
) -> Config:
    overrides = compare.overrides.get(method or "", ())
    overrides += compare.tuned.get(setting, {}).get(method or "", ())
    where = f"compare.overrides, {method!r}:"
    _refuse(where, overrides, ("seed",))
    is_variant = any(_key(override) == "method.name" for override in overrides)
    axes = [] if method is None or is_variant else [f"method.name={method}"]
    axes += [] if seed is None else [f"seed={seed}"]
    changed = configuration.applied(values, [*overrides, *axes], where)
    try:
        return configuration.check(changed)
    except ConfigError as error:
        if not overrides and not setting:
            raise
        cell = [setting and f"setting {setting!r}", repr(method) if method else ""]
        raise ConfigError(f"compare, {', '.join(filter(None, cell))}: {error}") from None


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _refuse(where: str, overrides: Iterable[str], keys: Sequence[str]) -> None:
    """Raise `ConfigError` for an override of a key that an axis of the study sets."""
    for override in overrides:
        if _key(override) in keys:
            axis = {"seed": "compare.seeds", "method.name": "compare.methods"}[_key(override)]
            raise ConfigError(
                f"{where} {override!r} is not allowed: {axis} sets that for each cell"
            )


def check_names(compare: Compare, in_file: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for unknown names, and for names that would share a folder.

    ``in_file``: methods that are known though they are not compared this time.
    """
    known = dict.fromkeys([*compare.methods, *in_file])
    for setting in compare.tuned:
        if setting not in (compare.settings or ("",)):
            raise ConfigError(f"compare.tuned: there is no setting {setting!r} in compare.settings")
    named = [("overrides", name) for name in compare.overrides]
    named += [("tuned", name) for by_method in compare.tuned.values() for name in by_method]
    for key, name in named:
        if name not in known:
            raise ConfigError(
                f"compare.{key}: {name!r} is not compared: compare.methods has {', '.join(known)}"
            )
    if compare.reference is not None and compare.reference not in compare.methods:
        raise ConfigError(
            f"compare.reference = {compare.reference!r} is not compared: choose one of "
            f"{', '.join(compare.methods)}"
        )
    for axis, names in (("methods", compare.methods), ("settings", compare.settings)):
        folders: dict[str, str] = {}
        for name in names:
            folder = folder_name(name).lower()
            if not folder:
                raise ConfigError(f"compare.{axis}: {name!r} has no letter or digit for a folder")
            if folder in folders:
                raise ConfigError(
                    f"compare.{axis}: {folders[folder]!r} and {name!r} would share the folder "
                    f"{folder!r}: rename one"
                )
            folders[folder] = name


def _check_metric(study: Study) -> None:
    metric, base = study.compare.metric, study.base
    measured = base.evaluation.metrics or tasks.get(base.task).metrics
    if metric is not None and metric not in measured:
        raise ConfigError(
            f"compare.metric = {metric!r} is not measured: task {base.task!r} with this "
            f"[evaluation] has {', '.join(measured)}"
        )


def _of_methods(
    overrides: Mapping[str, tuple[str, ...]], names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    return {name: keys for name, keys in overrides.items() if name in names}


def _strings(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else []
