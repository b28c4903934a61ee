"""DP-SGD at real sites: their budgets, also when a trainer or the server is killed (kill -9)."""

import json
import os
import signal
from pathlib import Path

import pytest
from loopback import Federation, kill_group, until

from prelort.events import BudgetSpent, ClientFailed, ClientFinished
from prelort.privacy.example import SPENT

STEPS = 8
ROUNDS = 3
BUDGET = {"epsilon": 6.0, "delta": 1e-5}
CHANGES = {
    "partition": {"clients": 2},
    "ranks": {"mix": "2, 4"},
    "training": {"local_steps": STEPS},
    "privacy": {**BUDGET, "unit": "example"},
    "evaluation": {"every": 0},
    "federation": {"rounds": ROUNDS, "min_clients": 2},
}


def paid(federation: Federation, site: str) -> int:
    """The rounds that a site has paid for, by the ledger in its own folder."""
    folder = federation.site_file(site).parent / "state" / "privacy"
    steps = [one["count"] for file in folder.glob("*.json") for one in json.loads(file.read_text())]
    return sum(steps) // STEPS


@pytest.mark.chaos
def test_a_killed_trainer_pays_for_its_round_again_and_ends_earlier(tmp_path: Path) -> None:
    with Federation(tmp_path, CHANGES) as federation:
        federation.start_superlink()
        for number, site in enumerate(("site-1", "site-2")):
            federation.set_site(site, partition=number, privacy=BUDGET)
            federation.start_node(site)
        federation.start_run()
        until(lambda: paid(federation, "site-1") == 1, 120, "the first step")
        os.kill(federation.trainer("site-1"), signal.SIGKILL)
        federation.runs[-1].wait(240)

        history = federation.history()
        assert history.finished
        assert history.done == ROUNDS
        (failed,) = [event for event in federation.events() if isinstance(event, ClientFailed)]
        assert (failed.round, failed.client) == (ROUNDS, "client-0")
        assert SPENT in failed.reason
        assert paid(federation, "site-1") == paid(federation, "site-2") == ROUNDS
        assert 0.9 * 6.0 < history.epsilon <= 6.0


@pytest.mark.chaos
def test_a_killed_server_asks_again_and_the_run_ends_with_the_budget(tmp_path: Path) -> None:
    with Federation(tmp_path, CHANGES).start(2) as federation:
        stream = federation.start_run()
        federation.wait_for(ClientFinished, 2)
        until(lambda: paid(federation, "site-1") == paid(federation, "site-2") == 2, 60, "round 2")
        os.kill(federation.server_app().pid, signal.SIGKILL)
        kill_group(stream)
        federation.run()

        history = federation.history()
        assert history.finished
        assert history.done == ROUNDS - 1
        assert paid(federation, "site-1") == paid(federation, "site-2") == ROUNDS
        assert any(isinstance(event, BudgetSpent) for event in federation.events())
        assert 0.9 * 6.0 < history.epsilon <= 6.0
