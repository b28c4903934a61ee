"""Diagnostics of real runs: in every round's event, the same after a kill, and in the results."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import LAST, Killer

import prelort
from prelort.config import Config, to_toml
from prelort.report.write import write_results
from prelort.study.definition import of_run
from prelort.study.run import run_study

KEYS = {
    "layers",
    "aggregation_noise",
    "client_dispersion",
    "initialization_noise",
    "client_drift",
    "truncation_noise",
    "least_truncation_noise",
    "effective_rank",
    "energy_share",
    "slot_energy",
    "tail_kept",
}


def aggregated(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "aggregated"]


def test_every_round_tells_them(undisturbed: Path) -> None:
    events = aggregated(undisturbed)
    assert len(events) == LAST
    for event in events:
        found = event["diagnostics"]
        assert found.keys() == KEYS
        assert found["layers"]["measured"] == found["layers"]["of"] > 0
        for key in ("truncation_noise", "least_truncation_noise", "energy_share", "tail_kept"):
            assert list(found[key]) == ["2", "4", "8"], key
        assert found["truncation_noise"]["8"] == 0
        assert found["aggregation_noise"] > 0
        assert 1 <= found["effective_rank"] <= 8
        assert len(found["slot_energy"]) == 8
        assert event["seconds"]["diagnose"] > 0
    # B is zero at first, so there is nothing to be relative to.
    assert events[0]["diagnostics"]["client_drift"]["mean"] is None
    assert events[1]["diagnostics"]["client_drift"]["mean"] > 0
    assert events[1]["diagnostics"]["initialization_noise"]["max"] > 0


@pytest.mark.parametrize("number, count", [(1, 1), (2, 1), (3, 2)])
def test_a_killed_run_tells_the_same(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path, number: int, count: int
) -> None:
    """Killed when a client of the round has answered: the round is diagnosed anew."""
    out = tmp_path / "run"
    kill = {"trap": "event", "name": "client_finished", "round": number, "count": count}
    assert killer.run(config_file, out, kill) == {"signal": signal.SIGKILL}
    assert len(aggregated(out)) == number - 1

    code, said = killer.cli("run", "--resume", str(out), "-q")

    assert code == 0, said
    found = [event["diagnostics"] for event in aggregated(out)]
    assert found == [event["diagnostics"] for event in aggregated(undisturbed)]


def test_several_methods_in_one_picture_and_table(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(federation={"rounds": 2, "clients_per_round": 3})
    (tmp_path / "run.toml").write_text(to_toml(config))
    study = of_run(tmp_path / "run.toml", methods=["prelort", "fed-plora", "fedsa-lora"])
    run_study(study, tmp_path / "runs")
    results = (tmp_path / "runs" / "results.md").read_text(encoding="utf-8")
    table = results[results.index("Diagnostics of the last round") :]
    assert "| prelort |" in table
    assert "| fed-plora |" in table
    assert "fedsa-lora" not in table
    picture = tmp_path / "runs" / "diagnostics.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "diagnostics" not in aggregated(tmp_path / "runs" / "fedsa-lora")[-1]
    found = aggregated(tmp_path / "runs" / "fed-plora")[-1]["diagnostics"]
    assert found["initialization_noise"] == {"mean": 0.0, "max": 0.0}
    assert found["tail_kept"] == {"2": None, "4": None, "8": None}


def test_they_can_be_left_out(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    federation = {"rounds": 1, "clients_per_round": 2}
    config = make_config(federation=federation, evaluation={"diagnostics": False})
    prelort.run(config, tmp_path / "run")
    (event,) = aggregated(tmp_path / "run")
    assert "diagnostics" not in event
    assert event["seconds"]["diagnose"] == 0
    write_results(prelort.read(tmp_path / "run"), tmp_path)
    assert not (tmp_path / "diagnostics.png").exists()
    assert "Diagnostics" not in (tmp_path / "results.md").read_text(encoding="utf-8")
