"""Peak memory and time of a training step, with and without what saves memory.

``logits at once`` and ``in parts``: the loss over a vocabulary of 150,000, of all tokens and (``of
answers``) of a quarter of them, as in instruction tuning. ``padded`` and ``packed``: examples of 16
to 256 tokens, each in a row of its own or several in one, with a vocabulary of 4,096. Both sides
take the same steps from the same adapter, in turns; the peak is without the model itself. On the
CPU a Llama of 2 layers of width 64 (packing: 4 layers of width 256); with ``--device cuda`` one of
16 layers of width 2048 in bfloat16; with random weights.

    python benchmarks/memory.py [--device cuda] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import card_of, machine, no_gpu, paired, ratio, report
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
NARROW = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}
LIMIT, AT_ONCE = token_losses.LIMIT, 2**62


class Bench:
    """A model with LoRA layers, and the ways to take steps with it."""

    def __init__(self, device: str, vocabulary: int, shape: dict[str, int]) -> None:
        gpu = device != "cpu"
        config = LlamaConfig(
            vocab_size=vocabulary, num_attention_heads=shape["hidden_size"] // 32, **shape
        )
        with torch.device(device):
            base = LlamaForCausalLM(config).to(torch.bfloat16 if gpu else torch.float32)
        self.model = attach(base.requires_grad_(False), LoraSettings(), RANK, "causal")
        rule = ScaleRule()
        self.adapter = initial_adapter(self.model, rule, seed=0)
        truncation = Truncation(self.model, rule)
        self.runtime = ModelRuntime(self.model, truncation, tasks.get("causal-lm"), pad_id=0)
        self.gpu = gpu

    def steps(self, examples: list[Example], limit: int = LIMIT, **settings: Any) -> None:
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


def examples(lengths: list[int], learnt: float = 1.0) -> list[Example]:
    """Sequences of which the last share is learnt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(3, 4096, (length,), generator=generator).tolist()
        prompt = round(length * (1 - learnt))
        made.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one turn")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.repeats = 1
    if no_gpu(arguments.device):
        return
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    on_cpu = arguments.device == "cpu"
    bench = Bench(arguments.device, VOCABULARY, NARROW if on_cpu else LARGE)
    layers = Bench(arguments.device, 4096, SMALL if on_cpu else LARGE)
    batch = 4 if on_cpu else 8
    all_tokens = examples([LENGTH] * batch)
    answers = examples([LENGTH] * batch, learnt=0.25)
    uneven = examples([LENGTH >> (i % 5) for i in range(3 * batch)])
    work: list[dict[str, Callable[[], None]]] = [
        {
            "logits at once, of all tokens": lambda: bench.steps(all_tokens, AT_ONCE),
            "logits in parts, of all tokens": lambda: bench.steps(all_tokens),
        },
        {
            "logits at once, of answers": lambda: bench.steps(answers, AT_ONCE),
            "logits in parts, of answers": lambda: bench.steps(answers),
        },
        {
            "padded, 16 to 256 tokens": lambda: layers.steps(uneven),
            "packed, 16 to 256 tokens": lambda: layers.steps(uneven, packing=True),
        },
    ]
    rows = []
    for sides in work:
        taken = paired(
            {k: lambda v=v: bench.seconds(v) for k, v in sides.items()}, arguments.repeats
        )
        peaks = {side: bench.peak(steps) for side, steps in sides.items()}
        reference = next(iter(sides))
        for side in sides:
            rows.append(
                {
                    "step": side,
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
    name = "memory" if arguments.device == "cpu" else f"memory_gpu{card_of(facts)}"
    report(name, "Memory and time of a step", rows, facts)


if __name__ == "__main__":
    main()
