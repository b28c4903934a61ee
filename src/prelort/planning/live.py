"""Which bytes are alive after every operation of torch, by watching storages come and go.

It sees what torch's operators return (views share a storage and count once), on real and on fake
tensors alike. What a kernel allocates and frees inside itself it does not see.
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
    """While it is active, ``live`` and ``gradients`` get an entry at every new storage.

    Entries are bytes alive then: all of them, and those of finished gradients. Values that fake
    tensors do not have are answered as 1 (a number), 0 (an integer) and False (a truth value):
    finite losses, the first level, and rows of unequal length, so that masks are really made.
    """

    def __init__(self, present: Iterable[Tensor]) -> None:
        """``present``: what is there from the start."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: list[int] = []
        self.gradients: list[int] = []
        self._sizes: dict[int, int] = {}
        self._now = 0
        self._gradients_now = 0
        self._of_gradients: set[int] = set()
        for tensor in present:
            self._see(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and look at what it made."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return _some_value(args[0])
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def mark_gradient(self, gradient: Tensor) -> None:
        """Count this tensor's storage as a gradient from now on."""
        key = gradient.untyped_storage()._cdata
        if key in self._sizes and key not in self._of_gradients:
            self._of_gradients.add(key)
            self._gradients_now += self._sizes[key]

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.live.append(self._now)
        self.gradients.append(self._gradients_now)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        size = self._sizes.pop(key)
        self._now -= size
        if key in self._of_gradients:
            self._of_gradients.remove(key)
            self._gradients_now -= size


def _some_value(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 0
