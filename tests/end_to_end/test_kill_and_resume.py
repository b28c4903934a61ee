"""kill -9 at any moment, then `prelort run --resume`: the same adapters and events, bit for bit.

Real processes: forked by `killer.py`, which imports torch once, and killed by SIGKILL.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import LAST, Killer, adapters_of, assert_same_run, events_of

KILLED: dict[str, dict[str, Any]] = {
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
        ("checkpointing", 0, 1),
        ("checkpointed", 0, 1),
        ("client_finished", 1, 1),
        ("round_started", 2, 1),
        ("client_finished", 2, 2),
        ("aggregated", 2, 1),
        ("evaluating", 2, 2),
        ("checkpointing", 2, 1),
        ("checkpointed", LAST, 1),
        ("run_finished", LAST, 1),
    ]
} | {
    "in the middle of a client": {"trap": "training", "count": 5},
    "before a checkpoint is renamed": {"trap": "rename", "ends": "checkpoints/00002"},
    "before the first checkpoint is renamed": {"trap": "rename", "ends": "checkpoints/00000"},
    "in the middle of writing a checkpoint": {
        "trap": "half file",
        "ends": "00002.tmp/state.safetensors",
    },
    "while an old checkpoint is deleted": {"trap": "deleting", "name": "00000"},
    "in the middle of a line of the log": {
        "trap": "half event",
        "name": "client_finished",
        "round": 2,
    },
    "in the middle of the first line of the log": {
        "trap": "half event",
        "name": "run_started",
        "round": 0,
    },
    "between two adapters": {"trap": "exporting", "count": 2},
    "in the middle of an adapter": {
        "trap": "half file",
        "ends": "rank-4/adapter_model.safetensors",
    },
}


def test_the_undisturbed_run_is_whole(undisturbed: Path) -> None:
    """Guards what the others are compared with."""
    kinds = [event["event"] for event in events_of(undisturbed)]
    assert kinds.count("aggregated") == LAST
    assert kinds.count("client_finished") == 3 * LAST
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert {name.split("/")[1] for name in adapters_of(undisturbed)} == {
        "rank-2",
        "rank-4",
        "rank-8",
    }


@pytest.mark.parametrize("kill", KILLED.values(), ids=KILLED)
def test_killed_and_resumed_is_as_if_never_killed(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path, kill: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    assert killer.run(config_file, out, kill) == {"signal": signal.SIGKILL}

    code, said = killer.cli("run", "--resume", str(out), "--quiet")

    assert code == 0, said
    assert "Traceback" not in said
    assert_same_run(out, undisturbed)


def test_killed_three_times(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    kills = [
        {"trap": "event", "name": "client_finished", "round": 1},
        {"trap": "rename", "ends": "checkpoints/00002"},
        {"trap": "event", "name": "aggregated", "round": 3},
    ]
    for number, kill in enumerate(kills):
        ended = killer.run(config_file, out, kill, resume=number > 0)
        assert ended == {"signal": signal.SIGKILL}
    assert killer.cli("run", "--resume", str(out), "--quiet")[0] == 0
    assert_same_run(out, undisturbed)


def test_killed_and_its_newest_checkpoint_damaged(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    kill = {"trap": "event", "name": "client_finished", "round": 3}
    assert killer.run(config_file, out, kill) == {"signal": signal.SIGKILL}
    newest = out / "checkpoints" / "00002" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])

    code, said = killer.cli("run", "--resume", str(out))

    assert code == 0, said
    assert "warning:" in said
    assert "falling back to the checkpoint before it" in said
    assert_same_run(out, undisturbed)


def test_a_finished_run_resumed_is_left_as_it_is(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    out = tmp_path / "run"
    assert killer.run(config_file, out, {}) == {"code": 0}
    assert killer.cli("run", "--resume", str(out), "--quiet")[0] == 0
    assert_same_run(out, undisturbed)


def test_killed_before_the_folder_was_a_run(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    """There is nothing to resume; the same command can be given again."""
    out = tmp_path / "run"
    kill = {"trap": "rename", "ends": "config.toml"}
    assert killer.run(config_file, out, kill) == {"signal": signal.SIGKILL}

    code, said = killer.cli("run", "--resume", str(out))
    assert code == 2
    assert "holds no run" in said
    assert killer.run(config_file, out, {}) == {"code": 0}
    assert_same_run(out, undisturbed)


def test_with_a_process_started_from_the_shell(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path
) -> None:
    """The same without forks: `python -m prelort.cli` resumes."""
    out = tmp_path / "run"
    kill = {"trap": "event", "name": "aggregated", "round": 2}
    assert killer.run(config_file, out, kill) == {"signal": signal.SIGKILL}
    resumed = subprocess.run(
        [sys.executable, "-m", "prelort.cli", "run", "--resume", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "perplexity by rank prefix" in resumed.stdout
    assert resumed.stderr == ""  # no progress bars nor notices of the libraries
    assert_same_run(out, undisturbed)
