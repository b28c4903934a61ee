"""Exporting needs the run and the base model, and of the data no more than the class names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import prelort
from prelort.config import Config
from prelort.experiment.inspect import export_run


@pytest.mark.parametrize("merge", [False, True])
def test_a_language_models_adapter_is_exported_without_the_data(
    make_config: Callable[..., Config], text_file: Path, tmp_path: Path, merge: bool
) -> None:
    data = tmp_path / "here_today.jsonl"
    shutil.copy(text_file, data)
    config = make_config(data={"source": str(data)}, federation={"rounds": 1})
    prelort.run(config, tmp_path / "run")
    data.unlink()
    out = export_run(tmp_path / "run", tmp_path / "out", 4, merge=merge)
    assert (out / ("model.safetensors" if merge else "adapter_model.safetensors")).is_file()


def test_a_classifier_is_exported_with_its_head_and_its_class_names(
    make_config: Callable[..., Config], tiny_bert: Path, tmp_path: Path
) -> None:
    config = make_config(
        task="classification", model={"name": str(tiny_bert)}, federation={"rounds": 1}
    )
    result = prelort.run(config, tmp_path / "run")
    adapter = export_run(tmp_path / "run", tmp_path / "adapter", 8, merge=False)
    name = "base_model.model.classifier.weight"
    exported = load_file(adapter / "adapter_model.safetensors")[name]
    assert exported.equal(result.adapter.modules_to_save["classifier.weight"])

    merged_path = export_run(tmp_path / "run", tmp_path / "merged", 8, merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(merged_path).eval()
    assert merged.config.id2label == {0: "early", 1: "late"}
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
