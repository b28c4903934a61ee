"""The same configuration in one process, to compare with."""

from pathlib import Path
from typing import Any

from loopback import TINY, merged

import prelort
from prelort import config as configuration
from prelort.config import Config


def alone(changes: dict[str, Any]) -> Config:
    """The sites' configuration, without waiting for other processes."""
    values = merged(merged(TINY, changes), {"federation": {"min_clients": None}})
    del values["federation"]["min_clients"]
    return configuration.check(values)


def run_here(path: Path, changes: dict[str, Any]) -> Path:
    prelort.run(alone(changes), path)
    return path
