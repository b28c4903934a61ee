"""The types in which numbers travel: how far off they are, and what is refused of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prelort.errors import UpdateRefused
from prelort.federation.encoding import (
    DTYPES,
    SMALLEST_SCALE,
    change_of,
    decode,
    encode,
    with_change,
)
from random_adapters import same_bits
from small_federation import make_adapter

A, B, HEAD, BIAS = "q.lora_A.weight", "q.lora_B.weight", "head.weight", "head.bias"
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1.0, 127.0, 1e-45, -1e-38, 3.4028234663852886e38]
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """A layer's factors, a head of two or more dimensions and a bias, of any finite numbers."""

    def of(*shape: int) -> Tensor:
        count = math.prod(shape)
        values = draw(st.lists(NUMBERS, min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.float32).reshape(shape)

    size = st.integers(0, 4)
    rank = draw(size)
    head = draw(st.sampled_from([(2, 3), (3, 1), (2, 2, 2), (0, 3)]))
    return {
        A: of(rank, draw(size)),
        B: of(draw(size), rank),
        HEAD: of(*head),
        BIAS: of(*draw(st.sampled_from([(), (0,), (3,)]))),
    }


def dimensions(name: str, tensor: Tensor) -> Tensor:
    """[rank dimensions, width], written down another way than in the module."""
    if name == BIAS:
        return tensor.reshape(1, -1)
    rows = tensor.unbind(1 if name == B else 0)
    return torch.stack([row.reshape(-1) for row in rows]) if rows else tensor.new_zeros(0, 1)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_int8_is_off_by_half_a_step_of_its_dimension_at_most(given: dict[str, Tensor]) -> None:
    found = decode(encode(given, "int8"), "int8")
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, torch.float32)
        if tensor.numel() == 0:
            continue
        off = dimensions(name, found[name].double() - tensor.double()).abs().amax(1)
        largest = dimensions(name, tensor.double()).abs().amax(1)
        allowed = largest / 127 / 2 * (1 + 1e-4)
        assert bool((off <= torch.maximum(allowed, torch.tensor(127 * SMALLEST_SCALE))).all())
        assert not found[name][tensor == 0].any()


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_to_encode_what_was_decoded_changes_nothing(given: dict[str, Tensor]) -> None:
    for dtype in DTYPES:
        once = encode(given, dtype)
        assert same(encode(decode(once, dtype), dtype), once)


def test_every_rank_dimension_has_a_scale_of_its_own() -> None:
    a = torch.tensor([[127.0, -1.0, 0.4], [0.0, 0.0, 0.0], [1.27, -0.01, 0.02]])
    found = encode({A: a, B: a.T.contiguous(), HEAD: a, BIAS: a[0]}, "int8")

    whole = torch.tensor([[127, -1, 0], [0, 0, 0], [127, -1, 2]], dtype=torch.int8)
    assert torch.equal(found[A], whole)
    assert torch.equal(found[B], whole.T)
    assert torch.equal(found[HEAD], whole)
    assert torch.equal(found[BIAS], whole[0])
    scales = torch.tensor([1.0, 0.0, 0.01])
    for name in (A, B, HEAD):
        assert found[f"{name}:scale"].dtype == torch.float32
        assert torch.allclose(found[f"{name}:scale"], scales, rtol=1e-4, atol=0)
    assert found[f"{BIAS}:scale"].tolist() == [1.0]


# What is refused


def good() -> dict[str, Tensor]:
    return encode(make_adapter(4).tensors(), "int8")


NAME = "model.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name, changed, said",
    [
        (f"{NAME}:scale", None, "scale' is missing"),
        (f"{NAME}:scale", torch.ones(3), r"scale' has shape \[3\], expected \[4\]"),
        (f"{NAME}:scale", torch.ones(4, 1), r"scale' has shape \[4, 1\], expected \[4\]"),
        (f"{NAME}:scale", torch.tensor(1.0), r"scale' has shape \[\], expected \[4\]"),
        (f"{NAME}:scale", torch.ones(4).double(), r"scale' is torch\.float64, stated was int8"),
        (f"{NAME}:scale", torch.ones(4).half(), r"scale' is torch\.float16, stated was int8"),
        (f"{NAME}:scale:scale", torch.ones(4), "scale:scale' is surplus: it is the scale of"),
        ("other:scale", torch.ones(4), "'other:scale' is surplus: it is the scale of nothing"),
        (NAME, None, "scale' is surplus: it is the scale of nothing"),
        (NAME, torch.ones(4, 6), r"weight' is torch\.float32, stated was int8"),
        (NAME, torch.ones(4, 6).to(torch.uint8), r"weight' is torch\.uint8, stated was int8"),
        (NAME, torch.full((4, 6), -128, dtype=torch.int8), "holds -128, allowed are -127 to 127"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, changed: Any, said: str) -> None:
    found = good()
    found.pop(name, None)
    if changed is not None:
        found[name] = changed
    with pytest.raises(UpdateRefused, match=said):
        decode(found, "int8")


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([A, B, HEAD, f"{A}:scale", f"{B}:scale", f"{HEAD}:scale", ":scale", ""]),
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from([torch.float32, torch.int8, torch.float16]),
            st.sampled_from([-128.0, -1.0, 0.0, 3.0]),
        ),
    )
)
def test_any_tensors_are_refused_or_become_float32(described: dict[str, Any]) -> None:
    made = {n: torch.full(shape, v).to(dtype) for n, (shape, dtype, v) in described.items()}
    try:
        found = decode(made, "int8")
    except UpdateRefused:
        return
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (torch.float32, made[name].shape)


# Changes


def test_no_change_leaves_what_was_sent_to_the_bit() -> None:
    """Whatever was received in its place."""
    sent = make_adapter(4, seed=1)
    received = sent.to(torch.bfloat16)
    change = change_of(received.to(torch.float32), received)
    assert same_bits(with_change(sent, change, {}), sent)
