"""Cost of a training step of each nested objective, against plain LoRA.

Same model, same batches, rank 16 with levels 2, 4, 8, 16; the objectives alternate. ``by PEFT``
is plain LoRA with PEFT's own layers; ``at once`` runs all truncations of a batch in one forward
pass (`training.batch_truncations`). On the CPU the embedded base; with ``--device cuda`` a Llama of
16 layers of width 2048 with random weights in bfloat16 (the cost does not depend on the values).

    python benchmarks/nested_cost.py [--device cuda] [--repeats 20]
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from common import (
    card_of,
    high_water_mib,
    machine,
    no_gpu,
    paired,
    ratio,
    report,
    set_high_water_back,
)
from transformers import LlamaConfig, LlamaForCausalLM

from prelort import tasks
from prelort.adapters import ScaleRule
from prelort.config import LoraSettings, ModelConfig, TrainingConfig
from prelort.methods.objective import FULL_SHARE, Objective, nested
from prelort.models.base import load_model
from prelort.models.lora import attach, initial_adapter, install
from prelort.tasks.interface import Example
from prelort.training.local import train
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation

LEVELS = (2, 4, 8, 16)
KINDS = (
    "plain, by PEFT",
    "plain",
    "example",
    "step",
    "full+one",
    "full+one, at once",
    "mean",
    "mean, at once",
)
STEPS = 4


def base(device: str) -> torch.nn.Module:
    """The frozen base model."""
    if device == "cpu":
        return load_model(ModelConfig(device="cpu"), "causal", pad_id=0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.requires_grad_(False)


class Bench:
    """A model with LoRA layers, and the examples to train on."""

    def __init__(self, device: str, batch: int, length: int) -> None:
        self.model = attach(base(device), LoraSettings(), LEVELS[-1], "causal")
        rule = ScaleRule()
        self.adapter = initial_adapter(self.model, rule, seed=0)
        truncation = Truncation(self.model, rule)
        self.runtime = ModelRuntime(self.model, truncation, tasks.get("causal-lm"), pad_id=0)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 500, (64, length), generator=generator).tolist()
        self.examples = [Example(row, row) for row in ids]
        precision = "float32" if device == "cpu" else "bfloat16"
        config = TrainingConfig(local_steps=STEPS, batch_size=batch, precision=precision)
        self.settings = LocalTraining.of(config)

    def steps(self, kind: str) -> None:
        """Take `STEPS` steps of an objective from the initial adapter."""
        name, _, way = kind.partition(", ")
        install(self.model, self.adapter)
        settings = replace(self.settings, batch_truncations=way == "at once")
        work = Assignment("client", 0, 1, 0, objective(name))
        train(self.runtime, self.examples, settings, work, fused=way != "by PEFT")


def objective(kind: str) -> Objective:
    """The objective of a client of the highest rank, with the default weights."""
    return nested(kind, LEVELS[-1], LEVELS, full_share=FULL_SHARE.get(kind))


def peak_mib(kind: str, batch: int, length: int) -> float:
    """Peak memory that training adds to the process, in MiB (Linux; in a new process)."""
    torch.set_num_threads(1)
    bench = Bench("cpu", batch, length)
    set_high_water_back()
    before = high_water_mib()
    bench.steps(kind)
    return high_water_mib() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--short", action="store_true", help="three turns")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.repeats = 3
    device = arguments.device
    if no_gpu(device):
        return
    if device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(device, arguments.batch, arguments.length)
    memory: dict[str, float] = {}

    def side(kind: str) -> Callable[[], float]:
        def run() -> float:
            if device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            bench.steps(kind)
            if device != "cpu":
                torch.cuda.synchronize()
                memory[kind] = torch.cuda.max_memory_allocated() / 2**20
            return (time.perf_counter() - started) / STEPS

        return run

    sides = {kind: side(kind) for kind in KINDS}
    taken = paired(sides, arguments.repeats)
    if device == "cpu":
        # Each in a process of its own: an allocator does not give back what it once had.
        spawn = multiprocessing.get_context("spawn")
        for kind in KINDS:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                job = pool.submit(peak_mib, kind, arguments.batch, arguments.length)
                memory[kind] = job.result()
    rows = []
    for kind in KINDS:
        ratios = ratio(taken, kind, "plain")
        rows.append(
            {
                "objective": kind,
                "ms a step": 1000 * sorted(taken[kind])[len(taken[kind]) // 2],
                "x plain (median)": ratios["median"],
                "min": ratios["min"],
                "max": ratios["max"],
                "peak MiB": round(memory[kind]),
            }
        )
    facts = {**vars(arguments), **machine(device), "command": "python benchmarks/nested_cost.py"}
    name = "nested_cost" if device == "cpu" else f"nested_cost_gpu{card_of(facts)}"
    report(name, "Cost of a step of each objective, against plain LoRA", rows, facts)


if __name__ == "__main__":
    main()
