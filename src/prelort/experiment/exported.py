"""What is exported is loaded as a user would, and must compute what was measured."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from prelort.adapters import LoraAdapter
from prelort.config import ModelConfig
from prelort.errors import AdapterError
from prelort.federation.client import ClientRuntime
from prelort.models import base
from prelort.models.lora import install
from prelort.planning.measured import free_memory
from prelort.planning.rehearsal import storage_bytes, tensors_of
from prelort.training.runtime import evaluation_mode

TEXTS = ("The quick brown fox jumps over the lazy dog.", "def add(a, b): return a + b")

EXACT, ROUNDED = 1e-3, 5e-2
"""How far logits may be off, relative to them: in float32, and where anything is in fewer bits."""


def check_adapters(
    config: ModelConfig,
    runtime: ClientRuntime,
    labels: Sequence[str],
    exported: Mapping[Path, LoraAdapter],
) -> None:
    """Load each PEFT folder onto a new copy of the base and compare with the run's model.

    Warns where the memory does not suffice. Raises `AdapterError` with the likely cause.
    """
    device = str(runtime.device)
    needed = storage_bytes(tensors_of(runtime.model))
    if free_memory(device)[0] < 1.1 * needed:
        warnings.warn(
            "the exported adapters were not checked: there is no memory for a second base model",
            stacklevel=2,
        )
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a user's draws are not the run's
        fresh: nn.Module = base.load_model(config, runtime.task.kind, labels, pad_id=runtime.pad_id)
        for folder, adapter in exported.items():
            install(runtime.model, adapter)
            loaded = PeftModel.from_pretrained(fresh, folder)
            rounding = tolerance(runtime.model)
            measured = logits(runtime, runtime.model)
            difference = _difference(measured, logits(runtime, loaded), rounding)
            if not difference <= rounding:
                raise AdapterError(
                    f"{str(folder)!r}, loaded by PEFT, gives other logits than were measured (by "
                    f"{difference:.2g} of them): {_cause(runtime.model, loaded)}"
                )
            fresh = loaded.unload()


def merge(
    config: ModelConfig, runtime: ClientRuntime, adapter: LoraAdapter, dtype: torch.dtype | None
) -> Any:
    """The base model with ``adapter`` in its weights, in ``dtype`` (default: the checkpoint's).

    Where the adapter changes one of two tied embeddings, they are tied no more.
    """
    install(runtime.model, adapter)
    runtime.truncation.detach()
    whole = runtime.model.get_base_model()
    settings = {id(c): c for c in (whole.config, whole.config.get_text_config())}.values()
    ends = base.token_table(whole), whole.get_output_embeddings()
    if any(isinstance(end, ModulesToSaveWrapper) or hasattr(end, "lora_A") for end in ends):
        for end in ends:
            if hasattr(end, "lora_A"):
                own = end.base_layer
                own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
        for part in settings:
            part.tie_word_embeddings = False
    merged = runtime.model.merge_and_unload()
    kept = getattr(base.load_configuration(config), "dtype", None)
    return merged.to(dtype or kept or torch.float32)


def check_merged(
    folder: Path, runtime: ClientRuntime, labels: Sequence[str], measured: Tensor, rounding: float
) -> None:
    """Load a merged model and compare its logits with those that were ``measured``.

    ``rounding``: `tolerance` of the model that was measured. Raises `AdapterError` and removes the
    folder.
    """
    settings = ModelConfig(name=str(folder.resolve()), device=str(runtime.device), dtype="auto")
    model = base.load_model(settings, runtime.task.kind, labels, pad_id=runtime.pad_id)
    rounding = max(rounding, tolerance(model))
    difference = _difference(measured, logits(runtime, model), rounding)
    if not difference <= rounding:
        shutil.rmtree(folder)
        raise AdapterError(
            f"the merged model gives other logits than were measured (by {difference:.2g} of "
            "them), so it was not kept: export the adapter without --merge, or give --dtype float32"
        )


@torch.no_grad()
def logits(runtime: ClientRuntime, model: nn.Module) -> Tensor:
    """The logits of two short texts, float32 on the CPU, one after the other."""
    found = []
    tokenizer: Any = runtime.tokenizer
    with evaluation_mode(model):
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(runtime.device)
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            found.append(out.float().cpu().flatten())
    return torch.cat(found)


def _difference(measured: Tensor, found: Tensor, rounding: float) -> float:
    """How far logits are off, relative to them; NaN and infinity, of a diverged model, as 0.

    With fewer bits, of logits below 1 the absolute difference: they are what is left of larger
    activations, and so is their rounding.
    """
    measured, found = (torch.nan_to_num(x.double(), 0.0, 0.0, 0.0) for x in (measured, found))
    least = 1e-30 if rounding <= EXACT else math.sqrt(measured.numel())
    return float((found - measured).norm() / measured.norm().clamp(min=least))


def tolerance(model: nn.Module) -> float:
    """How far logits may be off because of rounding, relative to them."""
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    return EXACT if frozen <= {torch.float32} else ROUNDED


def _cause(measured: nn.Module, loaded: nn.Module) -> str:
    """The tensors in which two models differ that should be equal."""
    own = {n: p for n, p in measured.named_parameters() if ".original_module." not in n}
    other = [
        name.removeprefix("base_model.model.")
        for name, value in loaded.named_parameters()
        if name in own
        and (own[name].shape != value.shape or not own[name].to(value.dtype).equal(value))
    ]
    if not other:
        return "all tensors are equal, so PEFT computes something else with them"
    return f"tensor {other[0]!r} is not what it was in the run ({len(other)} such tensors)"
