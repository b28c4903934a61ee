"""Real architectures with random weights on a GPU, against plain PEFT, Trainer and SFTTrainer.

- one client's steps: a loop with PEFT alone, transformers' Trainer, TRL's SFTTrainer (if
  installed), this project's loop, and the same with the nested objective ``example``
- K clients of mixed ranks: PEFT one after the other, this project one after the other, and all in
  one batch (`together.py`)

for an encoder, a model of 0.5 billion parameters and one of 7 billion in 4 bits, at rank 64 with
2,048 tokens. Memory is the peak of training and one copy of the base. What the machine lacks is
skipped, and said.

    python benchmarks/gpu.py [--clients 1 2 4 8 16 32] [--repeats 5] [--short]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, paired, ratio, report
from datasets import Dataset
from together import Bench, Case, measured, timed
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from prelort.config import ModelConfig
from prelort.methods.objective import nested
from prelort.models.base import load_tokenizer
from prelort.models.lora import install
from prelort.training.batched import BatchedClient
from prelort.training.local import train

ENCODER = partial(BertConfig, num_labels=6)
HALF = partial(
    Qwen2Config,
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SEVEN = partial(LlamaConfig)
"""Llama 2 7B: the default of transformers."""
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def cases(folder: Path, small: bool) -> Iterator[tuple[Case, bool]]:
    """Each case, and whether several clients are measured too; its model is made when due."""
    bits = "4bit" if importlib.util.find_spec("bitsandbytes") else "none"
    if bits == "none":
        print("skipped: 4 bits, since bitsandbytes is not installed")
    low = "float32" if small else "bfloat16"
    yield (
        Case("encoder, 8 x 64", _made(folder / "encoder", ENCODER, small), "classification", 8, 64),
        True,
    )
    half = _made(folder / "half", HALF, small)
    yield Case("0.5B, 4 x 64", half, "causal-lm", 4, 64, dtype=low), True
    yield Case("0.5B, 4 x 512", half, "causal-lm", 4, 512, dtype=low), False
    seven = Case("7B 4 bits, 1 x 2048", "", "causal-lm", 1, 2048, (16, 64), low, bits, True)
    if small:
        seven = replace(seven, name="7B 4 bits, small", tokens=64)
    elif torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        print("skipped: 7B, which needs 24 GiB to be made and quantised")
        return
    if bits != "none":
        yield replace(seven, model=_made(folder / "seven", SEVEN, small)), False


def _made(path: Path, shape: Callable[..., PretrainedConfig], small: bool) -> str:
    """A folder with a model of random weights."""
    config = shape(**SMALL if small else {})
    classifier = isinstance(config, BertConfig)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device("cpu" if small else "cuda"):
        model = auto.from_config(config, dtype=torch.float32 if small else torch.bfloat16)
    model.save_pretrained(path)
    return str(path)


def own(bench: Bench, client: BatchedClient, kind: str) -> None:
    """This project's loop; ``kind`` of the objective."""
    levels = bench.case.ranks
    objective = nested(kind, client.adapter.rank, levels, full_share=0.5)
    install(bench.runtime.model, client.adapter)
    work = replace(client.assignment, objective=objective)
    train(bench.runtime, client.examples, client.settings, work)


def with_trainer(
    bench: Bench, client: BatchedClient, device: str, make: Callable[..., Any]
) -> float:
    """Seconds of the same steps by what ``make`` builds of a model, arguments and rows."""
    model = bench.wrapped(client)
    batch = bench.task.collate(client.examples, 0)
    rows = Dataset.from_dict({name: tensor.tolist() for name, tensor in batch.items()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "max_steps": bench.case.steps,
            "per_device_train_batch_size": bench.case.batch,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "bf16": bench.case.precision == "bfloat16",
            "gradient_checkpointing": bench.case.checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "use_cpu": device == "cpu",
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        seconds = timed(make(model, arguments, rows).train, 1, device)()
    bench.plain_base = model.unload()
    return seconds


def trainer(model: Any, arguments: dict[str, Any], rows: Dataset) -> Trainer:
    """Transformers' own."""
    return Trainer(model, TrainingArguments(**arguments), default_data_collator, rows)


def sft_trainer(model: Any, arguments: dict[str, Any], rows: Dataset) -> Any:
    """TRL's, on rows that are tokenised already; the tokenizer only pads."""
    from trl import SFTConfig, SFTTrainer

    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    return SFTTrainer(
        model,
        SFTConfig(**arguments | prepared),
        train_dataset=rows,
        processing_class=load_tokenizer(ModelConfig()),
    )


def one_client(bench: Bench, repeats: int, device: str) -> list[dict[str, Any]]:
    """One row for each side: tokens a second, and time and memory against the PEFT loop."""
    client = bench.clients(len(bench.case.ranks))[-1]
    sides = {"peft": timed(lambda: bench.peft([client]), 1, device)}
    sides["Trainer"] = partial(with_trainer, bench, client, device, trainer)
    if bench.task.kind == "causal" and importlib.util.find_spec("trl"):
        sides["SFTTrainer"] = partial(with_trainer, bench, client, device, sft_trainer)
    for name, kind in (("prelort", "plain"), ("prelort, example", "example")):
        sides[name] = timed(partial(own, bench, client, kind), 1, device)
    base = sum(p.nbytes for p in bench.plain_base.parameters()) / 2**20
    memory = {name: base + added_mib(side) for name, side in sides.items() if device != "cpu"}
    taken = paired(sides, repeats)
    tokens = bench.case.steps * bench.case.batch * bench.case.tokens
    rows = []
    for name in sides:
        times = ratio(taken, name, "peft")
        rows.append(
            {
                "case": bench.case.name,
                "side": name,
                "tokens/s": tokens / sorted(taken[name])[len(taken[name]) // 2],
                "x peft's time": times["median"],
                "min": times["min"],
                "max": times["max"],
            }
        )
        if memory:
            rows[-1] |= {
                "peak MiB": memory[name],
                "x peft's memory": memory[name] / memory["peft"],
            }
    return rows


def added_mib(work: Callable[[], object]) -> float:
    """Peak memory of the GPU beyond what is loaded, in MiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - loaded) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="tiny models, also on a CPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.short:
        print("skipped: there is no GPU; --short tries everything on tiny models")
        return
    if arguments.short:
        arguments.clients, arguments.repeats = [1, 4], 1
    if not importlib.util.find_spec("trl"):
        print("skipped: SFTTrainer, since trl is not installed")
    alone, several = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case, with_clients in cases(Path(folder), arguments.short):
            steps = 4 if arguments.short else 32  # so that a Trainer's start counts little
            bench = Bench(replace(case, steps=steps), device)
            alone += one_client(bench, arguments.repeats, device)
            for count in arguments.clients if with_clients else ():
                several += measured(bench, count, arguments.repeats, device)
            del bench
    facts = {**vars(arguments), **machine(device)}
    facts["command"] = "python benchmarks/gpu.py"
    report("gpu", "One client on a GPU, against a plain loop and two Trainers", alone, facts)
    report("gpu_clients", "Clients on one GPU, against PEFT one after the other", several, facts)


if __name__ == "__main__":
    main()
