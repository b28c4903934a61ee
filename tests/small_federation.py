"""A federation without a model: adapters of a few numbers, clients that add noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from prelort import methods
from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule
from prelort.config import Config, MethodConfig, check
from prelort.events import Event, RankChanged, RoundFinished
from prelort.federation import wire
from prelort.federation.allocation import Allocation
from prelort.federation.encoding import carries_change, change_of
from prelort.federation.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Grid,
    Message,
    MessageType,
    RecordDict,
    identify_process,
    set_message_id,
)
from prelort.federation.in_process import InProcessGrid
from prelort.federation.messages import (
    AdapterSpec,
    ClientProperties,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
)
from prelort.federation.server import Observe, Private, Server
from prelort.federation.transport import Transport
from prelort.methods.interface import Client, Method, ServerState

SCALE = ScaleRule("constant", 2.0)
DIMENSIONS = {"model.q_proj": (6, 5), "model.k_proj": (6, 3)}
E = TypeVar("E", bound=Event)
App = Callable[[Message, Context], Message]
"""What a `ClientApp` is to a grid."""


def make_adapter(rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoraAdapter:
    """Two layers of ``rank`` (one of rank 3 at most) and a head that is trained in full."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    layers = {}
    for name, (d_in, d_out) in DIMENSIONS.items():
        dimensions = min(rank, 3) if name == "model.k_proj" else rank
        layers[name] = Factors(normal(dimensions, d_in), normal(d_out, dimensions))
    return LoraAdapter(layers, SCALE, {"head.weight": normal(2, 4)})


SPEC = AdapterSpec("base-0", AdapterSchema.of(make_adapter(8)), SCALE)


def make_config(**federation: Any) -> Config:
    return check({"federation": {"rounds": 2, "clients_per_round": 4, **federation}})


def make_state(rank: int = 8) -> ServerState:
    return ServerState(make_adapter(rank, seed=99))


def clients_of(ranks: Sequence[int]) -> list[Client]:
    return [Client(f"site-{i}", rank, 10 + 3 * i) for i, rank in enumerate(ranks)]


# Messages, whatever a client may say in them


def make_reply_header(client: Client, round_index: int = 0, /, **changes: Any) -> TrainReply:
    dtype = changes.get("dtype", "float32")
    values = {
        **SPEC.header(client.rank).model_dump(),
        "dtype": dtype,
        "change": carries_change(dtype),
        "client": client.name,
        "round": round_index,
        "examples": client.examples,
        "steps": 2,
        "loss": 1.5,
        "seconds": 0.25,
        **changes,
    }
    return TrainReply.model_construct(**values)


def make_properties(client: Client, /, **changes: Any) -> ClientProperties:
    values = {
        **SPEC.header(client.rank).model_dump(),
        "client": client.name,
        "examples": client.examples,
        "max_rank": client.rank,
        **changes,
    }
    return ClientProperties.model_construct(**values)


def raw_content(header: str | None, blob: bytes | None, stype: str = "safetensors") -> RecordDict:
    """A message's content from whatever bytes a client may send."""
    content = RecordDict()
    if header is not None:
        content["header"] = ConfigRecord({"json": header})
    if blob is not None:
        array = Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)
        content["adapter"] = ArrayRecord({"adapter": array})
    return content


def header_of(content: RecordDict) -> str:
    return str(content.config_records["header"]["json"])


def blob_of(content: RecordDict) -> bytes:
    return bytes(content.array_records["adapter"]["adapter"].data)


def with_header(content: RecordDict, **changes: Any) -> RecordDict:
    """The content with other values in its header."""
    text = json.dumps(json.loads(header_of(content)) | changes)
    return raw_content(text, blob_of(content) if "adapter" in content else None)


def request_to(node: int, content: RecordDict | None = None) -> Message:
    """A message that has an id, as one that was sent."""
    identify_process(1)
    message = Message(content or RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
    set_message_id(message, f"to-{node}")
    return message


def answer(content: RecordDict, node: int = 1000) -> Message:
    """A client's reply with this content."""
    return Message(content, reply_to=request_to(node))


# Clients

Trained = Callable[[LoraAdapter, TrainRequest], LoraAdapter]


def add_noise(index: int) -> Trained:
    """Training that adds noise: a function of client, round and what was received."""

    def trained(received: LoraAdapter, request: TrainRequest) -> LoraAdapter:
        noise = make_adapter(request.rank, seed=1000 * index + request.round)
        tensors = {n: t + noise.tensors()[n] for n, t in received.tensors().items()}
        return LoraAdapter.from_tensors(tensors, received.scale)

    return trained


def small_client_app(
    clients: Sequence[Client],
    training: Callable[[int], Trained] = add_noise,
    *,
    max_rank: int = 0,
    properties: Mapping[int, dict[str, Any]] | None = None,
    replies: Mapping[tuple[str, int], dict[str, Any]] | None = None,
    instead: Mapping[int, App] | None = None,
) -> App:
    """Clients that add noise and measure a loss that is their index.

    ``training``: what the client of an index does instead. ``max_rank``: the rank to which each can
    be raised, where it is above its own. ``properties``: index -> what its properties say
    differently. ``replies``: client and round (from 1) -> what the header of its reply to a request
    to train says differently; a smaller rank cuts the adapter too. ``instead``: index -> what
    answers requests to train or to evaluate.
    """

    def app(message: Message, context: Context) -> Message:
        index, kind = int(context.node_config["partition-id"]), message.metadata.message_type
        client = clients[index]
        if kind == MessageType.QUERY:
            changes = {"max_rank": max(client.rank, max_rank)} | (properties or {}).get(index, {})
            return Message(wire.pack(make_properties(client, **changes)), reply_to=message)
        if index in (instead or {}):
            return (instead or {})[index](message, context)
        if kind == MessageType.EVALUATE:
            measured = wire.header(message.content, EvaluateRequest)
            return Message(wire.pack(evaluate_reply(client, measured)), reply_to=message)
        request = wire.header(message.content, TrainRequest)
        received, _ = wire.adapter(message.content, request)
        if request.by_rank:
            request, received = request.at(client.rank), received.prefix(client.rank)
        # The rank is the request's: it may have changed since the client stated its own.
        change = request.masked is not None or carries_change(request.dtype)
        changes = {"dtype": request.reply_dtype, "change": change, "rank": request.rank}
        changes |= (replies or {}).get((client.name, request.round + 1), {})
        head = make_reply_header(client, request.round, **changes)
        adapter = training(index)(received, request).prefix(head.rank)
        reply = change_of(adapter, received) if head.change else adapter
        return Message(wire.pack(head, reply), reply_to=message)

    return app


def evaluate_reply(client: Client, request: EvaluateRequest, /, **changes: Any) -> EvaluateReply:
    metrics = {"loss": float(client.name.rpartition("-")[2])}
    values = {
        **SPEC.header(request.rank).model_dump(),
        "client": client.name,
        "round": request.round,
        "examples": client.examples,
        "weight": client.examples,
        "metrics": metrics,
        "prefixes": {rank: {"loss": metrics["loss"] + rank} for rank in request.prefixes},
        **changes,
    }
    return EvaluateReply.model_construct(**values)


def in_process(app: App, count: int) -> InProcessGrid:
    """A grid of so many nodes: 1000, 1001, ..."""
    return InProcessGrid(app, [{"partition-id": i} for i in range(count)])


# Runs


@dataclass
class SmallRun:
    """A federation, the state of its run, and its events."""

    server: Server
    method: Method
    config: Config
    state: ServerState
    events: list[Event] = field(default_factory=list)

    def train(self, after_round: Callable[[ServerState], None] = lambda state: None) -> ServerState:
        """The rounds that are left, and the end; ``after_round`` gets the state after each."""
        self.state = self.server.connect(self.method, self.state)
        for number in range(self.state.round + 1, self.config.federation.rounds + 1):
            self.state, stats = self.server.train(self.method, self.state, number)
            self.events.append(RoundFinished(number, stats))
            after_round(self.state)
        self.server.close()
        return self.state

    def of(self, kind: type[E]) -> list[E]:
        """The events of this kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def rank_changes(self) -> list[tuple[int, str, int, int]]:
        changes = self.of(RankChanged)
        return [(one.round, one.client, one.old_rank, one.new_rank) for one in changes]


def make_run(
    app: App,
    config: Config | None = None,
    *,
    clients: int = 4,
    method: Method | str = "prelort",
    state: ServerState | None = None,
    transport: Transport | None = None,
    allocation: Allocation | None = None,
    observe: Observe | None = None,
    private: Private | None = None,
) -> SmallRun:
    """A run over so many clients of ``app`` in this process, or over a ``transport``."""
    config, state, events = config or make_config(), state or make_state(), []
    spec = AdapterSpec(SPEC.base, AdapterSchema.of(state.adapter), SCALE)
    transport = transport or Transport(in_process(app, clients), 1)
    found = methods.build(MethodConfig(name=method), 0) if isinstance(method, str) else method
    named = {"allocation": allocation, "observe": observe, "private": private}
    server = Server(config, transport, spec, events.append, **named)
    return SmallRun(server, found, config, state, events)


class PlannedGrid(Grid):
    """A grid and a clock in one: each node's reply comes at a planned time, or never.

    ``arrivals``: node -> after how many seconds which replies come to each message.
    """

    def __init__(self, arrivals: Mapping[int, Sequence[tuple[float, Callable[..., Any]]]]) -> None:
        identify_process(1)
        self.now = 0.0
        self.arrivals = dict(arrivals)
        self.sent: dict[str, Message] = {}
        self.due: list[tuple[float, str, Callable[[Message], Message]]] = []
        self.pulled: list[tuple[int, int]] = []
        """Of each pull: how many ids it named, and how many replies it got."""

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"m{len(self.sent)}"
            set_message_id(message, message_id)
            self.sent[message_id] = message
            for delay, reply in self.arrivals.get(message.metadata.dst_node_id, []):
                self.due.append((self.now + delay, message_id, reply))
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        ready = [entry for entry in self.due if entry[0] <= self.now and entry[1] in wanted]
        self.due = [entry for entry in self.due if entry not in ready]
        self.pulled.append((len(wanted), len(ready)))
        ready.sort(key=lambda entry: entry[0])
        return [reply(self.sent[message_id]) for _, message_id, reply in ready]

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.arrivals)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError
