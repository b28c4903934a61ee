"""Key agreement by X25519 (RFC 7748) with HKDF (RFC 5869), and sealing by ChaCha20-Poly1305."""

from __future__ import annotations

import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from prelort.errors import PrelortError

KEY_BYTES = 32
NONCE_BYTES = 12


def new_secret() -> bytes:
    """32 bytes of the system's generator: a private key or a seed."""
    return secrets.token_bytes(KEY_BYTES)


def private_key(secret: bytes) -> X25519PrivateKey:
    """The private key of these bytes; making it costs as much as an agreement."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_key(secret: bytes) -> bytes:
    """The public key of the private one of these bytes."""
    return private_key(secret).public_key().public_bytes_raw()


def commitment(secret: bytes) -> bytes:
    """A hash that binds to a random secret of 32 bytes and says nothing about it."""
    return hashlib.sha256(b"prelort commitment" + secret).digest()


def agree(private: X25519PrivateKey, public: bytes, purpose: str) -> bytes:
    """The key that two sides share for one ``purpose``, which names the session and both of them.

    Raises `PrelortError` for a public key that is none.
    """
    try:
        peer = X25519PublicKey.from_public_bytes(public)
        shared = private.exchange(peer)
    except ValueError:
        raise PrelortError("a public key cannot be used") from None
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=purpose.encode()).derive(shared)


def seal(key: bytes, message: bytes) -> bytes:
    """The message encrypted and authenticated, after its nonce."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, message, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """The message. Raises `PrelortError` if it was changed or sealed with another key."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
    except (InvalidTag, ValueError):
        raise PrelortError("a share was changed on its way, or is of another session") from None
