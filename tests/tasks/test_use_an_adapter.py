"""docs/use-an-adapter.md: each task's export is loaded as the page says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_tokens import TEMPLATE, make_tokenizer

import prelort
from prelort import evaluate, export
from prelort.config import Config

PAGE = Path(__file__).parents[2] / "docs" / "use-an-adapter.md"
Make = Callable[..., Config]


def snippet(task: str) -> str:
    found = re.search(rf"\(`{task}`\).*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows that are good for every task, of three classes whose alphabetic order is not theirs."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "text": f"{label} is the word {number}",
            "label": label,
            "messages": [
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": label},
            ],
        }
        for number in range(8)
        for label in ("zebra", "ant", "mole")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def config(make_config: Make, data: Path, tiny_llama: Path, tmp_path: Path) -> Make:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    make_tokenizer(template=TEMPLATE).save_pretrained(base)

    def make(**changes: Any) -> Config:
        own = {"prompt_template": "{text}\n", "completion_column": "label"}
        return make_config(
            model={"name": str(base)},
            data={"source": str(data), "max_length": 48, **own, **changes.pop("data", {})},
            partition={"by": "iid", "clients": 2, "column": None},
            ranks={"mix": "2, 8"},
            federation={"rounds": 1, "clients_per_round": 2},
            **changes,
        )

    return make


@pytest.mark.parametrize("task", ["causal-lm", "instruction", "chat", "classification"])
def test_the_page_loads_an_export_of_each_task(
    config: Make, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"labels": ("zebra", "ant", "mole")} if task == "classification" else {}
    prelort.run(config(task=task, data=data), tmp_path / "run")
    adapter = export(tmp_path / "run", tmp_path / "adapter", 8, merge=False)
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(snippet(task).replace("runs/first/adapters/rank-8", str(adapter)), names)
    assert capsys.readouterr().out
    if task == "classification":
        assert names["model"].config.id2label == {0: "zebra", 1: "ant", 2: "mole"}
        (found,) = names["classify"]("ant is the word 3")
        assert found["label"] in ("zebra", "ant", "mole")


def test_other_data_do_not_change_the_order_of_the_classes(
    config: Make, data: Path, tmp_path: Path
) -> None:
    prelort.run(config(task="classification"), tmp_path / "run")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    without = tmp_path / "without.jsonl"  # without the first class the others would move up
    without.write_text("\n".join(json.dumps(r) for r in rows if r["label"] != "ant"))
    both = [f"data.source={without}", f"data.test={data}"]
    whole = evaluate(tmp_path / "run", [f"data.test={data}"]).prefixes
    assert evaluate(tmp_path / "run", both).prefixes == whole
    data.unlink()
    adapter = export(tmp_path / "run", tmp_path / "adapter", 8, merge=False)
    assert json.loads((adapter / "labels.json").read_text()) == {
        "id2label": {"0": "ant", "1": "mole", "2": "zebra"},
        "label2id": {"ant": 0, "mole": 1, "zebra": 2},
    }
