"""Error of `prelort plan` against the measured memory of training.

For models of different size and kind, and for different settings: the estimate, made from the
model's configuration alone, against the peak of a real round on the CPU. The peak is the most
that torch's allocator had allocated, including inside kernels. Models without a folder have random
weights (memory does not depend on their values).

Finally, one round of the largest batch in its own process, whose resident memory (RSS) is what the
system sees: once with the blocks that the C library's allocator keeps for later, and once with that
allocator configured to return blocks of 64 KiB and more at once.

    python benchmarks/plan_error.py [--weights FOLDER] [--device cuda] [--short]

FOLDER, if given, holds stories260K/. With ``--device cuda`` models of 0.5 and 7 billion weights on
a GPU, where the peak is that of torch's caching allocator; those that it does not hold are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from common import card_of, machine, report
from gpu import empty_cache, made
from measured_peak import allocated_peak, measured_peak
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from prelort.config import Config, check, load, to_toml
from prelort.errors import PrelortError
from prelort.planning.memory import Planner
from prelort.planning.sizes import show

RANDOM: dict[str, Any] = {
    "llama 34M": LlamaConfig(
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
    ),
    "qwen3 24M, tied, grouped": Qwen3Config(
        vocab_size=50000,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=40,
        tie_word_embeddings=True,
    ),
    "gpt2 28M": GPT2Config(n_embd=384, n_layer=5, n_head=6),
    "bert 17M": BertConfig(
        hidden_size=320, num_hidden_layers=6, num_attention_heads=5, intermediate_size=1280
    ),
}
SAVING = ["training.gradient_checkpointing=true", "training.precision=bfloat16"]
SETTINGS: dict[str, list[tuple[int, list[str]]]] = {
    "embedded": [
        (2, []),
        (16, []),
        (64, []),
        (16, ["training.batch_size=1", "data.max_length=32"]),
        (16, ["training.batch_size=2", "data.max_length=256"]),
        (16, ["training.gradient_checkpointing=true"]),
        (16, ["training.precision=bfloat16"]),
        (16, SAVING),
        (16, ["method.objective=plain"]),
        (16, ["method.objective=full+one"]),
        (16, ["training.gradient_accumulation=4"]),
        (16, ["lora.dropout=0.1"]),
        (16, ["method.name=fed-plora"]),
        (16, ["model.quantization=8bit"]),
        (16, ["model.quantization=4bit"]),
    ],
    "stories260K": [(16, []), (16, SAVING)],
    "llama 34M": [(8, []), (64, []), (16, SAVING), (16, ["model.quantization=4bit"])],
    "qwen3 24M, tied, grouped": [(16, []), (16, ["training.precision=bfloat16"])],
    "gpt2 28M": [(16, []), (16, SAVING)],
    "bert 17M": [(16, ["task=classification"]), (16, ["task=classification", *SAVING])],
}
SHORT, LONG = ([f"data.max_length={tokens}", "model.dtype=bfloat16"] for tokens in (512, 2048))
LARGE: dict[str, list[tuple[int, list[str]]]] = {
    "0.5B": [
        (16, SHORT),
        (16, [*SHORT, *SAVING]),
        (64, [*LONG, *SAVING, "training.batch_size=1"]),
        (16, [*SHORT, *SAVING, "model.quantization=4bit"]),
    ],
    "7B": [
        (64, [*LONG, *SAVING, "training.batch_size=1", "model.quantization=4bit"]),
        (64, [*LONG, *SAVING, "training.batch_size=1", "training.optimizer=adamw-8bit"]),
    ],
}
LARGEST = ("llama 34M", ["training.batch_size=4", "data.max_length=256"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--short", action="store_true", help="tiny models in place of large ones")
    parser.add_argument("--rss", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.rss is not None:
        resident(load(given.rss))
        return
    if given.device == "cuda" or given.short:
        large_models(given.short)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        names = random_models(Path(folder))
        if given.weights is not None:
            names["stories260K"] = str(given.weights / "stories260K")
        for model, settings in SETTINGS.items():
            if model in names:
                for rank, changes in settings:
                    rows.append(compared(model, configured(names[model], changes), rank, changes))
        facts = machine() | {"resident memory": in_process(names)}
    errors = [float(row["error %"]) for row in rows]
    facts |= {"lowest error %": min(errors), "highest error %": max(errors)}
    report("plan_error", "estimate of prelort plan against the measured peak", rows, facts)


def large_models(short: bool) -> None:
    """Models of 0.5 and 7 billion weights; what fails for want of memory or a library is said."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not short:
        print("skipped: there is no GPU; --short tries the same on tiny models")
        return
    peak = allocated_peak if device == "cpu" else cuda_peak
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in LARGE.items():
            for rank, changes in settings:
                changes = [*changes, *(["data.max_length=64"] if short else [])]
                try:
                    config = configured(made(name, Path(folder), short), changes, device)
                    rows.append(compared(name, config, rank, changes, peak))
                except (OSError, torch.OutOfMemoryError, PrelortError) as error:
                    print(f"skipped: {name}, rank {rank}, {', '.join(changes)}: {error}")
                empty_cache()
    facts = {**machine(device), "short": short}
    title = "estimate of prelort plan against the measured peak"
    if rows:
        report(f"plan_error_gpu{card_of(facts)}", title, rows, facts)


def cuda_peak(work: Callable[[], object]) -> int:
    """The peak of the bytes that ``work`` allocates on the GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def random_models(folder: Path) -> dict[str, str]:
    names = {"embedded": "embedded"}
    for name, config in RANDOM.items():
        auto = AutoModelForSequenceClassification if "bert" in name else AutoModelForCausalLM
        names[name] = str(folder / name.split()[0])
        auto.from_config(config).save_pretrained(names[name])
    return names


def configured(name: str, changes: list[str], device: str = "cpu") -> Config:
    own = [f"model.device={device}", f"model.name={json.dumps(name)}"]
    return load(None, [*own, *(["training.batch_size=4"] if name != "embedded" else []), *changes])


def compared(
    model: str,
    config: Config,
    rank: int,
    changes: list[str],
    peak: Callable[[Callable[[], object]], int] = allocated_peak,
) -> dict[str, Any]:
    estimated, measured = Planner(config).exact(rank).total, measured_peak(config, rank, peak=peak)
    return {
        "model": model,
        "settings": ", ".join(c.partition(".")[2] or c for c in changes) or "as they are",
        "batch": f"{config.training.batch_size} x {config.data.max_length}",
        "rank": rank,
        "estimate": show(estimated),
        "measured": show(measured),
        "error %": round(100 * (estimated / measured - 1), 2),
    }


def in_process(names: dict[str, str]) -> dict[str, Any]:
    """Resident memory of a round in its own process, with the estimate."""
    model, changes = LARGEST
    config = configured(names[model], changes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(to_toml(config))
        command = [sys.executable, __file__, "--rss", str(file)]
        grown = [
            int(
                subprocess.run(
                    command, capture_output=True, text=True, check=True, env=os.environ | more
                ).stdout.splitlines()[-1]
            )
            for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})
        ]
    estimated = Planner(config).exact(16).total
    return {
        "model": model,
        "batch": f"{config.training.batch_size} x {config.data.max_length}",
        "estimate": show(estimated),
        "measured": show(measured_peak(config, 16)),
        "growth of RSS": show(grown[0]),
        "growth of RSS with MALLOC_MMAP_THRESHOLD_=65536": show(grown[1]),
        "ratios": [round(one / estimated, 2) for one in grown],
    }


def resident(config: Config) -> None:
    """Print by how much the peak of RSS exceeds that before the model is loaded."""
    small = check({"model": {"device": "cpu"}, "training": {"batch_size": 1}})
    measured_peak(small, 2, peak=run_only)  # libraries and kernels are loaded
    before = psutil.Process().memory_info().rss
    measured_peak(config, 16, peak=run_only)
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    print(int(status.split()[0]) * 1024 - before)


def run_only(work: Any) -> int:
    work()
    return 0


if __name__ == "__main__":
    main()
