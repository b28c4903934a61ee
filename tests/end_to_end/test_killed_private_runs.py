"""kill -9 and resume under differential privacy: no noise twice, and no more than the budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import KILLED, LAST, Killer

from prelort.config import Config, to_toml
from prelort.events import BudgetSpent, RoundFinished
from run_files import adapters_of, events_of

pytestmark = pytest.mark.chaos

STEPS = 2
KILLS: dict[str, dict[str, Any]] = {
    "while the last client of round 2 trains": {"trap": "step", "count": 12 + 12},
    "when the adapter of round 2 is known": {"trap": "event", "name": "round_finished", "round": 2},
}


@pytest.fixture(params=["client", "example"])
def config_file(
    request: pytest.FixtureRequest, tmp_path: Path, make_config: Callable[..., Config]
) -> Path:
    path = tmp_path / "run.toml"
    config = make_config(
        federation={"rounds": LAST, "clients_per_round": 1.0},
        training={"local_steps": STEPS, "batch_size": 4},
        privacy={"epsilon": 4.0, "delta": 1e-3, "unit": request.param},
    )
    path.write_text(to_toml(config))
    return path


def paid(run: Path) -> list[int]:
    """The rounds that the server, or that each client has paid for."""
    if (run / "privacy.json").is_file():
        return [json.loads((run / "privacy.json").read_text())["releases"]]
    ledgers = [json.loads(file.read_text()) for file in sorted((run / "privacy").glob("*.json"))]
    return [sum(one["count"] for one in ledger) // STEPS for ledger in ledgers]


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_round_draws_new_noise_and_is_paid_again(
    tmp_path: Path, killer: Killer, config_file: Path, kill: dict[str, Any]
) -> None:
    """Two copies of what the kill left behind go on with noise of their own."""
    out, copy = tmp_path / "run", tmp_path / "copy"
    assert killer.run(config_file, out, kill) == KILLED
    before = set(paid(out))
    shutil.copytree(out, copy)
    for folder in (out, copy):
        killer.finish(config_file, folder)
        events = events_of(folder)
        done = [event for event in events if isinstance(event, RoundFinished)]
        # Of round 2, unless the server was killed before it added its noise.
        repeated = before == {2}
        assert repeated or before == {1}
        assert len(done) == (LAST - 1 if repeated else LAST)
        assert any(isinstance(event, BudgetSpent) for event in events) == repeated
        assert set(paid(folder)) == {LAST}
        assert 0.9 * 4.0 < done[-1].stats.epsilon <= 4.0
    assert adapters_of(out) != adapters_of(copy)
