"""Examples that share rows train like examples in rows of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import Bench, assert_close, without_dropout
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, OPTConfig

from prelort.adapters import ScaleRule
from prelort.config import Config, LoraSettings
from prelort.errors import ConfigError
from prelort.methods.objective import nested, plain
from prelort.models.lora import attach
from prelort.tasks import get
from prelort.tasks.causal_lm import CausalLM
from prelort.tasks.interface import IGNORED, Batch, Example
from prelort.tasks.packing import pack
from prelort.training.runtime import ModelRuntime
from prelort.training.truncation import Truncation

SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_examples_are_placed_where_they_fit() -> None:
    examples = [Example([n] * n, [n] * n) for n in (3, 8, 4, 5, 3)]
    batch = pack(examples, pad_id=0, one_row=False)
    assert batch["input_ids"].tolist() == [
        [8] * 8,
        [5, 5, 5, 5, 5, 3, 3, 3],
        [4, 4, 4, 4, 3, 3, 3, 0],
    ]
    assert batch["position_ids"][1:].tolist() == [[*range(5), *range(3)], [*range(4), *range(3), 0]]
    assert batch["labels"][2].tolist() == [IGNORED, 4, 4, 4, IGNORED, 3, 3, IGNORED]
    assert batch["example"][2].tolist() == [2, 2, 2, 2, 4, 4, 4, 0]
    assert pack(examples, pad_id=0, one_row=True)["input_ids"].shape == (1, 23)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["plain", "example", "step", "mean"])
def test_packed_training_is_unpacked_training(
    base: str, kind: str, request: pytest.FixtureRequest
) -> None:
    bench = Bench(request.getfixturevalue(f"tiny_{base}"))
    without_dropout(bench.model)
    objective = plain(8) if kind == "plain" else nested(kind, 8, (1, 3, 8))
    settings = {"objective": objective, "gradient_accumulation": 2, "batch_size": 5}
    expected, alone = bench.train(**settings)
    found, packed = bench.train(**settings, packing=True)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_close(packed, alone, 1e-5)


@pytest.mark.parametrize(
    "config, independent",
    [
        (LlamaConfig(**SMALL, intermediate_size=48), True),
        (LlamaConfig(**SMALL, intermediate_size=48, attn_implementation="eager"), True),
        (GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4), True),
        (OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32), False),
        (MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=8), False),
    ],
    ids=["llama", "eager", "gpt2", "opt", "mamba"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_does_not_keep_examples_apart_is_refused(
    config: object, independent: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    model = attach(base.requires_grad_(False), LoraSettings(), 4, "causal")
    runtime = ModelRuntime(model, Truncation(model, ScaleRule()), get("causal-lm"), pad_id=0)
    if independent:
        runtime.check_packing()
        return
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"training\.packing = true does not work"):
            runtime.check_packing()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"task": "classification"}, "task = 'classification'"),
        ({"federation": {"clients_per_batch": 4}}, "federation.clients_per_batch = 4"),
    ],
)
def test_what_packing_excludes_is_refused(
    make_config: Callable[..., Config], changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=f"training.packing = true is not possible with {says}"):
        make_config(training={"packing": True}, **changes)


class CountsRows(CausalLM):
    """A task whose loss depends on how a batch is laid out."""

    def weight(self, batch: Batch) -> int:
        return len(batch["labels"])


def test_a_task_with_a_batch_of_its_own_is_refused(tiny_llama: Path) -> None:
    runtime = replace(Bench(tiny_llama).runtime, task=CountsRows())
    with pytest.raises(ConfigError, match="does not work with task CountsRows, which has its own"):
        runtime.check_packing()


def test_a_model_that_ignores_positions_is_refused(tiny_llama: Path) -> None:
    bench = Bench(tiny_llama)
    decoder = bench.model.get_base_model().model
    inner = decoder.forward
    decoder.forward = lambda position_ids=None, **named: inner(**named)
    with pytest.raises(ConfigError, match=r"training\.packing = true does not work"):
        bench.train(packing=True)
