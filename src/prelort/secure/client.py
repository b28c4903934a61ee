"""A client's side: four steps, each a function of its session so far and of a message.

The session holds the client's secrets and exists for one round. Keys are new in each, whatever the
server names it, so no mask is ever used twice. A client never reveals its own mask key, and of each
neighbour a share of the seed or of the mask key, never both: with a threshold above half of the
holders nobody can restore both, which together would unmask the neighbour's vector.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import Field

from prelort.errors import PrelortError
from prelort.secure import keys, noise, shamir
from prelort.secure.masks import add_mask, positions, shared
from prelort.secure.messages import (
    KeysReply,
    KeysRequest,
    MaskedInput,
    Noise,
    Part,
    Peer,
    SharesReply,
    SharesRequest,
    Step,
    UnmaskReply,
    UnmaskRequest,
)
from prelort.secure.ring import Values, Words, quantise
from prelort.secure.signatures import Identity


class Session(Part):
    """A client's secrets and what it knows of the others, after its last ``step``."""

    session: str
    number: int
    blocks: tuple[int, ...]
    noise: Noise | None = None
    step: Literal["keys", "shares", "masked"]
    mask_key: bytes = Field(repr=False)
    share_key: bytes = Field(repr=False)
    seed: bytes = Field(repr=False)
    own_share: bytes = Field(b"", repr=False)
    """Of its seed; nobody is asked for the mask key of who is still there."""
    shares: dict[int, bytes] = Field(default_factory=dict, repr=False)
    """Of the mask key and the seed of each neighbour that has joined."""
    threshold: int = 0
    min_holders: int = 0
    peers: dict[int, Peer] = Field(default_factory=dict)


def advertise(request: KeysRequest, identity: Identity | None = None) -> tuple[Session, KeysReply]:
    """Draw new secrets and state their public keys, signed if the client has an identity."""
    session = Session(
        session=request.session,
        number=request.number,
        blocks=request.blocks,
        noise=request.noise,
        step="keys",
        mask_key=keys.new_secret(),
        share_key=keys.new_secret(),
        seed=keys.new_secret(),
    )
    own = Peer(
        mask_key=keys.public_key(session.mask_key),
        share_key=keys.public_key(session.share_key),
        seed=keys.commitment(session.seed),
        blocks=request.blocks,
        noise=request.noise,
    )
    if identity is not None:
        own = identity.signed(request.session, request.number, own)
    return session, KeysReply(
        session=request.session, **own.model_dump(exclude={"blocks", "noise"})
    )


def share(
    session: Session, request: SharesRequest, identity: Identity | None = None
) -> tuple[Session, SharesReply]:
    """Share the mask key and the seed among the neighbours.

    Raises `PrelortError` for a message out of turn, for a threshold at which the server could learn
    both secrets, for a block that too few hold, for a neighbour that is to add other noise, and,
    if the client has an identity, for keys that no known client has signed.
    """
    _check_step(session, request, "keys")
    if identity is not None:
        identity.check(session.session, request.peers)
    for number, peer in request.peers.items():
        if peer.noise != session.noise:
            raise PrelortError(f"participant {number} is to add other noise than this client")
    holders = [session.number, *request.peers]
    if len(set(holders)) < len(holders) or not len(holders) < 2 * request.threshold:
        raise PrelortError(
            f"threshold {request.threshold} of {len(holders)} holders is not allowed: it must be "
            "above one half"
        )
    of_key = shamir.split(session.mask_key, holders, request.threshold)
    of_seed = shamir.split(session.seed, holders, request.threshold)
    session = session.model_copy(
        update={
            "step": "shares",
            "own_share": of_seed[session.number],
            "threshold": request.threshold,
            "min_holders": request.min_holders,
            "peers": request.peers,
        }
    )
    _check_holders(session, request.peers)
    private = keys.private_key(session.share_key)
    sealed = {
        number: keys.seal(
            share_key(private, peer.share_key, session.session, session.number, number),
            of_key[number] + of_seed[number],
        )
        for number, peer in request.peers.items()
    }
    return session, SharesReply(session=session.session, sealed=sealed)


def mask(session: Session, request: MaskedInput, blocks: Sequence[Values]) -> tuple[Session, Words]:
    """The client's weighted and masked vector.

    Args:
        session: after `share`.
        request: how to mask.
        blocks: what the client contributes, each float64 [n]: the blocks that it holds.

    Raises `PrelortError` for a message out of turn, too few neighbours, a share that was changed,
    or a value above the bound.
    """
    _check_step(session, request, "shares")
    joined = request.sealed.keys()
    if len(joined) + 1 < session.threshold or not joined <= session.peers.keys():
        raise PrelortError(
            f"{len(joined)} neighbours have shared their secrets, "
            f"{session.threshold - 1} of the {len(session.peers)} are needed"
        )
    _check_holders(session, joined)
    # Before masking: only who knows the keys of this session, its neighbours', can seal for it.
    shares = {number: _unsealed(session, number, request.sealed[number]) for number in joined}
    session = session.model_copy(update={"step": "masked", "shares": shares})
    held = dict(zip(request.holds, blocks, strict=False))
    sent = {block: held[block] for block in session.blocks if block in held}
    for block, values in sent.items():
        if values.size != request.lengths[block]:
            raise PrelortError(
                f"block {block} has {values.size} values, expected {request.lengths[block]}"
            )
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= request.bound:
            raise PrelortError(
                f"its change holds {largest:.3g}, above federation.max_abs_value = "
                f"{request.bound:g}"
            )
    weight, bits = request.weight, request.fraction_bits
    if session.noise is not None:
        weight *= noise.clipping(session.noise, sent.values(), weight, bits)
    places = positions(session.blocks, request.lengths)
    vector: Words = np.zeros(sum(p.stop - p.start for p in places.values()), dtype=np.uint64)
    for block, values in sent.items():
        vector[places[block]] = quantise(values, weight, bits)
    if session.noise is not None:
        senders = [session.blocks, *(session.peers[number].blocks for number in joined)]
        lost = len(senders) - session.threshold
        fewest = noise.fewest(senders, lost, session.min_holders)
        for block, place in places.items():
            part = math.ldexp(session.noise.deviation, bits) / math.sqrt(fewest[block])
            vector[place] += noise.gaussian(part, place.stop - place.start)
    add_mask(vector, places, session.seed, session.blocks, negative=False)
    private = keys.private_key(session.mask_key)
    for number in joined:
        peer = session.peers[number]
        add_mask(
            vector,
            places,
            mask_key(private, peer.mask_key, session.session, session.number, number),
            shared(session.blocks, peer.blocks),
            negative=session.number > number,
        )
    return session, vector


def reveal(session: Session, request: UnmaskRequest) -> UnmaskReply:
    """Shares of the seeds of those who are still there, and of the mask keys of those who are not.

    Raises `PrelortError` for a message out of turn and for too few survivors. Afterwards the
    session is to be deleted.
    """
    _check_step(session, request, "masked")
    joined, survivors = {*session.shares, session.number}, {*request.survivors}
    if session.number not in survivors or not survivors <= joined:
        raise PrelortError("the survivors are not those that have joined")
    if len(survivors) < session.threshold:
        raise PrelortError(
            f"{len(survivors)} of {len(joined)} have survived, {session.threshold} are needed"
        )
    _check_holders(session, survivors - {session.number})
    seeds = {session.number: session.own_share}
    of_keys: dict[int, bytes] = {}
    for number, both in session.shares.items():
        if number in survivors:
            seeds[number] = both[shamir.SHARE_BYTES :]
        else:
            of_keys[number] = both[: shamir.SHARE_BYTES]
    return UnmaskReply(session=session.session, seeds=seeds, keys=of_keys)


def mask_key(private: X25519PrivateKey, public: bytes, session: str, one: int, other: int) -> bytes:
    """The key of the mask that two participants share."""
    low, high = sorted((one, other))
    return keys.agree(private, public, f"prelort mask {session} {low} {high}")


def share_key(
    private: X25519PrivateKey, public: bytes, session: str, sender: int, receiver: int
) -> bytes:
    """The key that seals the shares from one participant to another."""
    return keys.agree(private, public, f"prelort share {session} {sender} {receiver}")


def _unsealed(session: Session, number: int, sealed: bytes) -> bytes:
    """The shares of a neighbour's mask key and seed, one after the other."""
    private, public = keys.private_key(session.share_key), session.peers[number].share_key
    return keys.unseal(share_key(private, public, session.session, number, session.number), sealed)


def _check_step(session: Session, request: Step, expected: str) -> None:
    if request.session != session.session or session.step != expected:
        raise PrelortError(
            "received a message of secure aggregation out of turn: it is of another session, or "
            "was answered before"
        )


def _check_holders(session: Session, others: Iterable[int]) -> None:
    """Raise `PrelortError` for a block that too few of these and the client itself send.

    Also for one that it does not send: it would help to open it.
    """
    senders = [session.blocks, *(session.peers[number].blocks for number in others)]
    for block, count in sorted(Counter(itertools.chain(*senders)).items()):
        if count < session.min_holders:
            raise PrelortError(
                f"block {block} would be the sum of {count} clients, "
                f"privacy.min_holders = {session.min_holders} are needed"
            )
