"""One configuration on three engines gives the same adapters, to the bit."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from loopback import TINY, Federation, merged

import prelort
from prelort import config as configuration
from prelort.experiment.stage import StageOf, in_process


def adapters_of(run: Path) -> dict[str, bytes]:
    files = sorted((run / "adapters").rglob("*.safetensors"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def run_here(path: Path, changes: dict[str, Any], stage_of: StageOf = in_process) -> Path:
    # Who is alone here need not wait for anybody.
    alone = {"federation": {"min_clients": None}}
    values = merged(merged(TINY, changes), alone)
    del values["federation"]["min_clients"]
    prelort.run(configuration.check(values), path, stage_of=stage_of)
    return path


def test_real_sites_give_the_adapters_of_a_run_in_one_process(tmp_path: Path) -> None:
    changes = {"federation": {"rounds": 2}}
    with Federation(tmp_path, changes).start() as federation:
        federation.run()
        found = adapters_of(federation.folder())
    expected = adapters_of(run_here(tmp_path / "here", changes))
    assert list(expected) == [f"adapters/rank-{r}/adapter_model.safetensors" for r in (2, 4, 8)]
    assert found == expected


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'prelort[simulation]'"
)
def test_the_simulation_gives_the_adapters_of_a_run_in_one_process(tmp_path: Path) -> None:
    from prelort.experiment.simulation import simulated

    changes = {"federation": {"rounds": 2}}
    found = adapters_of(run_here(tmp_path / "simulated", changes, simulated))
    assert found == adapters_of(run_here(tmp_path / "here", changes))
