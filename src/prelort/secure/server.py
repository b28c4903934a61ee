"""The server's side: collects keys, shares and masked vectors, and opens their sum."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from prelort.errors import PrelortError, QuorumError, UpdateRefused
from prelort.secure import keys, shamir
from prelort.secure.client import mask_key
from prelort.secure.graph import neighbours
from prelort.secure.masks import add_mask, positions, shared
from prelort.secure.messages import (
    KeysReply,
    KeysRequest,
    Noise,
    Peer,
    SharesReply,
    SharesRequest,
    Step,
    UnmaskReply,
    UnmaskRequest,
)
from prelort.secure.ring import Words


class MaskedSum:
    """The sum of one vector from each participant, block by block.

    Each phase ends when the next one's requests are made: who has not replied by then is left out.
    The order is ``keys_request``, ``add_keys``; ``shares_request``, ``add_shares``; ``joined``,
    ``add``; ``unmask_request``, ``add_revealed``; ``open``.

    Args:
        blocks: participant's number (from 1) -> the blocks that it sends, rising.
        lengths: of all blocks.
        threshold: the share of the holders of a secret that restore it, above one half.
        min_holders: the participants whose sum may be opened.
        noise: of which each participant adds a share.
    """

    def __init__(
        self,
        blocks: Mapping[int, tuple[int, ...]],
        lengths: Sequence[int],
        threshold: float,
        min_holders: int,
        noise: Noise | None = None,
    ) -> None:
        self.session = secrets.token_hex(16)
        self._blocks = dict(blocks)
        self._lengths = tuple(lengths)
        self._share = threshold
        self._min_holders = min_holders
        self._noise = noise
        self._peers: dict[int, Peer] = {}
        self._neighbours: dict[int, frozenset[int]] = {}
        self._sealed: dict[int, Mapping[int, bytes]] = {}
        self._survivors: list[int] = []
        self._revealed: dict[int, UnmaskReply] = {}
        self._places = positions(range(len(lengths)), lengths)
        self._total: Words = np.zeros(sum(lengths), dtype=np.uint64)

    def keys_request(self, number: int) -> KeysRequest:
        """The first message to a participant."""
        blocks, noise = self._blocks[number], self._noise
        return KeysRequest(session=self.session, number=number, blocks=blocks, noise=noise)

    def add_keys(self, number: int, reply: KeysReply) -> None:
        """Take the keys of a participant. Raises `UpdateRefused` for those of another session."""
        self._check(reply)
        values = reply.model_dump(exclude={"session"})
        self._peers[number] = Peer(**values, blocks=self._blocks[number], noise=self._noise)

    def draw_graph(self) -> None:
        """Make those whose keys are here neighbours. Raises `QuorumError` if they are too few."""
        self._check_holders(self._peers)
        self._neighbours = neighbours(list(self._peers))

    def shares_request(self, number: int) -> SharesRequest:
        """The second message to a participant whose keys are here."""
        return SharesRequest(
            session=self.session,
            threshold=self._threshold(number),
            min_holders=self._min_holders,
            peers={other: self._peers[other] for other in sorted(self._neighbours[number])},
        )

    def add_shares(self, number: int, reply: SharesReply) -> None:
        """Take the sealed shares. Raises `UpdateRefused` where one is missing or surplus."""
        self._check(reply)
        if reply.sealed.keys() != self._neighbours[number]:
            raise UpdateRefused("has sealed shares for others than its neighbours")
        self._sealed[number] = reply.sealed

    def sealed_for(self, number: int) -> dict[int, bytes]:
        """What each neighbour of a participant that has shared its secrets has sealed for it."""
        joined = sorted(self._neighbours[number] & self._sealed.keys())
        return {other: self._sealed[other][number] for other in joined}

    def check_joined(self) -> None:
        """Raise `QuorumError` if too few have shared their secrets for the sum to be opened."""
        self._check_holders(self._sealed)
        self._check_thresholds(self._sealed, self._sealed)

    def add(self, number: int, vector: Words) -> None:
        """Add a masked vector. Raises `UpdateRefused` for a wrong length, or a second one."""
        places = positions(self._blocks[number], self._lengths)
        expected = sum(place.stop - place.start for place in places.values())
        if vector.shape != (expected,):
            raise UpdateRefused(f"sends {vector.size} masked values, expected {expected}")
        if number in self._survivors or number not in self._sealed:
            raise UpdateRefused("sends a masked vector that was not requested")
        for block, place in places.items():
            self._total[self._places[block]] += vector[place]
        self._survivors.append(number)

    def check_survivors(self) -> None:
        """Raise `QuorumError` if too few masked vectors are here for the sum to be opened."""
        self._check_holders(self._survivors)
        self._check_thresholds(self._survivors, self._sealed)

    def unmask_request(self, number: int) -> UnmaskRequest:
        """The last message to a participant whose vector is here."""
        neighbours = self._neighbours[number] & {*self._survivors}
        return UnmaskRequest(session=self.session, survivors=tuple(sorted({number, *neighbours})))

    def add_revealed(self, number: int, reply: UnmaskReply) -> None:
        """Take the revealed shares. Raises `UpdateRefused` for others than were requested."""
        self._check(reply)
        survivors = {*self.unmask_request(number).survivors}
        others = self.sealed_for(number).keys() - survivors
        if reply.seeds.keys() != survivors or reply.keys.keys() != others:
            raise UpdateRefused("reveals shares of others than was requested")
        self._revealed[number] = reply

    def open(self) -> list[Words]:
        """The sum of the survivors' vectors, by block.

        Raises `QuorumError` where too few shares are here, or where one of them is wrong.
        """
        self._check_thresholds(self._revealed, self._survivors)
        total = self._total.copy()
        for number in self._survivors:
            seed = self._restored(number, {n: r.seeds for n, r in self._revealed.items()})
            if keys.commitment(seed) != self._peers[number].seed:
                raise QuorumError("a share of a seed is wrong: the round's sum cannot be opened")
            add_mask(total, self._places, seed, self._blocks[number], negative=True)
        for gone in self._sealed.keys() - {*self._survivors}:
            present = self._neighbours[gone] & {*self._survivors}
            if present:
                self._remove_pair_masks(total, gone, present)
        return [total[place] for place in self._places.values()]

    def _remove_pair_masks(self, total: Words, gone: int, present: frozenset[int]) -> None:
        """Subtract the masks that the survivors share with a participant that has dropped out."""
        secret = self._restored(gone, {n: r.keys for n, r in self._revealed.items()})
        private = keys.private_key(secret)
        if private.public_key().public_bytes_raw() != self._peers[gone].mask_key:
            raise QuorumError("a share of a mask key is wrong: the round's sum cannot be opened")
        for number in present:
            key = mask_key(private, self._peers[number].mask_key, self.session, gone, number)
            covered = shared(self._blocks[gone], self._blocks[number])
            add_mask(total, self._places, key, covered, negative=number < gone)

    def _restored(self, number: int, revealed: Mapping[int, Mapping[int, bytes]]) -> bytes:
        """The secret of a participant from the first shares that suffice."""
        threshold = self._threshold(number)
        shares = {n: of[number] for n, of in sorted(revealed.items()) if number in of}
        try:
            return shamir.combine(dict(list(shares.items())[:threshold]))
        except PrelortError as error:
            raise QuorumError(f"{error}: the round's sum cannot be opened") from None

    def _threshold(self, number: int) -> int:
        return max(2, math.ceil(self._share * (len(self._neighbours[number]) + 1) - 1e-9))

    def _check(self, reply: Step) -> None:
        if reply.session != self.session:
            raise UpdateRefused("answers for another session of secure aggregation")

    def _check_thresholds(self, present: Collection[int], needed: Collection[int]) -> None:
        """Raise `QuorumError` if a secret of one of ``needed`` has too few holders ``present``."""
        for number in needed:
            holders = len({*present} & {number, *self._neighbours[number]})
            if holders < self._threshold(number):
                raise QuorumError(
                    f"secure aggregation has lost too many clients: {holders} of "
                    f"{len(self._neighbours[number]) + 1} holders of a secret are left, "
                    f"privacy.threshold = {self._share:g} needs {self._threshold(number)}"
                )

    def _check_holders(self, present: Collection[int]) -> None:
        """Raise `QuorumError` for a block that some of those present send, but too few."""
        for block in sorted({b for number in present for b in self._blocks[number]} or {0}):
            holders = sum(block in self._blocks[number] for number in present)
            if holders < self._min_holders:
                what = f"rank dimension {block}" if block else "the sum"
                raise QuorumError(
                    f"{what} has {holders} clients left, privacy.min_holders = "
                    f"{self._min_holders} are needed for a sum that hides them"
                )
