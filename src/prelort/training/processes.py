"""The processes in which one client trains: one, or as many as a site has GPUs.

All of them get every message and do the same work, but for the rows of a pass, of which each has a
share. Before a step the gradients are summed, so that every process takes the same one: that of a
single process with whole batches, up to rounding. The adapter is whole everywhere; so is the base,
unless FSDP splits its weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from prelort.errors import ConfigError
from prelort.tasks.interface import Batch, Example
from prelort.training.batches import ForwardPass

IDLE = timedelta(days=365)
"""How long a process waits for the next message; the launcher ends it with the others."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among the ``count`` that train one client; the one with ``index`` 0 replies.

    ``device``: where it loads the base, "": where the model's settings say. ``messages``: the group
    in which messages are shared, on the CPU. ``split``: moves a loaded base to the devices of all
    processes, a part of its weights to each; None: each process holds all of them.
    """

    index: int = 0
    count: int = 1
    device: str = ""
    messages: Any = None
    split: Callable[[PreTrainedModel], None] | None = None

    def rows(self, part: ForwardPass, collate: Callable[[Sequence[Example]], Batch]) -> ForwardPass:
        """This process's examples of a pass, or one without weight if there are too few."""
        if self.count == 1:
            return part
        rows = [*range(self.index, len(part.examples), self.count)]
        weight = part.weight if rows else 0.0
        rows = rows or [0]
        own = [part.examples[row] for row in rows]
        return ForwardPass(
            own,
            collate(own),
            part.ranks[rows] if isinstance(part.ranks, Tensor) else part.ranks,
            weight[rows] if isinstance(weight, Tensor) else weight,
        )

    def all_reduce(
        self, parameters: Sequence[nn.Parameter], loss: Tensor, over: bool
    ) -> tuple[Tensor, bool]:
        """Sum the gradients over the processes, in place; the summed loss, whether one is over.

        A parameter without a gradient in any process still has none.
        """
        if self.count == 1:
            return loss, over
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
        flags = loss.new_tensor([over, *[p.grad is not None for p in parameters]])
        # All in one message, since each has a latency of its own.
        numbers = torch.cat([*[own.flatten() for own in gradients], loss[None], flags])
        dist.all_reduce(numbers)
        sizes = [*[parameter.numel() for parameter in parameters], 1, len(flags)]
        *sums, total, found = torch.split(numbers, sizes)
        stop, *anywhere = found.tolist()
        for parameter, own, processes in zip(parameters, sums, anywhere, strict=True):
            parameter.grad = own.view_as(parameter) if processes else None
        return total[0], stop > 0

    def all_reduce_min(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        least = torch.tensor(number)
        if self.count > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN, self.messages)
        return int(least)

    def all_gather(self, data: bytes) -> list[bytes]:
        """What each process gives, by their indices. None may be empty."""
        if self.count == 1:
            return [data]
        found = []
        for source in range(self.count):
            size = torch.tensor(len(data))
            dist.broadcast(size, source, self.messages)
            own = bytearray(data if source == self.index else int(size))
            dist.broadcast(_bytes(own), source, self.messages)
            found.append(bytes(own))
        return found

    def send_bytes(self, data: bytes) -> None:
        """Give ``data`` to the other processes, if there are any."""
        if self.count > 1:
            dist.broadcast(torch.tensor(len(data)), 0, self.messages)
            dist.broadcast(_bytes(bytearray(data)), 0, self.messages)

    def recv_bytes(self, most: int) -> bytes:
        """What process 0 sends next. Raises `OSError` for more than ``most`` bytes."""
        size = torch.tensor(0)
        dist.broadcast(size, 0, self.messages)
        if size > most:
            raise OSError(f"a message of {int(size)} bytes: at most {most} are allowed")
        data = bytearray(int(size))
        dist.broadcast(_bytes(data), 0, self.messages)
        return bytes(data)


ALONE = Processes()
"""A client in a process of its own."""


def join() -> Processes:
    """This process among those that ``accelerate launch`` has started with it.

    Raises `ConfigError` for a kind of FSDP that cannot be used.
    """
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
    from torch.distributed.fsdp import CPUOffloadPolicy

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"

    def split(model: PreTrainedModel) -> None:
        if not all(weight.is_floating_point() for weight in model.parameters()):
            raise ConfigError(
                "FSDP cannot split a base in 8 bits, or one that is stored in 4 bits: use "
                "model.quantization = '4bit' or 'none' with the whole weights, or a "
                "distributed_type without FSDP, where each GPU holds the base"
            )
        whole = dict(model.named_parameters())
        fsdp2_prepare_model(accelerator, model)
        for name, part in model.named_parameters():
            for key in ("compress_statistics", "quant_type"):  # of 4 bits, which PEFT reads
                if hasattr(whole[name], key):
                    setattr(part, key, getattr(whole[name], key))

    if fsdp:
        plugin = accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for key, value, allowed in (
            ("fsdp_version", plugin.fsdp_version, 2),
            ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), False),
        ):
            if value != allowed:
                raise ConfigError(f"{key} = {value} of accelerate is not supported: use {allowed}")
    return Processes(
        index=accelerator.process_index,
        count=accelerator.num_processes,
        device="cpu" if fsdp or accelerator.device.type == "cpu" else str(accelerator.device),
        messages=dist.new_group(backend="gloo", timeout=IDLE),
        split=split if fsdp else None,
    )


def call_through(model: PeftModel) -> None:
    """Let PEFT call its base model as a module: it calls ``forward``, without FSDP's hooks."""
    tuner = model.base_model
    tuner.forward = lambda *arguments, **named: tuner.model(*arguments, **named)


def _bytes(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
