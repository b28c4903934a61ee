"""A user's own method: one class in a file of their own, with a memory that survives a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import KILLED, Killer

from prelort.config import load, to_toml
from run_files import adapters_of, assert_same_run

OWN = """
import torch
from prelort.adapters import LoraAdapter
from prelort.methods import PreLort, ServerState


class Momentum(PreLort):
    name = "momentum"
    summary = "PreLort with server momentum"
    paper = "none"

    def aggregator(self, state):
        inner = super().aggregator(state)

        class Moving:
            add = inner.add

            def result(self):
                old, mean = state.adapter.tensors(), inner.result().adapter.tensors()
                speed = {
                    name: 0.5 * state.memory.get(name, torch.zeros(())) + mean[name] - old[name]
                    for name in old
                }
                moved = {name: old[name] + speed[name] for name in old}
                adapter = LoraAdapter.from_tensors(moved, state.adapter.scale)
                return ServerState(adapter, state.round + 1, speed)

        return Moving()
"""


@pytest.fixture(scope="module")
def own(killer: Killer, config_file: Path) -> Path:
    """A configuration of that method, in the folder where its file is."""
    (killer.folder / "my_method.py").write_text(OWN)
    path = killer.folder / "momentum.toml"
    path.write_text(to_toml(load(config_file, ["method.name=my_method:Momentum"])))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, killer: Killer, own: Path) -> Path:
    """The folder of a run of that method that was never killed."""
    out = tmp_path_factory.mktemp("own") / "run"
    killer.finish(own, out, resume=False)
    return out


def test_it_runs_from_the_folder_where_its_file_is(finished: Path, undisturbed: Path) -> None:
    assert adapters_of(finished).keys() == adapters_of(undisturbed).keys()
    name = "adapters/rank-8/adapter_model.safetensors"
    assert adapters_of(finished)[name] != adapters_of(undisturbed)[name]


@pytest.mark.parametrize("number", [1, 3])
def test_its_memory_survives_a_kill(
    tmp_path: Path, killer: Killer, own: Path, finished: Path, number: int
) -> None:
    out = tmp_path / "killed"
    kill = {"trap": "event", "name": "round_finished", "round": number}
    assert killer.run(own, out, kill) == KILLED
    killer.finish(own, out)
    assert_same_run(out, finished)


def test_several_methods_with_ones_own_among_them(
    tmp_path: Path, killer: Killer, config_file: Path, own: Path
) -> None:
    out = tmp_path / "several"
    methods = ["-m", "prelort", "-m", "my_method:Momentum"]
    code, said = killer.cli("run", str(config_file), *methods, "--out", str(out), "-q")
    assert code == 0, said
    assert (out / "my_method-Momentum" / "adapters" / "rank-8").is_dir()
    assert "my_method:Momentum" in (out / "results.md").read_text()
