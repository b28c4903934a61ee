"""The private mean: its equation, its sensitivity, its noise, and an audit of all of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audit import audited_epsilon
from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import MethodConfig
from prelort.errors import ConfigError
from prelort.methods import REGISTRY, Client, Method, ServerState, Update, build
from prelort.privacy.accounting import Budget
from prelort.privacy.mean import CLIP, Mechanism, PrivateMean, check_method
from prelort.privacy.noise import poisson_sample, system_normal
from rounds import aggregate, clients_of, replies, start

RANKS = [2, 8, 5, 2]
SUMS = ("fedhl", "fedit", "ffa-lora", "prelort", "rolora", "zero-padding")
"""Methods whose server needs only a sum."""


def silent(shape: torch.Size) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def method_of(name: str) -> Method:
    return build(MethodConfig(name=name, weights="uniform"), seed=3)


def private(
    name: str = "prelort", clients: list[Client] | None = None, normal=silent, **changes
) -> PrivateMean:
    mechanism = replace(Mechanism(1.0, 1.0, 1.0, adaptive=False), **changes)
    clients = clients_of(RANKS) if clients is None else clients
    return PrivateMean(method_of(name), start(), clients, mechanism, normal)


def difference(after: ServerState, before: ServerState) -> dict[str, torch.Tensor]:
    old = before.adapter.tensors()
    return {name: t.double() - old[name].double() for name, t in after.adapter.tensors().items()}


def norm(change: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))


@pytest.mark.parametrize("name", [*SUMS, "homogeneous-min", "homogeneous-max"])
def test_without_noise_and_clipping_it_is_the_methods_own_mean(name: str) -> None:
    ranks = [8] * 4 if name == "fedit" else RANKS
    method, clients = method_of(name), clients_of(ranks)
    updates = replies(method, start(), clients)
    mean = private(name, clients, clip=1e6)
    for update in updates:
        mean.add(update)
    expected = aggregate(method, start(), updates).adapter.tensors()
    for key, tensor in mean.result().adapter.tensors().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - set(SUMS)))
def test_other_methods_are_refused_unless_their_server_only_averages(name: str) -> None:
    method = method_of(name)
    if name.startswith("homogeneous") or name == "local":
        check_method(method, start(), clients_of(RANKS))
        return
    with pytest.raises(ConfigError, match=f"not possible with method '{name}'"):
        check_method(method, start(), clients_of(RANKS))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100.0), st.integers(0, 3))
def test_one_client_moves_the_sum_by_the_clip_norm_at_most(
    seed: int, clip: float, left_out: int
) -> None:
    updates = replies(method_of("prelort"), start(), clients_of(RANKS), seed)
    whole, without = private(clip=clip), private(clip=clip)
    for index, update in enumerate(updates):
        whole.add(update)
        if index != left_out:
            without.add(update)
    gap = {n: t - without.sum.tensors()[n] for n, t in whole.sum.tensors().items()}
    assert norm(gap) <= clip * (1 + 1e-4)


@pytest.mark.parametrize("name", ["prelort", "zero-padding", "fedhl"])
def test_the_denominators_do_not_depend_on_who_came(name: str) -> None:
    """Half the clients are expected, two of four come: each counts as in the sum over both."""
    updates = replies(method_of(name), start(), clients_of(RANKS))
    results = []
    for chosen in ([0], [1], [0, 1], []):
        mean = private(name, rate=0.5, clip=3.0)
        for index in chosen:
            mean.add(updates[index])
        results.append({n: t.double() for n, t in mean.result().adapter.tensors().items()})
    first, second, both, none = results
    for key, tensor in both.items():
        parts = first[key] + second[key] - 2 * none[key]
        torch.testing.assert_close(tensor - none[key], parts, rtol=1e-5, atol=1e-5)


def test_the_noise_is_the_clip_norm_times_the_multiplier_over_the_expected_holders() -> None:
    adapter = LoraAdapter(
        {"layer": Factors(torch.zeros(2, 4000), torch.zeros(4000, 2))}, ScaleRule(), {}
    )
    clients = [Client("a", 1, 1), Client("b", 2, 1), Client("c", 2, 1)]
    mechanism = Mechanism(clip=0.3, noise_multiplier=2.0, rate=0.5, adaptive=False)
    mean = PrivateMean(
        method_of("prelort"), ServerState(adapter), clients, mechanism, system_normal
    )
    factors = mean.result().adapter.layers["layer"]
    for dimension, holders in enumerate((3, 2)):
        for values in (factors.A[dimension], factors.B[:, dimension]):
            assert float(values.std()) == pytest.approx(0.3 * 2.0 / (0.5 * holders), rel=0.06)


def test_what_is_not_trained_gets_no_noise() -> None:
    change = difference(private("ffa-lora", normal=system_normal).result(), start())
    assert all(not t.any() for n, t in change.items() if n.endswith("lora_A.weight"))
    assert all(t.any() for n, t in change.items() if not n.endswith("lora_A.weight"))


class TestAdaptiveClipping:
    @pytest.mark.parametrize("clip, direction", [(1e6, -1), (1e-6, 1)])
    def test_the_clip_norm_moves_towards_the_median(self, clip: float, direction: int) -> None:
        updates = replies(method_of("prelort"), start(), clients_of(RANKS))
        mean = private(clip=clip, adaptive=True)
        for update in updates:
            mean.add(update)
        after = mean.result()
        assert float(after.memory[CLIP]) == pytest.approx(clip * math.exp(0.15 * direction))
        again = PrivateMean(mean.method, after, clients_of(RANKS), mean.mechanism, silent)
        assert again.clip == float(after.memory[CLIP])

    def test_changes_and_count_compose_to_the_whole_noise(self) -> None:
        changes, count = Mechanism(1.0, 1.3, 0.5, adaptive=True).multipliers()
        assert changes**-2 + count**-2 == pytest.approx(1.3**-2)


class TestNoiseSource:
    def test_the_numbers_are_standard_normal(self) -> None:
        numbers = system_normal(torch.Size([200, 500]))
        assert numbers.dtype == torch.float64
        assert abs(float(numbers.mean())) < 0.02
        assert abs(float(numbers.std()) - 1) < 0.02
        assert 0.0015 < float((numbers.abs() > 3).double().mean()) < 0.004
        assert not torch.equal(numbers, system_normal(torch.Size([200, 500])))

    def test_a_sample_has_each_client_with_the_same_probability(self) -> None:
        counts = np.zeros(10)
        for _ in range(3000):
            counts[poisson_sample(range(10), 0.3)] += 1
        assert np.all(np.abs(counts / 3000 - 0.3) < 0.05)


def audited(noise_multiplier: float, canaries: int = 600) -> float:
    """The audit of one release: a canary's change is the clip norm in a coordinate of its own."""
    adapter = LoraAdapter(
        {"layer": Factors(torch.zeros(1, canaries), torch.zeros(1, 1))}, ScaleRule(), {}
    )
    clients = [Client(f"{index}", 1, 1) for index in range(canaries)]
    mechanism = Mechanism(1.0, noise_multiplier, 1.0, adaptive=False)
    mean = PrivateMean(method_of("fedit"), ServerState(adapter), clients, mechanism, system_normal)
    took_part = np.random.default_rng(0).random(canaries) < 0.5
    for index in np.flatnonzero(took_part):
        change = torch.zeros(1, canaries)
        change[0, index] = 5.0  # clipped to 1
        trained = LoraAdapter({"layer": Factors(change, torch.zeros(1, 1))}, ScaleRule(), {})
        mean.add(Update(clients[index], trained, 1))
    scores = mean.result().adapter.layers["layer"].A[0].numpy()
    return audited_epsilon(scores, took_part, canaries // 2)


def test_an_audit_finds_no_more_than_is_claimed_and_more_if_the_noise_is_broken() -> None:
    budget = Budget(3.0, 1e-5, releases=1, rate=1.0)
    noise = budget.noise_multiplier()
    assert 0.0 < audited(noise) < budget.epsilon
    assert audited(noise / 5) > budget.epsilon
