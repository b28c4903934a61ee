"""lm-evaluation-harness loads an exported adapter as a user would, and gives the right figure."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import prelort
from prelort import export
from prelort.config import Config

main = pytest.importorskip("lm_eval.__main__", reason="pip install 'prelort[lm-eval]'")
from lm_eval.tasks import TaskManager  # noqa: E402

ROOT = Path(__file__).parents[2]
TASK = "heldout_perplexity"


def bits_per_byte(model: torch.nn.Module, base: Path, texts: list[str]) -> float:
    """Of whole texts that fit the model's window, each after one prefix token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    nats, length = 0.0, 0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
        nats -= float(logits.gather(2, ids[:, 1:, None]).sum())
        length += len(text.encode())
    return nats / length / math.log(2)


def test_the_documented_command_measures_an_exported_adapter(
    tmp_path: Path,
    tiny_llama: Path,
    text_file: Path,
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(training={"learning_rate": 5e-2, "local_steps": 8})
    prelort.run(config, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "adapter-r4", 4, merge=False)
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()[:6]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "heldout.jsonl").write_text(lines)

    documented = (ROOT / "docs" / "lm-eval.md").read_text()
    found = re.search(r"^    lm_eval (--model hf .*?)\n\n", documented, re.DOTALL | re.MULTILINE)
    assert found is not None
    command = found.group(1).replace("\\\n", " ").replace("BASE", str(tiny_llama))
    arguments = command.replace("examples/lm_eval", str(ROOT / "examples" / "lm_eval")).split()
    # In this process, for imports take longer; nor are the harness's own thousands of tasks read.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(main, "setup_logging", lambda: None)
    read = partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", read)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--output_path", f"{tmp_path}/out"])
    monkeypatch.chdir(tmp_path)
    main.cli_evaluate()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    measured = json.loads(file.read_text())["results"][TASK]["bits_per_byte,none"]

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    untuned = bits_per_byte(model, tiny_llama, texts)
    tuned = bits_per_byte(
        PeftModel.from_pretrained(model, tmp_path / "adapter-r4").eval(), tiny_llama, texts
    )
    assert measured == pytest.approx(tuned, rel=1e-4)
    assert tuned < 0.99 * untuned
