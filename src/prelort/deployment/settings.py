"""A site's own settings. Only the name and the rank are sent to the server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from prelort.config import (
    Config,
    DataConfig,
    ModelConfig,
    Section,
    check,
    read_toml,
    unknown_key,
    validated,
)
from prelort.errors import ConfigError, PrelortError
from prelort.planning import sizes
from prelort.secure.signatures import Identity, read_identity

log = logging.getLogger(__name__)


def _checked_size(text: str) -> str:
    try:
        sizes.parse(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


Size = Annotated[str, AfterValidator(_checked_size)]
"""A number of bytes with its unit, e.g. ``8GiB``."""


class TrainerSettings(Section):
    """The process that keeps the base model loaded between rounds."""

    warm: bool = Field(True, description="false: load everything again for each message")
    idle_minutes: Annotated[float, Field(gt=0.0)] = Field(
        30.0, description="the trainer ends after this time without work"
    )
    memory: Size | None = Field(
        None, description="e.g. '24GiB': the trainer is restarted if it takes more"
    )
    accelerate: str | None = Field(
        None, description="for several GPUs: the file that `accelerate config` writes"
    )

    @model_validator(mode="after")
    def _stays_warm(self) -> TrainerSettings:
        if self.accelerate is not None and not self.warm:
            raise ValueError("warm = false does not work with accelerate, whose processes stay")
        return self


class SitePrivacy(Section):
    """A site's limit on what it sends of its examples, in all runs together."""

    epsilon: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        description="train with noise only, up to this budget"
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        1e-5, description="probability that epsilon does not hold: far below 1 / examples"
    )


class SiteSettings(Section):
    """A site's own file, ``site.toml``."""

    name: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="the name that the server sees"
    )
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="the site's rank; auto: the largest that fits `memory`"
    )
    memory: Size | None = Field(
        None, description="for rank = 'auto', e.g. '8GiB'; default: the free memory"
    )
    data: dict[str, Any] = Field(
        default_factory=dict, description="keys of [data] that differ here, in particular `source`"
    )
    model: dict[str, Any] = Field(
        default_factory=dict, description="keys of [model] that differ here, e.g. device"
    )
    partition: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="instead of data: this client of the federation's data (to try it out)",
    )
    masked_only: bool = Field(
        False, description="send no reply that is not masked (privacy.secure_aggregation)"
    )
    key: str | None = Field(
        None, description="private key that signs its part of secure aggregation: its node's"
    )
    peers: str | None = Field(
        None,
        description="with `key`: public keys of the sites that it shares masks with",
    )
    privacy: SitePrivacy | None = Field(
        None,
        description="its limit where privacy.unit = 'example' (docs/privacy.md)",
    )
    state: str = Field("state", description="folder for logs and the site's own state")
    trainer: TrainerSettings = TrainerSettings()

    @field_validator("data", "model")
    @classmethod
    def _known_keys(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        allowed = list((DataConfig if info.field_name == "data" else ModelConfig).model_fields)
        for key in values:
            if key not in allowed:
                raise ValueError(unknown_key(key, allowed))
        return values

    @model_validator(mode="after")
    def _signs_and_verifies(self) -> SiteSettings:
        if (self.key is None) != (self.peers is None):
            raise ValueError("`key` and `peers` need each other: a site signs and verifies")
        return self

    @model_validator(mode="after")
    def _has_data(self) -> SiteSettings:
        if self.partition is None and not (self.name and self.rank and self.data.get("source")):
            raise ValueError(
                "a site needs a name, a rank and [data] source (or, to try it out, a partition)"
            )
        return self

    def state_folder(self, file: Path) -> Path:
        """The folder of the site's state; a relative path starts at its file."""
        return file.parent / Path(self.state).expanduser()

    def identity(self, file: Path) -> Identity | None:
        """What the site signs with; None where it does not. Raises `ConfigError`."""
        if self.key is None or self.peers is None:
            return None
        folder = file.parent
        return read_identity(
            folder / Path(self.key).expanduser(), folder / Path(self.peers).expanduser()
        )

    def applied_to(self, config: Config, file: Path) -> Config:
        """The federation's configuration with the site's own keys.

        Paths that begin with a dot start at the site's file.
        """
        values = config.model_dump(mode="json")
        for section, overrides in (("data", self.data), ("model", self.model)):
            for key, value in overrides.items():
                local = isinstance(value, str) and value.startswith(("./", "../"))
                values[section][key] = str(file.resolve().parent / value) if local else value
        return check(values)


def read(file: Path) -> SiteSettings:
    """A site's file. Raises `ConfigError` with one sentence."""
    values = read_toml(file)
    try:
        return validated(SiteSettings, values)
    except ConfigError as error:
        raise ConfigError(f"site file {str(file)!r}: {error}") from None


def read_for_reply(file: Path) -> tuple[SiteSettings, Identity | None]:
    """A site's file, and what it signs with.

    An error goes to the site's log; the server is told only that there is one.
    """
    try:
        site = read(file)
        return site, site.identity(file)
    except ConfigError as error:
        log.error("%s", error)
        raise PrelortError("its site file cannot be used: its log says why") from None
