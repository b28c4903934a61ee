"""Cost of the federation beyond the clients' own training loops.

The embedded default's rounds with messages, checks, aggregation and checkpoints, alternating with
the same clients' local training alone.

    python benchmarks/overhead.py [--rounds 3] [--repeats 6] [--short]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import local_app, machine, paired, ratio, report

from prelort import diagnostics, methods
from prelort.config import load
from prelort.experiment import checkpoint
from prelort.experiment.assemble import Assembly, assemble
from prelort.experiment.checkpoint import Checkpoint
from prelort.federation.in_process import InProcessGrid
from prelort.federation.sampling import sample
from prelort.federation.server import Server
from prelort.federation.transport import Transport
from prelort.methods.interface import Client, ServerState
from prelort.models.lora import install
from prelort.training.local import train
from prelort.training.settings import LocalTraining
from prelort.training.steps import Assignment


def federated(assembly: Assembly) -> float:
    """Seconds of the rounds through server and client app, a checkpoint after each."""
    sites = assembly.clients
    app = local_app(sites)
    grid = InProcessGrid(app, [{"partition-id": index} for index in range(len(sites))])
    with tempfile.TemporaryDirectory() as folder:
        config = assembly.config
        method = methods.build(config.method, config.seed)
        server = Server(
            config,
            Transport(grid, 1),
            assembly.runtime.spec,
            lambda event: None,
            observe=diagnostics.observer(config),
        )
        started = time.perf_counter()
        state = server.connect(method, ServerState(assembly.initial))
        for server_round in range(1, config.federation.rounds + 1):
            state, _ = server.train(method, state, server_round)
            checkpoint.save(Checkpoint(state, 0, "", 0), Path(folder))
        return time.perf_counter() - started


def bare(assembly: Assembly) -> float:
    """Seconds of the same clients' local training alone, one after the other."""
    config, work = assembly.config, assembly.runtime
    method = methods.build(config.method, config.seed)
    levels = tuple(sorted({site.rank for site in assembly.clients}))
    state = ServerState(assembly.initial, levels=levels)
    by_name = sorted(assembly.clients, key=lambda site: site.name)
    seconds = 0.0
    for index in range(config.federation.rounds):
        per_round = config.federation.clients_per_round
        for site in sample(by_name, per_round, seed=config.seed, round_index=index):
            client = Client(site.name, site.rank, len(site.examples))
            install(work.model, assembly.initial.prefix(site.rank))
            objective = method.objective(state, client)
            rounds, settings = config.federation.rounds, LocalTraining.of(config.training)
            assignment = Assignment(site.name, index, rounds, config.seed, objective)
            started = time.perf_counter()
            train(work, site.examples, settings, assignment)
            seconds += time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--short", action="store_true", help="one round, two turns")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.rounds, arguments.repeats = 1, 2
    torch.set_num_threads(1)
    config = load(None, [f"federation.rounds={arguments.rounds}", "data.max_test_examples=8"])
    assembly = assemble(config)
    sides = {"bare": lambda: bare(assembly), "federated": lambda: federated(assembly)}
    taken = paired(sides, arguments.repeats)
    rows = []
    for name in sides:
        ratios = ratio(taken, name, "bare")
        rows.append(
            {
                "side": name,
                "seconds (median)": sorted(taken[name])[len(taken[name]) // 2],
                "x bare (median)": ratios["median"],
                "min": ratios["min"],
                "max": ratios["max"],
            }
        )
    facts = {**vars(arguments), **machine(), "command": "python benchmarks/overhead.py"}
    report("overhead", "A federated run against the bare local training loops", rows, facts)


if __name__ == "__main__":
    main()
