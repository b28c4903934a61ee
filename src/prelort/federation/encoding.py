"""The types in which numbers travel, and the cost of the lossy ones.

float32 is exact. bfloat16 and float16 round each number by itself: to 8 significant bits, and to
11 where it is at least 6.1e-5 (below, to a multiple of 6e-8). int8 has one float32 scale for each
row: a row of A, a column of B (one rank dimension each), a row of any other tensor (one in all,
where it has fewer than two axes): ``value = scale * q`` with integer q from -127 to 127.

A lossy type rounds a trained adapter harmlessly where it carries the *change* of it, since the
receiver of a reply has what the change is from in full precision. Rounded values would put the
rounding of the whole adapter into the global state in every round, and a change of less than half a
step of the value would be lost in each of them, however often it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.errors import UpdateRefused

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
LARGEST = 127
"""The largest int8 value; -128 is never used."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A row with a smaller scale becomes zeros: below it float32 loses precision."""

_SCALE = ":scale"
"""After the name of an int8 tensor: that of its scales."""
_SPARE = ~0x7F
"""Takes the last 7 bits off a scale, so that 127 of it is a float32 without rounding."""


def carries_change(dtype: str) -> bool:
    """Whether a trained adapter travels as its change: in every type but the exact one."""
    return dtype != "float32"


def encode(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Named tensors in the type in which they travel; int8 adds ``<name>:scale`` for each.

    int8: a number is off by ``scale / 2`` at most (to float32's own rounding), where the row's
    scale is the largest magnitude in it over 127, cut to 17 significant bits; zeros are exact, and
    a row whose scale would be below `SMALLEST_SCALE` (magnitudes below 1.5e-36) is zeros of
    scale 0. Encoding what was decoded changes no bit. A row with a number that is not
    finite has a scale that is not, so that its receiver refuses it.
    """
    if dtype != "int8":
        return {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    encoded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rows = _rows(name, tensor).float()
        scales = _scales(rows)
        divisors = scales.where(scales != 0, torch.inf).unsqueeze(1)
        whole = torch.round(rows / divisors).clamp(-LARGEST, LARGEST)
        whole = torch.nan_to_num(whole).to(torch.int8)  # where no number is, the scale is none
        encoded[name] = whole.T if _is_b(name, tensor) else whole.reshape(tensor.shape)
        encoded[name + _SCALE] = scales
    return encoded


def decode(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The named tensors that were encoded: of the stated type, or float32 where that is int8.

    Raises `UpdateRefused` for a tensor of another type, and for int8 scales that are missing,
    surplus, mis-shaped, negative or not finite, or a number below -127.
    """
    if dtype != "int8":
        for name, tensor in tensors.items():
            _check_type(name, tensor, DTYPES[dtype], dtype)
        return dict(tensors)
    values = {name: t for name, t in tensors.items() if not name.endswith(_SCALE)}
    for name in tensors.keys() - values.keys():
        if name.removesuffix(_SCALE) not in values:
            raise UpdateRefused(f"tensor {name!r} is surplus: it is the scale of nothing")
    return {name: _decoded(name, q, tensors.get(name + _SCALE)) for name, q in values.items()}


def change_of(trained: LoraAdapter, received: LoraAdapter) -> LoraAdapter:
    """What training has added to the received adapter; ``trained`` may have a lower rank."""
    base = received.prefix(trained.rank).tensors()
    changes = {name: t - base[name].float() for name, t in trained.tensors().items()}
    return LoraAdapter.from_tensors(changes, trained.scale)


def with_change(
    sent: LoraAdapter, change: LoraAdapter, unchanged: Mapping[str, Tensor]
) -> LoraAdapter:
    """The prefix of ``sent`` at the rank of ``change``, plus that change, in float32.

    Tensors named in ``unchanged`` are as sent, whatever ``change`` has for them.
    """
    base = sent.prefix(change.rank).tensors()
    moved = {
        name: base[name] if name in unchanged else base[name].float() + tensor.float()
        for name, tensor in change.tensors().items()
    }
    return LoraAdapter.from_tensors(moved, sent.scale)


def _scales(rows: Tensor) -> Tensor:
    """One scale for each of the rows [rows, width]: the largest magnitude over 127."""
    largest = rows.abs().amax(1) if rows.numel() else torch.zeros(len(rows))
    scales = ((largest / LARGEST).view(torch.int32) & _SPARE).view(torch.float32)
    return torch.where(scales < SMALLEST_SCALE, torch.zeros_like(scales), scales)


def _decoded(name: str, whole: Tensor, scales: Tensor | None) -> Tensor:
    _check_type(name, whole, torch.int8, "int8")
    if scales is None:
        raise UpdateRefused(f"tensor {name + _SCALE!r} is missing")
    _check_type(name + _SCALE, scales, torch.float32, "int8")
    rows = _rows(name, whole)
    if scales.shape != rows.shape[:1]:
        raise UpdateRefused(
            f"tensor {name + _SCALE!r} has shape {list(scales.shape)}, expected {[len(rows)]}"
        )
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise UpdateRefused(
            f"tensor {name!r} holds a value that is not finite, or its scales one below zero"
        )
    if bool((whole < -LARGEST).any()):
        raise UpdateRefused(f"tensor {name!r} holds -128, allowed are -127 to 127")
    values = rows.float() * scales.unsqueeze(1)
    return values.T.contiguous() if _is_b(name, whole) else values.reshape(whole.shape)


def _rows(name: str, tensor: Tensor) -> Tensor:
    """A view of the tensor as [rows, width], each row with a scale of its own."""
    if _is_b(name, tensor):
        return tensor.T
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _is_b(name: str, tensor: Tensor) -> bool:
    return name.endswith(".lora_B.weight") and tensor.ndim == 2


def _check_type(name: str, tensor: Tensor, expected: torch.dtype, stated: str) -> None:
    if tensor.dtype != expected:
        raise UpdateRefused(f"tensor {name!r} is {tensor.dtype}, stated was {stated}")
