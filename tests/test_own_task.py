"""A task in a user's own module: the one of docs/own-task.md, and wrong ones."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prelort
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.methods import Client, build
from rounds import start

PAGE = (Path(__file__).parents[1] / "docs" / "own-task.md").read_text(encoding="utf-8")
REGRESSION, HALVES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
WRONG = """
import numpy as np
from prelort.tasks.causal_lm import CausalLM
from prelort.tasks.classification import Classification
from prelort.tasks.interface import Example


class Mean(CausalLM):
    def losses(self, model, batch):
        return super().losses(model, batch).mean()


class Trained(CausalLM):
    def losses(self, model, batch):
        return 2 * super().losses(model, batch)


class Measured(CausalLM):
    metrics = ("own",)

    def compute_metrics(self, prediction):
        return {"own": prediction.typo}


class Broken(CausalLM):
    def losses(self, model, batch):
        return batch["typo"]


class Scored(Classification):
    def scores(self, model, batch):
        return batch["typo"]


class Tensors(CausalLM):
    def encode(self, *of):
        return [Example(np.array([1, 2]), [1, 2])]


class Texts(CausalLM):
    def encode(self, *of):
        return ["text"]


class Failing(CausalLM):
    def columns(self, config, available):
        return available[99]


class Nothing(CausalLM):
    metrics = ("bleu",)


class Headless(CausalLM):
    kind = "classification"


class Poetry(CausalLM):
    kind = "poetry"


class Listed(CausalLM):
    metrics = ["perplexity"]


class Named(CausalLM):
    def collate(self, examples, pad_id):
        return {"labels": [e.labels["tokens"] for e in examples]}


class Built(CausalLM):
    def __init__(self, name): ...


class Half:
    name, kind = "half", "causal"
    def columns(self, config, available): ...


class Nameless(CausalLM):
    name = None


def function(): ...
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in (("regression", REGRESSION), ("halves", HALVES), ("wrong_task", WRONG)):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def rated(text_file: Path, tmp_path: Path) -> Path:
    """The sentences with a rating, which depends on their first word."""
    rows = [json.loads(line) for line in text_file.read_text().splitlines()]
    rated = [{**row, "label": 3.5 if row["label"] == "late" else 1.5} for row in rows]
    path = tmp_path / "rated.jsonl"
    path.write_text("\n".join(map(json.dumps, rated)))
    return path


def test_the_pages_regression_learns(
    own: Path, rated: Path, make_config: Callable[..., Config], tiny_bert: Path
) -> None:
    data = {"source": str(rated), "max_length": 32}
    config = make_config(
        task="regression:Regression",
        model={"name": str(tiny_bert)},
        data=data,
        training={"local_steps": 8, "learning_rate": 2e-2},
        federation={"rounds": 4},
    )
    result = prelort.run(config, own / "run")
    tuned, untuned = result.metrics[8], result.base
    assert tuned.keys() == {"mean_absolute_error", "loss"}
    assert tuned["mean_absolute_error"] ** 2 <= tuned["loss"] < 0.8 * untuned["loss"]
    assert result.model(4).config.num_labels == 1
    module: Any = importlib.import_module("regression")
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    federation = prelort.Federation(
        str(tiny_bert), datasets=rows, task=module.Regression, data={"max_length": 32}, threads=1
    )
    assert federation.config.task == "regression:Regression"
    frame = federation.run(1, own / "python").to_pandas()
    assert set(frame["metric"]) == {"mean_absolute_error", "loss"}
    rated.write_text(rated.read_text() + '\n{"client": "site-0", "text": "x", "label": null}\n')
    with pytest.raises(prelort.PrelortError, match="row 73 has None, which is no number"):
        prelort.run(config, own / "no")


def test_the_pages_objective_is_a_method(own: Path) -> None:
    method = build(Config().method.model_copy(update={"name": "halves:Halves"}), 0)
    objective = method.objective(start(levels=[2, 4, 8]), Client("k", 8, 5))
    assert (objective.kind, objective.levels) == ("mean", (4, 8))


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("Mean", r"Mean: losses\(\) must return one loss for each of the 4 .* shape \(\)"),
        ("Trained", r"Trained: scores\(\) must return the losses of losses\(\), whose sum is"),
        (
            "Measured",
            r"Measured: compute_metrics raised AttributeError: .*\(wrong_task.py, line 22\)",
        ),
        ("Broken", r"Broken: losses\(\) raised KeyError: 'typo' \(wrong_task.py, line 27\)"),
        ("Tensors", r"Tensors: encode\(\) must return Examples .* but returned Example\(input_ids"),
        ("Texts", r"Texts: encode\(\) must return Examples .* but returned 'text'"),
        ("Failing", r"Failing: columns\(\), .* raised IndexError: .* \(wrong_task.py, line 47\)"),
        ("Nothing", "compute_metrics did not return its metric 'bleu'"),
        ("Headless", r"Headless: labels\(\) must name the model's outputs"),
        ("Poetry", "kind = 'poetry' is not allowed: 'causal' or 'classification'"),
        ("Listed", r"metrics must be a tuple of names, not \['perplexity'\]"),
        ("Built", r"its constructor raised TypeError: .*'name'"),
        ("Scored", r"Scored: scores\(\) raised KeyError: 'typo'"),
        ("Half", "lacks check, collate, compute_metrics, encode, labels, losses, scores, weight"),
        ("Nameless", "is no task: it lacks name"),
        ("function", "is not a class"),
        ("Absent", "cannot be imported"),
    ],
)
def test_what_is_no_task_is_one_sentence(
    own: Path, make_config: Callable[..., Config], name: str, sentence: str
) -> None:
    config = make_config(task=f"wrong_task:{name}")
    with pytest.raises(prelort.PrelortError, match=sentence):
        prelort.run(config, own / "run")
    assert not (own / "run").exists()


def test_a_plan_that_cannot_make_the_tasks_labels_says_so(own: Path) -> None:
    config = Config.model_validate({"task": "wrong_task:Named"})
    with pytest.raises(ConfigError, match=r"task Named cannot be planned: its collate\(\) takes"):
        prelort.plan(config, ranks=[2])
