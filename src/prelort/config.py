"""One typed configuration for a run: the same keys in TOML, in ``--set`` and in Python.

Every section is a frozen pydantic model that refuses unknown keys. `load` turns whatever is
wrong into one sentence that names the key, the value and what is allowed.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prelort.errors import ConfigError

EMBEDDED = "embedded"
"""The name of the base model and of the text that come with the package."""

SITES = "sites"
"""The data source of a federation of real sites: each has its own, which nobody else sees."""

EMBEDDED_FILE = Path(__file__).parent / "embedded" / "default.toml"
"""The configuration that runs where none is given."""

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the configuration: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NoOptions(Section):
    """Of a method that leaves nothing to choose."""


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    """The base model that every client shares and nobody trains."""

    name: str = Field(EMBEDDED, description="'embedded', a local folder, or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="load the base in 8 or 4 bits (needs bitsandbytes)"
    )
    trust_remote_code: bool = Field(False, description="run the model's own code from the hub")


class DataConfig(Section):
    """Where the examples come from and which columns hold what."""

    source: str = Field(
        EMBEDDED,
        description="'embedded', a hub name, or a CSV/TSV/JSON/JSON-lines/Parquet/text file; "
        "'sites': each real site has its own",
    )
    subset: str | None = Field(None, description="the hub data set's configuration name")
    split: str = Field("train", description="which split of a hub data set to train on")
    test: str | None = Field(None, description="file, or split of a hub data set, to test on")
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="share of each client's rows held out where `test` is not given"
    )
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of each client's training rows held out to tune on; 0: none"
    )
    text_column: str | None = Field(None, description="found by itself where it is clear")
    label_column: str | None = Field(None, description="classification: the class")
    labels: tuple[str, ...] | None = Field(
        None,
        description="classification: the classes in order; default: those that occur (real sites "
        "must name them, since none sees them all)",
    )
    prompt_template: str = Field(
        "{instruction}\n\n{context}\n\n",
        description="instruction task: the prompt, with columns in braces",
    )
    completion_column: str | None = Field(None, description="instruction task: the answer")
    messages_column: str = Field("messages", description="chat task: list of role and content")
    max_length: Annotated[int, Field(ge=8)] = Field(128, description="tokens an example")
    max_train_examples: Annotated[int, Field(ge=1)] | None = None
    max_test_examples: Annotated[int, Field(ge=1)] | None = Field(
        None, description="test on at most so many examples, drawn by the seed"
    )


class PartitionConfig(Section):
    """How the training rows are dealt to the clients."""

    by: Literal["auto", "column", "iid", "dirichlet", "quantity", "shards"] = Field(
        "auto", description="auto: natural clients if there is a column of them, else iid"
    )
    clients: Annotated[int, Field(ge=1)] | None = Field(
        None, description="number of clients; not set: one per value of the column, 16 if auto"
    )
    column: str | None = Field(
        None, description="column, dirichlet, shards: the column to deal by (default: the label)"
    )
    alpha: Annotated[float, Field(gt=0.0)] = Field(
        0.5, description="dirichlet, quantity: concentration; small is more uneven"
    )
    shards_per_client: Annotated[int, Field(ge=1)] = 2
    min_examples: Annotated[int, Field(ge=1)] = Field(1, description="rows each client has")


class LoraSettings(Section):
    """Which layers are adapted, and the federation's one scale rule."""

    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="'all-linear' or names of modules (their last parts)"
    )
    scale_rule: Literal["constant", "rslora"] = Field(
        "constant", description="constant: s for every rank; rslora: alpha / sqrt(rank in use)"
    )
    scale: Annotated[float, Field(gt=0.0)] = Field(
        2.0, description="s of the constant rule, alpha of rslora"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    modules_to_save: tuple[str, ...] | None = Field(
        None, description="modules trained in full, e.g. the head (classification: by itself)"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="largest rank of single layers, by (the end of) a name"
    )


class RanksConfig(Section):
    """Which client can afford which rank."""

    mix: str = Field(
        "2*0.25, 4*0.25, 8*0.25, 16*0.25",
        coerce_numbers_to_str=True,
        description="a list '4, 8, 16, 16' (one a client) or a mix 'rank*share, ...'",
    )
    assign: Literal["random", "by-size", "in-order"] = Field(
        "random", description="who gets which: drawn by the seed, most data highest, as listed"
    )
    schedule: dict[str, str] = Field(
        default_factory=dict, description="new mixes later on: {5 = '4*0.5, 16*0.5'} from round 5"
    )
    allocation: Literal["fixed", "by-loss"] = Field(
        "fixed",
        description="by-loss: all start at the mix's lowest rank, then the best get its highest",
    )
    high_share: Share = Field(0.1, description="by-loss: share of the clients that are raised")

    @field_validator("schedule")
    @classmethod
    def _rounds(cls, schedule: dict[str, str]) -> dict[str, str]:
        for key in schedule:
            if not (key.isascii() and key.isdigit() and int(key) >= 2):
                raise ValueError(f"{key!r} is not a round from 2 on (round 1 has ranks.mix)")
        return schedule


class TrainingConfig(Section):
    """What a client does between receiving an adapter and sending it back."""

    local_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="optimiser steps a round; 0: as many as local_epochs makes"
    )
    local_epochs: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="passes over the client's examples a round, where local_steps is 0"
    )
    batch_size: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0)] = 8e-3
    rank_exponent: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None,
        description="a client of rank r trains at learning_rate * (highest rank / r) ** this; "
        "default: the method's own, mostly 0",
    )
    head_learning_rate: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="for modules trained in full; default: learning_rate"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="SGD only")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="of the rate, over the whole run and not within one round"
    )
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="share of the run")
    max_grad_norm: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="gradients are scaled down to this norm; 0: never"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast of the forward pass"
    )
    gradient_checkpointing: bool = False
    batch_truncations: bool = Field(
        False,
        description="all truncations of a batch (mean, full+one) in one forward pass: for a GPU "
        "that a batch does not fill; takes their number times the memory",
    )
    shuffle: bool = Field(True, description="draw batches by the seed; false: in the data's order")


class MethodConfig(Section):
    """The published algorithm, and what it leaves to choose."""

    name: str = Field("prelort", description="see `prelort methods`, or 'package.module:Class'")
    weights: Literal["examples", "uniform"] = Field(
        "examples", description="a client's weight: its number of examples, or 1"
    )
    objective: Literal["plain", "mean", "example", "step", "full+one"] | None = Field(
        None, description="how prefixes are trained (PreLort); default: the method's own"
    )
    truncations: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="ranks that nested training cuts to; default: the clients' rank levels"
    )
    full_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="weight of the client's full rank; the rest is shared by its prefixes"
    )
    level_weights: dict[str, Annotated[float, Field(ge=0.0)]] | None = Field(
        None, description="weight of each rank level, e.g. {2 = 0.5, 4 = 1}; over full_share"
    )
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="a method's own: [method.options.hetlora] gamma = 0.9; see docs/methods",
    )

    def options_of(self, name: str, kind: type[S]) -> S:
        """The options of method ``name``. Raises `ConfigError` with one sentence."""
        return validated(kind, self.options.get(name, {}), f"method.options.{name}")


class FederationConfig(Section):
    """Rounds, who takes part, and what is tolerated."""

    rounds: Annotated[int, Field(ge=1)] = 12
    clients_per_round: Annotated[int, Field(ge=1)] | Share = Field(
        5, description="a number of clients, or (with a decimal point) a share of them"
    )
    quorum: Annotated[int, Field(ge=1)] | Share = Field(
        0.5, description="usable replies a round needs: a number, or a share of those asked"
    )
    timeout: Annotated[float, Field(gt=0.0)] = Field(
        3600.0, description="seconds that a round waits for its replies"
    )
    min_clients: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="real sites: how many must be there for a round to begin; default: "
        "clients_per_round where it is a number, else 1",
    )
    wait: Annotated[float, Field(ge=0.0)] = Field(
        600.0, description="real sites: seconds to wait for min_clients, then the run stops"
    )
    attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="real sites: times that a round is tried before the run stops"
    )
    clients_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="clients of this process that train in one batch; auto: one on a CPU, on a GPU "
        "all of a round, or as many as its memory holds",
    )
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        "float32", description="the type in which adapters travel; int8 with a scale for each slot"
    )
    max_client_examples: Annotated[int, Field(ge=1)] = Field(
        10_000_000, description="a reply that claims more is refused"
    )
    max_abs_value: Annotated[float, Field(gt=0.0)] = Field(
        1e4, description="a reply with a larger number in its adapter is refused"
    )


class EvaluationConfig(Section):
    """What is measured, when, and at which prefixes of the global adapter."""

    every: Annotated[int, Field(ge=0)] = Field(
        0, description="measure every so many rounds; 0: before the first and after the last"
    )
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="ranks to measure at; default: the rank levels and method.truncations",
    )
    on: Literal["test", "validation"] = Field(
        "test", description="validation: the rows held out by data.validation_fraction"
    )
    at_clients: bool = Field(
        False, description="measure at every client too, on its own held-out rows at its own rank"
    )
    diagnostics: bool = Field(
        True, description="measure each round's noise, drift and energy of ranks (docs/diagnostics)"
    )
    batch_size: Annotated[int, Field(ge=1)] = 32
    metrics: tuple[Literal["accuracy", "macro_f1", "perplexity", "rouge_l"], ...] | None = Field(
        None, description="default: the task's own"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(48, description="for rouge_l")
    max_generated: Annotated[int, Field(ge=1)] = Field(64, description="examples for rouge_l")


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = 0
    task: Literal["causal-lm", "instruction", "chat", "classification"] = "causal-lm"
    threads: Annotated[int, Field(ge=1)] | None = Field(None, description="CPU threads of torch")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    ranks: RanksConfig = RanksConfig()
    lora: LoraSettings = LoraSettings()
    training: TrainingConfig = TrainingConfig()
    method: MethodConfig = MethodConfig()
    federation: FederationConfig = FederationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _validation_rows(self) -> Config:
        wanted = {
            "evaluation.on = 'validation'": self.evaluation.on == "validation",
            "ranks.allocation = 'by-loss'": self.ranks.allocation == "by-loss",
        }
        for key, asked in wanted.items():
            if asked and self.data.validation_fraction == 0:
                raise ValueError(
                    f"{key} needs rows held out at the clients: set data.validation_fraction, "
                    "for instance to 0.1"
                )
        return self


def load(path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply ``a.b=value`` overrides, and check everything.

    Without a file the embedded default is meant. Raises `ConfigError` with one sentence.
    """
    return check(applied(read_values(path), overrides))


def read_values(path: Path | str | None = None) -> dict[str, Any]:
    """The plain values of a TOML file, of the embedded default without one; unchecked."""
    return read_toml(Path(path) if path is not None else EMBEDDED_FILE)


def applied(
    values: Mapping[str, Any], overrides: Iterable[str], where: str = "--set"
) -> dict[str, Any]:
    """The values with ``a.b=value`` overrides, in their order; ``where`` they stand, for errors."""
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        _apply(changed, override, where)
    return changed


def check(values: Mapping[str, Any]) -> Config:
    """Build a `Config` from plain values; raises `ConfigError` with one sentence."""
    if "compare" in values:
        raise ConfigError("the section [compare] makes this a study: `prelort compare` runs it")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def validated(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """A section built from plain values that stand at ``where``.

    Raises `ConfigError` with one sentence.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_option_sentence(error, where, kind)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file; raises `ConfigError` if it is missing or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file {str(path)!r} is not valid TOML: {error}") from None


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML; keys that are not set are left out."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of every key."""
    return _flat(config.model_dump(mode="json"))


def differences(first: Config, second: Config) -> list[str]:
    """The dotted keys whose values differ."""
    a, b = flat(first), flat(second)
    return [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _apply(values: dict[str, Any], override: str, where: str) -> None:
    """Put one ``a.b=value`` into the nested values; the value is TOML, or else a string."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"{where} {override!r} is not of the form key=value, e.g. method.name=fedit"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{where} {override!r}: {section!r} is a value, not a section")
        target = inner
    target[last] = value


def _sentence(error: ValidationError) -> str:
    """The first thing wrong, as one sentence with the value and what is allowed."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(Config, first["loc"][:-1])
        return f"unknown key {key!r}: {_nearest(str(first['loc'][-1]), allowed)}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    value = json.dumps(first["input"], default=str)
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    key = _known_part(first["loc"])
    return f"{key} = {value} is not allowed: {message}"


def _option_sentence(error: ValidationError, where: str, kind: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join([where, *map(str, first["loc"][:1])])
    if first["type"] == "extra_forbidden":
        allowed = list(kind.model_fields)
        if not allowed:
            return f"unknown key {key!r}: this method has no options"
        return f"unknown key {key!r}: {_nearest(str(first['loc'][-1]), allowed)}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{key} = {json.dumps(first['input'], default=str)} is not allowed: {message}"


def _known_part(location: Sequence[Any]) -> str:
    """The dotted key without the names that pydantic adds for the branches of a union."""
    parts: list[str] = []
    model: type[BaseModel] | None = Config
    for part in location:
        if model is None or part not in model.model_fields:
            break
        parts.append(str(part))
        model = _section(model, str(part))
    return ".".join(parts)


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        model = _section(model, str(part)) or model
    return list(model.model_fields)


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section behind a key, None if the key is a value."""
    annotation: Any = model.model_fields[key].annotation
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _nearest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "allowed are " + ", ".join(allowed)
