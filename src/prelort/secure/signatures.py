"""Signatures of the keys that clients announce: whoever passes them on cannot put in its own.

A client signs with an EC private key (ECDSA with SHA-256), such as its node's in Flower, and knows
the public keys of the others, in files as OpenSSH writes them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from prelort.errors import ConfigError, PrelortError
from prelort.secure.messages import Peer

_ECDSA = ec.ECDSA(SHA256())


@dataclass(frozen=True, slots=True)
class Identity:
    """What a client signs with, and whose signatures it accepts: fingerprint -> public key."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    peers: Mapping[str, ec.EllipticCurvePublicKey]

    @property
    def fingerprint(self) -> str:
        """Of its own public key."""
        public = self.key.public_key()
        return fingerprint(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))

    def signed(self, session: str, number: int, own: Peer) -> Peer:
        """What this client announces as participant ``number`` of a session, with its signature."""
        signature = self.key.sign(_statement(session, number, own), _ECDSA)
        return own.model_copy(update={"signer": self.fingerprint, "signature": signature})

    def check(self, session: str, peers: Mapping[int, Peer]) -> None:
        """Raise `PrelortError` unless each has signed, for this session, with a known key."""
        signers = {self.fingerprint: "this client"}
        for number, peer in peers.items():
            who, signer = f"participant {number}", peer.signer
            if not signer:
                raise PrelortError(f"{who} has not signed its keys: its site.toml has no `key`")
            if signer not in self.peers:
                raise PrelortError(f"{who} signs with {signer}, which this site's peers lack")
            if signer in signers:
                raise PrelortError(f"{who} signs with {signer}, the key of {signers[signer]}")
            signers[signer] = who
            try:
                statement = _statement(session, number, peer)
                self.peers[signer].verify(peer.signature, statement, _ECDSA)
            except InvalidSignature:
                raise PrelortError(
                    f"{who} has another signature than that of {signer}: its keys were exchanged, "
                    "or are of another session"
                ) from None


def read_identity(key: Path, peers: Path) -> Identity:
    """The identity in two files: a private key, and public keys one a line (`.pub` files joined).

    Raises `ConfigError` for a file without such keys.
    """
    try:
        private = load_ssh_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"key = {str(key)!r} cannot be read: {error}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"key = {str(key)!r} is not an ECDSA key: ssh-keygen -t ecdsa makes one")
    known: dict[str, ec.EllipticCurvePublicKey] = {}
    try:
        lines = peers.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"peers = {str(peers)!r} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(b"#"):
            continue
        try:
            public = load_ssh_public_key(line)
        except (ValueError, UnsupportedAlgorithm):
            public = None
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise ConfigError(f"peers = {str(peers)!r}, line {number}: no public ECDSA key")
        known[fingerprint(line)] = public
    if not known:
        raise ConfigError(f"peers = {str(peers)!r} has no keys")
    return Identity(private, known)


def fingerprint(public_key: bytes) -> str:
    """The key's fingerprint as `ssh-keygen -l` shows it, from a PEM or an OpenSSH public key.

    Raises `ValueError` for other bytes.
    """
    pem = public_key.startswith(b"-----")
    try:
        key = load_pem_public_key(public_key) if pem else load_ssh_public_key(public_key)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    _, blob = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split(b" ")
    digest = hashlib.sha256(base64.b64decode(blob)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _statement(session: str, number: int, peer: Peer) -> bytes:
    """What a participant signs."""
    announced = peer.model_dump_json(exclude={"signer", "signature"})
    return f"prelort secure aggregation {session} {number} {announced}".encode()
