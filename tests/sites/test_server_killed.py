"""kill -9 at the server's side, in each phase of a round: the run ends in the same adapters."""

import os
import signal
from pathlib import Path

import pytest
from in_one_process import run_here
from loopback import Federation, kill_group

from prelort.events import (
    ClientFinished,
    ClientJoined,
    ClientLeft,
    RoundFinished,
    RoundStarted,
    RunFinished,
    Waiting,
)
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


def assert_logged_once(federation: Federation) -> None:
    """The log of all the attempts is that of one run."""
    events = [
        (type(event), event.round, getattr(event, "client", None))
        for event in federation.events()
        if not isinstance(event, Waiting | ClientJoined | ClientLeft)
    ]
    assert len(events) == len(set(events))
    assert events[-1][:2] == (RunFinished, 2)


@pytest.mark.chaos
def test_the_servers_app_is_killed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with Federation(tmp_path, CHANGES).start(2) as federation:
        for event, of_round in (
            (RoundStarted, 1),  # while the sites train
            (ClientFinished, 1),  # while another trains
            (RoundFinished, 1),  # while it is checkpointed, and the next round begins
        ):
            stream = federation.start_run()
            federation.wait_for(event, of_round)
            os.kill(federation.server_app().pid, signal.SIGKILL)
            kill_group(stream)
        federation.run()
        assert adapters_of(federation.folder()) == undisturbed
        assert_logged_once(federation)


@pytest.mark.chaos
def test_the_superlink_is_killed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with Federation(tmp_path, CHANGES).start(2) as federation:
        stream = federation.start_run()
        federation.wait_for(ClientFinished, 2)
        assert federation.superlink is not None
        federation.superlink.kill()  # and not what it has started
        federation.superlink.wait()
        kill_group(stream)
        federation.start_superlink()  # the sites come back by themselves
        federation.run()
        assert adapters_of(federation.folder()) == undisturbed
        assert_logged_once(federation)
