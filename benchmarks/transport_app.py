"""The apps of `transport.py`: prelort's own server and wire, and clients that have no model.

A client sends back what it received, but for a few numbers; the adapter has the shapes of a model
of 7 billion parameters.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule
from prelort.adapters.initial import draw_a
from prelort.config import check
from prelort.federation import wire
from prelort.federation.client_app import Kind, client_app
from prelort.federation.content import blob_in, content_of
from prelort.federation.encoding import carries_change
from prelort.federation.flower import Context, Grid, RecordDict, ServerApp
from prelort.federation.messages import AdapterSpec, ClientProperties, TrainReply, TrainRequest
from prelort.federation.transport import Transport

BLOCKS, WIDTH, INNER, RANK = 32, 4096, 11008, 64
ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH))
INSIDE = {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
CASES = {
    "none": {"q_proj": (8, 8)},
    "qv": {name: ATTENTION[name] for name in ("q_proj", "v_proj")},
    "all": ATTENTION | INSIDE,
}
"""Adapted layers in each block of a Llama-2-7B: name -> (d_in, d_out)."""
SCALE = ScaleRule("constant", 2.0)
TIMEOUT = 900.0
STEP = 2**20
"""A byte is changed every so often, so that no object is one that the SuperLink has already."""
DATA = 2**20
"""Where the first byte is changed: after the names and shapes."""

torch.set_num_threads(1)


def agreement_of(case: str) -> AdapterSpec:
    """The shapes of the case's adapter at rank 64."""
    layers = {
        f"layers.{block}.{name}": (d_in, d_out, RANK)
        for block in range(BLOCKS)
        for name, (d_in, d_out) in CASES[case].items()
    }
    return AdapterSpec("synthetic", AdapterSchema(layers, {}), SCALE)


def initial(spec: AdapterSpec) -> LoraAdapter:
    """Random A as at the start, B with values as after some rounds."""
    layers = {}
    for name, (d_in, d_out, rank) in spec.schema.layers.items():
        b = draw_a(1, name, rank, d_out).T.contiguous()
        layers[name] = Factors(draw_a(0, name, rank, d_in), b)
    return LoraAdapter(layers, SCALE)


def respond(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
    """A client's reply: the bytes that it received, some of them changed.

    As at a real site this process holds no model, nor the adapter as tensors: the trainer does.
    """
    started = time.perf_counter()
    spec = agreement_of(str(context.run_config["case"]))
    number, rank = int(context.node_config["partition-id"]), int(context.node_config["rank"])
    name = f"site-{number}"
    if kind != "train":
        facts = spec.header(rank).model_dump()
        return wire.pack(ClientProperties(**facts, client=name, examples=10, max_rank=rank))
    request = wire.header(content, TrainRequest)
    spec.check(request)
    blob = bytearray(blob_in(content) or b"")
    for position in range(DATA, len(blob), STEP):
        blob[position] = number
    head = TrainReply(
        **spec.header(request.rank).model_dump(),
        dtype=request.dtype,
        change=carries_change(request.dtype),
        client=name,
        round=request.round,
        examples=10,
        steps=1,
        loss=1.0,
        seconds=time.perf_counter() - started,
    )
    return content_of(head.model_dump_json(), bytes(blob))


client = client_app(respond)
server = ServerApp()


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run rounds of prelort's own federation and write their costs."""
    from prelort import methods
    from prelort.events import Event, RoundFinished, encode
    from prelort.federation.server import Server
    from prelort.methods.interface import ServerState

    asked: dict[str, Any] = dict(context.run_config)
    spec = agreement_of(str(asked["case"]))
    nodes = int(asked["nodes"])
    config = check(
        {
            "method": {"name": "prelort"},
            "evaluation": {"diagnostics": False},
            "federation": {
                "rounds": int(asked["rounds"]),
                "clients_per_round": nodes,
                "min_clients": nodes,
                "quorum": 1.0,
                "timeout": TIMEOUT,
                "attempts": 1,
                "wire_dtype": str(asked["dtype"]),
            },
        }
    )
    state = ServerState(initial(spec))
    found: dict[str, Any] = {
        "parameters": sum(t.numel() for t in state.adapter.tensors().values()),
        "before": psutil.Process().memory_info().rss,
        "events": [],
    }
    method = methods.build(config.method, config.seed)
    transport = Transport(grid, deadline=TIMEOUT, patience=120.0)

    def log(event: Event) -> None:
        found["events"].append(json.loads(encode(event)))

    server = Server(config, transport, spec, log)
    try:
        state = server.connect(method, state)
        for server_round in range(1, config.federation.rounds + 1):
            state, stats = server.train(method, state, server_round)
            log(RoundFinished(server_round, stats))
        server.close()
    finally:
        Path(str(asked["out"])).write_text(json.dumps(found))
