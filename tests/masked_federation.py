"""A small federation (`small_federation`) whose clients mask their replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from prelort import methods
from prelort.adapters import LoraAdapter
from prelort.config import Config, MethodConfig
from prelort.errors import PrelortError
from prelort.federation import masking
from prelort.federation.client_app import handler
from prelort.federation.content import content_of, text_in
from prelort.federation.flower import Context, Message, MessageType, RecordDict
from prelort.secure.messages import Noise
from prelort.secure.signatures import Identity
from small_federation import App, SmallRun, clients_of, make_run, small_client_app

RANKS = [2, 2, 2, 8, 8, 8, 8]
CLIENTS = clients_of(RANKS)
Sabotage = Callable[[RecordDict], RecordDict]


def lost(content: RecordDict) -> RecordDict:
    raise PrelortError("is gone")


def masked_app(
    sabotage: Mapping[tuple[int, str], Sabotage] | None = None,
    clients: list[Any] = CLIENTS,
    identities: Sequence[Identity | None] = [None] * len(CLIENTS),
) -> App:
    """Clients that answer all messages of secure aggregation.

    ``sabotage``: index and action ("train" for the masked reply) -> what becomes of the reply.
    ``identities``: what they sign with.
    """
    usual = small_client_app(clients)

    def reply(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        kind, _, action = message.metadata.message_type.partition(".")

        def content(request: RecordDict, context: Context) -> RecordDict:
            if action in masking.STEPS:
                step = masking.STEPS[action](
                    text_in(request) or "", context.state, identities[index]
                )
                found = content_of(step.text())
            else:
                trained = usual(message, context)
                if kind == MessageType.QUERY:
                    return masking.properties(request, trained.content, context.state)
                if kind != MessageType.TRAIN:
                    return trained.content
                found = masking.masked(request, trained.content, context.state)
            return (sabotage or {}).get((index, action or kind), lambda same: same)(found)

        return handler(content)(message, context)

    return reply


def run_of(
    app: App,
    config: Config,
    method: str = "prelort",
    options: dict[str, Any] | None = None,
    private: Any = None,
    weights: Literal["examples", "uniform"] = "examples",
) -> SmallRun:
    options = {method: options or {}}
    built = methods.build(MethodConfig(name=method, weights=weights, options=options), 0)
    return make_run(app, config, clients=len(CLIENTS), method=built, private=private)


def distance(x: LoraAdapter, y: LoraAdapter) -> float:
    a, b = x.tensors(), y.tensors()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def broken(message: Message, context: Context) -> Message:
    return handler(lambda content, context: lost(content))(message, context)


@dataclass
class Noisy:
    """Differential privacy with so little noise that sums stay what they are."""

    terms: Noise = field(default_factory=lambda: Noise(clip=1e3, deviation=1e-9))
    releases: int = 0

    def noise(self) -> Noise:
        return self.terms

    def count_release(self) -> None:
        self.releases += 1

    def epsilon(self) -> float:
        return 1.0


def noise(content: RecordDict) -> RecordDict:
    vector = masking.vector_in(content)
    random = np.random.default_rng(0).integers(0, 2**64, vector.size, dtype=np.uint64)
    return content_of(text_in(content) or "", masking.blob_of(random))
