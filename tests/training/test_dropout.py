"""Every client draws its dropout from its own seed: alone, beside others, and recomputed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from bench import Bench, assert_close, without_dropout
from torch import nn

from prelort.errors import ConfigError
from prelort.methods.objective import nested
from prelort.training.dropout import ClientDropout, draws
from random_adapters import same_bits

NESTED = nested("full+one", 8, (2, 4, 8))


def dropping(folder) -> Bench:
    """BERT has dropout of its own (0.1), in its attention too; Llama and GPT-2 get some."""
    bench = Bench(folder, dropout=0.2)
    bench.model.config.attention_dropout = 0.2
    for module in bench.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return bench


@pytest.mark.parametrize("checkpointing", [False, True])
def test_clients_in_threads_train_to_the_bits_of_each_alone(folder, checkpointing):
    settings = {"objective": NESTED, "gradient_checkpointing": checkpointing, "local_steps": 3}
    bench, beside = dropping(folder), [dropping(folder) for _ in range(2)]
    alone = [bench.train(client=name, **settings) for name in "ab"]
    assert not same_bits(alone[0][1], alone[1][1])
    for _ in range(2):
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(lambda b, n: b.train(client=n, **settings), beside, "ab"))
        for (mine, adapter), (theirs, expected) in zip(found, alone, strict=True):
            assert mine.loss == theirs.loss
            assert same_bits(adapter, expected)


def test_gradient_checkpointing_recomputes_the_same_masks(folder):
    exact = {"objective": NESTED}
    result, expected = dropping(folder).train(**exact)
    again, found = dropping(folder).train(gradient_checkpointing=True, **exact)
    assert again.loss == pytest.approx(result.loss, rel=1e-6)
    assert_close(found, expected)


def test_the_process_generator_is_neither_read_nor_advanced(tiny_bert):
    bench = dropping(tiny_bert)
    adapters = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        adapters.append(bench.train(gradient_checkpointing=seed == 2)[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert_close(*adapters)


@pytest.mark.parametrize("change", [{"seed": 1}, {"client": "other"}, {"round_index": 1}])
def test_another_seed_client_or_round_drops_differently(tiny_llama, change):
    bench = dropping(tiny_llama)
    # Two epochs without shuffling: the batches are the same in every round.
    settings = {"rounds": 2, "schedule": "constant", "shuffle": False, "local_steps": 3}
    (_, first), (_, same) = bench.train(**settings), bench.train(**settings)
    assert same_bits(first, same)
    assert not same_bits(bench.train(**settings, **change)[1], first)


def test_eager_attention_and_functional_dropout_are_drawn_from_the_seed(tiny_bert):
    bench = dropping(tiny_bert)
    bench.model.base_model.model.set_attn_implementation("eager")
    torch.manual_seed(1)
    first = bench.train()[1]
    torch.manual_seed(2)
    assert same_bits(bench.train()[1], first)


@pytest.mark.parametrize("masked", ["not", "causal", "boolean", "additive"])
def test_attention_with_dropout_is_torchs(masked):
    """At a probability at which nothing is dropped; and what is dropped is dropped in the mean."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    hidden = torch.rand(2, 1, 5, 5, generator=generator) < 0.3
    hidden[..., 0] = False
    more = {"not": {}, "causal": {"is_causal": True}, "boolean": {"attn_mask": ~hidden}}
    more["additive"] = {"attn_mask": torch.zeros(hidden.shape).masked_fill(hidden, -9.0)}
    options = {"enable_gqa": True, "scale": 0.4, **more[masked]}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    with ClientDropout(3):
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9, **options), expected
        )
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, **options), expected)
        many = [
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **options) for _ in range(400)
        ]
    torch.testing.assert_close(torch.stack(many).mean(dim=0), expected, rtol=0, atol=0.25)


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(3), lambda: torch.empty(4).bernoulli_(0.5), lambda: torch.randn(2, 2)],
)
def test_other_random_functions_are_given_the_clients_generator(draw):
    before = torch.get_rng_state()
    found = []
    for _ in range(2):
        with ClientDropout(5):
            found.append((draw(), draw()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_takes_no_generator_is_refused_where_it_would_draw():
    x = torch.randn(3, 2, 8)
    attention = nn.MultiheadAttention(8, 2, dropout=0.1)
    with ClientDropout(1):
        with pytest.raises(ConfigError, match="multi_head_attention_forward with dropout"):
            attention(x, x, x)
        with pytest.raises(ConfigError, match="dropout2d"):
            nn.Dropout2d(0.5)(x[None])
        attention.eval()(x, x, x)
        nn.Dropout2d(0.0)(x[None])


def test_which_models_draw(tiny_llama, tiny_bert):
    llama, bert = Bench(tiny_llama), Bench(tiny_bert)
    assert not draws(llama.model)
    assert draws(bert.model)
    without_dropout(bert.model)
    assert not draws(bert.model)
    assert draws(Bench(tiny_llama, dropout=0.1).model)
    llama.model.config.attention_dropout = 0.1
    assert draws(llama.model)
