"""Sizes in bytes as people write them: ``8GiB``, ``512 MiB``, ``80GB``."""

from __future__ import annotations

import re

from prelort.errors import ConfigError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
"""Units in capitals -> bytes; decimal, and binary with an i."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", re.ASCII)


def parse(text: str, where: str = "size") -> int:
    """The bytes that ``text`` means, rounded down. Raises `ConfigError` naming ``where``.

    A unit is always needed: whether 8 means GB or GiB nobody should have to guess.
    """
    found = _SIZE.fullmatch(text)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ConfigError(
            f"{where} {text!r} is not a size: write a number and a unit, e.g. 8GiB, 512 MiB or "
            "80GB (B, kB, MB, GB, TB or KiB, MiB, GiB, TiB)"
        )
    size = int(float(found[1]) * unit)
    if size < 1:
        raise ConfigError(f"{where} {text!r} is not allowed: it must be at least one byte")
    return size


def show(count: float) -> str:
    """A number of bytes in binary units with three digits: ``7.45 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
