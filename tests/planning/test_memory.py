"""Estimates among themselves, and the largest rank that fits."""

from __future__ import annotations

import importlib.machinery
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from transformers import LlamaConfig

import prelort
from prelort.config import Config, PrivacyConfig, check
from prelort.data.ranks import levels
from prelort.errors import ConfigError
from prelort.methods import REGISTRY
from prelort.models.base import load_model
from prelort.planning import rehearsal
from prelort.planning.memory import Planner, largest_rank


def assert_between_is_exact(config: Config, rank: int) -> None:
    planner = Planner(config)
    between, exact = planner.estimate(rank, 32), planner.exact(rank)
    assert (between.adapter, between.down, between.up) == (exact.adapter, exact.down, exact.up)
    # The table of a truncation has rank * (rank + 1) numbers, which is not affine.
    assert 0 <= between.total - exact.total <= 4 * 32**2


@pytest.mark.parametrize("name", ["prelort", "fed-plora", "homogeneous-min"])
def test_a_rank_in_between_is_what_a_rehearsal_of_it_gives(
    settings: Callable[..., Config], name: str
) -> None:
    assert_between_is_exact(settings(method={"name": name}, data={"max_length": 8}), 13)


def test_an_optimiser_in_8_bits_has_a_quarter_of_the_state_of_large_tensors(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "LEAST_IN_8_BITS", 256)
    config = settings(training={"optimizer": "adamw-8bit"}, data={"max_length": 8})
    for rank in (4, 7, 8, 9, 13):
        assert_between_is_exact(config, rank)
    whole = Planner(settings(data={"max_length": 8})).exact(16).optimiser
    assert 0.25 * whole < Planner(config).exact(16).optimiser < 0.27 * whole


def test_gradients_of_examples_are_in_memory_together(settings: Callable[..., Config]) -> None:
    common = {"training": {"batch_size": 32}, "data": {"max_length": 8}}
    private = settings(**common, privacy={"epsilon": 8.0, "unit": "example"})
    assert_between_is_exact(private, 13)
    with_, without = (Planner(one).exact(32) for one in (private, settings(**common)))
    assert with_.total > with_.weights + 34 * with_.adapter > without.total


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_method_can_be_planned(settings: Callable[..., Config], name: str) -> None:
    found = Planner(settings(method={"name": name}, data={"max_length": 8})).exact(3)
    assert found.up > 0
    assert found.total > found.weights + found.adapter + found.optimiser


def test_the_parts_are_those_of_the_shapes(settings: Callable[..., Config]) -> None:
    config = settings(lora={"target_modules": ("q_proj", "v_proj")})
    found = Planner(config).exact(4)
    # Two layers of width 32 with queries of 32 and values of 16; A has 4 rows, B 4 columns.
    numbers = 2 * 4 * ((32 + 32) + (32 + 16))
    assert found.adapter == 4 * numbers
    assert found.down == found.up == 4 * numbers
    secure = config.model_copy(update={"privacy": PrivacyConfig(secure_aggregation=True)})
    masked = Planner(secure).exact(4)
    assert (masked.down, masked.up) == (4 * numbers, 8 * numbers)
    hidden = PrivacyConfig(secure_aggregation=True, hide_ranks=True)
    whole = Planner(config.model_copy(update={"privacy": hidden})).exact(2)
    highest = Planner(secure).exact(max(levels(config.ranks.mix)))
    assert (whole.down, whole.up) == (highest.down, highest.up)
    assert 2 * 4 * numbers <= found.optimiser <= 2 * 4 * numbers + 4 * 8  # and steps counted
    base = load_model(config.model, "causal", pad_id=0)
    assert found.weights == sum(t.nbytes for t in [*base.parameters(), *base.buffers()])
    total = found.weights + found.adapter + found.optimiser + found.activations
    assert found.total == total


@pytest.mark.parametrize(
    "dtype, method", [("float32", "fedex-lora"), ("bfloat16", "fedex-lora"), ("int8", "prelort")]
)
def test_what_is_sent_is_what_a_run_counts(
    make_config: Callable[..., Config], tmp_path: Path, dtype: str, method: str
) -> None:
    config = make_config(
        method={"name": method},
        ranks={"mix": "8*1"},
        federation={"rounds": 1, "clients_per_round": 2, "wire_dtype": dtype},
    )
    history = prelort.run(config, tmp_path / "run").history
    found = Planner(config).exact(8)
    # Beside the tensors a message has their names and shapes, and a header.
    more = 8000 if dtype == "int8" else 5000
    assert 2 * found.down < history.bytes_down < 2 * (found.down + more)
    assert 2 * found.up < history.bytes_up < 2 * (found.up + more)


def test_what_should_save_memory_does(settings: Callable[..., Config]) -> None:
    before = Planner(settings()).exact(8).total
    for change in (
        {"training": {"gradient_checkpointing": True}},
        {"training": {"precision": "bfloat16"}},
        {"training": {"batch_size": 2}},
        {"data": {"max_length": 24}},
        {"model": {"quantization": "4bit"}},
        {"model": {"dtype": "bfloat16"}},
        {"training": {"optimizer": "sgd"}},
        {"method": {"name": "ffa-lora"}},
    ):
        assert Planner(settings(**change)).exact(8).total < before, change


@pytest.mark.parametrize("max_rank", [1, 2, 17])
def test_the_largest_rank_is_the_last_that_fits(
    settings: Callable[..., Config], max_rank: int
) -> None:
    planner = Planner(settings())
    for rank in {1, 2, 3, max_rank - 1, max_rank} & set(range(1, max_rank + 1)):
        budget = planner.estimate(rank, max_rank).total
        assert planner.largest(budget, max_rank).rank == rank
        if rank > 1:
            assert planner.largest(budget - 1, max_rank).rank == rank - 1
    assert planner.largest(10**12, max_rank).rank == max_rank


def test_not_even_rank_one_is_one_sentence(settings: Callable[..., Config]) -> None:
    planner = Planner(settings())
    least = planner.exact(1).total
    with pytest.raises(ConfigError, match=r"not even rank 1 fits: .* would help: training[.]batch"):
        planner.largest(least - 1, 16)
    assert planner.largest(least, 16).rank == 1
    saving = {"batch_size": 1, "gradient_checkpointing": True, "precision": "bfloat16"}
    config = settings(training=saving, model={"quantization": "4bit", "dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"what would help: data.max_length below 48$"):
        largest_rank(config, 1000, 16)


@pytest.mark.parametrize("installed", [True, False])
def test_four_bits_are_proposed_where_they_can_be_loaded(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    spec = importlib.machinery.ModuleSpec("bitsandbytes", None) if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ConfigError) as error:
        largest_rank(settings(), 1000, 16)
    assert ("model.quantization = '4bit'" in str(error.value)) == installed


def test_a_billion_weights_need_no_memory_and_a_few_seconds(tmp_path: Path) -> None:
    """Four of the 32 layers of Llama 7B."""
    LlamaConfig(torch_dtype="bfloat16", num_hidden_layers=4).save_pretrained(tmp_path)
    config = check(
        {
            "model": {"name": str(tmp_path), "device": "cpu", "dtype": "bfloat16"},
            "data": {"max_length": 512},
            "training": {"batch_size": 1},
        }
    )
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    before, started = psutil.Process().memory_info().rss, time.process_time()
    found = Planner(config).exact(16)
    assert time.process_time() - started < 10  # some 2 s on a free core
    assert psutil.Process().memory_info().rss - before < 500e6
    # The published number of parameters, without 28 layers of q, k, v, o (4096 x 4096), gate, up,
    # down (4096 x 11008) and two norms; inverse frequencies of positions are float32.
    left_out = 28 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert found.weights == 2 * (6_738_415_616 - left_out) + 2 * 64 * 4
    assert found.adapter == 4 * 16 * 4 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    # At least the logits, twice in float32 and once as they come.
    assert found.activations > 512 * 32000 * (4 + 4 + 2)
