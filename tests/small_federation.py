"""A federation without a model: adapters of a few numbers, clients that add noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from prelort.federation.strategy import AdapterStrategy

from prelort import methods
from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule
from prelort.config import Config, FederationConfig, MethodConfig, check
from prelort.federation import wire
from prelort.federation.allocation import Allocation
from prelort.federation.client_manager import AdapterSpec, ConnectedClient
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
from prelort.federation.transport import Engine
from prelort.methods.interface import Client, Method, ServerState

SCALE = ScaleRule("constant", 2.0)
DIMENSIONS = {"model.q_proj": (6, 5), "model.k_proj": (6, 3)}
LIMITS = FederationConfig()


def make_adapter(rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoraAdapter:
    """Two layers of ``rank`` (one holds 3 slots at most) and a fully trained head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    layers = {}
    for name, (d_in, d_out) in DIMENSIONS.items():
        dimensions = min(rank, 3) if name == "model.k_proj" else rank
        layers[name] = Factors(normal(dimensions, d_in), normal(d_out, dimensions))
    return LoraAdapter(layers, SCALE, {"head.weight": normal(2, 4)})


AGREEMENT = AdapterSpec("base-0", AdapterSchema.of(make_adapter(8)), SCALE)


def make_config(**federation: Any) -> Config:
    return check({"federation": {"rounds": 2, "clients_per_round": 4, **federation}})


def make_state(rank: int = 8) -> ServerState:
    return ServerState(make_adapter(rank, seed=99))


def clients_of(ranks: Sequence[int]) -> list[Client]:
    return [Client(f"site-{i}", rank, 10 + 3 * i) for i, rank in enumerate(ranks)]


def make_reply_header(client: Client, round_index: int = 0, /, **changes: Any) -> wire.TrainReply:
    facts = AGREEMENT.header(client.rank).model_dump()
    dtype = changes.get("dtype", "float32")
    values = {
        **facts,
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
    return wire.TrainReply.model_construct(**values)


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


def request_to(node: int, content: RecordDict | None = None) -> Message:
    """A message that has an id, as one that was sent."""
    identify_process(1)
    message = Message(content or RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
    set_message_id(message, f"to-{node}")
    return message


def answer(content: RecordDict, node: int = 1000) -> Message:
    """A client's reply with this content."""
    return Message(content, reply_to=request_to(node))


Trained = Callable[[LoraAdapter, wire.TrainRequest], LoraAdapter]


def add_noise(seed: int) -> Trained:
    """Training that adds noise: a function of client, round and what was received."""

    def trained(received: LoraAdapter, request: wire.TrainRequest) -> LoraAdapter:
        noise = make_adapter(request.rank, seed=1000 * seed + request.round)
        tensors = {n: t + noise.tensors()[n] for n, t in received.tensors().items()}
        return LoraAdapter.from_tensors(tensors, received.scale)

    return trained


def small_client_app(
    clients: Sequence[Client], training: Callable[[int], Trained] = add_noise
) -> Callable[[Message, Context], Message]:
    """What a `ClientApp` is to a grid, for clients that add noise.

    ``training``: what the client of an index does instead.
    """

    def app(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        client = clients[index]
        facts = AGREEMENT.header(client.rank).model_dump()
        if message.metadata.message_type == MessageType.QUERY:
            facts |= {"client": client.name, "examples": client.examples, "max_rank": client.rank}
            intro = wire.ClientProperties(**facts)
            return Message(wire.pack(intro), reply_to=message)
        request = wire.header(message.content, wire.TrainRequest)
        received, _ = wire.adapter(message.content, request)
        adapter = training(index)(received, request)
        # The rank is the request's: it may have changed since the introduction.
        head = make_reply_header(client, request.round, dtype=request.dtype, rank=request.rank)
        answer = change_of(adapter, received) if head.change else adapter
        return Message(wire.pack(head, answer), reply_to=message)

    return app


def in_process(
    app: Callable[[Message, Context], Message], count: int, first: int = 0
) -> InProcessGrid:
    return InProcessGrid(app, [{"partition-id": first + i} for i in range(count)])


def make_strategy(
    clients: Sequence[Client],
    config: Config | None = None,
    *,
    method: Method | None = None,
    name: str = "prelort",
    nodes: Sequence[int] | None = None,
    max_rank: int = 0,
    allocation: Allocation | None = None,
) -> tuple[AdapterStrategy, list[dict[str, Any]]]:
    """A strategy over these clients (nodes 1000, 1001, ...) and the list its events go to.

    ``max_rank``: the rank to which each can be raised, where it is above its own.
    """
    config = config or make_config()
    plan = allocation or Allocation()
    levels = sorted({client.rank for client in clients} | plan.levels())
    chosen = method or methods.build(MethodConfig(name=name), levels, 0)
    numbers = nodes or range(1000, 1000 + len(clients))
    connected = [
        ConnectedClient(n, c, max(c.rank, max_rank)) for n, c in zip(numbers, clients, strict=True)
    ]
    events: list[dict[str, Any]] = []
    state = make_state(max(levels))
    spec = AdapterSpec("base-0", AdapterSchema.of(state.adapter), SCALE)
    strategy = AdapterStrategy(config, chosen, connected, state, spec, events.append, allocation)
    return strategy, events


def run_rounds(
    strategy: AdapterStrategy, engine: Engine, after_round: Callable[[ServerState], None]
) -> ServerState:
    """The rounds that are left; ``after_round`` gets the state after each."""
    for server_round in range(strategy.state.round + 1, strategy.config.federation.rounds + 1):
        strategy.run_round(server_round, engine)
        after_round(strategy.state)
    return strategy.state


def same_bits(one: LoraAdapter, other: LoraAdapter) -> bool:
    a, b = one.tensors(), other.tensors()
    if a.keys() != b.keys() or one.scale != other.scale:
        return False
    return all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8))
        for n in a
    )


class PlannedGrid(Grid):
    """A grid on a clock of its own: each node's reply comes at a planned time, or never."""

    def __init__(
        self, arrivals: dict[int, list[tuple[float, Callable[[Message], Message]]]]
    ) -> None:
        identify_process(1)
        self.now = 0.0
        self.arrivals = arrivals
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
        return [reply(self.sent[message_id]) for _, message_id, reply in sorted_by_time(ready)]

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


def sorted_by_time(entries: list[Any]) -> list[Any]:
    return sorted(entries, key=lambda entry: entry[0])
