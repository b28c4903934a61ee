"""Losses and their gradients under truncations, once by masks and once by cutting by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.models.lora import ADAPTER, install, lora_layers, trainable
from prelort.training.truncation import Truncation
from tiny_models import token_batch

Gradients = dict[str, Tensor]


def labelled_batch(rows: int = 3, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    batch = token_batch(rows, length, seed)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def row_losses(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss of each row: of its next tokens, or of the class ``row % 3``."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if out.ndim == 2:
        return F.cross_entropy(out.float(), torch.arange(len(out)) % 3, reduction="none")
    each = F.cross_entropy(
        out[:, :-1].transpose(1, 2).float(), batch["labels"][:, 1:], reduction="none"
    )
    return each.sum(dim=1)


def gradients(model: PeftModel) -> Gradients:
    """The gradients now in the model, which are taken out of it."""
    named = {}
    for name, layer in lora_layers(model).items():
        named[f"{name}.A"] = layer.lora_A[ADAPTER].weight
        named[f"{name}.B"] = layer.lora_B[ADAPTER].weight
    named |= {f"saved {i}": p for i, p in enumerate(trainable(model)[-1])}
    taken = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    model.zero_grad(set_to_none=True)
    return taken


def masked(
    model: PeftModel, truncation: Truncation, batch: dict[str, Tensor], ranks: int | Tensor | None
) -> Gradients:
    """The gradient of the summed loss under a truncation of the installed adapter."""
    with truncation.at(ranks):
        row_losses(model, batch).sum().backward()
    return gradients(model)


def cut(
    model: PeftModel, adapter: LoraAdapter, batch: dict[str, Tensor], ranks: Sequence[int]
) -> Gradients:
    """The same by brute force: for each rank the prefix is installed as an adapter of its own.

    ``ranks``: one for each row. Dimensions that a prefix lacks have no gradient from it. The
    adapter is installed again in the end.
    """
    install(model, adapter)
    total = gradients(model)
    for rank in set(ranks):
        install(model, adapter.prefix(rank))
        rows = torch.tensor([own == rank for own in ranks])
        row_losses(model, batch)[rows].sum().backward()
        for name, gradient in gradients(model).items():
            if name.endswith(".A"):
                total[name][: gradient.shape[0]] += gradient
            elif name.endswith(".B"):
                total[name][:, : gradient.shape[1]] += gradient
            else:
                total[name] += gradient
    install(model, adapter)
    return total


def combined(parts: Sequence[tuple[float, Gradients]]) -> Gradients:
    """The weighted sum of gradients."""
    return {name: sum(w * g[name] for w, g in parts) for name in parts[0][1]}


def flat(found: Gradients) -> Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


def assert_same_gradients(found: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=tolerance, atol=tolerance * largest, msg=name
        )
