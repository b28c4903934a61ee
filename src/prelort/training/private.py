"""DP-SGD on what a client trains (Abadi et al., arXiv 1607.00133, algorithm 1).

A step draws each example with probability q, clips the gradient of each to the norm C, all layers
and modules together, and gives the optimiser

    g = (sum of the clipped gradients + N(0, (z C)^2)) / (q n)

The denominator is the expected number of examples, so that it says nothing of how many were drawn.
What the optimiser makes of g is post-processing.

Each row of a batch is a group of its own in the fused layers (`prelort.models.fused_lora`), so that
one backward pass has the gradients of all examples: for scale s, inputs X_i and gradients G_i
[tokens, d_out] of example i, ``dB_i = s G_i' (X_i A')`` and ``dA_i = s (G_i B)' X_i``.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.modules.batchnorm import _BatchNorm

from prelort.config import Config
from prelort.errors import ConfigError
from prelort.models.fused_lora import linear_by_group
from prelort.models.lora import lora_layers, saved_module_places, trainable
from prelort.privacy.accounting import Budget
from prelort.privacy.example import ExamplePrivacy, NoisyGradients, example_privacy
from prelort.privacy.noise import poisson_sample
from prelort.tasks.interface import Example
from prelort.training.batches import ForwardPass, steps_per_round
from prelort.training.runtime import ModelRuntime, evaluation_mode, low_precision
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment, LocalSteps, precision, row_ranks

SAME = 1e-3
"""How far an example's gradient may be from that of the example alone, relative to its norm."""
_WHOLE = 2**30
"""A rank that cuts nothing."""


def budget_of(
    private: ExamplePrivacy, examples: int, settings: LocalTraining, rounds: int
) -> Budget:
    """The budget of a client with so many examples that trains in all rounds of a run.

    Raises `ConfigError` for a delta that gives an example away.
    """
    if private.delta >= 1 / examples:
        raise ConfigError(
            f"privacy.delta = {private.delta:g} would allow to publish one of the {examples} "
            f"examples of a client: use much less than {1 / examples:g}"
        )
    batch = settings.batch_size * settings.gradient_accumulation
    steps = steps_per_round(examples, settings) * rounds
    return Budget(private.epsilon, private.delta, steps, min(1.0, batch / examples))


def calibrate(config: Config, examples: int) -> None:
    """Find the noise of a client with so many examples, if it needs any: this takes seconds.

    Raises `ConfigError` as `budget_of`, or where dp-accounting is not installed.
    """
    private = example_privacy(config.privacy)
    if private is not None:
        settings = LocalTraining.of(config.training)
        budget_of(private, examples, settings, config.federation.rounds).noise_multiplier()


class PrivateSteps(LocalSteps):
    """The steps of a client whose examples are drawn from the system's generator.

    Truncations come from the seed, which the server knows: they are drawn for all of the client's
    examples, so that an example's does not depend on which others take part in the step.
    """

    def __init__(
        self,
        runtime: ModelRuntime,
        examples: Sequence[Example],
        settings: LocalTraining,
        assignment: Assignment,
        noise: NoisyGradients,
    ) -> None:
        super().__init__(examples, settings, assignment)
        self.gradients = ExampleGradients(runtime, settings)
        self._runtime = runtime
        self._noise = noise

    def backward(self) -> None:
        """Make the noisy mean gradient over the next step's examples that of the parameters."""
        noise = self._noise
        sums = [torch.zeros_like(parameter) for parameter in self.gradients.learning]
        for batch in self.next(self._runtime):
            torch._foreach_add_(sums, clipped_sums(self.gradients.of(batch), noise.clip))
        deviation, expected = noise.multiplier * noise.clip, noise.rate * len(self._examples)
        for parameter, total in zip(self.gradients.learning, sums, strict=True):
            drawn = (noise.normal(total.shape) * deviation).to(total.device, total.dtype)
            parameter.grad = (total + drawn) / expected

    def next(self, runtime: ModelRuntime) -> list[list[ForwardPass]]:
        """The passes of the next step: none if no example is drawn.

        A row's weight makes its loss the mean over what the task counts of it.
        """
        objective, task = self.assignment.objective, runtime.task
        parts = objective.passes(len(self._examples), self._truncations)
        drawn = poisson_sample(range(len(self._examples)), self._noise.rate)
        size, passes = self.settings.batch_size, []
        for start in range(0, len(drawn), size):
            rows = drawn[start : start + size]
            examples = [self._examples[row] for row in rows]
            counts = [task.weight(runtime.collate([example])) for example in examples]
            each = torch.tensor([1 / max(1, count) for count in counts])
            batch = runtime.collate(examples)
            passes.append(
                [
                    ForwardPass(
                        examples,
                        batch,
                        part.ranks[rows] if isinstance(part.ranks, Tensor) else part.ranks,
                        part.weight * each,
                    )
                    for part in parts
                ]
            )
        return passes


class ExampleGradients:
    """Computes the gradients of single examples of the adapter that is installed in a model.

    Raises `ConfigError` for a model in which an example has none of its own.
    """

    def __init__(self, runtime: ModelRuntime, settings: LocalTraining) -> None:
        model = runtime.model
        self._runtime = runtime
        self._settings = settings
        modules = {module for module, _ in saved_module_places(model).values()}
        self._linear = [module for module in modules if type(module) is nn.Linear]
        self.learning = [*chain(*trainable(model))]
        self._of_rows: dict[nn.Parameter, Tensor] = {}
        self._rows = 0
        if runtime.processes.count > 1:
            raise _impossible("with several GPUs (trainer.accelerate)", "use one")
        if any(isinstance(layer, ParamWrapper) for layer in lora_layers(model).values()):
            raise _impossible(
                "with lora.target_parameters", "all examples of a batch share an expert's weights"
            )
        for module in modules.difference(self._linear):
            raise _impossible(
                f"with a {type(module).__name__} that is trained in full (lora.modules_to_save)",
                "only linear layers can be",
            )
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise _impossible("with this model", "its batch normalisation mixes examples")
        if not runtime.by_example():
            raise _impossible("with this model", "its layers do not see the rows of the batch")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model compute with parameters of their own for each row."""

        def weights_of(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
            bias = None if module.bias is None else self._groups_of(module.bias)
            return self._groups_of(module.weight), bias

        truncation, model = self._runtime.truncation, self._runtime.model
        with truncation.fused(model, self._groups_of), linear_by_group(self._linear, weights_of):
            yield

    def of(self, passes: Sequence[ForwardPass]) -> list[Tensor]:
        """The gradients [rows, *shape] of each parameter that learns, over all passes of a batch.

        The model must be `installed`.
        """
        runtime, device = self._runtime, self._runtime.device
        self._rows = len(passes[0].examples)
        self._of_rows = {p: self._repeated(p).requires_grad_() for p in self.learning}
        for part in passes:
            batch = {name: tensor.to(device) for name, tensor in part.batch.items()}
            rows, length = batch["input_ids"].shape
            ranks = row_ranks(part.ranks, rows, _WHOLE)  # of each, so that rows are checked
            weight = torch.as_tensor(part.weight).to(device)
            with runtime.truncation.at(ranks, (rows, length)), precision(self._settings, device):
                losses = runtime.task.losses(runtime.model, batch)
                (losses * weight).sum().backward()  # type: ignore[no-untyped-call]
        found = [
            torch.zeros_like(copy) if copy.grad is None else copy.grad
            for copy in self._of_rows.values()
        ]
        self._of_rows = {}
        return found

    def check(self, examples: Sequence[Example]) -> None:
        """Raise `ConfigError` unless the gradients of some examples are those of each alone.

        Tried once.
        """
        runtime = self._runtime
        if runtime.truncation.own_gradients:
            return

        def gradients(some: Sequence[Example]) -> list[Tensor]:
            one = ForwardPass(some, runtime.collate(some), None, 1.0)
            return [gradient.flatten(1) for gradient in self.of([one])]

        with evaluation_mode(runtime.model), self.installed():
            together = gradients(examples)
            tolerance = 0.1 if low_precision(runtime.model) else SAME
            for row, example in enumerate(examples):
                alone = gradients([example])
                pairs = list(zip(together, alone, strict=True))
                gap = sum(float((all_[row] - own[0]).square().sum()) for all_, own in pairs)
                size = sum(float(own.square().sum()) for own in alone)
                if gap > tolerance**2 * size:
                    raise _impossible(
                        "with this model",
                        "an example's gradient depends on the others of its batch",
                    )
        runtime.truncation.own_gradients = True

    def _groups_of(self, weight: Tensor) -> Tensor:
        own = self._of_rows.get(weight) if isinstance(weight, nn.Parameter) else None
        return self._repeated(weight) if own is None else own

    def _repeated(self, weight: Tensor) -> Tensor:
        return weight.detach().expand(self._rows, *weight.shape)


def clipped_sums(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
    """The sums over examples of their gradients, each shortened to the norm ``clip`` at most.

    ``gradients``: [examples, *shape] of each parameter; an example whose gradient is not finite
    adds nothing.
    """
    # In float64: the squares of small float32 numbers are 0, and what has no norm is not clipped.
    each = [vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) for gradient in gradients]
    norms = vector_norm(torch.stack([norm.to(each[0].device) for norm in each]), dim=0)
    finite = torch.isfinite(norms)
    factors = torch.where(finite, clip / norms.clamp(min=clip), 0.0)
    sums = []
    for gradient in gradients:
        rows = gradient.flatten(1).masked_fill_(~finite[:, None].to(gradient.device), 0.0)
        sums.append((factors.to(rows) @ rows).view(gradient.shape[1:]))
    return sums


def secret_seed() -> int:
    """A seed of dropout that nobody knows.

    Masks are drawn row by row: to whoever knows the seed, an example's mask would depend on which
    others are in its batch.
    """
    return secrets.randbits(63)


def _impossible(what: str, reason: str) -> ConfigError:
    return ConfigError(f"privacy.unit = 'example' is not possible {what}: {reason}")
