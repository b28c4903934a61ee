"""A client's side of secure aggregation: its secrets in Flower's context, its masked replies.

Imports no torch, so that a process that only forwards messages starts quickly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.numpy

from prelort.errors import PrelortError
from prelort.federation.content import blob_in, content_of, text_in
from prelort.federation.flower import ConfigRecord, RecordDict
from prelort.secure import blocks, client
from prelort.secure.client import Session
from prelort.secure.messages import (
    KeysRequest,
    MaskedInput,
    Part,
    SharesRequest,
    UnmaskRequest,
    read,
)
from prelort.secure.ring import Words
from prelort.secure.signatures import Identity

MASKED = "masked"
"""The name of the masked vector among a reply's tensors, uint64 [n]."""

_STATE = "secure-aggregation"


class _TrainRequest(Part):
    """What concerns masks in a request to train."""

    masked: MaskedInput | None = None


def input_of(text: str) -> MaskedInput | None:
    """How a request to train wants its reply masked; None: not at all."""
    return read(text, _TrainRequest).masked


def masked(request: RecordDict, reply: RecordDict, state: RecordDict) -> RecordDict:
    """The reply to a request to train, masked if the request is of secure aggregation.

    ``state``: of the node's context. Raises `PrelortError` if it may not or cannot be masked.
    """
    how = input_of(text_in(request) or "")
    if how is None:
        return reply
    tensors = safetensors.numpy.load(blob_in(reply) or b"")
    parts = blocks.split(tensors, len(how.holds) - 1)
    session, vector = client.mask(_load(state), how, [part.astype(np.float64) for part in parts])
    _save(state, session)
    text = text_in(reply) or ""
    if session.noise is not None:  # the server is not to learn more than the noisy sum
        text = json.dumps({**json.loads(text), "loss": None, "validation_loss": None})
    return content_of(text, blob_of(vector))


def blob_of(vector: Words) -> bytes:
    """A masked vector as it travels."""
    return safetensors.numpy.save({MASKED: vector})


def vector_in(content: RecordDict) -> Words:
    """The masked vector of a reply. Raises `PrelortError` if there is none."""
    try:
        tensors = safetensors.numpy.load(blob_in(content) or b"")
    except Exception as error:  # foreign bytes: `SafetensorError`, `KeyError`, `ValueError`
        raise PrelortError(f"masked vector cannot be read: {error}") from None
    vector = tensors.get(MASKED)
    if vector is None or vector.dtype != np.uint64 or vector.ndim != 1:
        raise PrelortError("carries no masked vector")
    return vector


def _keys(text: str, state: RecordDict, identity: Identity | None) -> Part:
    session, reply = client.advertise(read(text, KeysRequest), identity)
    _save(state, session)
    return reply


def _shares(text: str, state: RecordDict, identity: Identity | None) -> Part:
    session, reply = client.share(_load(state), read(text, SharesRequest), identity)
    _save(state, session)
    return reply


def _unmask(text: str, state: RecordDict, identity: Identity | None) -> Part:
    reply = client.reveal(_load(state), read(text, UnmaskRequest))
    del state[_STATE]
    return reply


Step = Callable[[str, RecordDict, Identity | None], Part]
"""From a request's text, the context's state and what the client signs with to the reply."""
STEPS: Mapping[str, Step] = {
    "keys": _keys,
    "shares": _shares,
    "unmask": _unmask,
}
"""By the action of the query that asks for them."""


def _load(state: RecordDict) -> Session:
    record = state.get(_STATE)
    if not isinstance(record, ConfigRecord):
        raise PrelortError("has no session of secure aggregation: it was restarted, or joined late")
    return read(str(record["json"]), Session)


def _save(state: RecordDict, session: Session) -> None:
    state[_STATE] = ConfigRecord({"json": session.model_dump_json()})
