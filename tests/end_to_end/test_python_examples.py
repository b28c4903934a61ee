"""The scripts in examples/python, and the examples of docs/reference.md, run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import prelort

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples" / "python").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_and_prints_its_results(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert list(tmp_path.glob("runs/*/results.md"))


def test_every_public_name_has_an_example_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    exec(compile(code, "docs/reference.md", "exec"), {"__name__": "reference"})
    for name in prelort.__all__:
        assert re.search(rf"\b{name}\b", code), f"docs/reference.md has no example of {name}"
