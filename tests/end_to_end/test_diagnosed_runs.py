"""Diagnostics of real runs: in every round's event, and the same after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from processes import LAST

import prelort
from prelort.config import Config
from prelort.events import RoundStats
from prelort.experiment.folder import RunFolder

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
    "dimension_energy",
    "tail_kept",
}


def rounds_of(run: Path) -> list[RoundStats]:
    """The statistics of the rounds that are done."""
    rounds = RunFolder(run).history().rounds.values()
    return [record.stats for record in rounds if record.stats is not None]


def test_every_round_has_them(undisturbed: Path) -> None:
    rounds = rounds_of(undisturbed)
    assert len(rounds) == LAST
    for stats in rounds:
        found = stats.diagnostics
        assert found is not None
        assert found.keys() == KEYS
        assert found["layers"]["measured"] == found["layers"]["of"] > 0
        for key in ("truncation_noise", "least_truncation_noise", "energy_share", "tail_kept"):
            assert list(found[key]) == ["2", "4", "8"], key
        assert found["truncation_noise"]["8"] == 0
        assert found["aggregation_noise"] > 0
        assert 1 <= found["effective_rank"] <= 8
        assert len(found["dimension_energy"]) == 8
        assert stats.seconds.diagnose > 0
    first, second = (stats.diagnostics or {} for stats in rounds[:2])
    # B is zero at first, so there is nothing to be relative to.
    assert first["client_drift"]["mean"] is None
    assert second["client_drift"]["mean"] > 0
    assert second["initialization_noise"]["max"] > 0


@pytest.mark.parametrize(
    "method, diagnostics, there",
    [("fed-plora", True, True), ("fedsa-lora", True, False), ("prelort", False, False)],
)
def test_they_are_left_out_where_not_wanted_or_without_a_global_model(
    tmp_path: Path, make_config: Callable[..., Config], method: str, diagnostics: bool, there: bool
) -> None:
    config = make_config(
        method={"name": method},
        federation={"rounds": 2, "clients_per_round": 2},
        evaluation={"diagnostics": diagnostics},
    )
    prelort.run(config, tmp_path / "run")
    stats = rounds_of(tmp_path / "run")[-1]
    assert (stats.diagnostics is not None) == there
    assert (stats.seconds.diagnose > 0) == there
    if stats.diagnostics is not None:
        assert stats.diagnostics["initialization_noise"] == {"mean": 0.0, "max": 0.0}
        assert stats.diagnostics["tail_kept"] == {"2": None, "4": None, "8": None}
