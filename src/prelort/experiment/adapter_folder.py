"""An exported adapter: a PEFT folder with its tokenizer, its class names and a model card."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from prelort import tasks
from prelort.adapters import LoraAdapter, peft_folder
from prelort.config import Config
from prelort.events import Metrics
from prelort.history import RunHistory
from prelort.methods import find
from prelort.report.formatting import metric_format
from prelort.tasks import labels

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``--max-lora-rank``."""


def write(
    folder: Path,
    adapter: LoraAdapter,
    template: LoraConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    names: Sequence[str],
    card: str,
) -> None:
    """Write an adapter to ``folder``.

    ``template``: what its PEFT configuration says besides its ranks. ``names``: the class names in
    the order of their numbers. ``card``: the text of its README.md (`model_card`).
    """
    peft_folder.save(adapter, folder, template)
    labels.write(folder, names)
    if tokenizer is not None:
        clean = copy.deepcopy(tokenizer)
        if clean.is_fast:  # it keeps the limits of its last call, which are no part of it
            clean.backend_tokenizer.no_truncation()
            clean.backend_tokenizer.no_padding()
        try:
            clean.save_pretrained(folder)
        except Exception as error:  # tokenizers has no other type for a full disk
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(config: Config, history: RunHistory, base: str, rank: int) -> str:
    """The card of a run's adapter of ``rank`` on the model ``base``, in the hub's format."""
    classifies = tasks.get(config.task).kind == "classification"
    data = ModelCardData(
        base_model=base if is_hub_name(base) else None,
        library_name="peft",
        pipeline_tag="text-classification" if classifies else "text-generation",
        tags=["lora", "federated-learning", "prelort"],
    )
    started, metrics = history.started, [metric_format(name) for name in history.metrics()]
    facts = {
        "base model": f"`{base}`",
        "task": config.task,
        "method": f"{config.method.name} ({find(config.method.name).paper})",
        "rounds": str(history.done),
        "seed": str(config.seed),
    }
    if started is not None:
        facts["clients"] = f"{started.clients}, of ranks {', '.join(map(str, started.levels))}"
    enough = [size for size in VLLM_RANKS if size >= rank]
    if classifies or config.lora.modules_to_save:
        facts["in vLLM"] = "merged only, since modules were trained in full"
    elif enough:
        facts["in vLLM"] = f"`--enable-lora --max-lora-rank {enough[0]}`"
    else:
        facts["in vLLM"] = f"merged only, since its rank is above {VLLM_RANKS[-1]}"
    if history.epsilon is not None:
        unit = "each client's examples" if config.privacy.of_examples else "the clients"
        facts[f"differential privacy of {unit}"] = (
            f"epsilon = {history.epsilon:.3g}, delta = {config.privacy.delta:g}"
        )
    measured: dict[str, Metrics] = {"untuned base": history.base} if history.base else {}
    if history.final is not None:
        measured |= {f"rank {rank}": values for rank, values in history.final.prefixes.items()}
    lines = [
        f"# LoRA adapter of rank {rank}",
        "",
        "Trained by federated fine-tuning with prelort.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {fact} |" for name, fact in facts.items()),
        "",
        "Measured on the run's test examples, cut to each rank:",
        "",
        f"| | {' | '.join(f'{one.title} {one.arrow}' for one in metrics)} |",
        "|---|" + "---:|" * len(metrics),
    ]
    for name, values in measured.items():
        cells = [one.show(values.get(one.metric)) for one in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    card: Any = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")
    return str(card)


def is_hub_name(name: str) -> bool:
    """Whether a base model's name is one on the hub, and no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
