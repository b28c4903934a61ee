"""A configuration to start from, with values that suit the task and the size of the model."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

from prelort import tasks
from prelort.config import LoraSettings, ModelConfig
from prelort.models.base import check_kind, load_tokenizer
from prelort.planning.skeleton import skeleton
from prelort.training.preflight import positions

MODELS = {"classification": "FacebookAI/roberta-base"}
ANY_MODEL = "Qwen/Qwen3-0.6B"
"""The model in a starter without ``--model``, for tasks of a kind that is not in `MODELS`."""

COLUMNS = {
    "causal-lm": "column `text`",
    "instruction": "columns `instruction` and `response`, or as docs/configuration.md says",
    "chat": "column `messages`: lists of `role` and `content`",
    "classification": "columns `text` and `label`",
}
TOKENS = {"causal-lm": 512, "instruction": 512, "chat": 1024, "classification": 256}

TEMPLATE = """\
# Federated {task} with {name}. Put your data at (1) and read (2);
# `prelort plan THIS-FILE --memory 16GiB` says which ranks a machine affords, and
# `prelort config --all` prints every key.

seed = 0
task = "{task}"

[model]
name = {name}
dtype = "{dtype}"
# quantization = "4bit"            # a base that is too large for the GPU otherwise

[data]
source = "my-data.csv"             # (1) a CSV/TSV/JSON/Parquet/text file or a hub name with
                                   #     {columns}
max_length = {tokens:<21} # tokens of an example; longer ones are cut

[partition]
by = "auto"                        # (2) a client per value of a column `client`, else 16 even ones

[ranks]
mix = "4*0.25, 8*0.25, 16*0.25, 32*0.25"

[training]
local_epochs = 1.0
batch_size = {batch_size:<21} # with gradient_accumulation 16 examples a step
gradient_accumulation = {accumulation}
learning_rate = {rate:<18} # too high if the loss does not fall from the first rounds on
warmup = 0.03
precision = "{precision}"
gradient_checkpointing = {checkpointing}

[federation]
rounds = 10
clients_per_round = 0.5            # share of the clients

[evaluation]
every = 2

[method]
name = "prelort"
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Values for models of up to ``parameters`` parameters."""

    parameters: float
    rate: str
    batch_size: int
    large: bool = False


SIZES = (
    Size(3e7, "4e-3", 16),
    Size(2e8, "1e-3", 16),
    Size(1.2e9, "5e-4", 8),
    Size(float("inf"), "2e-4", 2, large=True),
)
"""Rates of LoRA at scale 2 fall with a model's width; large models need their memory saved."""


def starter(task: str, model: str | None = None) -> str:
    """The text of a starter.

    Raises `ConfigError` for an unknown task or model, and for a model of another kind than the task
    needs; warns where a chat model has no chat template.
    """
    kind = tasks.get(task).kind
    name = model or MODELS.get(kind, ANY_MODEL)
    parameters, longest = 1e8 if kind in MODELS else 6e8, None
    if model is not None:
        own = ModelConfig(name=model)
        check_kind(own, kind)
        parameters, longest = measures(own, kind)
        if task == "chat" and not getattr(load_tokenizer(own), "chat_template", None):
            warnings.warn(
                f"model.name = {model!r} has no chat template: add model.chat_template, or use an "
                "instruction-tuned model, or the task 'instruction'",
                stacklevel=2,
            )
    values = values_for(task, parameters, longest)
    training = values["training"]
    return TEMPLATE.format(
        task=task,
        name=json.dumps(name),
        dtype=values["model"]["dtype"],
        columns=COLUMNS.get(task, "the columns that this task reads"),
        tokens=values["data"]["max_length"],
        batch_size=training["batch_size"],
        accumulation=training["gradient_accumulation"],
        rate=size_for(parameters).rate,
        precision=training["precision"],
        checkpointing=str(training["gradient_checkpointing"]).lower(),
    )


def values_for(task: str, parameters: float, longest: int | None) -> dict[str, dict[str, Any]]:
    """The starter's values as sections, for a model of so many parameters and tokens of a text."""
    size, tokens = size_for(parameters), TOKENS.get(task, 512)
    training = {
        "batch_size": size.batch_size,
        "gradient_accumulation": 16 // size.batch_size,
        "learning_rate": float(size.rate),
        "warmup": 0.03,
        "precision": "bfloat16" if size.large else "float32",
        "gradient_checkpointing": size.large,
    }
    return {
        "model": {"dtype": "bfloat16" if size.large else "float32"},
        "data": {"max_length": min(tokens, longest or tokens)},
        "training": training,
    }


def measures(config: ModelConfig, kind: str) -> tuple[float, int | None]:
    """The number of a model's parameters, and of the tokens of its longest text, if limited.

    From its configuration alone.
    """
    model = skeleton(config, LoraSettings(), 1, kind, labels=2).get_base_model()
    longest = positions(model) or getattr(model.config, "max_position_embeddings", None)
    return sum(weight.numel() for weight in model.parameters()), longest


def size_for(parameters: float) -> Size:
    """The values for a model of so many parameters."""
    return next(size for size in SIZES if parameters <= size.parameters)
