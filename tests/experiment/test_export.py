"""Exporting needs the run and the base model, and of the data no more than the class names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import prelort
from prelort import export
from prelort.adapters import peft_folder
from prelort.config import Config
from prelort.errors import AdapterError
from prelort.experiment import exported
from prelort.experiment.assemble import assemble


@pytest.mark.parametrize("merge", [False, True])
def test_a_language_models_adapter_is_exported_without_the_data(
    make_config: Callable[..., Config], text_file: Path, tmp_path: Path, merge: bool
) -> None:
    data = tmp_path / "here_today.jsonl"
    shutil.copy(text_file, data)
    config = make_config(data={"source": str(data)}, federation={"rounds": 1})
    prelort.run(config, tmp_path / "run")
    data.unlink()
    out = export(tmp_path / "run", tmp_path / "out", 4, merge=merge)
    assert (out / ("model.safetensors" if merge else "adapter_model.safetensors")).is_file()


def test_a_classifier_is_exported_with_its_head_and_its_class_names(
    make_config: Callable[..., Config], tiny_bert: Path, tmp_path: Path
) -> None:
    config = make_config(
        task="classification", model={"name": str(tiny_bert)}, federation={"rounds": 1}
    )
    result = prelort.run(config, tmp_path / "run")
    adapter = export(tmp_path / "run", tmp_path / "adapter", 8, merge=False)
    name = "base_model.model.classifier.weight"
    exported = load_file(adapter / "adapter_model.safetensors")[name]
    assert exported.equal(result.global_adapter.modules_to_save["classifier.weight"])

    merged_path = export(tmp_path / "run", tmp_path / "merged", 8, merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(merged_path).eval()
    assert merged.config.id2label == {0: "early", 1: "late"}
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)


def test_the_classes_have_the_order_of_a_head_that_is_trained_already(
    make_config: Callable[..., Config], tiny_bert: Path, tmp_path: Path
) -> None:
    names = {0: "late", 1: "early"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, id2label=names)
    model.save_pretrained(shutil.copytree(tiny_bert, tmp_path / "base"))
    config = make_config(task="classification", model={"name": str(tmp_path / "base")})
    assembly = assemble(config)
    assert assembly.rows.labels == ("late", "early")
    kept = assembly.runtime.model.get_base_model().classifier.original_module.weight
    assert torch.equal(kept, model.classifier.weight)


@pytest.mark.parametrize("off, refused", [(0.02, False), (0.2, True)])
def test_rounding_of_small_logits_is_no_difference(
    make_config: Callable[..., Config],
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    off: float,
    refused: bool,
) -> None:
    """In bfloat16 they are off by more than a part of them."""
    config = make_config(
        task="classification",
        model={"name": str(tiny_bert), "dtype": "bfloat16"},
        federation={"rounds": 1},
    )
    prelort.run(config, tmp_path / "run")
    given = iter([torch.full((4,), 0.1), torch.full((4,), 0.1 + off)])
    monkeypatch.setattr(exported, "logits", lambda *_: next(given))
    with pytest.raises(AdapterError) if refused else nullcontext():
        export(tmp_path / "run", tmp_path / "out", 4)


def test_an_export_that_is_not_what_was_measured_is_an_error_that_names_a_tensor(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = peft_folder.save
    monkeypatch.setattr(
        peft_folder, "save", lambda adapter, *where: save(adapter.scaled(2.0), *where)
    )
    with pytest.raises(AdapterError, match=r"rank-2'.* gives other logits .*lora_B.* is not what"):
        prelort.run(make_config(federation={"rounds": 2}), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_a_run_that_diverged_is_no_broken_export(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """A single step, whose weights are finite everywhere; what they compute is not."""
    config = make_config(
        training={"learning_rate": 1e29, "local_steps": 1},
        federation={"rounds": 1, "max_abs_value": 1e30},
    )
    prelort.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "adapters" / "rank-8").is_dir()


@pytest.mark.parametrize(
    "lora", [{"target_modules": ["c_attn", "lm_head"]}, {"modules_to_save": ["wte"]}]
)
def test_tied_embeddings_are_merged_one_by_one_and_in_the_type_of_the_base(
    make_config: Callable[..., Config], tiny_gpt2: Path, tmp_path: Path, lora: dict[str, object]
) -> None:
    """That the logits are right is what `export` checks by itself."""
    low = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.bfloat16)
    low.save_pretrained(tmp_path / "base")
    for file in tiny_gpt2.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    config = make_config(model={"name": str(tmp_path / "base")}, lora=lora)
    prelort.run(config, tmp_path / "run")
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        out = export(tmp_path / "run", tmp_path / f"{dtype}", None, merge=True, dtype=dtype)
        merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert merged.dtype == expected
        assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
