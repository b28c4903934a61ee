"""Sizes with units: ``8GiB``, ``512 MiB``, ``80GB``."""

from __future__ import annotations

import re

from prelort.errors import ConfigError

UNITS = {"B": 1}
"""Units in capitals -> bytes; decimal, and binary with an i."""
for _power, _prefix in enumerate("KMGT", start=1):
    UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", re.ASCII)


def parse(text: str, where: str = "size") -> int:
    """The bytes of a size, rounded down. Raises `ConfigError` naming ``where``.

    A unit is required: 8 could mean GB or GiB.
    """
    match = _SIZE.fullmatch(text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"{where} {text!r} is not a size: write a number and a unit, e.g. 8GiB, 512 MiB or "
            "80GB (B, kB, MB, GB, TB or KiB, MiB, GiB, TiB)"
        )
    size = int(float(match[1]) * unit)
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
