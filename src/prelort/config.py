"""One typed configuration for a run: the same keys in TOML, in ``--set`` and in Python.

Every section is a frozen pydantic model that refuses unknown keys. Errors are one sentence with
the key, the value and what is allowed.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prelort.errors import ConfigError
from prelort.extensions import TASKS, unknown_name
from prelort.files import as_path

EMBEDDED = "embedded"
"""The name of the base model and of the text that need no download."""

PYTHON = "python"
"""The data source, and the partition, that is an object given to `prelort.Federation`."""

SITES = "sites"
"""The data source of a federation of real sites: each reads its own data."""

EMBEDDED_FILE = Path(__file__).parent / "embedded" / "default.toml"
"""The default configuration."""

PATHS = (
    *(("model", "name"), ("model", "tokenizer")),
    *(("data", "source"), ("data", "test"), ("lora", "start_from")),
)
"""Section and key of what may be a path."""

Share = Annotated[float, Field(gt=0.0, le=1.0)]


def count_of(number: int | float, available: int) -> int:
    """An int as it is; a float as that share of ``available``, rounded up, at least 1."""
    if isinstance(number, int):
        return number
    return max(1, math.ceil(number * available - 1e-9))


MIN_CLIP, MAX_CLIP = 1e-6, 1e6
"""Between them norms and noise are exact enough in float32."""
CLIENTS_PER_ROUND = 6
"""How many clients train in a round, if there are so many and no number is configured."""


def cohort_size(per_round: int | float | None, clients: int) -> int:
    """How many of the clients train in a round, for ``federation.clients_per_round``."""
    return min(count_of(CLIENTS_PER_ROUND if per_round is None else per_round, clients), clients)


class Section(BaseModel):
    """A part of the configuration: immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python would take true for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{json.dumps(value)} is not allowed")
        return value


class NoOptions(Section):
    """The options of a method that has none."""


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    """The frozen base model, the same for every client."""

    name: str = Field(EMBEDDED, description="'embedded', a local folder, or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    tokenizer: str | None = Field(
        None, description="another tokenizer: a local folder, or a hub name; default: the model's"
    )
    chat_template: str | None = Field(
        None, description="chat task: a Jinja template in place of the tokenizer's"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="of the base's weights; auto: as the model was saved"
    )
    device: str = Field(
        "auto",
        description="'auto', 'cpu', 'cuda', 'cuda:N', or 'balanced': layer by layer over all GPUs",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="load the base in 8 or 4 bits (needs bitsandbytes)"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description="attention implementation; auto: transformers' choice for the model; "
        "flash_attention_2 needs flash-attn, a CUDA device and bfloat16 or float16",
    )
    trust_remote_code: bool = Field(False, description="run the model's own code from the hub")


class DataConfig(Section):
    """The data set and its columns."""

    source: str = Field(
        EMBEDDED,
        description="'embedded', a hub name, or a CSV/TSV/JSON/JSON-lines/Parquet/text file; "
        "'sites': each real site has its own; 'python': given to prelort.Federation",
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="training split of a hub data set")
    test: str | None = Field(None, description="test set: a file, or a split of a hub data set")
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="share of each client's rows held out for testing if `test` is not set"
    )
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of each client's training rows held out for validation"
    )
    text_column: str | None = Field(None, description="auto-detected if unambiguous")
    label_column: str | None = Field(None, description="classification: the column of the class")
    labels: tuple[str, ...] | None = Field(
        None,
        description="classification: the classes in order; default: those in the data (real sites "
        "must name them, since none sees them all)",
    )
    prompt_template: str | None = Field(
        None,
        description="instruction task: the prompt, with columns in braces; default: the columns "
        "instruction (and context or input), prompt, or question",
    )
    completion_column: str | None = Field(None, description="instruction task: the answer")
    messages_column: str | None = Field(
        None,
        description="chat task: list of role and content; default: messages, conversations, or "
        "prompt and completion",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        128, description="maximum number of tokens per example"
    )
    max_train_examples: Annotated[int, Field(ge=1)] | None = Field(
        None, description="maximum number of training examples, drawn by the seed"
    )
    max_test_examples: Annotated[int, Field(ge=1)] | None = Field(
        None, description="maximum number of test examples, drawn by the seed"
    )


class PartitionConfig(Section):
    """How the training rows are partitioned among the clients."""

    by: Literal["auto", "column", "iid", "dirichlet", "quantity", "shards", "python"] = Field(
        "auto",
        description="auto: natural clients if a column names them, else iid; python: given to "
        "prelort.Federation",
    )
    clients: Annotated[int, Field(ge=1)] | None = Field(
        None, description="number of clients; default: one per value of the column, else 16"
    )
    column: str | None = Field(
        None,
        description="column, dirichlet, shards: the column to partition by (default: the label)",
    )
    alpha: Annotated[float, Field(gt=0.0)] = Field(
        0.5, description="dirichlet, quantity: concentration; small is more uneven"
    )
    shards_per_client: Annotated[int, Field(ge=1)] = Field(
        2, description="shards: slices of the rows sorted by label that a client gets"
    )
    min_examples: Annotated[int, Field(ge=1)] = Field(
        1, description="minimum number of rows per client"
    )


class LoraSettings(Section):
    """The adapted layers and the scale rule of the federation."""

    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="'all-linear' or (the last parts of) module names"
    )
    target_parameters: tuple[str, ...] = Field(
        (),
        description="stacks of experts to adapt: (the ends of) names of parameters, such as "
        "'experts.gate_up_proj' and 'experts.down_proj'",
    )
    scale_rule: Literal["constant", "rslora"] = Field(
        "constant", description="constant: s for every rank; rslora: alpha / sqrt(rank in use)"
    )
    scale: Annotated[float, Field(gt=0.0)] = Field(
        2.0, description="s of the constant rule, alpha of rslora"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="of the adapters' input, in training"
    )
    modules_to_save: tuple[str, ...] | None = Field(
        None, description="modules trained in full (default for classification: the head)"
    )
    start_from: str | None = Field(
        None,
        description="begin from this adapter: a PEFT folder, or a finished run; needs this scale",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="maximum rank of single layers, by (the end of) a name"
    )


class RanksConfig(Section):
    """The clients' ranks."""

    mix: str = Field(
        "2*0.25, 4*0.25, 8*0.25, 16*0.25",
        coerce_numbers_to_str=True,
        description="a list '4, 8, 16, 16' (one per client) or a mix 'rank*share, ...'",
    )
    assign: Literal["random", "by-size", "in-order"] = Field(
        "random", description="random by the seed, highest rank to most data, or as listed"
    )
    schedule: dict[str, str] = Field(
        default_factory=dict, description="new mixes, e.g. {5 = '4*0.5, 16*0.5'} from round 5"
    )
    allocation: Literal["fixed", "by-loss"] = Field(
        "fixed",
        description="by-loss: all start at the mix's lowest rank, then the best get the highest",
    )
    high_share: Share = Field(
        0.1, description="by-loss: share of the clients that get the highest rank"
    )

    @field_validator("schedule")
    @classmethod
    def _rounds(cls, schedule: dict[str, str]) -> dict[str, str]:
        for key in schedule:
            if not (key.isascii() and key.isdigit() and int(key) >= 2):
                raise ValueError(
                    f"{key!r} is not a round number of 2 or more (round 1 uses ranks.mix)"
                )
        return schedule


class TrainingConfig(Section):
    """Local training of a client in one round."""

    local_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="optimiser steps per round; 0: use local_epochs"
    )
    local_epochs: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="passes over the client's examples per round if local_steps is 0"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        8, description="examples in a forward and backward pass"
    )
    gradient_accumulation: Annotated[int, Field(ge=1)] = Field(
        1, description="batches of an optimiser step"
    )
    optimizer: Literal["adamw", "sgd", "adamw-8bit"] = Field(
        "adamw",
        description="starts fresh each round; 8bit: a quarter of AdamW's state, with bitsandbytes",
    )
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        8e-3, description="made for the embedded model; `prelort config --task TASK` says others"
    )
    rank_exponent: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None,
        description="a client of rank r trains at learning_rate * (highest rank / r) ** "
        "rank_exponent; default: the method's own, mostly 0",
    )
    b_rate_ratio: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="LoRA+: the learning rate of B over that of A, such as 16"
    )
    head_learning_rate: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="for modules trained in full; default: learning_rate"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="of the optimiser, at each step"
    )
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="SGD only")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="of the learning rate, over the whole run and not within one round"
    )
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of the run in which the rate rises"
    )
    max_grad_norm: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="gradients are clipped to this norm; 0: never"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast of the forward pass"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again instead of keeping them: slower, less memory"
    )
    batch_truncations: bool = Field(
        False,
        description="all truncations of a batch (mean, full+one) in one forward pass: faster on "
        "a GPU that one batch does not fill, at a multiple of the memory",
    )
    packing: bool = Field(
        False,
        description="examples of a batch share rows, as long as its longest, in place of padding; "
        "equal up to rounding, faster where lengths differ (not for classification)",
    )
    shuffle: bool = Field(
        True, description="shuffle batches by the seed; false: keep the order of the data"
    )


class MethodConfig(Section):
    """The aggregation method and its options."""

    name: str = Field("prelort", description="see `prelort methods`, or 'package.module:Class'")
    weights: Literal["examples", "uniform"] = Field(
        "examples", description="weight of a client: its number of examples, or 1"
    )
    objective: Literal["plain", "mean", "example", "step", "full+one"] | None = Field(
        None, description="how truncations are trained (PreLort); default: the method's own"
    )
    truncations: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="ranks that nested training truncates to; default: the clients' rank levels",
    )
    full_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="weight of the client's full rank; its truncations share the rest"
    )
    level_weights: dict[str, Annotated[float, Field(ge=0.0)]] | None = Field(
        None, description="weight of each rank level, e.g. {2 = 0.5, 4 = 1}; overrides full_share"
    )
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="of single methods (their pages): [method.options.hetlora] gamma = 0.9",
    )

    def options_of(self, name: str, kind: type[S]) -> S:
        """The options of method ``name``. Raises `ConfigError` with one sentence."""
        return validated(kind, self.options.get(name, {}), f"method.options.{name}")


class FederationConfig(Section):
    """Rounds, participation and limits."""

    rounds: Annotated[int, Field(ge=1)] = Field(12, description="rounds of the whole run")
    clients_per_round: Annotated[int, Field(ge=1)] | Share | None = Field(
        None,
        description="number of clients, or (with a decimal point) share of them; default: 6, or "
        "all if there are fewer",
    )
    quorum: Annotated[int, Field(ge=1)] | Share = Field(
        0.5,
        description="usable replies that a round needs: number, or share of the sampled clients",
    )
    timeout: Annotated[float, Field(gt=0.0)] = Field(
        3600.0, description="seconds to wait for the replies of a round"
    )
    min_clients: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="real sites: connected clients that a round needs to start; default: "
        "clients_per_round if it is a number, else 1",
    )
    wait: Annotated[float, Field(ge=0.0)] = Field(
        600.0, description="real sites: seconds to wait for min_clients before the run stops"
    )
    verify_names: bool = Field(
        True,
        description="real sites: a client's name stays with the key of its node; false only for a "
        "SuperLink without --enable-supernode-auth, whose nodes have a new key at each start",
    )
    attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="real sites: attempts at a round before the run stops"
    )
    clients_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="clients of this process that train in one batch; auto: one on a CPU, on a GPU "
        "all of a round, or as many as its memory holds",
    )
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        "float32",
        description="data type of adapters in messages; int8 has one scale per rank dimension",
    )
    max_client_examples: Annotated[int, Field(ge=1)] = Field(
        10_000_000, description="maximum number of examples that a client may claim"
    )
    max_abs_value: Annotated[float, Field(gt=0.0)] = Field(
        1e4, description="maximum absolute value in the adapter of a reply"
    )


class PrivacyConfig(Section):
    """What the server, and who sees the adapter, may learn of clients or of their examples."""

    # Above 100 nothing is protected, and accounting for it takes minutes or fails.
    epsilon: Annotated[float, Field(gt=0.0, le=100.0)] | None = Field(
        None, description="budget of the whole run"
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        1e-5,
        description="probability that epsilon does not hold: far below 1 / clients (or examples)",
    )
    unit: Literal["client", "example"] = Field(
        "client",
        description="client: the adapter tells little about any client; example: what a client "
        "sends tells little about any of its training examples, to whose gradients it adds noise "
        "(DP-SGD)",
    )
    clip: Annotated[float, Field(ge=MIN_CLIP, le=MAX_CLIP)] = Field(
        1.0,
        description="norm that a client's change, or an example's gradient, is clipped to, all "
        "layers together",
    )
    adaptive_clipping: bool = Field(
        True,
        description="unit client: let the clip norm follow the median of the changes' norms from "
        "round 2",
    )
    secure_aggregation: bool = Field(
        False,
        description="the server gets sums of replies, no single one (docs/secure-aggregation.md)",
    )
    threshold: Annotated[float, Field(gt=0.5, le=1.0)] = Field(
        0.67, description="share of the clients of a round that must stay until its end"
    )
    min_holders: Annotated[int, Field(ge=2)] = Field(
        3, description="clients that a rank dimension's sum needs; with fewer it is left out"
    )
    hide_ranks: bool = Field(
        False,
        description="with secure_aggregation: the server learns how many clients hold each rank "
        "dimension, and not which",
    )

    @property
    def of_clients(self) -> bool:
        """Whether there is a budget for what is learnt about clients."""
        return self.epsilon is not None and self.unit == "client"

    @property
    def of_examples(self) -> bool:
        """Whether there is a budget for what is learnt about each client's examples."""
        return self.epsilon is not None and self.unit == "example"


class RobustnessConfig(Section):
    """Defence against malicious clients (docs/robustness.md)."""

    rule: Literal[
        "none", "clip", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"
    ] = Field("none", description="applied to the clients' changes, before the method's own mean")
    attackers: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.2,
        description="clients of a round that may be malicious: number, or (with a decimal point) "
        "share",
    )
    uncovered: Literal["freeze", "clip"] = Field(
        "freeze",
        description="for ranks with too few holders in a round for the rule: leave them as they "
        "are, or clip changes to the norm that is usual for lower ranks",
    )


class EvaluationConfig(Section):
    """What is measured, when, and at which ranks of the global adapter."""

    every: Annotated[int, Field(ge=0)] = Field(
        0, description="rounds between evaluations; 0: before the first and after the last round"
    )
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="ranks to evaluate; default: the rank levels and method.truncations",
    )
    on: Literal["test", "validation"] = Field(
        "test", description="validation: the rows that data.validation_fraction holds out"
    )
    at_clients: bool = Field(
        False, description="also evaluate at every client, on its own held-out rows at its own rank"
    )
    diagnostics: bool = Field(
        True,
        description="aggregation noise, drift and rank energy of each round (docs/diagnostics.md)",
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="examples in a forward pass")
    metrics: tuple[Literal["accuracy", "macro_f1", "perplexity", "rouge_l"], ...] | None = Field(
        None, description="default: the task's own"
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(48, description="for rouge_l")
    max_generated: Annotated[int, Field(ge=1)] = Field(
        64, description="maximum number of examples for rouge_l"
    )


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="decides everything random: partition, ranks, cohorts, batches, factors"
    )
    task: str = Field(
        "causal-lm",
        description="what is learnt, and which columns are read: 'causal-lm', 'instruction', "
        "'chat', 'classification', or 'package.module:Class'",
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads per process; default: all cores"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    ranks: RanksConfig = RanksConfig()
    lora: LoraSettings = LoraSettings()
    training: TrainingConfig = TrainingConfig()
    method: MethodConfig = MethodConfig()
    federation: FederationConfig = FederationConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @field_validator("task")
    @classmethod
    def _task(cls, task: str) -> str:
        if task not in TASKS and ":" not in task:
            raise ValueError(unknown_name("task", task, TASKS))
        return task

    @model_validator(mode="after")
    def _secure_aggregation(self) -> Config:
        per_round, needed = self.federation.clients_per_round, self.privacy.min_holders
        clients = self.partition.clients
        if isinstance(per_round, float) and clients is not None:
            per_round = math.ceil(per_round * clients - 1e-9)
        if self.privacy.secure_aggregation and isinstance(per_round, int) and per_round < needed:
            raise ValueError(
                f"privacy.secure_aggregation needs federation.clients_per_round = {needed} or more "
                f"(privacy.min_holders), it is {per_round}"
            )
        return self

    @model_validator(mode="after")
    def _validation_rows(self) -> Config:
        needs = {
            "evaluation.on = 'validation'": self.evaluation.on == "validation",
            "ranks.allocation = 'by-loss'": self.ranks.allocation == "by-loss",
        }
        for key, is_set in needs.items():
            if is_set and self.data.validation_fraction == 0:
                raise ValueError(
                    f"{key} needs validation rows: set data.validation_fraction to 0.1"
                )
        return self

    @model_validator(mode="after")
    def _packing(self) -> Config:
        excluded = {
            "task = 'classification'": self.task == "classification",
            "training.batch_truncations = true": self.training.batch_truncations,
            f"federation.clients_per_batch = {self.federation.clients_per_batch}": (
                self.federation.clients_per_batch not in ("auto", 1)
            ),
        }
        for setting, is_set in excluded.items():
            if self.training.packing and is_set:
                raise ValueError(f"training.packing = true is not possible with {setting}")
        return self

    @model_validator(mode="after")
    def _protections_that_exclude_each_other(self) -> Config:
        privacy, rule = self.privacy, self.robustness.rule != "none"
        by_loss, hidden = self.ranks.allocation == "by-loss", privacy.secure_aggregation
        together = self.federation.clients_per_batch
        exclusive = {
            "privacy.epsilon is not possible with ranks.allocation = 'by-loss': the ranks would "
            "tell the clients' losses; use 'fixed'": privacy.epsilon is not None and by_loss,
            "privacy.epsilon of clients is not possible with robustness.rule: the noise is "
            "calibrated to a sum of clipped changes, which a rule is not": privacy.of_clients
            and rule,
            "privacy.adaptive_clipping is not possible with privacy.secure_aggregation: the server "
            "does not see whose changes were clipped; set it to false": privacy.of_clients
            and hidden
            and privacy.adaptive_clipping,
            "robustness.rule is not possible with privacy.secure_aggregation: a rule compares "
            "single changes, which the server would not see": rule and hidden,
        }
        reasons = {
            "training.packing: examples of one row share a gradient": self.training.packing,
            "training.batch_truncations: the gradients of all examples would be in memory once for "
            "each truncation": self.training.batch_truncations,
            f"federation.clients_per_batch = {together}: a client's examples are drawn for it "
            "alone": together not in ("auto", 1),
            "evaluation.at_clients: what clients measure on their rows is not noisy": (
                self.evaluation.at_clients
            ),
            "data.source = 'sites' without data.test: what sites measure on their rows is not "
            "noisy": self.data.source == SITES and self.data.test is None,
        }
        if privacy.hide_ranks:
            exclusive |= self._excluded_by_hidden_ranks()
        if privacy.of_examples:
            impossible = "privacy.unit = 'example' is not possible with"
            exclusive |= {f"{impossible} {reason}": is_set for reason, is_set in reasons.items()}
        for sentence, is_asked in exclusive.items():
            if is_asked:
                raise ValueError(sentence)
        return self

    def _excluded_by_hidden_ranks(self) -> dict[str, bool]:
        """Sentence -> whether it applies, where ``privacy.hide_ranks`` is set."""
        per_round, weights = self.federation.clients_per_round, self.method.weights
        ranks, key = self.ranks, "privacy.hide_ranks"
        return {
            f"{key} needs privacy.secure_aggregation = true: a single reply shows its rank": (
                not self.privacy.secure_aggregation
            ),
            f"{key} needs method.weights = 'uniform', it is {weights!r}: the server knows the "
            "numbers of examples, and their sum over the holders of a rank dimension would tell "
            "who they are": weights != "uniform",
            f"{key} needs federation.clients_per_round = 1.0, it is {per_round}: of a random "
            "cohort nobody knows how many hold a rank dimension": per_round != 1.0
            or isinstance(per_round, int),
            f"{key} is not possible with ranks.allocation = {ranks.allocation!r} or a "
            "ranks.schedule: the server would change ranks that it does not know": bool(
                ranks.allocation != "fixed" or ranks.schedule
            ),
            f"{key} is not possible with evaluation.at_clients: each would measure at its own "
            "rank": self.evaluation.at_clients,
        }


def load(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (default: the embedded one), apply ``a.b=value`` overrides, check all of it.

    Raises `ConfigError` with one sentence.
    """
    return check(applied(read_values(path), overrides))


def read_values(path: Path | str | None = None) -> dict[str, Any]:
    """The unchecked values of a TOML file, by default of the embedded one."""
    return read_toml(as_path(path) if path is not None else EMBEDDED_FILE)


def applied(
    values: Mapping[str, Any], overrides: Sequence[str], where: str = "--set"
) -> dict[str, Any]:
    """The values with ``a.b=value`` overrides, in order; errors say that they stand at ``where``.

    A value is TOML, or else a string. Paths of models and data become absolute, so that what is
    started here can go on elsewhere.
    """
    changed = copy.deepcopy(dict(values))
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides):
        raise ConfigError(f"overrides must be a list of texts 'key=value', not {overrides!r}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"{where} {override!r} is not of the form key=value, e.g. method.name=fedit"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text
        *sections, last = key.strip().split(".")
        target = changed
        for section in sections:
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{where} {override!r}: {section!r} is a value, not a section")
            target = inner
        target[last] = value
    for section, key in PATHS:
        inner = changed.get(section)
        named = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(named, str) and _is_path(named):
            inner[key] = str(Path(named).expanduser().absolute())
    return changed


def _is_path(text: str) -> bool:
    if text in ("", EMBEDDED, PYTHON, SITES):
        return False
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such user
        return False


def check(values: Mapping[str, Any]) -> Config:
    """Build a `Config` from plain values; raises `ConfigError` with one sentence."""
    if "compare" in values:
        raise ConfigError("the section [compare] makes this a study: `prelort compare` runs it")
    return validated(Config, values)


def validated(kind: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Build a section from plain values; ``where``: the dotted key of the section.

    Raises `ConfigError`: one sentence with the key, the value and what is allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, kind, where)) from None


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
    except (tomllib.TOMLDecodeError, RecursionError) as error:
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


def conflicts(old: Config, new: Config) -> list[str]:
    """The dotted keys in which a run that goes on must not differ: all, but for more rounds."""
    more = new.federation.rounds > old.federation.rounds
    return [key for key in differences(old, new) if key != "federation.rounds" or not more]


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


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """A sentence about a dotted key whose last part is not ``allowed``, with the nearest one."""
    close = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(allowed)}"
    return f"unknown key {key!r}: {hint if allowed else 'no keys are allowed here'}"


def _sentence(error: ValidationError, kind: type[BaseModel], where: str) -> str:
    """The first error of a section of type ``kind``, as one sentence."""
    first, *others = error.errors()
    # Without the names that pydantic adds for the branches of a union.
    parts: list[str] = [where] if where else []
    section: Any = kind
    depth = 0
    for part in first["loc"]:
        if not _is_section(section) or part not in section.model_fields:
            break
        parts.append(str(part))
        section = section.model_fields[part].annotation
        depth += 1
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        allowed = list(section.model_fields)
        return unknown_key(".".join([*parts, unknown]), allowed)
    if first["type"] == "value_error":
        message = _lower(first["msg"].removeprefix("Value error, "))
        return f"{key}: {message}" if key else message
    # Every branch of a union has an error of its own: together they say what is allowed.
    in_branch = len(first["loc"]) > depth and isinstance(first["loc"][depth], str)
    branches = [e for e in others if in_branch and e["loc"][:depth] == first["loc"][:depth]]
    messages = dict.fromkeys(_lower(e["msg"]) for e in [first, *branches])
    message = ", or ".join(messages).replace("a valid tuple", "a list")
    return f"{key} = {json.dumps(first['input'], default=str)} is not allowed: {message}"


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
