"""What happens at the sites: killed, hanging, too late, too few, come back."""

import os
import re
import signal
from pathlib import Path

import pytest
from in_one_process import run_here
from loopback import Federation, kill_group, until

from prelort.events import ClientFailed, ClientJoined, RoundFinished, RoundStarted, Waiting
from run_files import adapters_of

LATE = 35.0
"""Seconds that a round waits; more than one takes here."""


def begun(federation: Federation, site: str, trainings: int) -> bool:
    """Whether the site's trainer has begun so many trainings."""
    log = federation.site_file(site).parent / "state" / "trainer.log"
    return log.is_file() and log.read_text().count("train: started") >= trainings


@pytest.mark.chaos
def test_a_killed_trainer_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    changes = {
        "partition": {"clients": 2},
        "ranks": {"mix": "2, 4"},
        "training": {"local_steps": 40},
        "evaluation": {"every": 0},
        "federation": {"rounds": 2, "min_clients": 2},
    }
    with Federation(tmp_path, changes).start(2) as federation:
        federation.start_run()
        until(lambda: begun(federation, "site-1", 1), 120, "the first training")
        first = federation.trainer("site-1")
        os.kill(first, signal.SIGKILL)
        until(lambda: begun(federation, "site-1", 3), 120, "the next round")
        assert federation.trainer("site-1") != first
        federation.runs[-1].wait(120)
        assert not any(isinstance(event, ClientFailed) for event in federation.events())
        assert adapters_of(federation.folder()) == adapters_of(run_here(tmp_path / "here", changes))


@pytest.mark.chaos
def test_sites_that_hang_or_die_are_left_out_and_come_back(tmp_path: Path) -> None:
    changes = {
        "evaluation": {"every": 0},
        "federation": {"rounds": 6, "min_clients": 1, "timeout": LATE},
    }
    with Federation(tmp_path, changes).start(2) as federation:
        federation.start_run()
        federation.wait_for(RoundFinished, 1)
        federation.set_site("site-3")
        federation.start_node("site-3")  # one that joins while the run goes
        joined = federation.wait_for(ClientJoined, client="client-2")
        assert joined.rank == 8
        federation.wait_for(RoundFinished, joined.round)
        hanging = federation.trainer("site-2")
        os.kill(hanging, signal.SIGSTOP)  # it takes the next message and never answers
        kill_group(federation.nodes["site-3"])
        first = federation.wait_for(ClientFailed)
        os.kill(hanging, signal.SIGCONT)
        federation.start_node("site-3")
        federation.runs[-1].wait(240)

        history = federation.history()
        assert history.finished
        record = history.rounds[first.round]
        assert {"client-1", "client-2"} <= record.failures.keys()
        assert record.failures["client-1"].reason == f"did not answer within {LATE:g} s"
        assert "client-0" in record.replies
        # Both are back in the end, with answers to the round that they were asked in.
        assert {"client-0", "client-1", "client-2"} <= history.rounds[6].replies.keys()


@pytest.mark.chaos
def test_too_few_sites_are_waited_for_and_the_run_stops_cleanly(tmp_path: Path) -> None:
    changes = {
        "partition": {"clients": 2},
        "ranks": {"mix": "2, 4"},
        "evaluation": {"every": 0},
        "federation": {"rounds": 6, "min_clients": 2, "wait": 25.0},
    }
    with Federation(tmp_path, changes).start(1) as federation:
        shown = federation.run()
        # On a busy machine the one that is there may not have introduced itself by then.
        assert re.search(
            r"[01] clients are connected after waiting 25 s \(federation.wait\), 2", shown
        )
        waited = [event for event in federation.events() if isinstance(event, Waiting)]
        assert all(event.needed == 2 for event in waited)

        federation.set_site("site-2")
        federation.start_node("site-2")
        federation.start_run()
        federation.wait_for(RoundStarted, 1)
        second = federation.run()  # while the first one runs
        assert "is in use: another prelort process is running it" in second
        federation.runs[-2].wait(120)
        assert federation.history().finished
        assert adapters_of(federation.folder()) == adapters_of(run_here(tmp_path / "here", changes))
        assert "is finished" in federation.run()
