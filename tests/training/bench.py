"""One tiny model on which clients train, each starting from the same adapter."""

from __future__ import annotations

import torch
from torch import nn

from prelort import tasks
from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import TrainingConfig
from prelort.methods.objective import plain
from prelort.models.lora import extract, install
from prelort.training.local import train
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation
from tiny_models import adapted, kind_of, ragged_examples, trained_adapter

RULE = ScaleRule("rslora", 1.3)
DEFAULTS = {"local_steps": 3, "batch_size": 4, "learning_rate": 0.05, "optimizer": "sgd"}
WORK = {"client": "k", "round_index": 0, "rounds": 1, "seed": 0, "objective": None}
INSTALLED = {"frozen": None, "trains": "AB", "scale_multiplier": 1.0}


def settings_of(**changes) -> LocalTraining:
    return LocalTraining.of(TrainingConfig(**(DEFAULTS | changes)))


class Bench:
    def __init__(self, folder, rank=8, rule=RULE, **lora):
        self.folder, self.rank, self.rule = folder, rank, rule
        self.model = adapted(folder, rank, **lora)
        task = tasks.get("classification" if kind_of(folder) != "causal" else "causal-lm")
        self.runtime = ModelRuntime(self.model, Truncation(self.model, rule), task, pad_id=0)
        self.start = trained_adapter(self.model, rule)
        self.examples = ragged_examples(folder)

    def train(self, adapter=None, *, examples=None, fused=True, noise=None, **changes):
        """The result and the trained adapter; ``changes`` of settings, work and installation."""
        work = WORK | {name: changes.pop(name) for name in [*changes] if name in WORK}
        work |= {n: changes.pop(n) for n in ("timeout", "stopped") if n in changes}
        how = INSTALLED | {name: changes.pop(name) for name in INSTALLED if name in changes}
        work["objective"] = work["objective"] or plain(self.rank)
        install(self.model, adapter or self.start, **how)
        examples = self.examples if examples is None else examples
        settings = settings_of(**changes)
        work = Assignment(**work)
        result = train(self.runtime, examples, settings, work, fused=fused, noise=noise)
        return result, extract(self.model, self.rule)

    def fold(self, rank, seed=7, size=0.2):
        """A frozen adapter beside the base."""
        generator = torch.Generator().manual_seed(seed)
        layers = {
            name: Factors(
                size * torch.randn(rank, f.A.shape[1], generator=generator),
                size * torch.randn(f.B.shape[0], rank, generator=generator),
            )
            for name, f in self.start.layers.items()
        }
        return LoraAdapter(layers, self.rule)


def without_dropout(model: nn.Module) -> None:
    """Switch off the base model's dropout, in modules and in attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0


def distance(x: LoraAdapter, y: LoraAdapter) -> float:
    return max(float((t - y.tensors()[n]).abs().max()) for n, t in x.tensors().items())


def assert_close(found: LoraAdapter, expected: LoraAdapter, tolerance: float = 1e-6) -> None:
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(
            found.tensors()[name], tensor, rtol=tolerance, atol=tolerance, msg=name
        )
