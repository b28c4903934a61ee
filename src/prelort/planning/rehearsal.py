"""The memory of a client's training round, rehearsed without weights or computation.

`training.local.train` itself runs on torch's fake tensors, which have shapes, types and storage
sizes, but no memory. So nothing here knows an architecture, and a change of the training loop needs
no change here. (Fake tensors are private in torch: only this module imports them.)
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from prelort import methods, tasks
from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import Config
from prelort.data import ranks
from prelort.errors import ConfigError
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.objective import Objective
from prelort.models.lora import extract, install, trainable
from prelort.planning.live import LiveBytes
from prelort.planning.skeleton import OnFakeTensors, for_gpu, materialise, skeleton
from prelort.privacy.example import NoisyGradients
from prelort.tasks.interface import Example
from prelort.training.local import train
from prelort.training.preflight import check_model
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation

UNLIMITED = 2**20
"""The rank of layers without a rank pattern; the model takes no memory."""

WIRE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "masked": 8}
"""Of a number. Masked: with up to 101 clients in a round; with more, all send the full rank."""
LEAST_IN_8_BITS = 4096
"""Numbers in the smallest tensor of which bitsandbytes' optimisers keep 8 bits."""

SCALE_BYTES = 4
"""Of the scale of each rank dimension in int8 messages."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The memory of one round at one rank, in bytes.

    ``live``: at every allocation, in order. ``down`` and ``up``: the tensors of the two messages.
    """

    rank: float
    weights: float
    adapter: float
    optimiser: float
    live: NDArray[np.float64]
    down: float
    up: float

    def between(self, other: Rehearsal, rank: int) -> Rehearsal | None:
        """The rehearsal at a rank between two, None if their operations differ.

        The size of every storage is affine in the rank, and so is the sum at each moment.
        """
        if len(self.live) != len(other.live):
            return None
        share = (rank - self.rank) / (other.rank - self.rank)
        ends = [(getattr(self, one.name), getattr(other, one.name)) for one in fields(self)]
        return Rehearsal(*(low + share * (high - low) for low, high in ends))


class Rehearser:
    """A model without weights on which rounds of any rank are rehearsed."""

    def __init__(self, config: Config, labels: int = 2) -> None:
        """``labels``: the number of classes, for a classifier's head."""
        self.config = config
        self.task = tasks.get(config.task)
        self.scale = ScaleRule(config.lora.scale_rule, config.lora.scale)
        self._levels = set(ranks.levels(config.ranks.mix))
        self._mode = FakeTensorMode()
        self._model: PeftModel = skeleton(
            config.model, config.lora, UNLIMITED, self.task.kind, labels
        )
        check_model(config, self._model.get_base_model(), self.task.kind)
        with self._mode:
            materialise(self._model)
            self._truncation = Truncation(self._model, self.scale)
            self._truncation.separates = True
            self._like = extract(self._model, self.scale)
            learning = {id(p) for parameters in trainable(self._model) for p in parameters}
            self._weights = storage_bytes(
                t for t in tensors_of(self._model) if id(t) not in learning
            )

    @property
    def max_rank(self) -> int:
        """The largest useful rank: the smaller dimension of the widest layer."""
        return max(min(f.A.shape[1], f.B.shape[0]) for f in self._like.layers.values())

    @cached_property
    def kinks(self) -> set[int]:
        """The ranks besides 1 at which sizes stop being affine in the rank."""
        patterns = {f.rank for f in self._like.layers.values() if f.rank < UNLIMITED}
        beyond = max(self._levels) + 1
        (low, _), (high, _) = self._broadcast(1), self._broadcast(beyond)
        regular = low.frozen is None and (low.trainable.rank, high.trainable.rank) == (1, beyond)
        if self.config.training.optimizer.endswith("8bit"):
            widths = {n for f in self._like.layers.values() for n in (f.A.shape[1], f.B.shape[0])}
            first = {-(-LEAST_IN_8_BITS // width) for width in widths}
            patterns |= first | {rank - 1 for rank in first}
        # Dimensions that a client does not train may be folded in, up to the highest rank; the
        # homogeneous references train at the lowest or the highest rank.
        return patterns if regular else patterns | self._levels

    def rehearse(self, rank: int) -> Rehearsal:
        """One round at this rank. Raises `ConfigError` for a method that cannot train it."""
        broadcast, objective = self._broadcast(rank)
        hidden = self.config.privacy.hide_ranks  # then messages are the same for all ranks
        highest = max(self._levels | {rank})
        down, up = self._traffic(self._broadcast(highest)[0] if hidden else broadcast)
        with self._mode, OnFakeTensors(), _without_gc():
            install(
                self._model,
                _on_cpu(broadcast.trainable),
                frozen=_on_cpu(broadcast.frozen) if broadcast.frozen is not None else None,
                trains=broadcast.trains,
                scale_multiplier=broadcast.scale_multiplier,
            )
            try:
                ratio = broadcast.magnitude_rate_ratio
                return self._round(rank, objective, ratio, down, up)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ConfigError(
                    f"model.name = {self.config.model.name!r}: the memory of this architecture "
                    f"cannot be estimated, since shapes in it depend on the tokens ({error}); a "
                    "run of one round with few steps measures it"
                ) from error

    def _round(
        self, rank: int, objective: Objective, ratio: float | None, down: int, up: int
    ) -> Rehearsal:
        training = self.config.training
        in_8_bits = training.optimizer.endswith("8bit")
        training = training.model_copy(
            update={
                # bitsandbytes does not take fake tensors: without momentum SGD allocates nothing.
                **({"optimizer": "sgd", "momentum": 0.0} if in_8_bits else {}),
                # In 8 bits the inputs of a batch are freed only after the next forward pass.
                "local_steps": 2 if self.config.model.quantization == "8bit" else 1,
                "shuffle": False,
                # Gradients exist already from the second batch of a step on.
                "gradient_accumulation": min(2, self.config.training.gradient_accumulation),
            }
        )
        length = self.config.data.max_length
        ids = [0] * length
        example = Example(ids, 0 if self.task.kind == "classification" else ids)
        try:
            self.task.collate([example], 0)
        except Exception as error:
            raise ConfigError(
                f"task {type(self.task).__name__} cannot be planned: its collate() takes other "
                "labels than one a token (a class's number)"
            ) from error
        examples = [example] * (training.batch_size * training.gradient_accumulation)
        settings = LocalTraining.of(training, magnitude_rate_ratio=ratio)
        assignment = Assignment("plan", 0, 1, 0, objective)
        runtime = ModelRuntime(self._model, self._truncation, self.task, pad_id=0)
        present = tensors_of(self._model)
        learning = [p for parameters in trainable(self._model) for p in parameters]
        watch = LiveBytes(present)
        begin = len(watch.live)
        starts: list[int] = []
        ends: list[int] = []
        state_bytes: list[int] = []

        def pre(optimizer: Any, *_: Any) -> None:
            starts.append(len(watch.live) - begin)

        def post(optimizer: Any, *_: Any) -> None:
            ends.append(len(watch.live) - begin)
            values = (v for state in optimizer.state.values() for v in state.values())
            size = storage_bytes(v for v in values if isinstance(v, Tensor))
            state_bytes.append(sum(map(_in_8_bits, learning)) if in_8_bits else size)

        handles = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]
        try:
            with watch:
                train(runtime, examples, settings, assignment, noise=_noise(self.config))
        finally:
            for handle in handles:
                handle.remove()
        live = np.array(watch.live[begin:], dtype=np.float64)
        # The optimiser state is allocated in the first step, and exists in all later ones.
        live[: starts[0]] += state_bytes[0]
        if for_gpu(self.config.model) and training.optimizer == "adamw":
            # There AdamW updates all tensors at once, with one temporary copy of each.
            for start, end in zip(starts, ends, strict=True):
                live[start:end] += storage_bytes(p for p in learning if p.requires_grad)
        adapter = storage_bytes(present) - self._weights
        return Rehearsal(rank, self._weights, adapter, state_bytes[0], live, down, up)

    def _broadcast(self, rank: int) -> tuple[Broadcast, Objective]:
        """The method's broadcast to a client of this rank, and the client's objective.

        The factors are meta tensors, so that a method's own draws (e.g. of dimensions) are real.
        """
        levels = sorted(self._levels | {rank})
        # Level weights change no size, and may be zero for a rank that no client has.
        chosen = self.config.method.model_copy(update={"level_weights": None, "full_share": None})
        method = methods.build(chosen, self.config.seed)
        client = Client("plan", rank, 1)
        layers = {
            name: Factors(
                _meta(min(levels[-1], f.rank), f.A.shape[1]),
                _meta(f.B.shape[0], min(levels[-1], f.rank)),
            )
            for name, f in self._like.layers.items()
        }
        modules_to_save = {
            name: _meta(*tensor.shape) for name, tensor in self._like.modules_to_save.items()
        }
        state = ServerState(LoraAdapter(layers, self.scale, modules_to_save), levels=tuple(levels))
        with LiveBytes([]):
            broadcast = method.broadcast(state, client)
        objective = method.objective(state, client)
        if objective.kind == "plain" or rank == 1:
            return broadcast, objective
        # Two levels need the memory of more, whose passes follow one another. A client of the
        # lowest rank really has one level and no mask: [tokens, rank] per layer less.
        return broadcast, Objective(objective.kind, (1, rank), (0.5, 0.5), objective.tail)

    def _traffic(self, broadcast: Broadcast) -> tuple[int, int]:
        """Bytes of the tensors sent to and from a client, as `federation.wire` packs them."""
        dtype = self.config.federation.wire_dtype
        sent = _bytes_of_kinds(broadcast.trainable, dtype)
        masked = self.config.privacy.secure_aggregation
        replied = _bytes_of_kinds(broadcast.trainable, "masked") if masked else sent
        second = broadcast.frozen.layers.values() if broadcast.frozen is not None else ()
        frozen = sum(_wire_bytes("A", f.A, dtype) + _wire_bytes("B", f.B, dtype) for f in second)
        stays = {"B", "extra"} if broadcast.personal else set()
        seeded = set(broadcast.seeded_factors.split(" and "))
        untrained = {letter for letter in "AB" if letter not in broadcast.trains}
        down = sum(size for kind, size in sent.items() if kind not in stays | seeded)
        up = sum(size for kind, size in replied.items() if kind not in stays | untrained)
        return down + frozen, up


def _in_8_bits(parameter: Tensor) -> int:
    """The bytes of bitsandbytes' two moments of a parameter, 0 if it does not learn."""
    count = parameter.numel() if parameter.requires_grad else 0
    return 2 * (4 * count if count < LEAST_IN_8_BITS else count + 4 * -(-count // 256))


def _bytes_of_kinds(adapter: LoraAdapter, dtype: str) -> dict[str, int]:
    """The bytes of all A, of all B, and of the modules to save."""
    kinds = {"A": 0, "B": 0, "extra": 0}
    for name, tensor in adapter.tensors().items():
        kind = {".lora_A.weight": "A", ".lora_B.weight": "B"}.get(name[-14:], "extra")
        kinds[kind] += _wire_bytes(kind, tensor, dtype)
    return kinds


def _wire_bytes(kind: str, tensor: Tensor, dtype: str) -> int:
    """The bytes of a tensor in a message: its numbers and, in int8, a scale per rank dimension."""
    dimensions = tensor.shape[1 if kind == "B" else 0] if tensor.ndim > 1 else 1
    scales = SCALE_BYTES * dimensions if dtype == "int8" else 0
    return tensor.numel() * WIRE_BYTES[dtype] + scales


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _on_cpu(adapter: LoraAdapter) -> LoraAdapter:
    """Tensors of the current mode in the adapter's shapes."""
    tensors = {name: torch.empty(t.shape) for name, t in adapter.tensors().items()}
    return LoraAdapter.from_tensors(tensors, adapter.scale)


def tensors_of(model: torch.nn.Module) -> list[Tensor]:
    """All parameters and buffers of a model."""
    return [*model.parameters(), *model.buffers()]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of distinct storages."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _noise(config: Config) -> NoisyGradients | None:
    """Noise as large as that of a client whose examples are private."""
    if not config.privacy.of_examples:
        return None
    zeros = partial(torch.zeros, dtype=torch.float64)
    return NoisyGradients(config.privacy.clip, multiplier=0.0, rate=1.0, normal=zeros)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Without garbage collection: storages are freed with their last reference."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
