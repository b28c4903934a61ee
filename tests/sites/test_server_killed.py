"""kill -9 at the server's side, in each phase of a round: the run ends in the same adapters."""

import os
import signal
from pathlib import Path

import pytest
from in_one_process import run_here
from loopback import Federation, kill_group

from run_files import adapters_of

CHANGES = {
    "partition": {"clients": 2},
    "ranks": {"mix": "2, 4"},
    "evaluation": {"every": 0},
    "federation": {"rounds": 2, "min_clients": 2},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return adapters_of(run_here(tmp_path_factory.mktemp("here") / "run", CHANGES))


def assert_told_once(federation: Federation) -> None:
    """The log of all the attempts is that of one run."""
    told = [(e["event"], e["round"], e.get("client")) for e in federation.events()]
    told = [entry for entry in told if entry[0] not in ("waiting", "client_joined", "client_left")]
    assert len(told) == len(set(told))
    assert told[-1][:2] == ("run_finished", 2)


@pytest.mark.chaos
def test_the_servers_app_is_killed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with Federation(tmp_path, CHANGES).start(2) as federation:
        for event, of_round in (
            ("round_started", 1),  # while the sites train
            ("client_finished", 1),  # while another trains
            ("aggregated", 1),  # while it is checkpointed, and the next round begins
        ):
            stream = federation.start_run()
            federation.wait_for(event, of_round)
            os.kill(federation.server_app().pid, signal.SIGKILL)
            kill_group(stream)
        federation.run()
        assert adapters_of(federation.folder()) == undisturbed
        assert_told_once(federation)


@pytest.mark.chaos
def test_the_superlink_is_killed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with Federation(tmp_path, CHANGES).start(2) as federation:
        stream = federation.start_run()
        federation.wait_for("client_finished", 2)
        assert federation.superlink is not None
        federation.superlink.kill()  # and not what it has started
        federation.superlink.wait()
        kill_group(stream)
        federation.start_superlink()  # the sites come back by themselves
        federation.run()
        assert adapters_of(federation.folder()) == undisturbed
        assert_told_once(federation)
