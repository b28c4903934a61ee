"""Bytes sent, against what each method needs; effect of lossy types on results.

Bytes: two rounds of the embedded model with four clients of ranks 2, 4, 8 and 16 (fedit: all 16),
counted as every run counts them. `needed` is four bytes for each number that has to be sent by the
method's definition (docs/methods), from the model's shapes alone; the rank of what has accumulated
on the server (flora, florist, fedex-lora) is that of its dense product. `KiB a message` is the
rest: names, shapes, header. Results: the embedded default at each prefix, by wire type.

    python benchmarks/wire.py [--seeds 0 1] [--only bytes|results] [--short]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import local_app, machine, report

from prelort import methods
from prelort.config import load
from prelort.events import RankChanged, RoundFinished
from prelort.experiment.assemble import assemble
from prelort.experiment.deterministic import deterministic
from prelort.experiment.run import run
from prelort.federation.in_process import InProcessGrid
from prelort.federation.server import Server
from prelort.federation.transport import Transport
from prelort.history import RunHistory
from prelort.methods import REGISTRY
from prelort.methods.interface import ServerState
from prelort.models.base import location

RANKS = (2, 4, 8, 16)
ONE_RANK = ("fedit",)
"""Methods without mixed ranks."""
TYPES = ("float32", "bfloat16", "int8")
COMPARED = ("prelort", "zero-padding")
SHORT = ("prelort", "flora", "fedex-lora", "fedsa-lora")
ALL_TYPES = ("float32", "bfloat16", "float16", "int8")
FOLDED = {"flora": "folded:", "florist": "folded:", "fedex-lora": "residual:"}
"""Methods whose server accumulates more than an adapter -> its key in the memory."""

Layers = Sequence[tuple[int, int]]
"""(d_in, d_out) of each adapted layer."""


def layers() -> Layers:
    """The linear layers of the embedded Llama, from its configuration."""
    facts = json.loads((Path(location("embedded")) / "config.json").read_text())
    width, inner = facts["hidden_size"], facts["intermediate_size"]
    heads = facts["num_attention_heads"] * facts["head_dim"]
    keys = facts["num_key_value_heads"] * facts["head_dim"]
    block = [(width, heads), (width, keys), (width, keys), (heads, width)]
    block += [(width, inner), (width, inner), (inner, width)]
    return block * facts["num_hidden_layers"]


def needed(
    method: str, index: int, rank: int, kept: int, gathered: Sequence[int]
) -> tuple[int, int]:
    """The numbers down to and up from one client in the round ``index`` (from 0).

    ``rank``: the client's; ``kept``: its reply's (lower if it prunes itself); ``gathered``: the
    rank of what the server holds besides its adapter, layer by layer.
    """
    into = sum(d_in for d_in, _ in layers())
    out = sum(d_out for _, d_out in layers())
    both, top = into + out, max(RANKS)
    besides = sum(q * sum(shape) for q, shape in zip(gathered, layers(), strict=True))
    match method:
        case "fed-plora":
            return top * both, rank * both
        case "flora" | "florist":
            return besides, rank * both
        case "fedex-lora":
            return top * both + besides, rank * both
        case "ffa-lora":
            return rank * out, rank * out
        case "rolora":
            return rank * both, rank * (out if index % 2 == 0 else into)
        case "fedsa-lora":
            return rank * into, rank * into
        case "homogeneous-min":
            return min(RANKS) * both, min(RANKS) * both
        case "homogeneous-max":
            return top * both, top * both
        case "hetlora":
            return rank * both, kept * both
        case _:
            return rank * both, rank * both


def ranks_of(method: str) -> tuple[int, ...]:
    """The ranks of the clients, in the order of their names."""
    return (max(RANKS),) * len(RANKS) if method in ONE_RANK else RANKS


def gathered(state: ServerState, start: str) -> list[int]:
    """The rank of each layer's product in the server's memory, by a dense SVD in float64."""
    a = {n: t for n, t in state.memory.items() if n.startswith(start) and ".lora_A" in n}
    ranks = []
    for name, factor in a.items():
        product = state.memory[name.replace(".lora_A", ".lora_B")].double() @ factor.double()
        ranks.append(int(torch.linalg.matrix_rank(product, rtol=1e-6)))
    return ranks


def counted(method: str, dtype: str) -> tuple[RunHistory, list[ServerState]]:
    """The events of two rounds, and the state before each."""
    ranks = ranks_of(method)
    config = load(
        None,
        [
            f"method.name={method}",
            f"federation.wire_dtype={dtype}",
            f"partition.clients={len(ranks)}",
            "data.max_test_examples=4",
            f"ranks.mix={', '.join(map(str, ranks))}",
            "ranks.assign=in-order",
            "training.local_steps=1",
            "federation.rounds=2",
            f"federation.clients_per_round={len(ranks)}",
            "evaluation.diagnostics=false",
        ],
    )
    history, states = RunHistory(), []
    with tempfile.TemporaryDirectory() as folder, deterministic(1):
        assembly = assemble(config, Path(folder))
        clients = assembly.clients
        app = local_app(clients)
        grid = InProcessGrid(app, [{"partition-id": index} for index in range(len(clients))])
        spec = assembly.runtime.spec
        server = Server(config, Transport(grid, 1), spec, history.apply)
        algorithm = methods.build(config.method, config.seed)
        state = server.connect(algorithm, ServerState(assembly.initial))
        for server_round in (1, 2):
            states.append(state)
            state, stats = server.train(algorithm, state, server_round)
            history.apply(RoundFinished(server_round, stats))
    return history, states


def bytes_of(method: str) -> dict[str, Any]:
    """One row: bytes of two rounds in each type, and the bytes needed in float32."""
    totals: dict[str, dict[str, int]] = {}
    for dtype in TYPES:
        history, states = counted(method, dtype)
        if any(record.failures for record in history.rounds.values()):
            raise SystemExit(f"{method} in {dtype}: a client failed")
        totals[dtype] = {"down": history.bytes_down, "up": history.bytes_up}
        if dtype == "float32":
            down, up = _needed(method, history, states)
    exact = totals["float32"]
    ratios = {
        f"{dtype} / float32": sum(totals[dtype].values()) / sum(exact.values())
        for dtype in TYPES[1:]
    }
    return {
        "method": method,
        "KiB down": round(exact["down"] / 1024),
        "needed down": round(down / 1024),
        "KiB up": round(exact["up"] / 1024),
        "needed up": round(up / 1024),
        "overhead %": 100 * (sum(exact.values()) / (down + up) - 1),
        "KiB a message": (sum(exact.values()) - down - up) / 1024 / (2 * 2 * len(RANKS)),
        **ratios,
    }


def _needed(method: str, history: RunHistory, states: Sequence[ServerState]) -> tuple[int, int]:
    """Bytes down and up of all rounds, in float32."""
    ranks = {name: reply.rank for name, reply in history.rounds[1].replies.items()}
    down = up = 0
    for index, state in enumerate(states):
        changed = {
            event.client: event.new_rank
            for event in history.incidents
            if isinstance(event, RankChanged) and event.round == index + 1
        }
        besides = gathered(state, FOLDED[method]) if method in FOLDED else []
        for client, rank in ranks.items():
            there = besides or [0] * len(layers())
            numbers = needed(method, index, rank, changed.get(client, rank), there)
            down, up = down + 4 * numbers[0], up + 4 * numbers[1]
        ranks |= changed
    return down, up


def perplexities(method: str, dtype: str, seed: int, short: bool) -> dict[int, float]:
    """Perplexity of the embedded default at each prefix."""
    overrides = [f"method.name={method}", f"federation.wire_dtype={dtype}", f"seed={seed}"]
    overrides.append("evaluation.diagnostics=false")
    if short:
        overrides += ["federation.rounds=3", "training.local_steps=2", "data.max_test_examples=32"]
    with tempfile.TemporaryDirectory() as folder:
        result = run(load(None, overrides), Path(folder) / "run")
    return {rank: values["perplexity"] for rank, values in result.metrics.items()}


def results(seeds: Sequence[int], short: bool) -> list[dict[str, Any]]:
    """A row per method and type: mean perplexity, largest change from float32 over seeds."""
    rows = []
    for method in COMPARED:
        exact: dict[int, dict[int, float]] = {}
        for dtype in ALL_TYPES:
            found = {seed: perplexities(method, dtype, seed, short) for seed in seeds}
            exact = exact or found
            cells = {
                f"ppl at {rank}": statistics.mean(found[seed][rank] for seed in seeds)
                for rank in found[seeds[0]]
            }
            changes = [
                100 * (found[seed][rank] / exact[seed][rank] - 1)
                for seed in seeds
                for rank in found[seed]
            ]
            largest = max(changes, key=abs)
            rows.append({"method": method, "type": dtype, **cells, "largest change %": largest})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", choices=("bytes", "results"))
    parser.add_argument("--short", action="store_true", help="few methods, one seed, 3 rounds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    seeds = arguments.seeds[:1] if arguments.short else arguments.seeds
    facts = {"rounds": 2, "ranks": RANKS, **vars(arguments), **machine()}
    names = SHORT if arguments.short else tuple(REGISTRY)
    if arguments.only != "results":
        report("wire", "bytes of two rounds", [bytes_of(method) for method in names], facts)
    if arguments.only != "bytes":
        rows = results(seeds, arguments.short)
        report("wire_results", "perplexity by wire type", rows, facts)


if __name__ == "__main__":
    from prelort.library_logging import quiet_libraries

    quiet_libraries()
    main()
