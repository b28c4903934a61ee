"""Checkpoints: the server's state after a round, in safetensors and JSON.

A checkpoint is a folder that appears by one rename, with a SHA-256 of its contents, so that it
is whole or not there. All random states are functions of the seed and the round (`prelort.seeds`),
so these two numbers are the sampler's and the clients' random state.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from prelort.adapters import LoraAdapter, ScaleRule
from prelort.errors import AdapterError, CheckpointError
from prelort.files import remove_folder, replace_folder
from prelort.methods.interface import ServerState

FORMAT = 1
MAX_CHECKPOINTS = 2
_ADAPTER, _MEMORY = "adapter:", "memory:"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A server state, and what else a run needs to continue from it."""

    state: ServerState
    seed: int
    base: str
    """Fingerprint of the base model."""
    metrics_bytes: int
    """Length of ``metrics.jsonl`` when it was written."""


def save(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a checkpoint under its round's number and delete all but the last two."""
    state = checkpoint.state
    tensors: dict[str, torch.Tensor] = {}
    # Copies: safetensors refuses tensors that share memory, as an adapter and its last one may.
    for name, tensor in state.adapter.tensors().items():
        tensors[_ADAPTER + name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    for name, tensor in state.memory.items():
        tensors[_MEMORY + name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    data = safetensors.torch.save(tensors)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "round": state.round,
        "seed": checkpoint.seed,
        "base": checkpoint.base,
        "scale_rule": state.adapter.scale.kind,
        "scale": state.adapter.scale.value,
        "metrics_bytes": checkpoint.metrics_bytes,
        "levels": list(state.levels),
        "ranks": dict(state.ranks),
    }
    facts["sha256"] = _digest(facts, data)

    def fill(target: Path) -> None:
        (target / "state.safetensors").write_bytes(data)
        (target / "state.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")

    path = folder / f"{state.round:05d}"
    replace_folder(path, fill)
    for old in _existing(folder)[:-MAX_CHECKPOINTS]:
        remove_folder(old)
    return path


def load_latest(folder: Path, base: str) -> Checkpoint | None:
    """The newest whole checkpoint, None if there never was one.

    A damaged one is skipped with a warning. Raises `CheckpointError` if all are
    damaged, or if the run was trained on another base model.
    """
    existing = _existing(folder)
    for path in reversed(existing):
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
            continue
        if checkpoint.base != base:
            raise CheckpointError(
                f"{str(path)!r} was trained on another base model: fingerprint {checkpoint.base}, "
                f"but model.name now has {base}"
            )
        return checkpoint
    if existing:
        raise CheckpointError(f"all checkpoints in {str(folder)!r} are damaged")
    return None


def load(path: Path) -> Checkpoint:
    """One checkpoint. Raises `CheckpointError` if anything in it is damaged or missing."""
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        data = (path / "state.safetensors").read_bytes()
        if facts.pop("sha256") != _digest(facts, data):
            raise ValueError("its contents are not those that were written")
        if facts["format"] != FORMAT:
            raise ValueError(f"it has format {facts['format']}, this version reads {FORMAT}")
        tensors = safetensors.torch.load(data)
        rule = ScaleRule(facts["scale_rule"], facts["scale"])
        adapter = LoraAdapter.from_tensors(_under(tensors, _ADAPTER), rule)
        ranks = {str(name): int(rank) for name, rank in facts.get("ranks", {}).items()}
        levels = tuple(int(level) for level in facts.get("levels", ()))
        state = ServerState(adapter, facts["round"], _under(tensors, _MEMORY), ranks, levels)
        return Checkpoint(state, facts["seed"], facts["base"], facts["metrics_bytes"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
        AdapterError,
    ) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is damaged: {error}") from None


def _existing(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def _digest(facts: dict[str, Any], data: bytes) -> str:
    """The hash of everything in a checkpoint, so that any flipped bit is noticed."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + data).hexdigest()


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
