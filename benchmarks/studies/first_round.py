"""Byun & Lee's first-round dilution: a high-rank client before aggregation, and after it.

    python benchmarks/studies/first_round.py [--seeds 3]

Ten clients of byun-lee-share train once from the same start, 60 steps each: one of balanced topics
at rank 20, nine of skewed topics at rank 5. Measured on the test rows are the high-rank client's
own model, and the global model that each method makes of the ten, at rank 20. "Own head": with the
high-rank client's own classification head, which shows what happens to the adapter alone.

Also the exact parameters that LoRA of the paper's model trains and sends: three 768 x 768 matrices
in each of DistilBERT's six layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DistilBertConfig, DistilBertModel

from prelort import methods
from prelort.config import Config
from prelort.experiment.assemble import Assembly, assemble
from prelort.experiment.measure import measure
from prelort.methods.interface import Client, ServerState, Update
from prelort.models.lora import extract, install
from prelort.study.definition import load
from prelort.training.local import train
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, report

STUDY = Path(__file__).parent / "byun-lee-share.toml"
HIGH, LOW = 20, 5
STEPS = 60
"""One epoch of 28 rows teaches next to nothing, which leaves nothing to dilute."""
METHODS = ("zero-padding", "hetlora", "replication", "prelort")


def trained(assembly: Assembly, config: Config, state: ServerState) -> list[Update]:
    """One round of one high-rank client, the first, and nine low-rank ones, sampled by the seed."""
    sites = [site for site in assembly.clients if site.rank == HIGH][:1]
    low = [site for site in assembly.clients if site.rank == LOW]
    order = torch.randperm(len(low), generator=torch.Generator().manual_seed(config.seed))
    sites += [low[index] for index in order[:9].tolist()]
    work, updates = assembly.runtime, []
    for site in sites:
        client = Client(site.name, site.rank, len(site.examples))
        method = methods.build(config.method, config.seed)
        install(work.model, method.broadcast(state, client).trainable)
        # A single round: the rate does not fall to zero within it.
        assignment = Assignment(site.name, 0, 10, config.seed, method.objective(state, client))
        train(work, site.examples, LocalTraining.of(config.training), assignment)
        updates.append(Update(client, extract(work.model, work.spec.scale), client.examples))
    return updates


def one_seed(seed: int) -> dict[str, float]:
    """Row -> accuracy in %."""
    config = load(
        STUDY, [f"seed={seed}", "method.name=zero-padding", f"training.local_steps={STEPS}"]
    ).base
    torch.set_num_threads(config.threads or 1)
    assembly = assemble(config)
    state = ServerState(assembly.initial, levels=(LOW, HIGH))

    def accuracy(adapter: Any) -> float:
        found = measure(config, [assembly.runtime], assembly.test, {HIGH: adapter})
        return 100 * found[HIGH]["accuracy"]

    updates = trained(assembly, config, state)
    high = updates[0].adapter
    rows = {"before aggregation": accuracy(high)}
    for name in METHODS:
        method = methods.build(config.method.model_copy(update={"name": name}), config.seed)
        aggregator = method.aggregator(state)
        for update in updates:
            aggregator.add(update)
        adapter = method.global_adapter(aggregator.result())
        rows[f"after {name}"] = accuracy(adapter)
        rows[f"after {name}, own head"] = accuracy(
            replace(adapter, modules_to_save=high.modules_to_save)
        )
    return rows


def parameters() -> list[dict[str, Any]]:
    """The parameters of DistilBERT's LoRA at a rank, counted on the model itself."""
    counts = {}
    for rank in (LOW, HIGH):
        with torch.device("meta"):
            model = DistilBertModel(DistilBertConfig())
        lora = LoraConfig(r=rank, target_modules=["q_lin", "k_lin", "v_lin"])
        wrapped = get_peft_model(model, lora)
        counts[rank] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    mixed = round(0.1 * counts[HIGH] + 0.9 * counts[LOW])
    named = {"all at 5": counts[LOW], "all at 20": counts[HIGH], "10 % at 20, 90 % at 5": mixed}
    return [
        {"clients": name, "parameters": count, "float32, MiB": round(4 * count / 2**20, 2)}
        for name, count in named.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    command = "python benchmarks/studies/first_round.py"
    report("studies_parameters", "DistilBERT, mean of a client", parameters(), {"command": command})
    found = [one_seed(seed) for seed in range(arguments.seeds)]
    rows = []
    for name in found[0]:
        values = [one[name] for one in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append({"model": name, "accuracy, %": f"{statistics.mean(values):.1f} ({spread:.1f})"})
    facts = {**machine(), "command": command, "seeds": arguments.seeds}
    report("studies_first_round", "accuracy at rank 20, mean (s.d. over seeds)", rows, facts)


if __name__ == "__main__":
    main()
