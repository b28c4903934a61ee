"""The same configuration in one process, to compare with."""

from pathlib import Path
from typing import Any

from loopback import TINY, merged

import prelort
from prelort import config as configuration
from prelort.experiment.stage import StageOf, in_process


def run_here(path: Path, changes: dict[str, Any], stage_of: StageOf = in_process) -> Path:
    # Who is alone here need not wait for anybody.
    alone = {"federation": {"min_clients": None}}
    values = merged(merged(TINY, changes), alone)
    del values["federation"]["min_clients"]
    prelort.run(configuration.check(values), path, stage_of=stage_of)
    return path
