"""Counting the bytes of live tensors after every operation of torch.

Counts the storages that torch's operators return (views share one), for real and for fake tensors.
Temporary buffers inside a kernel are not visible.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, appends the bytes of all live storages to ``live`` at every new one.

    Reading the value of a fake tensor gives 1.0 (float), 0 (integer) or False (bool): finite
    losses, the first level, and rows of unequal length, so that masks are allocated.
    """

    def __init__(self, present: Iterable[Tensor]) -> None:
        """``present``: the tensors that exist from the start."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: list[int] = []
        self._sizes: dict[int, int] = {}
        self._live_bytes = 0
        for tensor in present:
            self._count(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and count its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return _some_value(args[0])
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._live_bytes += storage.nbytes()
        self.live.append(self._live_bytes)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._live_bytes -= self._sizes.pop(key)


def _some_value(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 0
