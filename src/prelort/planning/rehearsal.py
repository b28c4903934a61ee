"""A client's training round without weights and without computing: which bytes it would hold.

`training.local.train` itself runs, on torch's fake tensors: they have shapes, types and storages of
a size, but no memory. So nothing here knows an architecture, and what training will do otherwise
one day it does here too. (torch does not call fake tensors public: only this module imports them.)
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from prelort import methods, tasks
from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import Config
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.objective import Objective
from prelort.models.lora import extract, install, trainable
from prelort.planning.live import LiveBytes
from prelort.planning.skeleton import for_gpu, materialise, skeleton
from prelort.tasks.interface import Example
from prelort.training.local import train
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation

UNLIMITED = 2**20
"""The rank of layers that no pattern limits, in a model that has no memory."""

WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4
"""Of each slot's scale, where numbers travel as int8."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one round at one rank held, in bytes.

    ``live`` and ``gradients``: at every allocation, in order. ``down`` and ``up``: the tensors that
    travel in the round.
    """

    rank: int
    weights: int
    adapter: int
    optimiser: int
    live: NDArray[np.float64]
    gradients: NDArray[np.float64]
    down: int
    up: int

    def between(self, other: Rehearsal, rank: int) -> Rehearsal | None:
        """The rehearsal at a rank between two, None where their operations are not the same.

        Every storage has a size that is affine in the rank, so what is alive at each moment is too.
        """
        if len(self.live) != len(other.live):
            return None
        share = (rank - self.rank) / (other.rank - self.rank)

        def mixed(own: Any, others: Any) -> Any:
            return own + share * (others - own)

        return Rehearsal(
            rank,
            self.weights,
            round(mixed(self.adapter, other.adapter)),
            round(mixed(self.optimiser, other.optimiser)),
            mixed(self.live, other.live),
            mixed(self.gradients, other.gradients),
            round(mixed(self.down, other.down)),
            round(mixed(self.up, other.up)),
        )


class Stage:
    """One model without weights on which rounds of any rank are rehearsed."""

    def __init__(self, config: Config, labels: int = 2) -> None:
        """``labels``: the number of classes, for a classifier's head."""
        self.config = config
        self.task = tasks.get(config.task)
        self.scale = ScaleRule(config.lora.scale_rule, config.lora.scale)
        self._levels = levels_of(config)
        self._mode = FakeTensorMode()
        self._model: PeftModel = skeleton(
            config.model, config.lora, UNLIMITED, self.task.kind, labels
        )
        with self._mode:
            materialise(self._model)
            self._truncation = Truncation(self._model, self.scale)
            self._like = extract(self._model, self.scale)
            factors, modules_to_save = trainable(self._model)
            learning = {id(p) for p in (*factors, *modules_to_save)}
            self._weights = storage_bytes(
                t for t in tensors_of(self._model) if id(t) not in learning
            )

    @property
    def most(self) -> int:
        """The largest rank that can add something to some layer: its smaller dimension."""
        return max(min(f.A.shape[1], f.B.shape[0]) for f in self._like.layers.values())

    @cached_property
    def kinks(self) -> set[int]:
        """The ranks at which sizes stop being affine in the rank, beside 1."""
        patterns = {f.rank for f in self._like.layers.values() if f.rank < UNLIMITED}
        beyond = max(self._levels, default=1) + 1
        (low, _), (high, _) = self._sent(1), self._sent(beyond)
        regular = low.frozen is None and (low.trainable.rank, high.trainable.rank) == (1, beyond)
        # Slots that a client does not train may be folded in, and there are none above the highest
        # rank; reference rows train at the lowest or the highest rank.
        return patterns if regular else patterns | self._levels

    def rehearse(self, rank: int) -> Rehearsal:
        """One round at this rank. Raises `ConfigError` for what the method cannot do."""
        sent, objective = self._sent(rank)
        down, up = self._travelling(sent)
        with self._mode, _without_gc():
            install(
                self._model,
                _on_cpu(sent.trainable),
                frozen=_on_cpu(sent.frozen) if sent.frozen is not None else None,
                trains=sent.trains,
                scale_multiplier=sent.scale_multiplier,
            )
            return self._round(rank, objective, down, up)

    def _round(self, rank: int, objective: Objective, down: int, up: int) -> Rehearsal:
        training = self.config.training.model_copy(
            update={
                # What 8 bits keep of a batch goes only when the next one has been computed.
                "local_steps": 2 if self.config.model.quantization == "8bit" else 1,
                "shuffle": False,
                # From the second batch of a step on gradients are there already.
                "gradient_accumulation": min(2, self.config.training.gradient_accumulation),
            }
        )
        length = self.config.data.max_length
        ids = [0] * length
        example = Example(ids, 0 if self.task.kind == "classification" else ids)
        # As many as one step takes, again and again.
        examples = [example] * (training.batch_size * training.gradient_accumulation)
        assignment = Assignment("plan", 0, 1, 0, objective)
        runtime = ModelRuntime(self._model, self._truncation, self.task, pad_id=0)
        present = tensors_of(self._model)
        factors, modules_to_save = trainable(self._model)
        learning = [*factors, *modules_to_save]
        watch = LiveBytes(present)
        begin = len(watch.live)
        starts: list[int] = []
        ends: list[int] = []
        kept: list[int] = []

        def pre(optimizer: Any, *_: Any) -> None:
            starts.append(len(watch.live) - begin)

        def post(optimizer: Any, *_: Any) -> None:
            ends.append(len(watch.live) - begin)
            values = (v for state in optimizer.state.values() for v in state.values())
            kept.append(storage_bytes(v for v in values if isinstance(v, Tensor)))

        handles = [_watched(p, watch) for p in learning]
        handles.append(register_optimizer_step_pre_hook(pre))
        handles.append(register_optimizer_step_post_hook(post))
        try:
            with watch:
                train(runtime, examples, LocalTraining.of(training), assignment)
        finally:
            for handle in handles:
                handle.remove()
        live = np.array(watch.live[begin:], dtype=np.float64)
        gradients = np.array(watch.gradients[begin:], dtype=np.float64)
        # What the optimiser keeps is made in the first step, and there in all that follow.
        live[: starts[0]] += kept[0]
        if for_gpu(self.config.model) and training.optimizer == "adamw":
            # There AdamW goes through all tensors at once, with one more of each for a moment.
            for start, end in zip(starts, ends, strict=True):
                live[start:end] += storage_bytes(p for p in learning if p.requires_grad)
        adapter = storage_bytes(present) - self._weights
        return Rehearsal(rank, self._weights, adapter, kept[0], live, gradients, down, up)

    def _sent(self, rank: int) -> tuple[Broadcast, Objective]:
        """What the method's server sends to a client of this rank, and what that optimises.

        The factors are meta tensors, so that a method's own draws (of slots, say) are real ones.
        """
        levels = sorted(self._levels | {rank})
        # The weights of levels change no size, and may leave nothing to a rank that nobody has.
        chosen = self.config.method.model_copy(update={"level_weights": None, "full_share": None})
        method = methods.build(chosen, self.config.seed)
        client = Client("plan", rank, 1)
        layers = {
            name: Factors(
                _meta(min(levels[-1], f.rank), d_in), _meta(d_out, min(levels[-1], f.rank))
            )
            for name, f in self._like.layers.items()
            for d_in, d_out in [(f.A.shape[1], f.B.shape[0])]
        }
        modules_to_save = {
            name: _meta(*tensor.shape) for name, tensor in self._like.modules_to_save.items()
        }
        state = ServerState(LoraAdapter(layers, self.scale, modules_to_save), levels=tuple(levels))
        with LiveBytes([]):
            sent = method.broadcast(state, client)
        asked = method.objective(state, client)
        if asked.kind == "plain" or rank == 1:
            return sent, asked
        # Two levels hold what more would: passes follow one another. A client of the lowest rank
        # has one level in truth and needs no mask, [tokens, rank] a layer less.
        return sent, Objective(asked.kind, (1, rank), (0.5, 0.5), asked.tail)

    def _travelling(self, sent: Broadcast) -> tuple[int, int]:
        """Bytes of the tensors that go down and come up (as `federation.wire` packs them)."""
        dtype = self.config.federation.wire_dtype
        kinds = {"A": 0, "B": 0, "extra": 0}
        for name, tensor in sent.trainable.tensors().items():
            kind = {".lora_A.weight": "A", ".lora_B.weight": "B"}.get(name[-14:], "extra")
            kinds[kind] += _wire_bytes(kind, tensor, dtype)
        second = sent.frozen.layers.values() if sent.frozen is not None else ()
        frozen = sum(_wire_bytes("A", f.A, dtype) + _wire_bytes("B", f.B, dtype) for f in second)
        stays = {"B", "extra"} if sent.personal else set()
        drawn = {
            letter
            for letter in "AB"
            if letter in sent.seeded_factors and sent.seeded_factors != "nothing"
        }
        untrained = {letter for letter in "AB" if letter not in sent.trains}
        down = sum(size for kind, size in kinds.items() if kind not in stays | drawn)
        up = sum(size for kind, size in kinds.items() if kind not in stays | untrained)
        return down + frozen, up


def _wire_bytes(kind: str, tensor: Tensor, dtype: str) -> int:
    """The bytes of one tensor as it travels: its numbers and, in int8, a scale for each slot."""
    dimensions = tensor.shape[1 if kind == "B" else 0] if tensor.ndim > 1 else 1
    scales = SCALE_BYTES * dimensions if dtype == "int8" else 0
    return tensor.numel() * WIRE_BYTES[dtype] + scales


def levels_of(config: Config) -> set[int]:
    """The ranks that ``ranks.mix`` names."""
    heads = (entry.split("*")[0].strip() for entry in config.ranks.mix.split(","))
    return {int(head) for head in heads if head.isdecimal() and int(head) > 0}


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _on_cpu(adapter: LoraAdapter) -> LoraAdapter:
    """Tensors of the current mode in the adapter's shapes."""
    tensors = {name: torch.empty(t.shape) for name, t in adapter.tensors().items()}
    return LoraAdapter.from_tensors(tensors, adapter.scale)


def _watched(parameter: Tensor, watch: LiveBytes) -> Any:
    """A hook that tells ``watch`` of the parameter's gradient as soon as it is whole."""

    def mark(owner: Tensor) -> None:
        if owner.grad is not None:
            watch.mark_gradient(owner.grad)

    hook: Any = parameter.register_post_accumulate_grad_hook
    return hook(mark)


def tensors_of(model: torch.nn.Module) -> list[Tensor]:
    """All parameters and buffers of a model."""
    return [*model.parameters(), *model.buffers()]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of distinct storages."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def _without_gc() -> Iterator[None]:
    """Storages go when their last reference goes, and not at some time of the collector's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
