"""Peak memory and time of a training step, with and without what saves memory.

``logits at once`` and ``in parts``: the loss over a vocabulary of 150,000, of all tokens and (``of
answers``) of a quarter of them, as in instruction tuning. Both sides take the same steps from the
same adapter, in turns; the peak is without the model itself. On the CPU a Llama of 2 layers of
width 64; with ``--device cuda`` one of 16 layers of width 2048 in bfloat16, with random weights.

    python benchmarks/memory.py [--device cuda] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, paired, ratio, report
from measured_peak import allocated_peak
from transformers import LlamaConfig, LlamaForCausalLM

from prelort import tasks
from prelort.adapters import ScaleRule
from prelort.config import LoraSettings, TrainingConfig
from prelort.methods.objective import plain
from prelort.models.lora import attach, initial_adapter, install
from prelort.tasks import token_losses
from prelort.tasks.interface import IGNORED, Example
from prelort.training.local import train
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation

VOCABULARY, RANK, STEPS, LENGTH = 150_000, 16, 2, 256
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}
AT_ONCE = 2**62


class Bench:
    """A model with LoRA layers, and the ways to take steps with it."""

    def __init__(self, device: str) -> None:
        gpu = device != "cpu"
        shape = LARGE if gpu else SMALL
        config = LlamaConfig(
            vocab_size=VOCABULARY, num_attention_heads=shape["hidden_size"] // 32, **shape
        )
        with torch.device(device):
            base = LlamaForCausalLM(config).to(torch.bfloat16 if gpu else torch.float32)
        self.model = attach(base.requires_grad_(False), LoraSettings(), RANK, "causal")
        rule = ScaleRule()
        self.adapter = initial_adapter(self.model, rule, seed=0)
        truncation = Truncation(self.model, rule)
        self.runtime = ModelRuntime(self.model, truncation, tasks.get("causal-lm"), pad_id=0)
        self.gpu = gpu

    def steps(self, examples: list[Example], limit: int, **settings: Any) -> None:
        """Take `STEPS` steps from the initial adapter, with at most ``limit`` logits at once."""
        token_losses.LIMIT = limit
        install(self.model, self.adapter)
        config = TrainingConfig(local_steps=STEPS, batch_size=len(examples), **settings)
        work = Assignment("client", 0, 1, 0, plain(RANK))
        train(self.runtime, examples, LocalTraining.of(config), work)

    def seconds(self, steps: Callable[[], None]) -> float:
        """The time of one step."""
        started = time.perf_counter()
        steps()
        if self.gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / STEPS

    def peak(self, steps: Callable[[], None]) -> float:
        """The bytes that training adds at its peak."""
        if not self.gpu:
            return allocated_peak(steps)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps()
        return torch.cuda.max_memory_allocated() - before


def examples(rows: int, learnt: float) -> list[Example]:
    """Sequences of which the last share is learnt."""
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    prompt = round(LENGTH * (1 - learnt))
    return [Example(row, [IGNORED] * prompt + row[prompt:]) for row in ids.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one turn")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.repeats = 1
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(arguments.device)
    batch = 4 if arguments.device == "cpu" else 8
    limit = token_losses.LIMIT
    work = {"of all tokens": examples(batch, 1.0), "of answers": examples(batch, 0.25)}
    rows = []
    for name, some in work.items():
        sides = {
            "logits at once": lambda some=some: bench.steps(some, AT_ONCE),
            "logits in parts": lambda some=some: bench.steps(some, limit),
        }
        taken = paired(
            {k: lambda v=v: bench.seconds(v) for k, v in sides.items()}, arguments.repeats
        )
        peaks = {side: bench.peak(steps) for side, steps in sides.items()}
        reference = next(iter(sides))
        for side in sides:
            rows.append(
                {
                    "loss": f"{side}, {name}",
                    "ms a step": round(1000 * sorted(taken[side])[len(taken[side]) // 2]),
                    "x time": ratio(taken, side, reference)["median"],
                    "peak MiB": round(peaks[side] / 2**20),
                    "x memory": peaks[side] / peaks[reference],
                }
            )
    facts = {
        **vars(arguments),
        **machine(arguments.device),
        "command": "python benchmarks/memory.py",
    }
    name = "memory" if arguments.device == "cpu" else "memory_gpu"
    report(name, "Memory and time of a step", rows, facts)


if __name__ == "__main__":
    main()
