from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prelort.adapters import ScaleRule
from prelort.errors import ConfigError
from prelort.models.lora import ADAPTER, install
from prelort.training.truncation import Truncation
from tiny_models import adapted, base_model, logits, token_batch, trained_adapter

RULES = [ScaleRule("constant", 0.7), ScaleRule("rslora", 1.3)]
rules = pytest.mark.parametrize("rule", RULES, ids=str)
ends = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def prepared(folder, rule, *, pattern=False, rank=8):
    settings = {"rank_pattern": {ends[folder.name]: 3}} if pattern else {}
    model = adapted(folder, rank, **settings)
    adapter = trained_adapter(model, rule)
    install(model, adapter)
    return model, adapter, Truncation(model, rule)


@rules
@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "rank_pattern"])
def test_evaluating_under_the_mask_is_evaluating_the_installed_prefix(folder, rule, pattern):
    model, adapter, truncation = prepared(folder, rule, pattern=pattern)
    under_mask = {}
    for rank in (1, 2, 3, 5, 8):
        with truncation.at(rank):
            under_mask[rank] = logits(model)
    for rank, found in under_mask.items():
        install(model, adapter.prefix(rank))
        torch.testing.assert_close(found, logits(model), **CLOSE)
    assert float((under_mask[2] - under_mask[8]).abs().max()) > 1e-2


@rules
def test_rank_zero_is_the_base_model_exactly(folder, rule):
    model, _, truncation = prepared(folder, rule)
    adapter = trained_adapter(model, rule)
    if adapter.modules_to_save:  # the head is trained in full and not truncated
        install(model, adapter.__class__(adapter.layers, rule, base_head(folder)))
    with truncation.at(0):
        assert torch.equal(logits(model), logits(base_model(folder)))


def base_head(folder):
    return {n: p for n, p in base_model(folder).named_parameters() if n.startswith("classifier")}


@rules
@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "rank_pattern"])
def test_each_row_of_a_batch_is_computed_at_its_own_rank(folder, rule, pattern):
    model, _, truncation = prepared(folder, rule, pattern=pattern)
    batch, ranks = token_batch(rows=4), torch.tensor([2, 4, 8, 0])
    with truncation.at(ranks):
        together = logits(model, batch)
    for row, rank in enumerate(ranks.tolist()):
        with truncation.at(rank):
            alone = logits(model, {k: v[row : row + 1] for k, v in batch.items()})
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


def test_the_full_rank_and_no_truncation_are_the_same_bits(folder):
    model, _, truncation = prepared(folder, RULES[1])
    plain = logits(model)
    for ranks in (None, 8, 100, torch.full((3,), 8)):
        with truncation.at(ranks):
            assert torch.equal(logits(model), plain)


def test_outside_the_block_nothing_is_cut_even_after_an_error(tiny_llama):
    model, _, truncation = prepared(tiny_llama, RULES[0])
    plain = logits(model)
    with pytest.raises(KeyError), truncation.at(2):
        raise KeyError
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("rows", [2, 4])
def test_ranks_that_do_not_match_the_rows_are_an_error(folder, rows):
    model, _, truncation = prepared(folder, RULES[0])
    message = rf"'example' does not work .*3.* rows for a batch of {rows}; use 'step' or 'mean'"
    with truncation.at(torch.full((rows,), 2)), pytest.raises(ConfigError, match=message):
        logits(model, token_batch(rows=3))


class Flattened(nn.Module):
    """A model that sees tokens and not sequences, as mixtures of experts do."""

    def __init__(self, flatten: bool) -> None:
        super().__init__()
        self.flatten = flatten
        self.expert = nn.Linear(5, 7)

    def forward(self, x):
        if not self.flatten:
            return self.expert(x)
        return self.expert(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], 7)


def flattened(flatten):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["expert"], init_lora_weights=False)
    model = get_peft_model(Flattened(flatten), config, adapter_name=ADAPTER)
    return model, Truncation(model, ScaleRule("constant", config.lora_alpha / config.r))


def test_models_that_flatten_the_batch_are_masked_by_example_too():
    x, ranks = torch.randn(3, 6, 5), torch.tensor([1, 2, 4])
    results = []
    for flatten in (False, True):
        model, truncation = flattened(flatten)
        with truncation.at(ranks, (3, 6)):
            results.append(model(x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(model(x)[0], results[0][0])


@rules
def test_under_bfloat16_autocast_the_mask_is_still_the_prefix(folder, rule):
    model, adapter, truncation = prepared(folder, rule)

    def cast(ranks):
        with torch.autocast("cpu", dtype=torch.bfloat16), truncation.at(ranks):
            return logits(model).float()

    one, each = cast(2), cast(torch.tensor([2, 2, 2]))
    full = cast(None)
    install(model, adapter.prefix(2))
    size = float(full.abs().max())
    torch.testing.assert_close(one, cast(None), rtol=0, atol=0.02 * size)
    torch.testing.assert_close(each, one, rtol=0, atol=1e-6)
    assert float((full - one).abs().max()) > 0.1 * size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_can_be_truncated(tiny_llama, dtype):
    from prelort.config import LoraSettings
    from prelort.models.lora import attach

    model = attach(base_model(tiny_llama, dtype=dtype), LoraSettings(), 8, "causal").eval()
    adapter = trained_adapter(model, RULES[0])
    install(model, adapter)
    truncation = Truncation(model, RULES[0])
    with truncation.at(torch.tensor([2, 2, 2])):
        found = logits(model)
    assert found.dtype == getattr(torch, dtype)
    install(model, adapter.prefix(2))
    torch.testing.assert_close(found, logits(model), rtol=0.02, atol=0.02)
