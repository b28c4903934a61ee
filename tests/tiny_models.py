"""The tiny base models with LoRA layers, and an adapter that changes their output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import LoraSettings, ModelConfig
from prelort.models.base import load_model
from prelort.models.lora import attach, extract
from prelort.tasks.interface import Example

LABELS = ("early", "late", "never")


def kind_of(folder: Path) -> str:
    return "classification" if folder.name == "bert" else "causal"


def base_model(folder: Path, **settings: Any) -> torch.nn.Module:
    """The frozen base; its new head, if it has one, is always the same."""
    config = ModelConfig(name=str(folder), device="cpu", **settings)
    kind = kind_of(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_model(config, kind, LABELS if kind == "classification" else (), pad_id=0)


def adapted(folder: Path, rank: int = 8, **settings: Any) -> PeftModel:
    """The base with LoRA layers, in evaluation mode."""
    return attach(base_model(folder), LoraSettings(**settings), rank, kind_of(folder)).eval()


def trained_adapter(model: PeftModel, scale: ScaleRule | None = None, seed: int = 0) -> LoraAdapter:
    """An adapter of the model's shapes in which neither factor is zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    now = extract(model, scale or ScaleRule("constant", 0.5))

    def noise(tensor: Tensor) -> Tensor:
        return 0.3 * torch.randn(tensor.shape, generator=generator)

    layers = {n: Factors(noise(f.A), noise(f.B)) for n, f in now.layers.items()}
    return LoraAdapter(layers, now.scale, {n: t + noise(t) for n, t in now.modules_to_save.items()})


def token_batch(rows: int = 3, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Input tokens with padding on the right of all rows but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 256, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - min(row, length - 1) :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def ragged_examples(folder: Path, count: int = 12, seed: int = 0) -> list[Example]:
    """Sequences of three to eight tokens, so that batches weigh differently."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(2, 256, (length,), generator=generator).tolist()
        made.append(Example(ids, index % 3 if kind_of(folder) == "classification" else ids))
    return made


def logits(model: torch.nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """Evaluated logits; those of padding are zero."""
    batch = batch or token_batch()
    with torch.no_grad():
        out = model(**batch).logits
    return out * batch["attention_mask"][:, :, None] if out.ndim == 3 else out
