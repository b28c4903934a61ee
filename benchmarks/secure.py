"""What secure aggregation costs: bytes and seconds of one round against plain replies.

Clients of ranks 2, 4, 8 and 16 in equal numbers with the embedded model's adapter; one in ten drops
out after the keys and shares are exchanged. All runs in this process, on one thread; messages are
counted as they would travel. Plain: float32 factors, packed, read and averaged. Seconds leave out
training and the network, and are of processor time.

    python benchmarks/secure.py [--clients 10 100 1000] [--short]
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
from common import machine, report
from scipy.stats import hypergeom

from prelort.adapters import LoraAdapter, ScaleRule
from prelort.adapters.initial import fresh
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import Config
from prelort.experiment.deterministic import deterministic
from prelort.federation.masking import blob_of
from prelort.models.lora import shapes
from prelort.planning.skeleton import skeleton
from prelort.secure import blocks, client, ring
from prelort.secure.graph import DEGREE, is_complete
from prelort.secure.messages import MaskedInput, Part
from prelort.secure.server import MaskedSum

RANKS = (2, 4, 8, 16)
ONE_IN = 10
"""The share of clients that drop out."""


@dataclass
class Costs:
    """Seconds of the server and of all clients, and bytes by direction."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def of(self, side: str) -> Iterator[None]:
        """Time what a side does."""
        started = time.process_time()
        yield
        self.seconds[side] += time.process_time() - started

    def sent(self, direction: str, message: Part | bytes) -> None:
        """Count a message."""
        data = message if isinstance(message, bytes) else message.text().encode()
        self.bytes[direction] += len(data)


def plain(adapter: LoraAdapter, ranks: Sequence[int]) -> Costs:
    """A round of single replies."""
    costs, mean = Costs(), RankwiseMean(adapter)
    for rank in ranks:
        own = adapter.prefix(rank)
        with costs.of("client"):
            blob = safetensors.torch.save({n: t.contiguous() for n, t in own.tensors().items()})
        costs.sent("up", blob)
        with costs.of("server"):
            read = LoraAdapter.from_tensors(safetensors.torch.load(blob), adapter.scale)
            mean.add(read, 1.0)
    with costs.of("server"):
        mean.over_holders(adapter)
    return costs


def masked(adapter: LoraAdapter, ranks: Sequence[int]) -> Costs:
    """A round of masked replies."""
    costs = Costs()
    highest = max(ranks)
    lengths = blocks.lengths({n: tuple(t.shape) for n, t in adapter.tensors().items()}, highest)
    held = {i: blocks.blocks_of(range(rank)) for i, rank in enumerate(ranks, start=1)}
    everything = blocks.blocks_of(range(highest))
    sent = held if is_complete(len(ranks)) else dict.fromkeys(held, everything)
    server = MaskedSum(sent, lengths, Config().privacy.threshold, 2)
    bits = ring.fraction_bits(len(ranks), Config().federation.max_abs_value)
    sessions = {}
    for i in held:
        request = server.keys_request(i)
        costs.sent("down", request)
        with costs.of("client"):
            sessions[i], reply = client.advertise(request)
        costs.sent("up", reply)
        server.add_keys(i, reply)
    with costs.of("server"):
        server.draw_graph()
    for i in held:
        with costs.of("server"):
            request = server.shares_request(i)
        costs.sent("down", request)
        with costs.of("client"):
            sessions[i], reply = client.share(sessions[i], request)
        costs.sent("up", reply)
        with costs.of("server"):
            server.add_shares(i, reply)
    server.check_joined()
    survivors = [i for i in held if i % ONE_IN != 1]
    for i in survivors:
        how = MaskedInput(
            session=server.session,
            sealed=server.sealed_for(i),
            holds=held[i],
            lengths=lengths,
            weight=1.0,
            fraction_bits=bits,
            bound=Config().federation.max_abs_value,
        )
        costs.sent("down", how)
        own = {n: t.numpy() for n, t in adapter.prefix(ranks[i - 1]).tensors().items()}
        with costs.of("client"):
            parts = [part.astype(np.float64) for part in blocks.split(own, ranks[i - 1])]
            sessions[i], vector = client.mask(sessions[i], how, parts)
            blob = blob_of(vector)
        costs.sent("up", blob)
        with costs.of("server"):
            server.add(i, vector)
    server.check_survivors()
    for i in survivors:
        with costs.of("server"):
            request = server.unmask_request(i)
        costs.sent("down", request)
        with costs.of("client"):
            reply = client.reveal(sessions.pop(i), request)
        costs.sent("up", reply)
        with costs.of("server"):
            server.add_revealed(i, reply)
    with costs.of("server"):
        opened = server.open()
    expected = adapter.prefix(2).tensors()
    found = ring.dequantise(opened[1], bits) / len(survivors)
    first = blocks.split({n: t.numpy() for n, t in expected.items()}, 2)[1]
    assert np.abs(found - first).max() < 1e-6, "the sum is wrong"
    return costs


def rows(adapter: LoraAdapter, count: int) -> list[dict[str, Any]]:
    ranks = [RANKS[i * len(RANKS) // count] for i in range(count)]
    found = []
    for name, cost in (("plain", plain(adapter, ranks)), ("masked", masked(adapter, ranks))):
        found.append(
            {
                "clients": count,
                "replies": name,
                "KiB up a client": round(cost.bytes["up"] / count / 1024, 1),
                "more KiB down a client": round(cost.bytes["down"] / count / 1024, 1),
                "CPU s a client": cost.seconds["client"] / count,
                "CPU s of the server": cost.seconds["server"],
            }
        )
    return found


def risks(clients: int = 1000, colluding: float = 0.2, gone: float = 0.1) -> dict[str, Any]:
    """Probabilities (their union bounds) that the sparse graph fails, for these shares of clients.

    That colluding clients hold enough shares of somebody's secrets; that without them and those
    that dropped out the others are not all connected by masks; that drop-outs end the round.
    """
    threshold = math.ceil(Config().privacy.threshold * (DEGREE + 1))
    enough = hypergeom.sf(threshold - 1, clients - 1, int(colluding * clients), DEGREE)
    too_few = hypergeom.cdf(threshold - 2, clients - 1, int((1 - gone) * clients), DEGREE)
    return {
        "clients": clients,
        "colluding": colluding,
        "dropped out": gone,
        "shares": f"{clients * enough:.0e}",
        "unconnected": f"{clients * (colluding + gone) ** (DEGREE / 2):.0e}",
        "round ends": f"{clients * too_few:.0e}",
    }


def embedded_adapter() -> LoraAdapter:
    config = Config()
    scale = ScaleRule(config.lora.scale_rule, config.lora.scale)
    model = skeleton(config.model, config.lora, max(RANKS), "causal", labels=0)
    return fresh(shapes(model, scale), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--short", action="store_true", help="10 clients")
    options = parser.parse_args()
    counts = [10] if options.short else options.clients
    with deterministic(1):
        adapter = embedded_adapter()
        found = [row for count in counts for row in rows(adapter, count)]
    values = sum(t.numel() for t in adapter.tensors().values())
    facts = {**machine(), "values": values, "one drops out in": ONE_IN, "short": options.short}
    facts["risks"] = [risks(), risks(colluding=0.3)]
    report("secure", "One round with and without secure aggregation", found, facts)


if __name__ == "__main__":
    main()
