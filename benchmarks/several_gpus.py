"""One client on 1, 2, 4, ... GPUs of a machine: tokens a second, memory, and evaluation.

The processes are those of a site (`prelort.training.processes`), started by accelerate: each has a
share of the rows of one batch, and of the examples that are measured. The model has 0.5 billion
random weights, in bfloat16 or 4 bits, whole on each GPU or split by FSDP. ``--short``: two
processes on a CPU and a tiny model.

    python benchmarks/several_gpus.py [--rows 32] [--tokens 512] [--short]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import card_of, machine, report
from gpu import made

from prelort import tasks
from prelort.adapters import ScaleRule
from prelort.config import LoraSettings, ModelConfig, TrainingConfig
from prelort.methods.objective import plain
from prelort.metrics.evaluate import EvaluationSettings, evaluate
from prelort.models.base import load_model
from prelort.models.lora import attach, initial_adapter, install
from prelort.tasks.interface import Example
from prelort.tasks.token_losses import keep_at_once
from prelort.training.local import train
from prelort.training.processes import ALONE, call_through, join
from prelort.training.runtime import ModelRuntime
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment
from prelort.training.truncation import Truncation

RANK, STEPS = 16, 8
FSDP = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
    },
}


def work(arguments: argparse.Namespace) -> None:
    """What each process does; process 0 writes what it measured."""
    processes = join() if "RANK" in os.environ else ALONE
    dtype = "float32" if arguments.short else "bfloat16"
    split = processes.split
    config = ModelConfig(
        name=str(arguments.model),
        dtype=dtype,
        device=processes.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        quantization=arguments.quantization,
    )
    base = load_model(config, "causal", pad_id=0, to_split=split is not None)
    if split is not None:
        split(base)
        keep_at_once(base)
    model = attach(base, LoraSettings(), RANK, "causal")
    if split is not None:
        call_through(model)
    rule, task = ScaleRule(), tasks.get("causal-lm")
    install(model, initial_adapter(model, rule, seed=0))
    truncation = Truncation(model, rule)
    runtime = ModelRuntime(model, truncation, task, pad_id=0, processes=processes)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 500, (arguments.rows, arguments.tokens), generator=generator).tolist()
    examples = [Example(row, row) for row in rows]
    settings = LocalTraining.of(
        TrainingConfig(
            local_steps=STEPS,
            batch_size=arguments.rows,
            precision=dtype,  # type: ignore[arg-type]
            gradient_checkpointing=True,
        )
    )
    measured = EvaluationSettings(("perplexity",), batch_size=arguments.rows)
    for _ in range(2):  # the first one is to warm up
        seconds = [time.perf_counter()]
        train(runtime, examples, settings, Assignment("client", 0, 1, 0, plain(RANK)))
        seconds.append(_now())
        evaluate(runtime, examples, (RANK,), lambda *_: nullcontext(), measured)
        seconds.append(_now())
    tokens = arguments.rows * arguments.tokens
    found = {
        "tokens/s": STEPS * tokens / (seconds[1] - seconds[0]),
        "measured tokens/s": tokens / (seconds[2] - seconds[1]),
        "peak MiB a GPU": "-",
    }
    if torch.cuda.is_available():
        found["peak MiB a GPU"] = torch.cuda.max_memory_allocated() / 2**20
    if processes.index == 0:
        arguments.out.write_text(json.dumps([found, machine(config.device)]))
    if processes.count > 1:
        dist.destroy_process_group()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def launched(kind: str, count: int, folder: Path, arguments: argparse.Namespace) -> Any:
    """What ``count`` processes measure; raises `RuntimeError` with the last line if they fail."""
    out, file = folder / "out.json", folder / "accelerate.json"
    out.unlink(missing_ok=True)
    chosen = FSDP if "FSDP" in kind else {"distributed_type": "MULTI_GPU"}
    file.write_text(json.dumps(chosen | {"num_processes": count, "num_machines": 1}))
    command = [sys.executable]
    if count > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file)]
        command += ["--main_process_port", "0"]
    command += [__file__, "--out", str(out), "--model", str(arguments.model)]
    command += ["--quantization", "4bit" if "4 bits" in kind else "none"]
    command += ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
    command += ["--short"] if arguments.short else []
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=900)
    if ended.returncode or not out.exists():
        lines = [line for line in ended.stderr.splitlines() if "Error" in line]
        raise RuntimeError(lines[0] if lines else f"status {ended.returncode}")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--short", action="store_true", help="tiny, also on a CPU")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quantization", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is not None:
        work(arguments)
        return
    gpus = 2 if arguments.short else torch.cuda.device_count()
    if gpus < 2:
        print(f"skipped: several GPUs, since there are {gpus}; --short tries two processes")
        return
    if arguments.short:
        arguments.rows, arguments.tokens = 4, 32
    counts = [1 << power for power in range(gpus.bit_length())]
    cases = [("whole", count) for count in counts]
    cases += [(f"FSDP{bits}", counts[-1]) for bits in ("", ", 4 bits")]
    rows, facts = [], {}
    with tempfile.TemporaryDirectory() as folder:
        arguments.model = Path(made("0.5B", Path(folder), arguments.short))
        for kind, count in cases:
            try:
                found, facts = launched(kind, count, Path(folder), arguments)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"skipped: {kind}, {count} processes: {error}")
                continue
            rows.append({"base": kind, "processes": count, **found})
    if rows:
        facts |= {"short": arguments.short, "command": "python benchmarks/several_gpus.py"}
        report(f"several_gpus{card_of(facts)}", "One client on several GPUs", rows, facts)


if __name__ == "__main__":
    main()
