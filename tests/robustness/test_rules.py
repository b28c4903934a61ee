"""The rules against other libraries and their definitions."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch import Tensor

from prelort.robustness import rules


@pytest.fixture(params=[7, 8], ids="{} clients".format)
def changes(request: pytest.FixtureRequest) -> Tensor:
    generator = torch.Generator().manual_seed(request.param)
    return torch.randn(request.param, 5, generator=generator, dtype=torch.float64)


def squares(changes: Tensor) -> Tensor:
    return (changes[:, None] - changes[None]).square().sum(dim=2)


def test_coordinates(changes: Tensor) -> None:
    assert torch.equal(rules.median(changes), changes.quantile(0.5, dim=0))
    trimmed = torch.from_numpy(scipy.stats.trim_mean(changes.numpy(), 2.5 / len(changes)))
    assert torch.allclose(rules.trimmed_mean(changes, 2), trimmed)


def test_at_the_geometric_median_the_directions_to_all_clients_cancel(changes: Tensor) -> None:
    away = changes - rules.geometric_median(squares(changes)) @ changes
    assert float((away / away.norm(dim=1, keepdim=True)).sum(dim=0).norm()) < 1e-3


def test_krum_chooses_by_the_sums_of_the_smallest_squared_distances(changes: Tensor) -> None:
    count = len(changes)
    scores = [
        sum(sorted(float((x - y).square().sum()) for y in changes)[1 : count - 2 - 2 + 1])
        for x in changes
    ]
    for chosen in (1, 4):
        best = sorted(range(count), key=scores.__getitem__)[:chosen]
        weights = rules.krum(squares(changes), 2, chosen)
        assert weights.nonzero().flatten().tolist() == sorted(best)
        assert float(weights.sum()) == pytest.approx(1)


def test_clipping_shortens_to_the_median_norm_and_never_lengthens() -> None:
    factors = rules.clipping(torch.tensor([0.0, 1.0, 2.0, 4.0, 1e9], dtype=torch.float64))
    assert factors.tolist() == [1.0, 1.0, 1.0, 0.5, 2e-9]
