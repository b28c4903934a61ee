"""What does a training step of each nested objective cost, against plain LoRA?

Same model, same batches, rank 16 with levels 2, 4, 8, 16; the objectives take turns. On the CPU
the embedded base; with ``--device cuda`` a Llama of 16 layers of width 2048 with random weights in
bfloat16 (the cost does not depend on the values).

    python benchmarks/nested_cost.py [--device cuda] [--repeats 20]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import machine, paired, ratio, report
from transformers import LlamaConfig, LlamaForCausalLM

from prelort import tasks
from prelort.adapters import ScaleRule
from prelort.config import LoraSettings, ModelConfig, TrainingConfig
from prelort.methods.objective import FULL_SHARE, Objective, nested
from prelort.models.base import load_model
from prelort.models.lora import attach, initial_adapter, install
from prelort.tasks.interface import Example
from prelort.training.local import Assignment, train
from prelort.training.truncation import Truncation

LEVELS = (2, 4, 8, 16)
KINDS = ("plain", "example", "step", "full+one", "mean")
STEPS = 4


def base(device: str) -> torch.nn.Module:
    """The frozen model that is adapted."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    model = attach(base(device), LoraSettings(), LEVELS[-1], "causal")
    rule = ScaleRule()
    adapter = initial_adapter(model, rule, seed=0)
    truncation = Truncation(model, rule)
    task = tasks.get("causal-lm")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (64, arguments.length), generator=generator).tolist()
    examples = [Example(row, row) for row in ids]
    settings = TrainingConfig(
        local_steps=STEPS,
        batch_size=arguments.batch,
        precision="bfloat16" if device != "cpu" else "float32",
    )
    memory: dict[str, float] = {}

    def side(kind: str, objective: Objective) -> Callable[[], float]:
        def run() -> float:
            install(model, adapter)
            if device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            train(
                model, truncation, task, examples, settings, Assignment("c", 0, 1, 0, objective), 0
            )
            if device != "cpu":
                torch.cuda.synchronize()
                memory[kind] = torch.cuda.max_memory_allocated() / 2**20
            return (time.perf_counter() - started) / STEPS

        return run

    sides = {
        kind: side(kind, nested(kind, LEVELS[-1], LEVELS, full_share=FULL_SHARE.get(kind)))
        for kind in KINDS
    }
    taken = paired(sides, arguments.repeats)
    rows = []
    for kind in KINDS:
        ratios = ratio(taken, kind, "plain")
        row = {
            "objective": kind,
            "ms a step": 1000 * sorted(taken[kind])[len(taken[kind]) // 2],
            "x plain (median)": ratios["median"],
            "min": ratios["min"],
            "max": ratios["max"],
        }
        if memory:
            row["peak MiB"] = memory[kind]
        rows.append(row)
    facts = {**machine(device), "command": "python benchmarks/nested_cost.py", **vars(arguments)}
    name = "nested_cost" if device == "cpu" else "nested_cost_gpu"
    report(name, "Cost of a step of each objective, against plain LoRA", rows, facts)


if __name__ == "__main__":
    main()
