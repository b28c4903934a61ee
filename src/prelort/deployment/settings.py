"""What a site sets for itself. Nothing of it is sent to the server but the name and the rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from prelort.config import Config, Section, check, read_toml
from prelort.errors import ConfigError, PrelortError
from prelort.planning import sizes

log = logging.getLogger(__name__)


class TrainerSettings(Section):
    """The process that keeps the base model loaded between rounds."""

    warm: bool = Field(True, description="false: load everything anew for each message")
    idle_minutes: Annotated[float, Field(gt=0.0)] = Field(
        30.0, description="ends after so long without work"
    )
    memory: str | None = Field(
        None, description="e.g. '24GiB': ends, and is started anew, if it takes more"
    )


class SiteSettings(Section):
    """A site's own file, ``site.toml``."""

    name: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="what the others know the site by"
    )
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="the rank that the site affords; auto: the largest that fits `memory`"
    )
    memory: str | None = Field(
        None, description="for rank = 'auto', e.g. '8GiB'; default: what is free now"
    )
    data: dict[str, Any] = Field(
        default_factory=dict, description="keys of [data] that are different here, first `source`"
    )
    model: dict[str, Any] = Field(
        default_factory=dict, description="keys of [model] that are different here, e.g. device"
    )
    partition: Annotated[int, Field(ge=0)] | None = Field(
        None, description="instead of data: this part of the federation's own data (to try it out)"
    )
    state: str = Field("state", description="folder for logs and what the site keeps")
    trainer: TrainerSettings = TrainerSettings()

    @model_validator(mode="after")
    def _whose_data(self) -> SiteSettings:
        if self.partition is None and not (self.name and self.rank and self.data.get("source")):
            raise ValueError(
                "a site needs a name, a rank and [data] source (or, to try it out, a partition)"
            )
        for key, size in (("memory", self.memory), ("trainer.memory", self.trainer.memory)):
            if size is not None:
                try:
                    sizes.parse(size)
                except ConfigError as error:
                    raise ValueError(f"{key}: {error}") from None
        return self

    def state_folder(self, file: Path) -> Path:
        """Where the site keeps its things: beside its file, unless it says otherwise."""
        return file.parent / Path(self.state).expanduser()

    def applied_to(self, config: Config, file: Path) -> Config:
        """The federation's configuration with what is different at this site.

        Paths that begin with a dot are meant from the site's file on.
        """
        values = config.model_dump(mode="json")
        for section, own in (("data", self.data), ("model", self.model)):
            for key, value in own.items():
                local = isinstance(value, str) and value.startswith(("./", "../"))
                values[section][key] = str(file.resolve().parent / value) if local else value
        return check(values)


def read(file: Path) -> SiteSettings:
    """A site's file. Raises `ConfigError` with one sentence."""
    values = read_toml(file)
    try:
        return SiteSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-int",))
        message = first["msg"].removeprefix("Value error, ")
        where = f"{key} = {first['input']!r}: " if first["loc"] else ""
        raise ConfigError(f"site file {str(file)!r}: {where}{message}") from None


def read_quietly(file: Path) -> SiteSettings:
    """A site's file; what is wrong with it is for the site's log and not for the server."""
    try:
        return read(file)
    except ConfigError as error:
        log.error("%s", error)
        raise PrelortError("its site file cannot be used: its log says why") from None
