"""Which part of one adapter a client trains: changes of the same part can be compared and added."""

from __future__ import annotations

from dataclasses import replace

import torch

from prelort.adapters import Factors, LoraAdapter
from prelort.errors import ConfigError
from prelort.methods.averaging import DimensionsOf
from prelort.methods.calls import calling
from prelort.methods.interface import Client, Method, ServerState
from prelort.methods.selection import take
from prelort.seeds import torch_generator


def trained_part(
    method: Method,
    state: ServerState,
    client: Client,
    whole: LoraAdapter,
    switch: str,
    dimensions_of: DimensionsOf | None = None,
) -> tuple[int, ...]:
    """The rank dimensions of ``whole`` that a client trains in this state, rising.

    Args:
        method: of the run.
        state: before a round; with zeros in its adapter too much is alike (`without_zeros`).
        client: at its current rank.
        whole: the adapter.
        switch: the configuration key that needs this, for the error.
        dimensions_of: those that are expected; without, they are the first ones.

    Raises `ConfigError` if what the client receives to train differs from that part.
    """
    with calling(method, "broadcast()"):
        broadcast = method.broadcast(state, client)
    if broadcast.magnitude_rate_ratio is not None:
        raise ConfigError(
            f"{switch} is not possible with method {method.name!r}: its clients do not train "
            "prefixes of one adapter but directions and magnitudes of their own"
        )
    sent = broadcast.trainable
    chosen = tuple(range(sent.rank))
    expected = whole.prefix(min(sent.rank, whole.rank))
    if dimensions_of is not None:
        by_layer = dimensions_of(client)
        each = {tuple(dimensions.tolist()) for dimensions in by_layer.values()}
        if len(each) > 1:
            raise ConfigError(
                f"{switch} with method {method.name!r} needs layers of one rank: leave "
                "lora.rank_pattern out"
            )
        chosen, expected = each.pop(), take(whole, by_layer)
    same = expected.tensors()
    for name, tensor in sent.tensors().items():
        if name not in same or not torch.equal(tensor, same[name]):
            part = "prefixes" if dimensions_of is None else "the selected dimensions"
            raise ConfigError(
                f"{switch} is not possible with method {method.name!r} here: its clients do not "
                f"train {part} of one adapter (tensor {name!r} differs)"
            )
    return chosen


def without_zeros(state: ServerState) -> ServerState:
    """The state with another B: at the beginning it is zero, and zeros hide a factor on it."""
    generator = torch_generator(0, "probe")
    layers = {
        name: Factors(f.A, torch.randn(f.B.shape, generator=generator, dtype=f.B.dtype))
        for name, f in state.adapter.layers.items()
    }
    return replace(state, adapter=replace(state.adapter, layers=layers))
