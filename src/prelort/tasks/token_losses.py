"""Losses of tokens over a large vocabulary, without the logits of all tokens at once.

Logits are made for a part of the tokens at a time by the model's own forward pass, in which its
decoder gives their hidden states instead of computing them. So whatever a model does after its
decoder (scaling, soft-capping, a bias, an adapted or quantised output layer) stays as it is;
`torch.nn.functional.linear_cross_entropy` and other fused losses take a plain weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from prelort.tasks.interface import IGNORED

LIMIT = 2**25
"""Logits that may exist at once: 128 MiB in float32."""

_AT_ONCE = "_prelort_logits_at_once"
"""The attribute of a model whose logits cannot be computed in parts."""


def token_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The negative log likelihood of each label in nats, 0 for `IGNORED` (float32 [rows, length]).

    ``inputs``: of the model's forward pass. ``labels`` int64 [rows, length]: the token after each.
    Up to `LIMIT` logits are computed as they are. Of more, only those of tokens with a label are
    computed, in parts, and the result is the same but for rounding.
    """
    if _all_fit(model, labels):
        return cross_entropy(model(**inputs, use_cache=False).logits, labels)
    return _in_parts(model, inputs, labels, LIMIT)


@torch.no_grad()
def token_scores(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and the most likely token after each place (int64 [rows, length])."""
    head = None if _all_fit(model, labels) else _Head(_inner(model), packed=False)
    with nullcontext() if head is None else head.of_first_tokens():
        logits = model(**inputs, use_cache=False).logits
    if head is None or logits.shape[:2] == labels.shape:
        return cross_entropy(logits, labels), logits.argmax(dim=-1)
    hidden = head.output.last_hidden_state
    size = max(1, LIMIT // (len(labels) * logits.shape[-1]))
    losses, made = [], []
    for part, own in _parts(hidden, labels.to(hidden.device), size):
        logits = head.logits(part)
        losses.append(cross_entropy(logits, own))
        made.append(logits.argmax(dim=-1))
    return torch.cat(losses, dim=1).to(labels.device), torch.cat(made, dim=1).to(labels.device)


def _all_fit(model: nn.Module, labels: Tensor) -> bool:
    inner = _inner(model)
    vocabulary = getattr(inner.config.get_text_config(), "vocab_size", None) or 0
    return labels.numel() * vocabulary <= LIMIT or hasattr(inner, _AT_ONCE)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The losses of ``labels`` [rows, tokens] under ``logits`` [rows, tokens, vocabulary]."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


@torch.no_grad()
def check_parts(model: nn.Module, ids: Tensor, tolerance: float) -> bool:
    """Whether the losses of some tokens ``ids`` [rows, length] are the same in parts.

    ``tolerance``: of the difference, relative to their norm. If they are not, `keep_at_once`.
    """
    if hasattr(_inner(model), _AT_ONCE):
        return True
    inputs, labels = {"input_ids": ids}, ids.roll(-1, dims=1)
    expected = cross_entropy(model(**inputs, use_cache=False).logits, labels)
    try:
        found = _in_parts(model, inputs, labels, limit=1)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        same = False
    else:
        same = float((found - expected).norm()) <= tolerance * float(expected.norm())
    if not same:
        keep_at_once(model)
    return same


def keep_at_once(model: nn.Module) -> None:
    """Let `token_losses` always compute this model's logits at once."""
    setattr(_inner(model), _AT_ONCE, True)


def _in_parts(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, limit: int) -> Tensor:
    """`token_losses` with at most ``limit`` logits at once, or those of one place of each row."""
    head = _Head(_inner(model), packed="position_ids" in inputs)
    with head.of_first_tokens():
        logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] == labels.shape:  # these are all
        return cross_entropy(logits, labels)
    hidden = head.output.last_hidden_state
    rows = labels.to(hidden.device)  # of a base on several devices, the last one
    if not head.learns:  # else it sees the rows of the batch: each may have an adapter of its own
        hidden, rows = hidden.flatten(0, 1)[None], rows.view(1, -1)
    places = (rows != IGNORED).any(dim=0).nonzero().flatten()
    hidden, counted = hidden.index_select(1, places), rows.index_select(1, places)
    size = max(1, limit // (len(rows) * logits.shape[-1]))
    if head.learns or not torch.is_grad_enabled():
        losses = torch.cat(
            [
                checkpoint(head.losses, *part, use_reentrant=False, preserve_rng_state=False)
                for part in _parts(hidden, counted, size)
            ],
            dim=1,
        )
    else:
        losses = _Losses.apply(hidden, counted, head, size)  # type: ignore[no-untyped-call]
    every = losses.new_zeros(rows.shape).index_copy(1, places, losses)
    return every.view(labels.shape).to(labels.device)


class _Head:
    """All that a model does after its decoder."""

    def __init__(self, model: Any, packed: bool) -> None:
        self._model, self._decoder = model, model.get_decoder()
        inside = set(self._decoder.modules())
        modules = [module for module in model.modules() if module not in inside]
        self.learns = any(p.requires_grad for m in modules for p in m.parameters(recurse=False))
        # What learns is computed twice, and would draw other masks then; in packed rows its
        # truncation is that of each place.
        self._whole = self.learns and (
            packed or any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
        )
        self.output: Any = None
        """The decoder's output for the whole batch."""

    @contextmanager
    def of_first_tokens(self) -> Iterator[None]:
        """Let the model make the logits of each row's first token only, if that is possible.

        The decoder's output is kept.
        """

        def cut(module: nn.Module, arguments: Any, output: Any) -> Any:
            if self._whole or not hasattr(output, "last_hidden_state"):
                return output
            self.output = output
            return replace(output, last_hidden_state=output.last_hidden_state[:, :1])

        handle = self._decoder.register_forward_hook(cut)
        try:
            yield
        finally:
            handle.remove()

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The losses of ``labels`` [rows, tokens] from hidden states [rows, tokens, width]."""
        return cross_entropy(self.logits(hidden), labels)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, tokens, vocabulary]."""
        own = vars(self._decoder).get("forward")
        output = replace(self.output, last_hidden_state=hidden)
        self._decoder.forward = lambda *_, **__: output
        try:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
            return logits
        finally:
            del self._decoder.forward
            if own is not None:
                self._decoder.forward = own


class _Losses(torch.autograd.Function):
    """The losses of hidden states [1, tokens, width], part by part, of a head that does not learn.

    A token's loss depends on its own hidden state alone, so its gradient can be computed with it
    and scaled later by what comes from above. No logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(context: Any, hidden: Tensor, labels: Tensor, head: _Head, size: int) -> Tensor:
        """[1, tokens]."""
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, own in _parts(hidden, labels, size):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                each = head.losses(leaf, own)
                gradients += torch.autograd.grad(each.sum(), leaf)
            losses.append(each.detach())
        context.save_for_backward(torch.cat(gradients, dim=1))
        return torch.cat(losses, dim=1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        """Of the hidden states."""
        (gradient,) = context.saved_tensors
        return (gradient * above[..., None]).to(gradient.dtype), None, None, None


def _parts(hidden: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, size, dim=1), torch.split(labels, size, dim=1), strict=True)


def _inner(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
