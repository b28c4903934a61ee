"""What does a round cost when the clients do nothing, in this process and through Ray?

The server's own rounds and Flower's apps on both engines; a client checks nothing, trains nothing
and answers with the adapter that it received (16 layers of 2048 x 2048 at rank 16: 4.2 MB). Ray's
start and the first round of each turn, in which its workers import what they need, do not count.

    python benchmarks/floor.py [--clients 20 100] [--rounds 6] [--repeats 2] [--short]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import machine, report

from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule
from prelort.adapters.initial import draw_a
from prelort.config import check
from prelort.federation import wire
from prelort.federation.client_app import Kind, client_app
from prelort.federation.content import blob_in, content_of
from prelort.federation.exchange import Engine
from prelort.federation.flower import ClientApp, Context, RecordDict, simulate
from prelort.federation.in_process import RUN_ID, InProcessGrid
from prelort.federation.registry import Agreement
from prelort.federation.server import ServerPlan, make_server_app
from prelort.methods.interface import ServerState

LAYERS, WIDTH, RANK = 16, 2048, 16
SCALE = ScaleRule("constant", 2.0)


def agreement() -> Agreement:
    """What server and clients agree on: shapes with no model behind them."""
    layers = {f"layers.{index}": (WIDTH, WIDTH, RANK) for index in range(LAYERS)}
    return Agreement("none", AdapterSchema(layers, {}), SCALE)


def initial() -> LoraAdapter:
    """A as it is drawn, B of numbers as after some rounds."""
    layers = {}
    for name, (d_in, d_out, rank) in agreement().schema.layers.items():
        b = draw_a(1, name, rank, d_out).T.contiguous()
        layers[name] = Factors(draw_a(0, name, rank, d_in), b)
    return LoraAdapter(layers, SCALE)


def idle_app() -> ClientApp:
    """A `ClientApp` that sends back what it received; it can be sent to Ray's workers."""

    def respond(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
        name = f"client-{int(context.node_config['partition-id']):04d}"
        facts = agreement().header(RANK).model_dump()
        if kind != "train":
            return wire.pack(wire.Introduction(**facts, client=name, examples=1, most=RANK))
        request = wire.header(content, wire.TrainRequest)
        head = wire.TrainReply(
            **facts,
            dtype=request.dtype,
            change=False,
            client=name,
            round=request.round,
            examples=1,
            steps=0,
            loss=0.0,
            seconds=0.0,
        )
        return content_of(head.model_dump_json(), blob_in(content))

    return client_app(respond)


def rounds(engine: str, clients: int, number: int) -> list[float]:
    """Seconds of each round but the first, with all clients in every round."""
    found: list[dict[str, Any]] = []
    plan = ServerPlan(
        config=check(
            {
                "evaluation": {"diagnostics": False},
                "federation": {"rounds": number + 1, "clients_per_round": clients, "quorum": 1.0},
            }
        ),
        state=ServerState(initial()),
        agreement=agreement(),
        emit=found.append,
        before_rounds=lambda now: None,
        after_round=lambda now: None,
        finished=lambda now: None,
    )
    if engine == "in-process":
        server_app = make_server_app(plan, lambda grid: Engine(grid, 1, float("inf")))
        grid = InProcessGrid(idle_app(), [{"partition-id": index} for index in range(clients)])
        server_app(grid, Context(RUN_ID, 1, {}, RecordDict(), {}))
    else:
        server_app = make_server_app(
            plan, lambda grid: Engine(grid, None, float("inf"), nodes=clients)
        )
        simulate(server_app, idle_app(), clients, cpus=1, gpus=0.0)
    aggregated = [event for event in found if event["event"] == "aggregated"]
    if len(aggregated) != number + 1 or any(event["failed"] for event in aggregated):
        raise SystemExit(f"{engine}: not all clients answered: {found[-3:]}")
    return [event["seconds"]["total"] for event in aggregated[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="20 clients, 2 rounds, one turn")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.clients, arguments.rounds, arguments.repeats = [20], 2, 1
    torch.set_num_threads(1)
    rows = []
    for clients in arguments.clients:
        taken: dict[str, list[float]] = {"in-process": [], "Ray": []}
        for _ in range(arguments.repeats):
            for engine, seconds in taken.items():
                seconds += rounds(engine, clients, arguments.rounds)
        ray = statistics.median(taken["Ray"])
        for engine, seconds in taken.items():
            middle = statistics.median(seconds)
            rows.append(
                {
                    "clients": clients,
                    "engine": engine,
                    "s a round (median)": middle,
                    "min": min(seconds),
                    "max": max(seconds),
                    "Ray / this": ray / middle,
                }
            )
    sizes = initial().num_parameters * 4
    facts = {"MB to and from each client": sizes / 1e6, **vars(arguments), **machine()}
    report("floor", "rounds of clients that do nothing", rows, facts)


if __name__ == "__main__":
    main()
