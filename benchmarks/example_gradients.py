"""Cost of the gradients of single examples, which DP-SGD needs, against that of their sum.

Same model, same batch, rank 16; the ways alternate. ``by group`` is what `prelort.training.private`
does: each row is a group of its own in the fused layers. ``vmap`` is `torch.func.vmap` of `grad`
over PEFT's own layers, ``Opacus`` its hooks on them (left out where it is not installed: ``pip
install opacus``), ``one by one`` a pass for each example. Then whole training steps, with noise.

    python benchmarks/example_gradients.py [--repeats 20] [--batch 8] [--length 128]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from common import machine, paired, ratio, report
from nested_cost import LEVELS, STEPS, Bench
from torch import Tensor

from prelort.methods.objective import plain
from prelort.models.lora import install, trainable
from prelort.privacy.example import NoisyGradients
from prelort.training.batches import ForwardPass
from prelort.training.local import train
from prelort.training.private import ExampleGradients
from prelort.training.steps import Assignment

REFERENCE = "sum of the batch"


class Ways:
    """Ways to the gradients of one batch of a model with LoRA layers."""

    def __init__(self, batch: int, length: int) -> None:
        self.bench = Bench("cpu", batch, length)
        self.runtime, self.model = self.bench.runtime, self.bench.model.train()
        install(self.model, self.bench.adapter)
        self.learning = [*chain(*trainable(self.model))]
        self.examples = self.bench.examples[:batch]
        self.batch = self.runtime.collate(self.examples)
        self.examples_gradients = ExampleGradients(self.runtime, self.bench.settings)
        self.hooks: Any = None
        if importlib.util.find_spec("opacus") is not None:
            from opacus import GradSampleModule

            self.hooks = GradSampleModule(self.model, loss_reduction="sum", strict=False)
            self.hooks.remove_hooks()

    def of_the_sum(self) -> list[Tensor]:
        """The gradient of the batch's loss."""
        with self.runtime.truncation.fused(self.model):
            self.runtime.task.losses(self.model, self.batch).sum().backward()
        return self._taken()

    def by_group(self) -> list[Tensor]:
        """Of each example, as DP-SGD takes them here."""
        with self.examples_gradients.installed():
            return self.examples_gradients.of([ForwardPass(self.examples, self.batch, None, 1.0)])

    def one_by_one(self) -> list[Tensor]:
        """Of each example, by a pass for each."""
        found = []
        for example in self.examples:
            with self.runtime.truncation.fused(self.model):
                batch = self.runtime.collate([example])
                self.runtime.task.losses(self.model, batch).sum().backward()
            found.append(self._taken())
        return [torch.stack(own) for own in zip(*found, strict=True)]

    def vmap(self) -> list[Tensor]:
        """Of each example, by `torch.func`."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        values = {name: parameter.detach() for name, parameter in named.items()}

        def loss(values: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
            one = {name: tensor[None] for name, tensor in row.items()}
            inputs = {"input_ids": one["input_ids"], "use_cache": False}
            logits = torch.func.functional_call(self.model, values, (), inputs).logits
            return torch.nn.functional.cross_entropy(
                logits[0, :-1], one["labels"][0, 1:], reduction="sum"
            )

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
        found = each(values, self.batch)
        of = {id(p): found[name] for name, p in named.items()}
        return [of[id(p)] for p in self.learning]

    def opacus(self) -> list[Tensor]:
        """Of each example, by Opacus's hooks."""
        assert self.hooks is not None
        self.hooks.add_hooks(loss_reduction="sum")
        self.runtime.task.losses(self.model, self.batch).sum().backward()
        found = [p.grad_sample for p in self.learning]
        self.hooks.remove_hooks()
        for parameter in self.learning:
            parameter.grad = parameter.grad_sample = None
        return found

    def _taken(self) -> list[Tensor]:
        taken = [p.grad for p in self.learning]
        self.model.zero_grad(set_to_none=True)
        return taken


def step(bench: Bench, noise: NoisyGradients | None) -> float:
    """Seconds of a training step."""
    install(bench.model, bench.adapter)
    work = Assignment("client", 0, 1, 0, plain(LEVELS[-1]))
    started = time.perf_counter()
    train(bench.runtime, bench.examples, bench.settings, work, noise=noise)
    return (time.perf_counter() - started) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--short", action="store_true", help="three turns")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.repeats = 3
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of vmap and Opacus about themselves
    ways = Ways(arguments.batch, arguments.length)
    kinds: dict[str, Callable[[], list[Tensor]]] = {
        REFERENCE: ways.of_the_sum,
        "by group": ways.by_group,
        "one by one": ways.one_by_one,
        "vmap": ways.vmap,
    }
    if ways.hooks is not None:
        kinds["Opacus"] = ways.opacus
    else:
        print("Opacus is not installed: left out")
    expected = ways.one_by_one()
    for name, way in list(kinds.items())[1:]:
        for one, own in zip(way(), expected, strict=True):
            torch.testing.assert_close(one, own, rtol=1e-3, atol=1e-4, msg=name)

    def side(way: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            way()
            return time.perf_counter() - started

        return run

    rate = arguments.batch / len(ways.bench.examples)
    noise = NoisyGradients(clip=1.0, multiplier=1.0, rate=rate)
    sides = {name: side(way) for name, way in kinds.items()}
    plain_step, private_step = "training step", "training step with noise"
    bench = Bench("cpu", arguments.batch, arguments.length)  # the steps replace its parameters
    sides |= {plain_step: lambda: step(bench, None), private_step: lambda: step(bench, noise)}
    taken = paired(sides, arguments.repeats)
    rows = []
    for name, seconds in taken.items():
        against = plain_step if name.startswith(plain_step) else REFERENCE
        ratios = ratio(taken, name, against)
        rows.append(
            {
                "gradients": name,
                "ms": 1000 * sorted(seconds)[len(seconds) // 2],
                "against": against,
                "x (median)": ratios["median"],
                "min": ratios["min"],
                "max": ratios["max"],
            }
        )
    facts = {**vars(arguments), **machine(), "command": "python benchmarks/example_gradients.py"}
    report("example_gradients", "Cost of the gradients of single examples", rows, facts)


if __name__ == "__main__":
    main()
