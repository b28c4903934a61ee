"""`prelort site trust`: the operator's word that a site has a new key."""

from __future__ import annotations

from pathlib import Path

from prelort.errors import ConfigError
from prelort.federation.site_keys import SiteKeys
from prelort.secure.signatures import fingerprint


def trust(run: Path, name: str, key: Path) -> str:
    """Give a client's name to the node with this public key; returns the key's fingerprint.

    Raises `ConfigError` for a folder that holds no run, and for what is no public key.
    """
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{str(run)!r} holds no run: config.toml is missing")
    try:
        public_key = key.read_bytes()
        shown = fingerprint(public_key)
    except (OSError, ValueError):
        raise ConfigError(f"{str(key)!r} cannot be read as a public key") from None
    SiteKeys(run).bind(name, public_key)
    return shown
