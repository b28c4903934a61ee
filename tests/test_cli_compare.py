"""`prelort compare` as a user sees it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import CommandLine
from prelort.config import Config, to_toml
from prelort.report.live import Display


@pytest.fixture
def study(tmp_path: Path, make_config: Callable[..., Config]) -> Path:
    file = tmp_path / "mine.toml"
    config = make_config(
        federation={"rounds": 1, "clients_per_round": 2}, evaluation={"diagnostics": False}
    )
    section = '[compare]\nmethods = ["prelort", "zero-padding"]\nseeds = [0]\n'
    file.write_text(to_toml(config) + section)
    return file


@pytest.mark.usefixtures("pictures")
def test_prints_the_tables_and_where_everything_is(
    command_line: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = command_line("compare", study)
    assert first.code == 0
    out = Path("runs") / "mine"
    for line in (
        "Perplexity by rank prefix",
        "prelort, seed 0: round 1/1",
        "prelort, seed 0: finished in",
        "1 of 2 cells, about",
        f"wrote  {out / 'results.md'}",
        f"wrote  {out / 'rank_curves.png'}",
        f"wrote  {out / 'report.html'}",
    ):
        assert line in first.out
    again = command_line("compare", study)
    assert again.code == 0
    assert "2 of 2 cells are finished already" in again.out
    assert "finished in" not in again.out


def test_a_failing_cell_is_told_and_makes_the_exit_code_1(
    command_line: CommandLine, study: Path, tmp_path: Path
) -> None:
    arguments = ("-m", "fedit", "-m", "prelort", "--seed", 3, "--out", tmp_path / "out")
    outcome = command_line("compare", study, *arguments)
    assert outcome.code == 1
    assert "fedit, seed 3: failed: method 'fedit' needs one rank for all clients" in outcome.out
    assert "prelort, seed 3: finished" in outcome.out
    assert "untuned base" in outcome.out


def test_ctrl_c_says_how_to_go_on(
    command_line: CommandLine, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Display, name: str, reason: str = "") -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Display, "ended", stop)
        outcome = command_line("compare", study, "--out", out)
    assert outcome.code == 130
    assert outcome.err.strip() == (
        f"stopped; the same command continues: prelort compare {study} --out {out}"
    )
    assert "not started" in (out / "results.md").read_text()
    again = command_line("compare", study, "--out", out)
    assert (again.code, "1 of 2 cells are finished already" in again.out) == (0, True)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--method", "prelorr"], "unknown method 'prelorr': did you mean 'prelort'?"),
        (["--set", "compare.seeds=[1, 1]"], "compare.seeds: 1 is listed twice"),
        (["--set", "federation.rounds=0"], "federation.rounds = 0 is not allowed"),
        (["--reference", "fedit"], "compare.reference = 'fedit' is not compared"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(
    command_line: CommandLine, study: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    out = tmp_path / "out"
    outcome = command_line("compare", study, "--out", out, *arguments)
    assert outcome.error.startswith(sentence)
    assert not out.exists()
