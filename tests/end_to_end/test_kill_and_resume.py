"""kill -9 at any moment, then resume: the same adapters and events, bit for bit.

Real processes: forked by `killer.py`, which imports torch once, and killed by SIGKILL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import KILLED, LAST, Killer

from prelort.events import ClientFinished, RoundFinished, RunFinished, RunStarted
from run_files import adapters_of, assert_same_run, events_of

pytestmark = pytest.mark.chaos

KILLS: dict[str, dict[str, Any]] = {
    f"{name} {number}" + (f" #{count}" if count > 1 else ""): {
        "trap": "event",
        "name": name,
        "round": number,
        "count": count,
    }
    for name, number, count in [
        ("loading", 0, 1),
        ("run_started", 0, 1),
        ("evaluating", 0, 1),
        ("checkpointed", 0, 1),
        ("client_finished", 1, 1),
        ("round_started", 2, 1),
        ("client_finished", 2, 2),
        ("round_finished", 2, 1),
        ("evaluating", 2, 2),
        ("checkpointed", LAST, 1),
        ("run_finished", LAST, 1),
    ]
} | {
    "in the middle of a client": {"trap": "step", "count": 10},
    "before a checkpoint is renamed": {"trap": "rename", "ends": "checkpoints/00002"},
    "before the first checkpoint is renamed": {"trap": "rename", "ends": "checkpoints/00000"},
    "in the middle of a checkpoint": {"trap": "half file", "ends": "00002.tmp/state.safetensors"},
    "while an old checkpoint is deleted": {"trap": "deleting", "name": "00000"},
    "in the middle of a line": {"trap": "half event", "name": "client_finished", "round": 2},
    "in the middle of the first line": {"trap": "half event", "name": "run_started", "round": 0},
    "in the middle of an adapter": {
        "trap": "half file",
        "ends": "rank-4/adapter_model.safetensors",
    },
}


def test_the_undisturbed_run_is_whole(undisturbed: Path) -> None:
    """Guards what the others are compared with."""
    events = events_of(undisturbed)
    assert sum(isinstance(event, RoundFinished) for event in events) == LAST
    assert sum(isinstance(event, ClientFinished) for event in events) == 3 * LAST
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunFinished)
    ranks = {name.split("/")[1] for name in adapters_of(undisturbed)}
    assert ranks == {"rank-2", "rank-4", "rank-8"}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_killed_and_resumed_is_as_if_never_killed(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path, kill: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    assert killer.run(config_file, out, kill) == KILLED
    killer.finish(config_file, out)
    assert_same_run(out, undisturbed)


def test_killed_three_times_and_resumed_once_more_at_the_end(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    kills = [
        {"trap": "event", "name": "client_finished", "round": 1},
        {"trap": "rename", "ends": "checkpoints/00002"},
        {"trap": "event", "name": "round_finished", "round": 3},
    ]
    for number, kill in enumerate(kills):
        assert killer.run(config_file, out, kill, resume=number > 0) == KILLED
    killer.finish(config_file, out)
    assert_same_run(out, undisturbed)
    killer.finish(config_file, out)  # a finished run is left as it is
    assert_same_run(out, undisturbed)


def test_killed_and_its_newest_checkpoint_damaged(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    kill = {"trap": "event", "name": "client_finished", "round": 3}
    assert killer.run(config_file, out, kill) == KILLED
    newest = out / "checkpoints" / "00002" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert "falling back to the checkpoint before it" in killer.finish(config_file, out)
    assert_same_run(out, undisturbed)


def test_killed_before_the_folder_was_a_run(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    """There is nothing to resume; the same run can be started again."""
    out = tmp_path / "run"
    kill = {"trap": "rename", "ends": "config.toml"}
    assert killer.run(config_file, out, kill) == KILLED
    assert killer.run(config_file, out, {}, resume=True) == {"code": 1}
    assert "holds no run" in killer.output.read_text()
    killer.finish(config_file, out, resume=False)
    assert_same_run(out, undisturbed)
