"""Real architectures with random weights on a GPU, against plain PEFT, Trainer and SFTTrainer.

- one client's steps: a loop with PEFT alone, transformers' Trainer, TRL's SFTTrainer, this
  project's loop, the same with the nested objective ``example``, with compiled layers, and its
  batches alone, without a model
- K clients of mixed ranks: PEFT one after the other, this project one after the other, and all in
  one batch (`together.py`)

for an encoder, a model of 0.5 billion parameters and one of 7 billion, in bfloat16 and 4 bits.
Memory is the peak of training with one copy of the base. Each case has a process of its own and one
GPU: one that fails, or for which no time is left, is named, and the others go on. What is measured
is written after each case, to ``results/gpu_CARD.json`` and ``results/gpu_clients_CARD.json``; the
last table has the goals.

    python benchmarks/gpu.py [--clients 1 2 4 8 16 32] [--repeats 5] [--minutes 25] [--short]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import card_of, machine, paired, ratio, report, write
from datasets import Dataset
from together import Bench, Case, measured, timed
from torch import nn
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
from prelort.planning.rehearsal import storage_bytes, tensors_of
from prelort.training.batched import BatchedClient
from prelort.training.local import train
from prelort.training.steps import LocalSteps

MODELS: dict[str, Callable[..., PretrainedConfig]] = {
    "encoder": partial(BertConfig, num_labels=6),
    "0.5B": partial(
        Qwen2Config,
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7B": LlamaConfig,  # Llama 2 7B: the default of transformers
}
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one process measures: the steps of one client, or of up to ``clients`` at once."""

    model: str
    batch: int
    tokens: int
    bits: str = "none"
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    steps: int = 32
    """Of one client; so many that a Trainer's start counts little."""
    clients: int = 0
    checkpointing: bool = False
    compiled: bool = False
    gib: int = 0
    """Of the GPU, and in the folder of temporary files, to make the model and to load it."""

    @property
    def name(self) -> str:
        """As in the tables."""
        kind = " 4 bits" if self.bits == "4bit" else ""
        return f"{self.model}{kind}, {self.batch} x {self.tokens}"

    def case(self, folder: Path, short: bool) -> Case:
        """What `Bench` runs."""
        classifies = self.model == "encoder"
        return Case(
            self.name,
            made(self.model, folder, short),
            "classification" if classifies else "causal-lm",
            self.batch,
            min(self.tokens, 64) if short else self.tokens,
            self.ranks,
            "float32" if classifies or short else "bfloat16",
            self.bits,
            self.checkpointing,
            4 if short or self.clients else self.steps,
        )


WORK = (
    Work("7B", 1, 2048, "4bit", (16, 64), steps=8, checkpointing=True, gib=24),
    Work("0.5B", 4, 512, compiled=True),
    Work("0.5B", 4, 64),
    Work("encoder", 8, 64),
    Work("encoder", 8, 64, clients=32),
    Work("0.5B", 4, 64, clients=32),
    Work("0.5B", 4, 64, "4bit", clients=32),
    Work("7B", 1, 256, "4bit", (8, 16, 32, 64), clients=8, checkpointing=True, gib=24),
    Work("7B", 1, 256, "none", (8, 16, 32, 64), clients=8, checkpointing=True, gib=48),
)
"""In order of worth, for when time runs out."""


def lacking(work: Work, folder: Path, short: bool) -> str:
    """What the machine lacks for this work; empty if nothing."""
    if work.bits != "none" and not importlib.util.find_spec("bitsandbytes"):
        return "bitsandbytes is not installed: pip install 'prelort[quantised]'"
    if short:
        return ""
    if torch.cuda.get_device_properties(0).total_memory < work.gib * 2**30:
        return f"the GPU has less than {work.gib} GiB"
    if shutil.disk_usage(folder).free < work.gib * 2**30:
        return f"{folder} has less than {work.gib} GiB free: TMPDIR names another folder"
    return ""


def made(name: str, folder: Path, short: bool) -> str:
    """A folder with a model of random weights, made when it is first needed."""
    path = folder / name
    if not path.exists():
        config = MODELS[name](**SMALL if short else {})
        classifier = isinstance(config, BertConfig)
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        torch.manual_seed(0)
        with torch.device("cpu" if short else "cuda"):
            model = auto.from_config(config, dtype=torch.float32 if short else torch.bfloat16)
        model.save_pretrained(folder / "unfinished")
        (folder / "unfinished").rename(path)
        del model
        empty_cache()
    return str(path)


def own(bench: Bench, client: BatchedClient, kind: str) -> None:
    """This project's loop; ``kind`` of the objective."""
    levels = bench.case.ranks
    objective = nested(kind, client.adapter.rank, levels, full_share=0.5)
    install(bench.runtime.model, client.adapter)
    work = replace(client.assignment, objective=objective)
    train(bench.runtime, client.examples, client.settings, work)


def compiled(bench: Bench, client: BatchedClient, backend: str) -> Callable[[], None]:
    """The same with the repeated layers compiled, once for all its calls."""
    modules = bench.runtime.model.modules()
    layers: Any = next(module for module in modules if isinstance(module, nn.ModuleList))
    calls = []
    for layer in layers:
        layer.compile(backend=backend)
        calls.append(layer._compiled_call_impl)
        layer._compiled_call_impl = None

    def work() -> None:
        for layer, call in zip(layers, calls, strict=True):
            layer._compiled_call_impl = call
        try:
            own(bench, client, "plain")
        finally:
            for layer in layers:
                layer._compiled_call_impl = None

    return work


def batches(bench: Bench, client: BatchedClient) -> None:
    """The batches of `own`, on their device: what could be ready beforehand."""
    steps = LocalSteps(client.examples, client.settings, client.assignment)
    for _ in range(steps.count):
        for passes in steps.next(bench.runtime):
            for part in passes:
                for tensor in part.batch.values():
                    tensor.to(bench.runtime.device)


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
        try:
            return timed(make(model, arguments, rows).train, 1, device)()
        finally:
            bench.plain_base = model.unload()


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


def one_client(
    bench: Bench, work: Work, loaded: dict[str, int], repeats: int, device: str
) -> list[dict[str, Any]]:
    """One row for each side: tokens a second, and time and memory against the PEFT loop.

    ``loaded``: bytes of the model that is ours (with the adapter) and of PEFT's (without).
    ``first s``: of the first run, in which layers are compiled.
    """
    client = bench.clients(len(bench.case.ranks))[-1]
    sides = {"peft": timed(lambda: bench.peft([client]), 1, device)}
    sides["Trainer"] = partial(with_trainer, bench, client, device, trainer)
    if bench.task.kind == "causal" and importlib.util.find_spec("trl"):
        sides["SFTTrainer"] = partial(with_trainer, bench, client, device, sft_trainer)
    ours = {"prelort": partial(own, bench, client, "plain")}
    ours["prelort, example"] = partial(own, bench, client, "example")
    if work.compiled:
        backend = "eager" if device == "cpu" else "inductor"
        ours["prelort, compiled"] = compiled(bench, client, backend)
    ours["prelort, batches alone"] = partial(batches, bench, client)
    sides |= {name: timed(side, 1, device) for name, side in ours.items()}
    first, memory = {}, {}
    for name, side in dict(sides).items():
        try:
            first[name], added = with_peak(side, device)
        except torch.OutOfMemoryError:
            if name == "peft":
                raise
            print(f"skipped: {bench.case.name}, {name}: out of memory")
            del sides[name]
            continue
        memory[name] = (loaded["ours" if name in ours else "peft"] + added) / 2**20
    taken = paired(sides, repeats)
    tokens = bench.case.steps * bench.case.batch * bench.case.tokens
    rows = []
    for name in sides:
        times = ratio(taken, name, "peft")
        rows.append(
            {
                "case": work.name,
                "side": name,
                "tokens/s": tokens / sorted(taken[name])[len(taken[name]) // 2],
                "x peft's time": times["median"],
                "min": times["min"],
                "max": times["max"],
                "first s": first[name],
            }
        )
        if device != "cpu":
            rows[-1] |= {
                "peak MiB": memory[name],
                "x peft's memory": memory[name] / memory["peft"],
            }
    return rows


def with_peak(work: Callable[[], float], device: str) -> tuple[float, int]:
    """Seconds, and the bytes of the GPU beyond what is loaded, at their peak."""
    empty_cache()
    if device == "cpu":
        return work(), 0
    torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated()
    return work(), torch.cuda.max_memory_allocated() - loaded


def empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def work_on(work: Work, folder: Path, arguments: argparse.Namespace) -> None:
    """Measure in this process; write the machine and the rows to ``arguments.out``."""
    device = "cpu" if not torch.cuda.is_available() else "cuda"
    bench = Bench(work.case(folder, arguments.short), device)
    models = {"ours": bench.runtime.model, "peft": bench.plain_base}
    loaded = {name: storage_bytes(tensors_of(model)) for name, model in models.items()}
    if device == "cuda":  # scales of quantised weights, which no parameter or buffer holds
        empty_cache()
        rest = torch.cuda.memory_allocated() - sum(loaded.values())
        loaded = {name: size + rest // 2 for name, size in loaded.items()}
    rows = [] if work.clients else one_client(bench, work, loaded, arguments.repeats, device)
    _save(arguments.out, rows, device)
    for count in arguments.clients:
        if count <= work.clients:
            try:
                rows += measured(bench, count, arguments.repeats, device)
            except torch.OutOfMemoryError:
                print(f"skipped: {work.name}, {count} clients and more: out of memory")
                break
            _save(arguments.out, rows, device)


def _save(out: Path, rows: list[dict[str, Any]], device: str) -> None:
    part = out.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(device), "rows": rows}))
    part.replace(out)


def begun(index: int, folder: Path, arguments: argparse.Namespace, end: float) -> Any:
    """What a process of its own has measured until then; None if nothing.

    Says why it did not end well.
    """
    out = folder / f"{index}.json"
    command = [sys.executable, __file__, "--only", str(index), "--folder", str(folder)]
    command += ["--out", str(out), "--repeats", str(arguments.repeats), "--clients"]
    command += [*map(str, arguments.clients), *(["--short"] if arguments.short else [])]
    # One GPU: a Trainer would use all that it sees.
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": card}
    with (folder / "errors").open("w+") as errors:
        try:
            status = subprocess.run(
                command, stderr=errors, timeout=end - time.monotonic(), env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            print("stopped: the time is over")
        else:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            if status:
                print(f"failed with status {status}: {lines[-1] if lines else 'no message'}")
    return json.loads(out.read_text()) if out.exists() else None


def goals(alone: list[dict[str, Any]], several: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what was measured, and whether it is met."""
    sides = {(row["case"], row["side"]): row for row in alone}

    def share(case: str, side: str, other: str, key: str) -> float | None:
        both = sides.get((case, side), {}), sides.get((case, other), {})
        return both[0][key] / both[1][key] if all(key in row for row in both) else None

    def gain(case: str) -> float | None:
        rows = [row for row in several if (row["case"], row["clients"]) == (case, 8)]
        return max((r["x best peft"] for r in rows if "one batch" in r["side"]), default=None)

    at_most: dict[str, tuple[float | None, float]] = {}
    for work in WORK:
        if work.clients:
            continue
        nested = share(work.name, "prelort, example", "prelort", "x peft's time")
        at_most[f"{work.name}: example / plain, time"] = nested, 1.05
        for what, key in (("time", "x peft's time"), ("memory", "peak MiB")):
            of_trl = share(work.name, "prelort", "SFTTrainer", key)
            if work.model != "encoder":
                at_most[f"{work.name}: prelort / SFTTrainer, {what}"] = of_trl, 1.05
    peak = sides.get((WORK[0].name, "prelort"), {}).get("peak MiB")
    at_most[f"{WORK[0].name}: GB"] = peak and peak * 2**20 / 1e9, 16.0
    at_least = {
        f"{case}: 8 clients in one batch, x best peft": (gain(case), bound)
        for case, bound in (("encoder, 8 x 64", 5.0), ("0.5B, 4 x 64", 2.0))
    }
    rows = [(name, *both, "at most") for name, both in at_most.items()]
    rows += [(name, *both, "at least") for name, both in at_least.items()]
    return [
        {
            "goal": f"{name}, {kind} {bound:g}",
            "measured": "-" if value is None else value,
            "met": "not measured"
            if value is None
            else ("yes" if (value <= bound) == (kind == "at most") or value == bound else "no"),
        }
        for name, value, bound, kind in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=25, help="for all cases")
    parser.add_argument("--short", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        work_on(WORK[arguments.only], arguments.folder, arguments)
        return
    if not torch.cuda.is_available() and not arguments.short:
        print("skipped: there is no GPU; --short tries everything on tiny models")
        return
    if arguments.short:
        arguments.clients, arguments.repeats = [1, 4], 1
    if not importlib.util.find_spec("trl"):
        print("skipped: SFTTrainer, since trl is not installed: pip install trl")
    end = time.monotonic() + 60 * arguments.minutes
    alone: list[dict[str, Any]] = []
    several: list[dict[str, Any]] = []
    show: list[Callable[[], object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, work in enumerate(WORK):
            title = work.name + f", up to {work.clients} clients" * (work.clients > 0)
            reason = lacking(work, folder, arguments.short)
            if time.monotonic() > end:
                reason = f"{arguments.minutes:g} minutes are over"
            if reason:
                print(f"skipped: {title}: {reason}", flush=True)
                continue
            print(f"{title} ...", flush=True)
            found = begun(index, folder, arguments, end)
            if found is None:
                continue
            (several if work.clients else alone).extend(found["rows"])
            facts = {"command": "python benchmarks/gpu.py", "short": arguments.short}
            facts |= {"clients": arguments.clients, "repeats": arguments.repeats}
            facts |= found["machine"]
            card = card_of(facts)
            small = ", of which tiny models say nothing" if arguments.short else ""
            tables = (
                (f"gpu{card}", "One client, against a plain loop and two Trainers", alone),
                (f"gpu_clients{card}", "Clients on one GPU, against PEFT alone", several),
                (f"gpu_goals{card}", f"Goals{small}", goals(alone, several)),
            )
            show = [partial(report, *table, facts) for table in tables if table[2]]
            for file, text, rows in tables:
                write(file, text, rows, facts)
    for table in show:
        table()


if __name__ == "__main__":
    main()
