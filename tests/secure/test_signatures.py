"""Signed keys: a server that exchanges, forges or repeats announcements is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from parties import Parties

from prelort.errors import ConfigError, PrelortError
from prelort.secure import client, keys, ring
from prelort.secure.messages import Peer, SharesRequest
from prelort.secure.signatures import Identity, fingerprint, read_identity

RANKS = (2, 2, 4, 4, 8, 8, 8)
PRIVATE = [ec.generate_private_key(ec.SECP384R1()) for _ in range(9)]
"""Of participants 1 to 7 (from index 0), and of two clients that they do not know."""


def public(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def identity(number: int) -> Identity:
    known = {fingerprint(public(key)): key.public_key() for key in PRIVATE[:7]}
    return Identity(PRIVATE[number - 1], known)


def signed() -> Parties:
    return Parties(RANKS, identities={i: identity(i) for i in range(1, 8)})


def test_the_sum_is_that_of_the_survivors() -> None:
    parties = signed().keys().shares(without=[2]).masked(without=[6]).revealed()
    assert parties.vectors.keys() == {1, 3, 4, 5, 7}
    assert parties.largest_error() <= ring.error_bound(7, parties.bits)


# What a server may do to the peers of participant 1


def own_keys(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[2] = peers[2].model_copy(update={"mask_key": keys.public_key(keys.new_secret())})


def keys_of_another(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[2], peers[3] = peers[3], peers[2]


def keys_of_an_earlier_session(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[2] = signed().keys().server.shares_request(1).peers[2]


def blocks_that_it_does_not_send(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[2] = peers[2].model_copy(update={"blocks": peers[7].blocks})


def no_signature(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[2] = peers[2].model_copy(update={"signer": "", "signature": b""})


def an_invented_client(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[2] = identity(8).signed(parties.server.session, 2, peers[2])


def one_client_twice(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[3] = identity(2).signed(parties.server.session, 3, peers[3])


def the_receiver_itself(parties: Parties, peers: dict[int, Peer]) -> None:
    peers[2] = identity(1).signed(parties.server.session, 2, peers[2])


@pytest.mark.parametrize(
    "attack, reason",
    [
        (own_keys, "participant 2 has another signature than that of SHA256:"),
        (keys_of_another, "participant 2 has another signature"),
        (keys_of_an_earlier_session, "were exchanged, or are of another session"),
        (blocks_that_it_does_not_send, "participant 2 has another signature"),
        (no_signature, "participant 2 has not signed its keys"),
        (an_invented_client, r"participant 2 signs with SHA256:\S+, which this site's peers lack"),
        (one_client_twice, r"participant 3 signs with SHA256:\S+, the key of participant 2"),
        (the_receiver_itself, "the key of this client"),
    ],
)
def test_peers_that_did_not_sign_are_refused(
    attack: Callable[[Parties, dict[int, Peer]], None], reason: str
) -> None:
    parties = signed().keys()
    request = parties.server.shares_request(1)
    peers = dict(request.peers)
    attack(parties, peers)
    changed = SharesRequest(**{**request.model_dump(exclude={"peers"}), "peers": peers})
    with pytest.raises(PrelortError, match=reason):
        client.share(parties.sessions[1], changed, identity(1))
    client.share(parties.sessions[1], request, identity(1))


def test_a_client_of_an_earlier_session_of_the_same_name_does_not_count() -> None:
    """The server has learnt its mask key there; what it sealed there does not fit here."""
    earlier, parties = signed(), signed()
    parties.server.session = earlier.server.session
    earlier.keys().shares()
    parties.keys()
    old = earlier.server.shares_request(1).peers[2]
    request = parties.server.shares_request(1)
    request = request.model_copy(update={"peers": {**request.peers, 2: old}})
    session, _ = client.share(parties.sessions[1], request, identity(1))
    parties.shares()
    sealed = {**parties.server.sealed_for(1), 2: earlier.server.sealed_for(1)[2]}
    with pytest.raises(PrelortError, match="was changed on its way, or is of another session"):
        client.mask(session, parties.input_of(1, sealed=sealed), parties.values[1])


def private_file(folder: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> Path:
    file = folder / "key"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return file


def test_keys_are_read_from_openssh_files(tmp_path: Path) -> None:
    key, peers = private_file(tmp_path, PRIVATE[0]), tmp_path / "peers.pub"
    peers.write_bytes(b"# of the others\n\n" + b" site-2\n".join(map(public, PRIVATE[1:3])))
    found = read_identity(key, peers)
    assert found.fingerprint == fingerprint(public(PRIVATE[0]))
    assert found.peers.keys() == {fingerprint(public(other)) for other in PRIVATE[1:3]}
    assert "EllipticCurvePrivateKey" not in repr(found)

    peers.write_bytes(public(PRIVATE[1]) + b"\n" + public(ed25519.Ed25519PrivateKey.generate()))
    with pytest.raises(ConfigError, match=r"peers\.pub', line 2: no public ECDSA key"):
        read_identity(key, peers)
    peers.write_bytes(b"\n")
    with pytest.raises(ConfigError, match="has no keys"):
        read_identity(key, peers)
    with pytest.raises(ConfigError, match=r"peers = .* cannot be read"):
        read_identity(key, tmp_path)
    with pytest.raises(ConfigError, match="is not an ECDSA key"):
        read_identity(private_file(tmp_path, ed25519.Ed25519PrivateKey.generate()), peers)
    with pytest.raises(ConfigError, match=r"key = .* cannot be read"):
        read_identity(peers, peers)
