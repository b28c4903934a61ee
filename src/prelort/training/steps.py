"""One client's optimiser steps of a round: their batches, truncations, losses and time limit.

Shared by the loops of one client (`local.py`) and of several in one batch (`batched.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import NoReturn

import torch
from torch import Tensor, nn

from prelort.errors import PrelortError
from prelort.methods.objective import Objective, Pass
from prelort.seeds import torch_generator
from prelort.tasks.interface import Batch, Example
from prelort.training.batches import ForwardPass, batches, steps_per_round
from prelort.training.dropout import ClientDropout, draws
from prelort.training.optimizer import rate_multiplier
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining


@dataclass(frozen=True, slots=True)
class Assignment:
    """One client's work in one round. ``round_index`` counts from 0."""

    client: str
    round_index: int
    rounds: int
    seed: int
    objective: Objective
    timeout: float = math.inf
    """Seconds after which the client gives up."""
    stopped: Callable[[], bool] = lambda: False
    """Whether the result is no longer needed; called after every step."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """``loss``: mean over the steps of the objective (per token, or per example), no penalty."""

    loss: float
    steps: int
    seconds: float


class LocalSteps:
    """The steps that one client takes in one round, as a function of seed, client and round.

    ``clients``: how many train in one batch; each takes an even share of its time. Raises
    `PrelortError` for a client without examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        settings: LocalTraining,
        assignment: Assignment,
        clients: int = 1,
    ) -> None:
        client, index, seed = assignment.client, assignment.round_index, assignment.seed
        if not examples:
            raise PrelortError(f"client {client!r} has no training examples")
        self.settings = settings
        self.assignment = assignment
        self.count = steps_per_round(len(examples), settings)
        self.losses: list[float] = []
        self._examples = examples
        self._order = batches(len(examples), settings, round_index=index, seed=seed, client=client)
        self._truncations = torch_generator(seed, "truncations", client, index)
        self._clients = clients
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """The client's own time so far."""
        return (time.monotonic() - self._started) / self._clients

    def next(self, runtime: ModelRuntime) -> list[list[ForwardPass]]:
        """The passes of the next step, for each of its (at most) ``gradient_accumulation`` batches.

        Their weights make the sum of the losses the objective per token (or per example). Examples
        of like length share a batch, to save padding: a step's gradient is a sum over all of them.
        """
        chosen = islice(self._order, self.settings.gradient_accumulation)
        micro = [[self._examples[i] for i in batch] for batch in chosen]
        packing = self.settings.packing
        if len(micro) > 1:
            of_step = sorted(chain(*micro), key=lambda example: -len(example.input_ids))
            size = self.settings.batch_size
            micro = [of_step[start : start + size] for start in range(0, len(of_step), size)]
        collated = [runtime.collate(examples, packing=packing) for examples in micro]
        total = max(1, sum(runtime.task.weight(batch) for batch in collated))
        objective, passes = self.assignment.objective, []
        for examples, batch in zip(micro, collated, strict=True):
            parts = objective.passes(len(examples), self._truncations)
            if self.settings.batch_truncations and len(parts) > 1:
                passes.append([_merged(examples, batch, parts, objective.levels[-1], total)])
            else:
                passes.append(
                    [ForwardPass(examples, batch, p.ranks, p.weight / total) for p in parts]
                )
        return passes

    def rate_multiplier(self) -> float:
        """The factor of the learning rates at the step whose loss was recorded last."""
        done = self.assignment.round_index * self.count + len(self.losses) - 1
        return rate_multiplier(self.settings, done, self.count * self.assignment.rounds)

    def record(self, loss: float) -> None:
        """Record the loss of the step. Raises `PrelortError` if it is no longer finite."""
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise PrelortError(
                # Not the client's own rate: it tells the rank, which may be hidden.
                f"the loss became {loss} {self._place()}: lower training.learning_rate"
            )

    @property
    def over(self) -> bool:
        """Whether the client has taken too long or was cancelled."""
        return self.seconds > self.assignment.timeout or self.assignment.stopped()

    def give_up(self) -> NoReturn:
        """Raise the `PrelortError` of a client whose time is over."""
        if self.seconds > self.assignment.timeout:
            raise PrelortError(f"timed out after {self.assignment.timeout:g} s {self._place()}")
        raise PrelortError(f"was cancelled {self._place()}")

    def result(self) -> TrainResult:
        """The result of all steps."""
        return TrainResult(sum(self.losses) / len(self.losses), len(self.losses), self.seconds)

    def _place(self) -> str:
        return f"at local step {len(self.losses)} of {self.count}"


def row_ranks(ranks: int | Tensor | None, rows: int, full: int) -> Tensor:
    """The truncation of each row, int64 [rows]; ``full`` where nothing is cut."""
    if isinstance(ranks, Tensor):
        return ranks
    return torch.full((rows,), full if ranks is None else ranks)


@contextmanager
def training_mode(model: nn.Module, settings: LocalTraining, seed: int) -> Iterator[None]:
    """The model in training mode, with its dropout drawn from ``seed``."""
    dropout = ClientDropout(seed) if draws(model) else None
    model.train()
    if settings.gradient_checkpointing:
        options: dict[str, object] = {"use_reentrant": False}
        if dropout is not None:
            options |= {"preserve_rng_state": False, "context_fn": dropout.checkpoint_contexts}
        model.gradient_checkpointing_enable(options)  # type: ignore[operator]
    with dropout or nullcontext():
        yield


def precision(settings: LocalTraining, device: torch.device) -> AbstractContextManager[object]:
    """The configured autocast of the forward pass."""
    if settings.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _merged(
    examples: Sequence[Example], batch: Batch, parts: Sequence[Pass], full: int, total: int
) -> ForwardPass:
    """All passes of a batch as one: its rows once for each truncation."""
    rows, times = len(examples), len(parts)
    return ForwardPass(
        [*examples] * times,
        {name: t.repeat(times, *[1] * (t.ndim - 1)) for name, t in batch.items()},
        torch.cat([row_ranks(part.ranks, rows, full) for part in parts]),
        torch.tensor([part.weight / total for part in parts]).repeat_interleave(rows),
    )
