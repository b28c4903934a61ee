"""The protocol: sums, drop-outs, and what nobody may learn or do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from parties import Parties
from scipy.stats import chisquare

from prelort.errors import PrelortError, QuorumError
from prelort.secure import client, graph, keys, ring, shamir
from prelort.secure.masks import add_mask, positions, shared
from prelort.secure.messages import KeysReply, Noise, UnmaskReply, read
from prelort.secure.ring import Words

RANKS = (2, 2, 4, 4, 8, 8, 8)


@pytest.fixture(params=["everyone", "nearest"])
def neighbours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All clients as neighbours, or the four nearest on a circle."""
    if request.param == "nearest":
        monkeypatch.setattr(graph, "ALL", 4)
        monkeypatch.setattr(graph, "DEGREE", 4)
    return str(request.param)


@pytest.mark.parametrize(
    "gone",
    [
        {},
        {"keys": [1]},
        {"shares": [2]},
        {"masked": [3]},
        {"revealed": [6]},
        {"keys": [1], "masked": [6]},
        {"shares": [5], "revealed": [3]},
    ],
    ids=str,
)
def test_the_sum_is_that_of_the_survivors(neighbours: str, gone: dict[str, Sequence[int]]) -> None:
    ranks = RANKS if neighbours == "everyone" else [8] * 7  # masks connect all that send a block
    parties = Parties(ranks, threshold=0.51)
    for phase in ("keys", "shares", "masked", "revealed"):
        getattr(parties, phase)(gone.get(phase, ()))
    lost = {*gone.get("keys", ()), *gone.get("shares", ()), *gone.get("masked", ())}
    assert parties.vectors.keys() == {1, 2, 3, 4, 5, 6, 7} - lost
    assert parties.largest_error() <= ring.error_bound(7, parties.bits)


@pytest.mark.parametrize("phase", ["keys", "shares", "masked", "revealed"])
def test_too_few_survivors_end_the_round(phase: str) -> None:
    parties = Parties([2] * 7, threshold=0.6)
    order = ["keys", "shares", "masked", "revealed"]
    for earlier in order[: order.index(phase)]:
        getattr(parties, earlier)()
    lost = [1, 2, 3] if phase != "keys" else [1, 2, 3, 4, 5, 6]
    with pytest.raises(QuorumError, match=r"lost too many clients|1 clients left"):
        getattr(parties, phase)(lost).server.open()


def test_a_rank_dimension_that_lost_its_holders_is_not_opened() -> None:
    parties = Parties([2, 2, 2, 2, 8, 8, 8], min_holders=3).keys().shares()
    with pytest.raises(QuorumError, match="rank dimension 3 has 2 clients left"):
        parties.masked(without=[7])
    for holds, number in ((True, 6), (False, 1)):
        assert (3 in parties.blocks[number]) == holds
        asked = parties.server.unmask_request(number)
        with pytest.raises(PrelortError, match="block 3 would be the sum of 2 clients"):
            client.reveal(parties.sessions[number], asked)


# What a masked vector shows


def p_value(words: Words) -> float:
    """That these words are uniform, by the numbers of their bytes."""
    return float(chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue)


def unmasked(parties: Parties, victim: int, colluding: Sequence[int]) -> Words:
    """What the server and the colluding clients make of the victim's vector.

    They put together all that they have been sent: each colluding client's keys, and the shares
    that it holds of the others' secrets.
    """
    vector, places = parties.vectors[victim].copy(), positions(parties.blocks[victim], LONG)
    peers = parties.sessions[victim].peers
    shares = {i: shares_at(parties, i) for i in colluding}
    threshold = parties.sessions[victim].threshold

    def restored(number: int, part: slice) -> bytes | None:
        held = {i: shares[i][number][part] for i in colluding if i != number}
        return shamir.combine(held) if len(held) >= threshold else None

    seed = restored(victim, slice(33, 66))
    if seed is not None:
        add_mask(vector, places, seed, parties.blocks[victim], negative=True)
    private = restored(victim, slice(0, 33))
    for number, peer in peers.items():
        if number in colluding:
            own, other = parties.sessions[number].mask_key, parties.sessions[victim]
            public = keys.public_key(other.mask_key)
        elif private is not None:
            own, public = private, peer.mask_key
        else:
            continue
        key = client.mask_key(keys.private_key(own), public, parties.server.session, victim, number)
        covered = shared(parties.blocks[victim], peer.blocks)
        add_mask(vector, places, key, covered, negative=victim < number)
    return vector


def shares_at(parties: Parties, holder: int) -> dict[int, bytes]:
    """The shares of others' secrets that a client can read."""
    session = parties.sessions[holder]
    private = keys.private_key(session.share_key)
    return {
        number: keys.unseal(
            client.share_key(private, peer.share_key, session.session, number, holder),
            parties.server.sealed_for(holder)[number],
        )
        for number, peer in session.peers.items()
    }


LONG = (400,) * 9


def test_masked_vectors_are_uniform_and_fewer_than_the_threshold_see_no_more() -> None:
    """With the threshold's number of clients the same attack shows the vector."""
    parties = Parties([8] * 7, threshold=0.6, lengths=LONG).keys().shares().masked()
    assert parties.sessions[1].threshold == 5
    for vector in parties.vectors.values():
        assert p_value(vector) > 1e-6
    plain = np.concatenate(
        [ring.quantise(v, parties.weights[1], parties.bits) for v in parties.values[1]]
    )
    assert p_value(plain) < 1e-6
    assert p_value(unmasked(parties, 1, [2, 3, 4, 5])) > 1e-6
    assert np.array_equal(unmasked(parties, 1, [2, 3, 4, 5, 6]), plain)


def test_no_key_is_used_twice() -> None:
    """Not even if the server asks again in the same words, as after a restart."""
    request = Parties(RANKS).server.keys_request(1)
    (first, said), (second, said_again) = client.advertise(request), client.advertise(request)
    secrets = [first.mask_key, first.share_key, first.seed]
    secrets += [second.mask_key, second.share_key, second.seed]
    assert len({*secrets, said.mask_key, said_again.mask_key}) == 8
    for secret in secrets:
        assert repr(secret) not in repr(first) + repr(second)


# What is refused


def replayed_keys(parties: Parties) -> None:
    earlier = Parties(RANKS)
    _, reply = client.advertise(earlier.server.keys_request(1))
    parties.server.add_keys(1, reply)


def masked_twice(parties: Parties) -> None:
    session, _ = client.mask(parties.sessions[1], parties.input_of(1), parties.values[1])
    client.mask(session, parties.input_of(1), parties.values[1])


def masked_in_another_session(parties: Parties) -> None:
    client.mask(parties.sessions[1], parties.input_of(1, session="0" * 32), parties.values[1])


def masked_with_strangers(parties: Parties) -> None:
    sealed = {**parties.server.sealed_for(1), 99: b""}
    client.mask(parties.sessions[1], parties.input_of(1, sealed=sealed), parties.values[1])


def masked_alone(parties: Parties) -> None:
    client.mask(parties.sessions[1], parties.input_of(1, sealed={}), parties.values[1])


def above_the_bound(parties: Parties) -> None:
    client.mask(parties.sessions[1], parties.input_of(1, bound=0.1), parties.values[1])


def not_a_number(parties: Parties) -> None:
    values = [*parties.values[1][:-1], np.full(5, np.nan)]
    client.mask(parties.sessions[1], parties.input_of(1), values)


def revealed_before(parties: Parties) -> None:
    client.reveal(parties.sessions[1], parties.server.unmask_request(1))


def low_threshold(parties: Parties) -> None:
    fresh, _ = client.advertise(parties.server.keys_request(1))
    request = parties.server.shares_request(1).model_copy(update={"threshold": 3})
    client.share(fresh, request)


def useless_key(parties: Parties) -> None:
    fresh, _ = client.advertise(parties.server.keys_request(1))
    request = parties.server.shares_request(1)
    peer = request.peers[2].model_copy(update={"share_key": bytes(32)})
    client.share(fresh, request.model_copy(update={"peers": {**request.peers, 2: peer}}))


def other_noise(parties: Parties) -> None:
    fresh, _ = client.advertise(parties.server.keys_request(1))
    request = parties.server.shares_request(1)
    peer = request.peers[2].model_copy(update={"noise": Noise(clip=1.0, deviation=1e-9)})
    client.share(fresh, request.model_copy(update={"peers": {**request.peers, 2: peer}}))


def of_an_unknown_vector(parties: Parties) -> None:
    parties.server.add(1, np.zeros(3, dtype=np.uint64))


def with_a_changed_share(parties: Parties) -> None:
    sealed = parties.server.sealed_for(1)
    sealed[2] = sealed[2][:-1] + b"\0"
    client.mask(parties.sessions[1], parties.input_of(1, sealed=sealed), parties.values[1])


def with_a_forged_share(parties: Parties) -> None:
    """Another client's sealed share in place of the one that was asked for."""
    sealed = parties.server.sealed_for(1)
    sealed[2] = sealed[3]
    client.mask(parties.sessions[1], parties.input_of(1, sealed=sealed), parties.values[1])


def its_own_key(parties: Parties) -> None:
    parties.masked()
    request = parties.server.unmask_request(1)
    others = tuple(n for n in request.survivors if n != 1)
    client.reveal(parties.sessions[1], request.model_copy(update={"survivors": others}))


def of_few_survivors(parties: Parties) -> None:
    parties.masked()
    request = parties.server.unmask_request(1).model_copy(update={"survivors": (1, 2, 3)})
    client.reveal(parties.sessions[1], request)


def of_everyone(parties: Parties) -> None:
    parties.masked()
    reply = UnmaskReply(
        session=parties.server.session,
        seeds={n: bytes(33) for n in range(1, 8)},
        keys={2: bytes(33)},
    )
    parties.server.add_revealed(1, reply)


@pytest.mark.parametrize(
    "attempt, reason",
    [
        (replayed_keys, "another session"),
        (masked_twice, "out of turn"),
        (masked_in_another_session, "out of turn"),
        (masked_with_strangers, "neighbours have shared"),
        (masked_alone, "0 neighbours have shared their secrets, 4 of the 6 are needed"),
        (above_the_bound, "above federation.max_abs_value = 0.1"),
        (not_a_number, "its change holds nan"),
        (revealed_before, "out of turn"),
        (low_threshold, "threshold 3 of 7 holders is not allowed"),
        (useless_key, "a public key cannot be used"),
        (other_noise, "participant 2 is to add other noise than this client"),
        (of_an_unknown_vector, "sends 3 masked values, expected 13"),
        (with_a_changed_share, "was changed on its way"),
        (with_a_forged_share, "was changed on its way"),
        (its_own_key, "the survivors are not those that have joined"),
        (of_few_survivors, "3 of 7 have survived, 5 are needed"),
        (of_everyone, "reveals shares of others"),
    ],
)
def test_it_is_refused(attempt: Callable[[Parties], None], reason: str) -> None:
    parties = Parties(RANKS).keys().shares()
    with pytest.raises(PrelortError, match=re.escape(reason)):
        attempt(parties)


@pytest.mark.parametrize("gone", [[], [7]], ids=["seed", "mask key"])
def test_a_wrong_share_does_not_become_a_wrong_sum(gone: Sequence[int]) -> None:
    parties = Parties(RANKS).keys().shares().masked(without=gone).revealed(without=[1])
    honest = client.reveal(parties.sessions[1], parties.server.unmask_request(1))
    wrong = {n: share[:-1] + bytes([share[-1] ^ 1]) for n, share in honest.seeds.items()}
    changes = {"keys": {7: wrong[1]}} if gone else {"seeds": wrong}
    parties.server.add_revealed(1, honest.model_copy(update=changes))
    with pytest.raises(QuorumError, match=r"a share of a (seed|mask key|secret) is wrong"):
        parties.server.open()


def test_keys_of_unexpected_form_are_refused() -> None:
    with pytest.raises(PrelortError, match=r"malformed KeysReply: mask_key"):
        read('{"session": "%s", "mask_key": "AAAA"}' % ("0" * 32), KeysReply)
