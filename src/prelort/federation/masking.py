"""A client's side of secure aggregation: its secrets in Flower's context, its masked replies.

Imports no torch, so that a process that only forwards messages starts quickly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.numpy
from pydantic import Field

from prelort.errors import PrelortError
from prelort.federation.content import blob_in, content_of, text_in
from prelort.federation.flower import ConfigRecord, RecordDict
from prelort.secure import blocks, client
from prelort.secure.client import Session
from prelort.secure.messages import (
    CountReply,
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
_RANK = "rank"
"""The client's rank, which the server does not know."""
_COUNTED = "counted-rank"
"""The rank with which it was counted: the sums are divided by those numbers."""


class _PropertiesRequest(Part):
    """What concerns a hidden rank in the server's first message."""

    hide_rank: bool = False
    rank: int = 0


class _TrainRequest(Part):
    """What concerns masks in a request to train; ``by_rank``: not empty where ranks are hidden."""

    masked: MaskedInput | None = None
    rank: int = 0
    by_rank: dict[int, object] = Field(default_factory=dict)


def input_of(text: str) -> MaskedInput | None:
    """How a request to train wants its reply masked; None: not at all."""
    return read(text, _TrainRequest).masked


def properties(request: RecordDict, reply: RecordDict, state: RecordDict) -> RecordDict:
    """The reply to the server's first message, with another rank if it asks for hidden ones.

    Raises `PrelortError` where the client's rank is above all that the run has.
    """
    asked = read(text_in(request) or "{}", _PropertiesRequest)
    if not asked.hide_rank:
        return reply
    stated = json.loads(text_in(reply) or "{}")
    if int(stated["rank"]) > asked.rank:
        raise PrelortError(f"offers a higher rank than the global adapter has: {asked.rank}")
    state[_RANK] = ConfigRecord({"rank": int(stated["rank"])})
    return content_of(json.dumps({**stated, "rank": asked.rank, "max_rank": asked.rank}))


def masked(request: RecordDict, reply: RecordDict, state: RecordDict) -> RecordDict:
    """The reply to a request to train, masked if the request is of secure aggregation.

    ``state``: of the node's context. Raises `PrelortError` if it may not or cannot be masked.
    """
    asked = read(text_in(request) or "", _TrainRequest)
    how = asked.masked
    if how is None:
        if asked.by_rank:
            raise PrelortError("was asked for a reply that is not masked, which shows its rank")
        return reply
    tensors, head = safetensors.numpy.load(blob_in(reply) or b""), json.loads(text_in(reply) or "")
    rank = len(how.holds) - 1
    if asked.by_rank:
        rank = int(head["rank"])
        if rank != _rank_in(state, _COUNTED):
            raise PrelortError("has another rank than that with which it was counted")
        head |= {"rank": asked.rank, "next_rank": None, "loss": None, "validation_loss": None}
    parts = [part.astype(np.float64) for part in blocks.split(tensors, rank)]
    session, vector = client.mask(_load(state), how, parts)
    _save(state, session)
    if session.noise is not None:  # the server is not to learn more than the noisy sum
        head |= {"loss": None, "validation_loss": None}
    return content_of(json.dumps(head), blob_of(vector))


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


def _count(text: str, state: RecordDict, identity: Identity | None) -> Part:
    if _COUNTED in state:  # several counts of different clients would tell whose rank is whose
        raise PrelortError("has been counted in this run already")
    how, rank = read(text, MaskedInput), _rank_in(state, _RANK)
    held = np.arange(sum(how.lengths)) < rank
    session, vector = client.mask(_load(state), how, [held.astype(np.float64)])
    _save(state, session)
    state[_COUNTED] = ConfigRecord({"rank": rank})
    return CountReply(session=session.session, words=vector.astype("<u8").tobytes())


def _unmask(text: str, state: RecordDict, identity: Identity | None) -> Part:
    reply = client.reveal(_load(state), read(text, UnmaskRequest))
    del state[_STATE]
    return reply


Step = Callable[[str, RecordDict, Identity | None], Part]
"""From a request's text, the context's state and what the client signs with to the reply."""
STEPS: Mapping[str, Step] = {
    "keys": _keys,
    "shares": _shares,
    "count": _count,
    "unmask": _unmask,
}
"""By the action of the query that asks for them."""


def _rank_in(state: RecordDict, name: str) -> int:
    record = state.get(name)
    if not isinstance(record, ConfigRecord):
        raise PrelortError(
            "was not counted: it was restarted, or came after the run had started, and can take "
            "part when the run is started again"
        )
    return int(str(record["rank"]))


def _load(state: RecordDict) -> Session:
    record = state.get(_STATE)
    if not isinstance(record, ConfigRecord):
        raise PrelortError("has no session of secure aggregation: it was restarted, or joined late")
    return read(str(record["json"]), Session)


def _save(state: RecordDict, session: Session) -> None:
    state[_STATE] = ConfigRecord({"json": session.model_dump_json()})
