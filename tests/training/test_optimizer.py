"""Optimisers of bitsandbytes against torch's."""

from __future__ import annotations

import importlib.machinery
import importlib.util

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
