"""Robust rules in front of the methods' own aggregators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from flwr.serverapp.strategy.multikrum import select_multikrum

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import MethodConfig
from prelort.errors import ConfigError, QuorumError
from prelort.federation.flower import ArrayRecord, ConfigRecord, RecordDict
from prelort.methods import REGISTRY, Client, Method, ServerState, Update, build
from prelort.robustness import attacks, coverage
from prelort.robustness.aggregator import RobustAggregator
from prelort.robustness.rules import Rule
from random_adapters import same_bits
from rounds import aggregate, replies, start, untrained

RULES: tuple[Rule, ...] = get_args(Rule)
ATTACKERS = 2
SELECTING = {"fed-plora", "fslora", "flora", "florist", "fedrora"}
"""Their clients do not train prefixes of one adapter."""


def clients_of(ranks: Sequence[int]) -> list[Client]:
    return [Client(f"site-{k}", rank, 10) for k, rank in enumerate(ranks)]


def robust(
    rule: Rule,
    method: Method,
    state: ServerState,
    updates: Sequence[Update],
    *,
    attackers: int = ATTACKERS,
    clip: bool = False,
) -> LoraAdapter:
    """The adapter after a round behind a rule."""
    aggregator = RobustAggregator(rule, method, state, attackers, clip)
    for update in updates:
        aggregator.add(update)
    return aggregator.result().adapter


def alike(method: Method, state: ServerState, clients: Sequence[Client]) -> list[Update]:
    """Replies whose changes are one common change and a tenth of it of each client's own."""
    common, own = replies(method, state, clients, seed=0), replies(method, state, clients, seed=50)
    rank = max(update.adapter.rank for update in common)
    whole = next(update.adapter for update in common if update.adapter.rank == rank)
    mixed = []
    for update, other in zip(common, own, strict=True):
        sent = method.broadcast(state, update.client).trainable.tensors()
        shared, noise = whole.prefix(update.adapter.rank).tensors(), other.adapter.tensors()
        tensors = {name: shared[name] + 0.1 * (noise[name] - sent[name]) for name in sent}
        adapter = LoraAdapter.from_tensors(tensors, update.adapter.scale)
        mixed.append(replace(update, adapter=adapter))
    return mixed


def distance(x: LoraAdapter, y: LoraAdapter) -> float:
    a, b = x.tensors(), y.tensors()
    return float(sum((a[name] - b[name]).double().square().sum() for name in a) ** 0.5)


@pytest.fixture
def method() -> Method:
    return build(MethodConfig(name="prelort", weights="examples"), 0)


@pytest.mark.parametrize("attack", attacks.ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_attackers_move_the_result_less_than_an_honest_round_does(
    method: Method, rule: Rule, attack: str
) -> None:
    state, clients = start(levels=(5, 8)), clients_of([5] * 3 + [8] * 8)
    honest = alike(method, state, clients)
    bad = attacks.attacked(attacks.ATTACKS[attack], honest[-ATTACKERS:], method, state, 0)
    clean = aggregate(method, state, honest).adapter
    result = robust(rule, method, state, [*honest[:-ATTACKERS], *bad])
    moved = distance(clean, state.adapter)
    # A shortened change still points where the attacker wants: 2 of 11 flip at most their share.
    assert distance(result, clean) < (0.5 if rule == "clip" else 0.15) * moved


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", [False, True], ids=["freeze", "clip"])
def test_an_attack_on_ranks_with_few_holders_does_not_get_through(
    method: Method, rule: Rule, clip: bool
) -> None:
    state, clients = start(levels=(5, 8)), clients_of([5] * 8 + [8] * 3)
    honest = alike(method, state, clients)
    bad = attacks.attacked(attacks.scaling, honest[-2:], method, state, 0, above=5)
    result = robust(rule, method, state, [*honest[:-2], *bad], clip=clip)
    for name, factors in result.layers.items():
        old = state.adapter.layers[name]
        tail = Factors(factors.A[5:] - old.A[5:], factors.B[:, 5:] - old.B[:, 5:])
        moved, size = float(tail.A.square().mean() ** 0.5), 1.1  # the usual change of a number
        assert moved == 0 if not clip else 0 < moved < 1.5 * size
        assert not torch.equal(factors.A[:5], old.A[:5])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", sorted(REGISTRY.keys() - SELECTING))
def test_equal_replies_pass_through_every_method_unchanged(name: str, rule: Rule) -> None:
    """The centre of equal changes is that change, up to rounding."""
    method = build(MethodConfig(name=name), 0)
    state, clients = untrained(levels=(8,)), clients_of([8] * 7)
    reply = replies(method, state, clients)[0]
    updates = [replace(reply, client=client) for client in clients]
    found = robust(rule, method, state, updates)
    expected = aggregate(method, state, updates).adapter
    assert distance(found, expected) < 1e-4 * distance(expected, state.adapter)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_methods_whose_changes_cannot_be_compared_are_refused(name: str) -> None:
    method, clients = (
        build(MethodConfig(name=name), 0),
        clients_of([8 if name == "fedit" else 5] * 7),
    )
    state = untrained(levels=(clients[0].rank,))
    if name in SELECTING:
        with pytest.raises(ConfigError, match="not train prefixes of one adapter"):
            coverage.check("median", method, state, clients, 7, 2)
    else:
        assert coverage.check("median", method, state, clients, 7, 2) == []


def test_mixed_ranks_under_rslora_are_refused_where_products_are_averaged() -> None:
    """What clients are sent differs by a factor then, which is hidden while B is zero."""
    state, clients = untrained(rule=ScaleRule("rslora", 3.0)), clients_of([5] * 3 + [8] * 7)
    with pytest.raises(ConfigError, match="not train prefixes"):
        coverage.check("median", build(MethodConfig(name="raflora"), 0), state, clients, 10, 2)


def test_krum_keeps_out_an_attacker_whom_flowers_lets_in() -> None:
    """Its squared distances are those of whole weights in float32, in which changes cancel."""
    method, state, clients = build(MethodConfig(name="prelort"), 0), start(), clients_of([8] * 7)
    old, let_in = state.adapter.tensors(), 0
    for trial in range(20):
        adapters = []
        for k in range(len(clients)):
            generator = torch.Generator().manual_seed(100 * trial + k)
            size = 2e-5 if k == 6 else 2e-6
            tensors = {
                name: tensor + size * torch.randn(tensor.shape, generator=generator)
                for name, tensor in old.items()
            }
            adapters.append(LoraAdapter.from_tensors(tensors, state.adapter.scale))
        updates = [Update(c, a, 10) for c, a in zip(clients, adapters, strict=True)]
        moved = distance(robust("multi-krum", method, state, updates), state.adapter)
        # The attacker's share of a mean of five is 4e-6, an honest mean is 1e-6 in each number.
        assert moved < 2e-6 * sum(tensor.numel() for tensor in old.values()) ** 0.5
        contents = [
            RecordDict({"arrays": ArrayRecord(a.tensors()), "k": ConfigRecord({"k": k})})
            for k, a in enumerate(adapters)
        ]
        let_in += any(one["k"]["k"] == 6 for one in select_multikrum(contents, ATTACKERS, 5))
    assert let_in > 0


def test_a_claim_of_examples_is_capped(method: Method) -> None:
    state, clients = start(levels=(8,)), clients_of([8] * 7)
    updates = alike(method, state, clients)
    greedy = [*updates[:-1], replace(updates[-1], examples=10**6)]
    twice = [*updates[:-1], replace(updates[-1], examples=20)]
    assert same_bits(robust("clip", method, state, greedy), robust("clip", method, state, twice))


def test_too_few_replies_end_the_round(method: Method) -> None:
    updates = replies(method, start(), clients_of([8] * 6))
    with pytest.raises(QuorumError, match=r"needs 7 replies where 2 may be malicious, but .* 6"):
        robust("krum", method, start(), updates)
