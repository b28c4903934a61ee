"""The rank that fits 2 to 16 GB, by `prelort plan`, for models of one billion parameters and more.

    python benchmarks/studies/budgets.py

Only shapes are used: Llama models of the sizes below, one example of 512 tokens a batch, gradient
checkpointing, LoRA of all linear layers, for PreLort (a client holds the first r dimensions) and
for Fed-PLoRA (a client also receives all other dimensions, folded into its frozen base).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from prelort.config import load
from prelort.errors import ConfigError
from prelort.planning.memory import Planner

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import report

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
           "tie_word_embeddings": True},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256,
           "tie_word_embeddings": True},
}  # fmt: skip
METHODS = ("prelort", "fed-plora")
BASES = {"bfloat16": [], "4 bits": ["model.quantization=4bit"]}
BUDGETS = (2, 3, 4, 6, 8, 12, 16)
MOST = 64


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            LlamaConfig(**shape).save_pretrained(folder)
            for (base, own), method in itertools.product(BASES.items(), METHODS):
                planner = Planner(load(None, [*settings(folder, method), *own]))
                row: dict[str, Any] = {"model": name, "base": base, "method": method}
                for budget in BUDGETS:
                    try:
                        row[f"{budget} GB"] = planner.largest(budget * 10**9, MOST).rank
                    except ConfigError:
                        row[f"{budget} GB"] = "-"
                for rank in (4, MOST):
                    estimate = planner.estimate(rank, MOST)
                    row[f"GB at rank {rank}"] = round(estimate.total / 1e9, 2)
                rows.append(row)
    command = {"command": "python benchmarks/studies/budgets.py"}
    report("studies_budgets", f"largest rank that fits (at most {MOST})", rows, command)


def settings(folder: str, method: str) -> list[str]:
    """The training configuration; on the CPU, so that no device's memory is queried."""
    return [
        f"model.name={folder}",
        "model.dtype=bfloat16",
        "data.max_length=512",
        "training.batch_size=1",
        "training.gradient_checkpointing=true",
        f"ranks.mix=4*0.5, {MOST}*0.5",
        f"method.name={method}",
    ]


if __name__ == "__main__":
    main()
