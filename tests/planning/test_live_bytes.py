"""Bytes alive, against tensors whose life is known."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prelort.planning.live import LiveBytes


def test_storages_count_once_and_while_they_live() -> None:
    first = torch.zeros(10)
    watch = LiveBytes([first, first.view(2, 5)])
    assert watch.live == [40]
    with watch:
        second = torch.ones(100)
        view = second[10:]
        del second
        third = view + 1
        del view
        torch.zeros(5)
    assert watch.live == [40, 440, 840 - 40, 440 - 40 + 20]
    del third
    with watch:
        torch.zeros(1)
    assert watch.live[-1] == 44


def test_what_backward_keeps_is_seen() -> None:
    weight = torch.ones(50, 50, requires_grad=True)
    with LiveBytes([weight]) as watch:
        loss = (weight * 2).exp().sum()
    # exp keeps its result, of the weight's size; the product is needed no more.
    assert max(watch.live) == 30_000
    assert watch.live[-1] == 10_000 + 10_000 + 4
    del loss
    with watch:
        torch.zeros(1)
    assert watch.live[-1] == 10_004


def test_fake_tensors_weigh_as_real_ones_and_have_some_value() -> None:
    with FakeTensorMode(), LiveBytes([]) as watch:
        huge = torch.empty(2**40, dtype=torch.bfloat16)
        assert float(huge.float().mean()) == 1.0
        assert int(torch.arange(3)[1]) == 0
        assert not bool((huge > 0).all())
    assert watch.live[0] == 2**41
