"""No room: one sentence, exit code 2, and what was finished is kept and can be gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import Killer

from run_files import assert_same_run


def told(code: int, said: str) -> str:
    """The one sentence."""
    assert code == 2, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.parametrize("largest", [1_000, 3_000, 20_000, 30_000])
def test_a_file_that_cannot_grow_any_more(
    tmp_path: Path, killer: Killer, config_file: Path, undisturbed: Path, largest: int
) -> None:
    """The system's limit for a file stands for a full disk: whichever file meets it first."""
    out = tmp_path / "run"
    sizes = [p.stat().st_size for p in undisturbed.rglob("*") if p.is_file()]
    assert max(sizes) > largest

    sentence = told(
        *killer.cli("run", str(config_file), "-q", "--out", str(out), largest_file=largest)
    )

    assert "File too large" in sentence
    if not (out / "config.toml").exists():
        assert killer.cli("run", str(config_file), "-q", "--out", str(out))[0] == 0
    else:
        assert "prelort run --resume" in sentence
        code, said = killer.cli("run", "--resume", str(out), "-q")
        assert code == 0, said
    assert_same_run(out, undisturbed)
