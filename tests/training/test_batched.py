"""Clients trained in one batch against the same clients trained one after the other."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from bench import Bench, settings_of, without_dropout

from prelort.adapters import ScaleRule
from prelort.errors import PrelortError
from prelort.methods.objective import Objective, TailPenalty, nested, plain
from prelort.models.lora import extract, install
from prelort.tasks import get, token_losses
from prelort.training.adapter_stack import stackable
from prelort.training.batched import BatchedClient, TrainedClient, train_batched
from prelort.training.local import train
from prelort.training.runtime import ModelRuntime
from prelort.training.steps import Assignment, LocalSteps
from prelort.training.truncation import Truncation
from tiny_models import adapted, ragged_examples

LEVELS = (1, 3, 8)
RULES = [ScaleRule("constant", 0.7), ScaleRule("rslora", 1.3)]


class Clients(Bench):
    """Clients of ranks 1, 3, 8 and 8 with 7, 12, 9 and 3 examples."""

    def __init__(self, folder, rule, **lora):
        super().__init__(folder, rule=rule, **lora)
        without_dropout(self.model)

    def clients(self, kind="example", *, tail=None, rates=(1, 1, 1, 1), scales=(1, 1, 1, 1), **own):
        made = []
        facts = zip((1, 3, 8, 8), (7, 12, 9, 3), rates, scales, strict=True)
        for index, (rank, count, rate, scale) in enumerate(facts):
            settings = settings_of(**own)
            settings = replace(settings, learning_rate=settings.learning_rate * rate)
            goal = plain(rank) if kind == "plain" else nested(kind, rank, LEVELS)
            if tail is not None and rank > 1:
                goal = Objective(goal.kind, goal.levels, goal.weights, tail)
            examples = ragged_examples(self.folder, count, seed=index)
            work = Assignment(f"client-{index}", 1, 3, 7, goal)
            made.append(
                BatchedClient(self.start.prefix(rank), examples, settings, work, float(scale))
            )
        return made

    def alone(self, client, trains="AB", fused=False):
        multiplier = client.scale_multiplier
        install(self.model, client.adapter, trains=trains, scale_multiplier=multiplier)
        result = train(
            self.runtime, client.examples, client.settings, client.assignment, fused=fused
        )
        return TrainedClient(extract(self.model, self.rule), result)

    def batched(self, clients, trains="AB"):
        install(self.model, self.start)
        return train_batched(self.runtime, clients, trains=trains)

    def assert_same(self, clients, tolerance=1e-4, loss=1e-5, trains="AB", fused=False):
        """``tolerance``: of each tensor's change, by the norm of the difference."""
        found = self.batched(clients, trains)
        for client, mine in zip(clients, found, strict=True):
            theirs = self.alone(client, trains, fused)
            assert isinstance(mine, TrainedClient)
            assert mine.result.steps == theirs.result.steps
            assert mine.result.loss == pytest.approx(theirs.result.loss, rel=loss)
            assert mine.adapter.rank == client.adapter.rank
            before, expected = client.adapter.tensors(), theirs.adapter.tensors()
            changes = {name: (t - before[name]).norm() for name, t in expected.items()}
            assert max(changes.values()) > 1e-3
            for name, tensor in mine.adapter.tensors().items():
                assert (tensor - expected[name]).norm() <= tolerance * changes[name] + 1e-7, name
        return found


@pytest.mark.parametrize("targets", ["all-linear", ("down_proj", "lm_head")])
def test_logits_in_parts(tiny_llama, targets, monkeypatch):
    """The output layer sees each client's rows, or no rows if it does not learn."""
    monkeypatch.setattr(token_losses, "LIMIT", 2000)
    clients = Clients(tiny_llama, RULES[0], target_modules=targets)
    clients.assert_same(clients.clients("example"))


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def bench(request):
    """GPT-2 flattens its tokens, BERT has a head that is trained in full."""
    return Clients(request.getfixturevalue(f"tiny_{request.param}"), RULES[1])


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return Clients(tiny_llama, RULES[0])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["plain", "example", "step", "full+one", "mean"])
def test_every_objective(bench, kind, merged):
    bench.assert_same(bench.clients(kind, batch_truncations=merged))


SETTINGS = {
    "momentum, decay, clipped": {"momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation": 2},
    "epochs of unequal lengths": {"local_steps": 0, "local_epochs": 2.0, "batch_size": 2},
    "epochs that end within a step": {
        "local_steps": 0,
        "local_epochs": 1.0,
        "batch_size": 2,
        "gradient_accumulation": 3,
    },
    "warm-up": {"schedule": "linear", "warmup": 0.5},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "rates and scales": {"rates": (4.0, 2.0, 1.0, 0.5), "scales": (3.0, 1.0, 0.5, 1.0)},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting(llama, settings):
    llama.assert_same(llama.clients("full+one", **SETTINGS[settings]))


def test_adam(bench):
    """Adam divides by a gradient's own size: the rounding of a tiny one counts in full."""
    clients = bench.clients(optimizer="adamw", learning_rate=0.01, weight_decay=0.1)
    bench.assert_same(clients, tolerance=5e-3)


def test_the_head_has_a_rate_of_its_own(tiny_bert):
    bench = Clients(tiny_bert, RULES[0])
    own = bench.assert_same(bench.clients(head_learning_rate=0.2))[0].adapter.modules_to_save
    same = bench.batched(bench.clients())[0].adapter.modules_to_save
    assert any(not torch.allclose(own[name], same[name]) for name in own)


@pytest.mark.parametrize("trains", ["A", "B"])
def test_one_factor_alone(llama, trains):
    clients = llama.clients("plain")
    kept = "B" if trains == "A" else "A"
    found = llama.assert_same(clients, trains=trains)
    for client, trained in zip(clients, found, strict=True):
        for name, factors in trained.adapter.layers.items():
            assert torch.equal(getattr(factors, kept), getattr(client.adapter.layers[name], kept))


def test_a_tail_penalty(llama):
    llama.assert_same(llama.clients("plain", tail=TailPenalty(0.5, 0.5, 1)))


def test_layers_of_different_ranks(tiny_llama):
    bench = Clients(tiny_llama, RULES[1], rank_pattern={"q_proj": 2})
    assert {f.rank for f in bench.start.layers.values()} == {2, 8}
    bench.assert_same(bench.clients())


def test_in_bfloat16(llama):
    """Against the same operations for one client: PEFT's round in other places."""
    clients = llama.clients("plain", precision="bfloat16")
    llama.assert_same(clients, tolerance=0.05, loss=1e-3, fused=True)


def test_a_client_that_fails_is_named_and_the_others_go_on(llama):
    clients = llama.clients()
    good = llama.batched([clients[0], clients[2]])
    broken = replace(clients[1], adapter=clients[1].adapter.scaled(math.inf))
    late = replace(clients[1], assignment=Assignment("late", 1, 3, 7, plain(3), timeout=0.0))
    cancelled = Assignment("cancelled", 1, 3, 7, plain(3), stopped=lambda: True)
    stopped = replace(clients[1], assignment=cancelled)
    empty = replace(clients[3], examples=[])
    first, *bad, last = llama.batched([clients[0], broken, late, stopped, empty, clients[2]])
    reasons = [
        "the loss became nan at local step 1 of 3",
        "timed out after 0 s at local step 1 of 3",
        "was cancelled at local step 1 of 3",
        "'client-3' has no training examples",
    ]
    for error, reason in zip(bad, reasons, strict=True):
        assert isinstance(error, PrelortError)
        assert reason in str(error)
    for mine, theirs in zip((first, last), good, strict=True):
        for name, tensor in mine.adapter.tensors().items():
            torch.testing.assert_close(tensor, theirs.adapter.tensors()[name])
    assert all(isinstance(e, PrelortError) for e in llama.batched([empty, late]))


def test_which_models_can_be_shared(llama, tiny_bert):
    install(llama.model, llama.start.prefix(2), frozen=llama.start.prefix(3))
    assert not stackable(llama.runtime)
    install(llama.model, llama.start)
    assert stackable(llama.runtime)
    bert = adapted(tiny_bert, 8, modules_to_save=["LayerNorm", "classifier"])
    truncation = Truncation(bert, ScaleRule("constant", 0.5))
    assert not stackable(ModelRuntime(bert, truncation, get("classification"), pad_id=0))


def test_time_out_is_of_a_clients_own_share_of_the_batchs_time(llama):
    work = Assignment("k", 0, 1, 0, plain(3), timeout=0.01)
    shared, alone = (LocalSteps(llama.examples, settings_of(), work, n) for n in (10_000, 1))
    time.sleep(0.02)
    assert not shared.over
    assert alone.over
    with pytest.raises(PrelortError, match=r"timed out after 0\.01 s"):
        alone.give_up()
