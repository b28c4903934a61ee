"""What README and CONTRIBUTING show is what runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import prelort
from command_line import CommandLine
from prelort.adapters import peft_folder
from prelort.config import Config
from prelort.events import Event, name_of
from prelort.models.base import location
from prelort.study.definition import load as load_study

ROOT = Path(__file__).parents[2]


def code_after(text: str, marker: str) -> str:
    """The first Python block after ``marker``."""
    found = re.search(r"```python\n(.*?)```", text.split(marker, 1)[1], re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_readmes_python_example_runs_on_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = code_after((ROOT / "README.md").read_text(), "<!-- python example: begin -->")
    code = code.replace("Qwen/Qwen3-0.6B", location("embedded"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    tuned, untuned = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert float(tuned) < 0.6 * float(untuned)
    adapters = tmp_path / "runs" / "from-python" / "adapters"
    assert {path.name for path in adapters.iterdir()} == {"rank-4", "rank-16"}


def test_contributings_method_in_one_file_runs(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tmp_path / "momentum.py").write_text(code_after(text, "## Add a method in one file"))
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(method={"name": "momentum:Momentum"}, federation={"rounds": 4})
    result = prelort.run(config, tmp_path / "run")
    assert result.metrics[8]["perplexity"] < result.base["perplexity"]
    # Half of the first round's change, and then more than that: it is momentum, and it is kept.
    plain = prelort.run(make_config(federation={"rounds": 4}), tmp_path / "plain")
    name = next(iter(plain.global_adapter.tensors()))
    assert not plain.global_adapter.tensors()[name].equal(result.global_adapter.tensors()[name])


def test_the_study_in_the_documentation_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "compare.md").read_text()
    found = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    (tmp_path / "study.toml").write_text(found.group(1))
    study = load_study(tmp_path / "study.toml")
    assert len(study.cells) == 5 * 5 * 2
    (variant,) = {c.config.method.objective for c in study.cells if c.method == "segment-wise only"}
    assert variant == "plain"
    short = ["federation.rounds=1", "training.local_steps=1", "threads=1"]
    short += ["data.max_train_examples=200", "data.max_test_examples=8"]
    study = load_study(tmp_path / "study.toml", short, methods=["segment-wise only"], seeds=[0])
    results = prelort.compare(study, tmp_path / "out")
    assert [cell.status for cell in results.cells] == ["finished", "finished"]


def test_the_tutorial_can_be_followed(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text()
    shown = []
    for command in "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        words, _, target = command.partition(" > ")
        short = ["training.local_steps=2", "data.max_test_examples=16"] if " run " in words else []
        more = [part for setting in short for part in ("--set", setting)]
        outcome = command_line(*shlex.split(words)[1:], *more)
        assert outcome.code == 0, outcome.err
        shown.append(outcome.out)
        if target:
            Path(target).write_text(outcome.out)
    assert "AURAC" in shown[1]
    assert "rank 4" in shown[4]
    assert Path("runs/first/report.html").is_file()
    assert peft_folder.load(Path("adapter-rank-4"))[0].rank == 4


def test_every_method_and_target_that_the_documentation_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"^    make ([\w-]+)", readme, re.MULTILINE):
        assert f"\n{target}:" in makefile
    from prelort.methods import REGISTRY

    for name in REGISTRY:
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def test_every_logged_event_and_its_fields_are_documented() -> None:
    rows = (ROOT / "docs" / "watching.md").read_text().splitlines()
    for kind in Event.__subclasses__():
        if kind.logged:
            (row,) = (row for row in rows if row.startswith("|") and f"`{name_of(kind)}`" in row)
            for one in fields(kind):
                assert one.name in ("round", "time") or f"`{one.name}`" in row, (kind, one.name)
