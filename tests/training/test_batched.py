"""Clients trained in one batch against the same clients trained one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prelort import tasks
from prelort.adapters import ScaleRule
from prelort.config import TrainingConfig
from prelort.errors import PrelortError
from prelort.methods.objective import Objective, TailPenalty, nested, plain
from prelort.models.lora import extract, install
from prelort.training.batched import Finished, Member, train_batched
from prelort.training.local import Assignment, train
from prelort.training.stack import Stack, stackable
from prelort.training.truncation import Truncation
from tiny_models import adapted, kind_of, ragged_examples, trained_adapter

LEVELS = (1, 3, 8)
RULES = [ScaleRule("constant", 0.7), ScaleRule("rslora", 1.3)]


class Bench:
    """A model, and clients of ranks 1, 3, 8 and 8 with 7, 12, 9 and 3 examples."""

    def __init__(self, folder, rule, **lora):
        self.folder, self.rule = folder, rule
        self.model = adapted(folder, 8, **lora)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.model.config.attention_probs_dropout_prob = 0.0
        self.truncation = Truncation(self.model, rule)
        self.task = tasks.get("classification" if kind_of(folder) != "causal" else "causal-lm")
        self.start = trained_adapter(self.model, rule)

    def members(
        self,
        kind="example",
        tail=None,
        rates=(1.0, 1.0, 1.0, 1.0),
        scale_multipliers=None,
        **changes,
    ):
        defaults = {"local_steps": 3, "batch_size": 4, "learning_rate": 0.05, "optimizer": "sgd"}
        members = []
        sizes = zip((1, 3, 8, 8), (7, 12, 9, 3), rates, strict=True)
        for index, (rank, count, rate) in enumerate(sizes):
            config = TrainingConfig(**(defaults | changes))
            config = config.model_copy(update={"learning_rate": config.learning_rate * rate})
            objective = plain(rank) if kind == "plain" else nested(kind, rank, LEVELS)
            if tail is not None and rank > 1:
                objective = Objective(objective.kind, objective.levels, objective.weights, tail)
            work = Assignment(f"client-{index}", 1, 3, 7, objective)
            members.append(
                Member(
                    self.start.prefix(rank),
                    ragged_examples(self.folder, count, seed=index),
                    config,
                    work,
                    1.0 if scale_multipliers is None else scale_multipliers[index],
                )
            )
        return members

    def alone(self, member, trains="AB", fused=False):
        install(self.model, member.adapter, trains=trains, scale_multiplier=member.scale_multiplier)
        result = train(
            self.model, self.truncation, self.task, member.examples, member.config,
            member.assignment, 0, fused=fused,
        )  # fmt: skip
        return Finished(extract(self.model, self.rule), result)

    def together(self, members, **more):
        return train_batched(self.model, self.truncation, self.task, members, 0, **more)

    def assert_same(self, members, tolerance=1e-4, loss=1e-5, trains="AB", fused=False, **more):
        """``tolerance``: of each tensor's change, by the norm of what is wrong with it."""
        found = self.together(members, trains=trains, **more)
        for member, mine in zip(members, found, strict=True):
            theirs = self.alone(member, trains, fused)
            assert isinstance(mine, Finished)
            assert mine.result.steps == theirs.result.steps
            assert mine.result.loss == pytest.approx(theirs.result.loss, rel=loss)
            assert mine.adapter.rank == member.adapter.rank
            before, expected = member.adapter.tensors(), theirs.adapter.tensors()
            changes = {name: (t - before[name]).norm() for name, t in expected.items()}
            assert max(changes.values()) > 1e-3
            for name, tensor in mine.adapter.tensors().items():
                assert (tensor - expected[name]).norm() <= tolerance * changes[name] + 1e-7, name


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def bench(request):
    """GPT-2 flattens its tokens, BERT has a head that is trained in full."""
    return Bench(request.getfixturevalue(f"tiny_{request.param}"), RULES[1])


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return Bench(tiny_llama, RULES[0])


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", ["plain", "example", "step", "full+one", "mean"])
def test_every_objective(bench, kind, at_once):
    bench.assert_same(bench.members(kind), at_once=at_once)


SETTINGS = {
    "momentum, decay, clipped": {"momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation": 2},
    "epochs of unequal lengths": {"local_steps": 0, "local_epochs": 2.0, "batch_size": 2},
    "warm-up": {"schedule": "linear", "warmup": 0.5},
    "constant": {"schedule": "constant"},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting(llama, settings):
    llama.assert_same(llama.members("full+one", **SETTINGS[settings]))


def test_adam(bench):
    """Adam divides by a gradient's own size: the rounding of a tiny one counts in full."""
    members = bench.members(optimizer="adamw", learning_rate=0.01, weight_decay=0.1)
    bench.assert_same(members, tolerance=5e-3)


def test_the_heads_own_rate(tiny_bert):
    bench = Bench(tiny_bert, RULES[0])
    bench.assert_same(bench.members(head_learning_rate=0.2))
    own = bench.together(bench.members(head_learning_rate=0.2))[0].adapter.modules_to_save
    same = bench.together(bench.members())[0].adapter.modules_to_save
    assert any(not torch.allclose(own[name], same[name]) for name in own)


def test_rates_and_gains_of_ones_own(llama):
    llama.assert_same(
        llama.members(rates=(4.0, 2.0, 1.0, 0.5), scale_multipliers=(3.0, 1.0, 0.5, 1.0))
    )


@pytest.mark.parametrize("trains", ["A", "B"])
def test_one_factor_alone(llama, trains):
    members = llama.members("plain")
    llama.assert_same(members, trains=trains)
    kept = "B" if trains == "A" else "A"
    for member, found in zip(members, llama.together(members, trains=trains), strict=True):
        for name, factors in found.adapter.layers.items():
            assert torch.equal(getattr(factors, kept), getattr(member.adapter.layers[name], kept))


def test_a_tail_penalty(llama):
    llama.assert_same(llama.members("plain", tail=TailPenalty(0.5, 0.5, 1)))


def test_layers_of_different_ranks(tiny_llama):
    bench = Bench(tiny_llama, RULES[1], rank_pattern={"q_proj": 2})
    assert {f.rank for f in bench.start.layers.values()} == {2, 8}
    bench.assert_same(bench.members())


def test_one_client_alone(bench):
    for member in bench.members("mean"):
        bench.assert_same([member], at_once=True)


def test_in_bfloat16(llama):
    """Against the same operations for one client: PEFT's round in other places."""
    members = llama.members("plain", precision="bfloat16")
    llama.assert_same(members, tolerance=0.05, loss=1e-3, fused=True)


def test_equal_arguments_give_equal_bits(llama):
    first, second = (llama.together(llama.members()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name, tensor in one.adapter.tensors().items():
            assert torch.equal(tensor, other.adapter.tensors()[name])


def test_who_fails_is_named_and_the_others_go_on(llama):
    members = llama.members()
    good = llama.together([members[0], members[2]])
    bad = members[1]
    huge = bad.adapter.scaled(math.inf)
    broken = Member(huge, bad.examples, bad.config, bad.assignment)
    empty = Member(members[3].adapter, [], members[3].config, members[3].assignment)
    found = llama.together([members[0], broken, empty, members[2]])
    assert isinstance(found[1], PrelortError)
    assert "the loss became nan at local step 1 of 3" in str(found[1])
    assert isinstance(found[2], PrelortError)
    assert "'client-3' has no training examples" in str(found[2])
    for mine, theirs in zip((found[0], found[3]), good, strict=True):
        for name, tensor in mine.adapter.tensors().items():
            torch.testing.assert_close(tensor, theirs.adapter.tensors()[name])


def test_who_is_late_or_called_off_is_named_and_the_others_go_on(llama):
    members = llama.members()
    works = [
        Assignment("late", 1, 3, 7, plain(1), timeout=0.0),
        Assignment("called off", 1, 3, 7, plain(3), stopped=lambda: True),
    ]
    changed = [
        Member(m.adapter, m.examples, m.config, work)
        for m, work in zip(members, works, strict=False)
    ]
    late, off, *others = llama.together([*changed, *members[2:]])
    assert "timed out after 0 s at local step 1 of 3" in str(late)
    assert "was called off at local step 1 of 3" in str(off)
    assert all(isinstance(other, Finished) for other in others)


def test_the_model_is_left_as_it_was(llama, tiny_bert):
    for bench in (llama, Bench(tiny_bert, RULES[0])):
        install(bench.model, bench.start)
        bench.together(bench.members())
        found = extract(bench.model, bench.rule).tensors()
        assert all(torch.equal(t, found[n]) for n, t in bench.start.tensors().items())
        assert all("forward" not in vars(module) for module in bench.model.modules())


def test_what_cannot_be_shared(llama, tiny_bert):
    assert stackable(llama.model)
    install(llama.model, llama.start.prefix(2), frozen=llama.start.prefix(3))
    assert not stackable(llama.model)
    install(llama.model, llama.start)
    assert stackable(llama.model)
    assert not stackable(adapted(tiny_bert, 8, modules_to_save=["LayerNorm", "classifier"]))


def test_a_stack_knows_whose_rows_are_whose(llama):
    """Rows in any order of owners, each cut at a rank of its own, against each adapter alone."""
    adapters = [llama.start.prefix(2), trained_adapter(llama.model, llama.rule, seed=4)]
    ids = torch.randint(2, 256, (6, 5), generator=torch.Generator().manual_seed(1))
    ranks = torch.tensor([1, 2, 8, 3, 0, 2])
    owners = [0, 1, 0]
    install(llama.model, llama.start)
    stack = Stack(llama.model, llama.truncation, adapters)
    llama.model.eval()
    with torch.no_grad(), stack.installed(), stack.rows(owners, ranks, 5):
        found = llama.model(input_ids=ids).logits
    for row in range(6):
        adapter = adapters[owners[row // 2]]
        install(llama.model, adapter)
        with torch.no_grad(), llama.truncation.at(min(int(ranks[row]), adapter.rank)):
            expected = llama.model(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
