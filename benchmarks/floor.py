"""Cost of a round without training, in this process and through Ray.

The same Flower apps on both engines; a client checks nothing, trains nothing and returns the
adapter that it received (16 layers of 2048 x 2048 at rank 16: 4.2 MB). `messages` is a server that
sends one message to each client and receives the replies: the engine alone. `rounds` is prelort's
server, which packs, checks and averages all adapters on either engine. Ray's start-up and the
first round of each turn, in which its workers import their modules, are not counted.

    python benchmarks/floor.py [--clients 20 100] [--rounds 6] [--repeats 2] [--short]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from common import machine, report

from prelort import methods
from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule
from prelort.adapters.initial import draw_a
from prelort.config import check
from prelort.federation import wire
from prelort.federation.client_app import Kind, client_app
from prelort.federation.content import blob_in, content_of
from prelort.federation.flower import (
    ClientApp,
    Context,
    Grid,
    Message,
    MessageType,
    RecordDict,
    ServerApp,
    simulate,
)
from prelort.federation.in_process import RUN_ID, InProcessGrid
from prelort.federation.messages import AdapterSpec, ClientProperties, TrainReply, TrainRequest
from prelort.federation.server import Server
from prelort.federation.transport import Transport
from prelort.methods.interface import ServerState
from prelort.training.settings import LocalTraining

LAYERS, WIDTH, RANK = 16, 2048, 16
SCALE = ScaleRule("constant", 2.0)


def spec() -> AdapterSpec:
    """An adapter specification: shapes with no model behind them."""
    layers = {f"layers.{index}": (WIDTH, WIDTH, RANK) for index in range(LAYERS)}
    return AdapterSpec("none", AdapterSchema(layers, {}), SCALE)


def initial() -> LoraAdapter:
    """Random A as at the start, B with values as after some rounds."""
    layers = {}
    for name, (d_in, d_out, rank) in spec().schema.layers.items():
        b = draw_a(1, name, rank, d_out).T.contiguous()
        layers[name] = Factors(draw_a(0, name, rank, d_in), b)
    return LoraAdapter(layers, SCALE)


def idle_app() -> ClientApp:
    """A `ClientApp` that returns what it received; Ray can send it to its workers."""

    def respond(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
        name = f"client-{int(context.node_config['partition-id']):04d}"
        facts = spec().header(RANK).model_dump()
        if kind != "train":
            return wire.pack(ClientProperties(**facts, client=name, examples=1, max_rank=RANK))
        request = wire.header(content, TrainRequest)
        head = TrainReply(
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


def messages(engine: str, clients: int, number: int) -> list[float]:
    """Seconds of each exchange with all clients but the first."""
    seconds: list[float] = []
    request = TrainRequest(
        **spec().header(RANK).model_dump(),
        dtype="float32",
        round=0,
        rounds=number,
        seed=0,
        training=LocalTraining.of(check({}).training),
        objective="plain",
        levels=(RANK,),
        level_weights=(1.0,),
        timeout=600.0,
    )
    content = wire.pack(request, initial())

    def talk(transport: Transport) -> None:
        while len(nodes := list(transport.grid.get_node_ids())) < clients:
            time.sleep(0.1)
        for _ in range(number + 1):
            started = time.perf_counter()
            out = (
                Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes
            )
            for reply in transport.send_and_receive(out):
                wire.reply_content(reply)
            seconds.append(time.perf_counter() - started)

    _run_on(engine, clients, talk)
    return seconds[1:]


def rounds(engine: str, clients: int, number: int) -> list[float]:
    """Seconds of each round but the first, with all clients in every round."""
    seconds: list[float] = []
    federation_settings = {"rounds": number + 1, "clients_per_round": clients, "quorum": 1.0}
    config = check({"federation": federation_settings})

    def train(transport: Transport) -> None:
        method = methods.build(config.method, config.seed)
        server = Server(config, transport, spec(), lambda event: None)
        state = server.connect(method, ServerState(initial()))
        for server_round in range(1, number + 2):
            state, stats = server.train(method, state, server_round)
            seconds.append(stats.seconds.total)

    _run_on(engine, clients, train)
    return seconds[1:]


def _run_on(engine: str, clients: int, main_of: Callable[[Transport], None]) -> None:
    app, here = ServerApp(), engine == "in-process"

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        main_of(Transport(grid, 1 if here else None, nodes=0 if here else clients))

    if here:
        grid = InProcessGrid(idle_app(), [{"partition-id": index} for index in range(clients)])
        app(grid, Context(RUN_ID, 1, {}, RecordDict(), {}))
    else:
        simulate(app, idle_app(), clients, cpus=1, gpus=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="20 clients, 2 rounds, one turn")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.clients, arguments.rounds, arguments.repeats = [20], 2, 1
    if importlib.util.find_spec("ray") is None:
        print("skipped: Ray is not installed (pip install 'prelort[simulation]')")
        return
    torch.set_num_threads(1)
    rows = []
    for clients in arguments.clients:
        for what, measure in (("messages", messages), ("rounds", rounds)):
            taken: dict[str, list[float]] = {"in-process": [], "Ray": []}
            for _ in range(arguments.repeats):
                for engine, seconds in taken.items():
                    seconds += measure(engine, clients, arguments.rounds)
            ray = statistics.median(taken["Ray"])
            for engine, seconds in taken.items():
                middle = statistics.median(seconds)
                rows.append(
                    {
                        "clients": clients,
                        "what": what,
                        "engine": engine,
                        "s (median)": middle,
                        "min": min(seconds),
                        "max": max(seconds),
                        "Ray / this": ray / middle,
                    }
                )
    sizes = sum(t.numel() for t in initial().tensors().values()) * 4
    facts = {"MB to and from each client": sizes / 1e6, **vars(arguments), **machine()}
    report("floor", "Rounds without training", rows, facts)


if __name__ == "__main__":
    main()
