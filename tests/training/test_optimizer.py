"""The optimiser of one client: bitsandbytes against torch, and directions with magnitudes."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from dataclasses import replace

import pytest
import torch
from bench import settings_of
from torch import Tensor, nn

from prelort.errors import ConfigError
from prelort.training.optimizer import LocalOptimizer


def trained(name: str) -> Tensor:
    """A tensor after ten steps, from zero."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    optimizer = LocalOptimizer([parameter], [], [], settings_of(optimizer=name, max_grad_norm=0.0))
    for step in range(10):
        parameter.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
        optimizer.step(1.0 - step / 10)
    return parameter.detach()


def test_8_bits_of_state_give_nearly_the_same_steps() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'prelort[quantised]'")
    found, expected = trained("adamw-8bit"), trained("adamw")
    assert 0 < float((found - expected).norm()) < 0.03 * float(expected.norm())


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes: pip install 'prelort\[quantised\]'"
    ):
        trained("adamw-8bit")


def test_directions_and_magnitudes_learn_as_if_the_model_computed_with_them() -> None:
    """Autograd through ``normalised B @ diag(S) @ normalised A``, and plain AdamW of the three."""
    generator = torch.Generator().manual_seed(0)
    a, b, target = (torch.randn(s, generator=generator) for s in ([3, 7], [5, 3], [5, 7]))
    a = nn.functional.normalize(a, dim=1)
    settings = replace(
        settings_of(optimizer="adamw", learning_rate=0.01, max_grad_norm=0.0),
        magnitude_rate_ratio=10.0,
    )
    factors = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    optimizer = LocalOptimizer([factors[0]], [factors[1]], [], settings)
    rows, columns, magnitudes = own = [
        nn.Parameter(t) for t in (a, nn.functional.normalize(b, dim=0), b.norm(dim=0))
    ]
    groups = [{"params": own[:2], "lr": 0.01}, {"params": own[2:], "lr": 0.1}]
    reference = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    for _ in range(30):
        (factors[1] @ factors[0] - target).square().sum().backward()
        optimizer.step(1.0)
        unit = nn.functional.normalize
        product = unit(columns, dim=0) @ magnitudes.diag() @ unit(rows, dim=1)
        reference.zero_grad()
        (product - target).square().sum().backward()
        reference.step()
    expected = unit(columns, dim=0) @ magnitudes.diag() @ unit(rows, dim=1)
    torch.testing.assert_close(factors[1] @ factors[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors[0].norm(dim=1), torch.ones(3))
    assert float((expected.detach() - b @ a).norm()) > 1
