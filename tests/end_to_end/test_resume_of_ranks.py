"""kill -9 while ranks change and clients keep factors of their own: resumed, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import KILLED, LAST, Killer

from prelort.config import Config, to_toml
from prelort.experiment import checkpoint
from run_files import assert_same_run, files_of

pytestmark = pytest.mark.chaos

Make = Callable[..., Config]

RUNS: dict[str, dict[str, Any]] = {
    "a schedule": {
        "ranks": {
            "mix": "2, 2, 4, 4, 8, 8",
            "assign": "in-order",
            "schedule": {"2": "8, 8, 4, 4, 2, 2", "3": "4*1"},
        },
        "evaluation": {"every": 2, "at_clients": True},
    },
    "by loss": {
        "ranks": {"mix": "2*0.5, 8*0.5", "allocation": "by-loss", "high_share": 0.5},
        "data": {"validation_fraction": 0.2},
    },
    "clients that prune": {
        "method": {"name": "hetlora", "options": {"hetlora": {"gamma": 0.75, "penalty": 30.0}}},
        "federation": {"rounds": LAST, "clients_per_round": 6},
    },
    "factors of their own": {
        "method": {"name": "fedsa-lora"},
        "ranks": {
            "mix": "2, 2, 4, 4, 8, 8",
            "assign": "in-order",
            "schedule": {"2": "8, 8, 4, 4, 2, 2", "3": "2, 8, 8, 4, 4, 2"},
        },
        "federation": {"rounds": LAST, "clients_per_round": 5},
    },
}

KILLS: dict[str, list[tuple[str, int]]] = {
    "a schedule": [("rank_changed", 1), ("client_finished", 3), ("clients_evaluated", 2)],
    "by loss": [("client_finished", 1), ("rank_changed", 1), ("client_finished", 2)],
    "clients that prune": [("rank_changed", 2), ("client_finished", 3)],
    "factors of their own": [("client_finished", 2), ("round_finished", 3)],
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, make_config: Make) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    paths = {}
    for name, changes in RUNS.items():
        values = {"federation": {"rounds": LAST, "clients_per_round": 3}, **changes}
        paths[name] = folder / f"{name.replace(' ', '-')}.toml"
        paths[name].write_text(to_toml(make_config(lora={"dropout": 0.1}, **values)))
    return paths


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, killer: Killer, configs: dict[str, Path]
) -> Callable[[str], Path]:
    """The folder of a run that was never killed, made when it is first asked for."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            killer.finish(configs[name], out, resume=False)
            made[name] = out
        return made[name]

    return run


@pytest.mark.parametrize(
    "name, event, number, damaged",
    [
        *[(name, *kill, False) for name, kills in KILLS.items() for kill in kills],
        # The run goes back two rounds, and so do the clients with what they keep.
        *[(name, "round_finished", 3, True) for name in RUNS],
    ],
)
def test_killed_and_resumed_is_as_if_never_killed(
    tmp_path: Path,
    killer: Killer,
    configs: dict[str, Path],
    undisturbed: Callable[[str], Path],
    name: str,
    event: str,
    number: int,
    damaged: bool,
) -> None:
    out = tmp_path / "run"
    kill = {"trap": "event", "name": event, "round": number}
    assert killer.run(configs[name], out, kill) == KILLED
    if damaged:
        newest = out / "checkpoints" / "00002" / "state.safetensors"
        newest.write_bytes(newest.read_bytes()[:-100])
    output = killer.finish(configs[name], out)
    assert ("falling back to the checkpoint before it" in output) == damaged

    expected = undisturbed(name)
    assert_same_run(out, expected)
    assert files_of(out / "personal") == files_of(expected / "personal")
    for done in (LAST - 1, LAST):
        found, wanted = (
            checkpoint.load(path / "checkpoints" / f"{done:05d}").state for path in (out, expected)
        )
        assert found.ranks == wanted.ranks
