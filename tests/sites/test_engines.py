"""One configuration on three engines gives the same adapters, to the bit."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from in_one_process import alone, run_here
from loopback import Federation

from run_files import adapters_of

PLAIN: dict[str, Any] = {"federation": {"rounds": 2}}
MASKED: dict[str, Any] = {
    **PLAIN,
    "ranks": {"mix": "2, 8, 8"},
    "privacy": {"secure_aggregation": True, "min_holders": 2},
}
"""Sums of masked replies are exact, hence equal on every engine too."""
HIDDEN: dict[str, Any] = {
    **MASKED,
    "federation": {"rounds": 2, "clients_per_round": 1.0, "min_clients": 3},
    "method": {"weights": "uniform"},
    "privacy": {"secure_aggregation": True, "min_holders": 2, "hide_ranks": True},
}


def sign(federation: Federation) -> None:
    """Let the sites sign their keys of secure aggregation, each other's in one file."""
    sites = ["site-1", "site-2", "site-3"]
    for number, site in enumerate(sites):
        federation.script("key.sh", site)
        federation.set_site(site, partition=number, key="key", peers="../peers.pub")
    folder = federation.path / "sites"
    keys = [(folder / site / "key.pub").read_text() for site in sites]
    (folder / "peers.pub").write_text("".join(keys))


@pytest.mark.chaos
@pytest.mark.parametrize(
    "changes", [PLAIN, MASKED, HIDDEN], ids=["plain", "signed and masked", "of hidden rank"]
)
def test_real_sites_give_the_adapters_of_a_run_in_one_process(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with Federation(tmp_path, changes) as federation:
        federation.start()
        if changes is not PLAIN and shutil.which("ssh-keygen"):
            sign(federation)
        federation.run()
        found = adapters_of(federation.folder())
        log = (federation.folder() / "metrics.jsonl").read_bytes()
    expected = adapters_of(run_here(tmp_path / "here", changes))
    assert (b'"rank":null' in log) == (changes is HIDDEN)
    assert len({Path(name).parent.name for name in expected}) > 1
    assert found == expected


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'prelort[simulation]'"
)


@needs_ray
@pytest.mark.parametrize(
    "changes", [PLAIN, MASKED, HIDDEN], ids=["plain", "masked", "of hidden rank"]
)
def test_the_simulation_gives_the_adapters_of_a_run_in_one_process(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    from prelort.experiment.simulation import run_simulated

    run_simulated(alone(changes), tmp_path / "simulated")
    expected = adapters_of(run_here(tmp_path / "here", changes))
    assert adapters_of(tmp_path / "simulated") == expected


@pytest.mark.chaos
@needs_ray
def test_flwr_run_on_flowers_simulation_gives_the_adapters_of_a_run_in_one_process(
    tmp_path: Path,
) -> None:
    changes = {  # the simulation has two nodes if it is not asked for more
        "partition": {"clients": 2},
        "ranks": {"mix": "2, 8"},
        "federation": {"rounds": 2, "min_clients": 2},
    }
    with Federation(tmp_path, changes) as federation:
        federation.start_superlink("--simulation")
        federation.run()
        found = adapters_of(federation.folder())
    assert found == adapters_of(run_here(tmp_path / "here", changes)) != {}
