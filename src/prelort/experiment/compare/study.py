"""A study: which methods, seeds and settings are compared, and the run of each cell.

A study's file is a run's configuration with a section ``[compare]``. A cell's configuration is that
of the file, changed by its setting, then by its method's own overrides; the seed is the cell's.
All draws of a run derive from its seed and from what they are for, never from the method, so that
the cells of one setting and seed deal the same data to the same clients, ask the same ones each
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
from prelort import methods, tasks
from prelort.config import Config, Section
from prelort.errors import ConfigError

DEFAULT_FLAGSHIP = "prelort"


class Compare(Section):
    """The section ``[compare]`` of a study."""

    methods: tuple[str, ...] = Field(
        (DEFAULT_FLAGSHIP, "zero-padding"),
        description="what `prelort methods` lists, 'package.module:Class', or any name whose "
        "overrides say method.name: a variant",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    settings: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="a setting's name to its overrides, as for --set"
    )
    overrides: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="a method's name to what holds for it alone"
    )
    reference: str | None = Field(
        None, description="whom the others are compared to; default: prelort, or the first method"
    )
    metric: Literal["accuracy", "macro_f1", "perplexity", "rouge_l"] | None = Field(
        None, description="what comes first and is drawn; default: the task's first"
    )

    @field_validator("methods", "seeds")
    @classmethod
    def _some_and_each_once(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not given:
            raise ValueError("name at least one")
        twice = next((one for one in given if given.count(one) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is there twice")
        return given


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study: a method under a setting with a seed.

    ``setting`` is empty where the study has no settings; ``folder`` is inside the study's.
    """

    setting: str
    method: str
    seed: int
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        """What it is, in words."""
        return ", ".join(
            [*([self.setting] if self.setting else []), self.method, f"seed {self.seed}"]
        )


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared. ``cells``: seed by seed, so that a study stopped early is balanced."""

    base: Config
    compare: Compare
    cells: tuple[Cell, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings' names; one empty name where there are none."""
        return tuple(self.compare.settings) or ("",)

    @property
    def reference(self) -> str:
        """The method that the others are compared to."""
        own = self.compare.reference
        if own is not None:
            return own
        known = self.compare.methods
        return DEFAULT_FLAGSHIP if DEFAULT_FLAGSHIP in known else known[0]

    def to_toml(self) -> str:
        """The resolved study as a file that repeats it."""
        section = self.compare.model_dump(mode="json", exclude_none=True)
        return configuration.to_toml(self.base) + "\n" + tomli_w.dumps({"compare": section})


def load(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    names: Sequence[str] = (),
    seeds: Sequence[int] = (),
    reference: str | None = None,
) -> Study:
    """Read a study's file (None: the embedded default's run) and check every cell's configuration.

    ``overrides`` change the file's values before a setting does; ``names`` and ``seeds`` replace
    those of the file. Raises `ConfigError` with one sentence.
    """
    values = configuration.applied(configuration.read_values(path), overrides)
    section = values.pop("compare", {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"compare = {section!r} is not allowed: it is a section, [compare]")
    given: dict[str, Any] = dict(section)
    if names:
        given["methods"] = list(dict.fromkeys(names))
    if seeds:
        given["seeds"] = list(dict.fromkeys(seeds))
    if reference is not None:
        given["reference"] = reference
    compare = configuration.validated(Compare, given, "compare")
    _check_names(compare, in_file=_strings(section.get("methods")))
    own = {name: some for name, some in compare.overrides.items() if name in compare.methods}
    compare = compare.model_copy(update={"overrides": own})
    base = configuration.check(values)
    _check_metric(compare, base)
    return Study(base, compare, tuple(_cells(values, compare)))


def _cells(values: Mapping[str, Any], compare: Compare) -> Iterator[Cell]:
    settings = compare.settings or {"": ()}
    for seed in compare.seeds:
        for setting, changes in settings.items():
            where = f"compare.settings, {setting!r}:"
            _refuse(where, changes, ("seed", "method.name"))
            changed = configuration.applied(values, changes, where)
            for method in compare.methods:
                config = _config(changed, compare, method, seed, setting)
                parts = [*([setting] if setting else []), method, f"seed-{seed}"]
                yield Cell(setting, method, seed, config, Path("cells", *map(folder_name, parts)))


def _config(
    values: Mapping[str, Any], compare: Compare, method: str, seed: int, setting: str
) -> Config:
    own = compare.overrides.get(method, ())
    where = f"compare.overrides, {method!r}:"
    _refuse(where, own, ("seed",))
    named = [] if _is_variant(own) else [f"method.name={method}"]
    changed = configuration.applied(values, [*own, *named, f"seed={seed}"], where)
    try:
        config = configuration.check(changed)
        methods.find(config.method.name)
    except ConfigError as error:
        if not own and not setting:
            raise
        within = f"setting {setting!r}, {method!r}" if setting else repr(method)
        raise ConfigError(f"compare, {within}: {error}") from None
    return config


def _is_variant(overrides: Iterable[str]) -> bool:
    return any(_key(override) == "method.name" for override in overrides)


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _refuse(where: str, overrides: Iterable[str], keys: Sequence[str]) -> None:
    """Raise `ConfigError` for an override of what the study itself says of each cell."""
    for override in overrides:
        if _key(override) in keys:
            own = {"seed": "compare.seeds", "method.name": "compare.methods"}[_key(override)]
            raise ConfigError(f"{where} {override!r} is not allowed: {own} says that of each cell")


def _check_names(compare: Compare, in_file: Sequence[str]) -> None:
    """Raise `ConfigError` for names that nothing has, or that two folders would share."""
    for name in compare.methods:
        if not _is_variant(compare.overrides.get(name, ())):
            try:
                methods.find(name)
            except ConfigError as error:
                raise ConfigError(
                    f"{error}; a variant of your own says its method in compare.overrides: "
                    f"{name!r} = ['method.name=prelort', ...]"
                ) from None
    known = dict.fromkeys([*compare.methods, *in_file])
    for name in compare.overrides:
        if name not in known:
            raise ConfigError(
                f"compare.overrides: {name!r} is not compared: compare.methods has "
                f"{', '.join(known)}"
            )
    if compare.reference is not None and compare.reference not in compare.methods:
        raise ConfigError(
            f"compare.reference = {compare.reference!r} is not compared: choose one of "
            f"{', '.join(compare.methods)}"
        )
    for kind, names in (("methods", compare.methods), ("settings", compare.settings)):
        folders: dict[str, str] = {}
        for name in names:
            folder = folder_name(name).lower()
            if not folder:
                raise ConfigError(f"compare.{kind}: {name!r} has no letter or digit for a folder")
            if folder in folders:
                raise ConfigError(
                    f"compare.{kind}: {folders[folder]!r} and {name!r} would share the folder "
                    f"{folder!r}: rename one"
                )
            folders[folder] = name


def _check_metric(compare: Compare, base: Config) -> None:
    task = tasks.get(base.task)
    measured = base.evaluation.metrics or task.metrics
    if compare.metric is not None and compare.metric not in measured:
        raise ConfigError(
            f"compare.metric = {compare.metric!r} is not measured: task {base.task!r} with this "
            f"[evaluation] has {', '.join(measured)}"
        )


def folder_name(name: str) -> str:
    """A name as a folder's: ``dirichlet 0.1`` is ``dirichlet-0.1``."""
    return re.sub(r"[^\w.+=-]+", "-", name, flags=re.ASCII).strip("-.")


def _strings(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else []
