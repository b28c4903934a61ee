"""A machine's clock that jumps: time-outs and results do not look at the time of day."""

import itertools
import time
from pathlib import Path

import pytest

import prelort
from prelort.config import check
from run_files import adapters_of

CONFIG = check(
    {
        "threads": 1,
        "data": {"max_train_examples": 24, "max_test_examples": 8, "max_length": 16},
        "partition": {"by": "iid", "clients": 2},
        "ranks": {"mix": "2, 4"},
        "training": {"local_steps": 2},
        "federation": {"rounds": 2, "clients_per_round": 1.0, "timeout": 60.0},
    }
)


def test_a_run_does_not_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prelort.run(CONFIG, tmp_path / "steady")
    real, jumps = time.time, itertools.cycle([0.0, 1e6, -1e6, 3e7, -3e7])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    prelort.run(CONFIG, tmp_path / "jumping")
    monkeypatch.undo()
    assert adapters_of(tmp_path / "jumping") == adapters_of(tmp_path / "steady")
    assert adapters_of(tmp_path / "steady")
