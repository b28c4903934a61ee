"""Which key each client name belongs to: the first node to use a name keeps it, for the run.

Flower authenticates a node by its key (`flower-superlink --enable-supernode-auth`), but a client
states its name itself. The run's folder has one line for each binding; the last one of a name
counts, so the operator can give a name to a new key while the run goes on.
"""

from __future__ import annotations

import json
from pathlib import Path

from prelort.errors import ConfigError, UpdateRefused
from prelort.secure.signatures import fingerprint

FILE = "site_keys.jsonl"
"""In the run's folder."""


class SiteKeys:
    """The bindings of a run, in its folder. A line without a key frees the name."""

    def __init__(self, run: Path) -> None:
        self._file = run / FILE

    def read(self) -> dict[str, str]:
        """Name -> fingerprint. Raises `ConfigError` where the file is damaged."""
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        try:
            bound = {line["client"]: line["key"] for line in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{str(self._file)!r} is damaged: restore it") from None
        return {name: key for name, key in bound.items() if key}

    def check(self, name: str, public_key: bytes) -> None:
        """Raise `UpdateRefused` unless the name is this key's, or both are new."""
        key, bound = _fingerprint_of_node(public_key), self.read()
        if name in bound and bound[name] != key:
            raise UpdateRefused(
                f"has the key {key}, but this name is that of {bound[name]}: if the site has a new "
                "key, run `prelort site trust`"
            )
        for other, others_key in bound.items():
            if others_key == key and other != name:
                raise UpdateRefused(
                    f"has the key of {other!r}: if the site has a new name, run `prelort site "
                    "trust`"
                )

    def bind(self, name: str, public_key: bytes) -> None:
        """Give the name to this key; a name that the key had before is free then."""
        key, bound = _fingerprint_of_node(public_key), self.read()
        if bound.get(name) == key:
            return
        freed = [other for other, others_key in bound.items() if others_key == key]
        lines = [{"client": other, "key": ""} for other in freed] + [{"client": name, "key": key}]
        with self._file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def _fingerprint_of_node(public_key: bytes) -> str:
    try:
        return fingerprint(public_key)
    except ValueError:
        raise UpdateRefused("its node has no key: start it with a private key") from None
