"""Dropout from a client's own generators, so that clients can train in several threads.

torch draws dropout masks from one generator for the whole process: two threads that share it get
other masks in every run. `ClientDropout` replaces the random functions of one thread.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prelort.errors import ConfigError

_TAKES_A_GENERATOR = {
    torch.bernoulli, torch.multinomial, torch.normal, torch.rand, torch.randint, torch.randn,
    torch.randperm, Tensor.bernoulli, Tensor.bernoulli_, Tensor.exponential_, Tensor.multinomial,
    Tensor.normal_, Tensor.random_, Tensor.uniform_,
}  # fmt: skip
_TAKES_NONE = {
    F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout,
    F.multi_head_attention_forward, F.rrelu, torch.rand_like, torch.randn_like,
    torch.randint_like,
}  # fmt: skip


class ClientDropout(TorchFunctionMode):
    """While active, everything that a model draws in this thread comes from ``seed``.

    Dropout and the dropout of `F.scaled_dot_product_attention` draw their masks from generators
    of this object, one for each device; functions that take a generator are given it. The process's
    generators are neither read nor advanced. Raises `ConfigError` for the few random functions of
    torch that take no generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.dropout:
            return self._dropout(*torch_dropout_arguments(*args, **kwargs))
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in _TAKES_A_GENERATOR and kwargs.get("generator") is None:
            like = next((a for a in args if isinstance(a, Tensor)), None)
            device = kwargs.get("device") or (like.device if like is not None else "cpu")
            return func(*args, **kwargs, generator=self._generator(torch.device(device)))
        if func in _TAKES_NONE:
            _refuse_dropout(func, args, kwargs)
        return func(*args, **kwargs)

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of `torch.utils.checkpoint`: recomputation draws the same masks again."""
        states: dict[torch.device, Tensor] = {}

        @contextmanager
        def forward() -> Iterator[None]:
            states.update(self._states())
            yield

        @contextmanager
        def recomputation() -> Iterator[None]:
            current = self._states()
            self._restore(states)
            try:
                with self:  # it is off during `Tensor.backward`, itself one of torch's functions
                    yield
            finally:
                self._restore(current)

        return forward(), recomputation()

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _states(self) -> dict[torch.device, Tensor]:
        return {device: own.get_state() for device, own in self._generators.items()}

    def _restore(self, states: Mapping[torch.device, Tensor]) -> None:
        self._generators = {device: torch.Generator(device) for device in states}
        for device, state in states.items():
            self._generators[device].set_state(state)

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return x
        if p == 1:
            return x.zero_() if inplace else x * 0
        keep = torch.empty_like(x, dtype=torch.bool)
        keep.bernoulli_(1 - p, generator=self._generator(x.device))
        if inplace:
            return x.mul_(keep).div_(1 - p)
        return x * keep / (1 - p)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` as its documentation defines it."""
        if dropout_p == 0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            heads = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(heads, dim=-3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask
        weights = scores.float().softmax(dim=-1).to(value.dtype)
        return self._dropout(weights, dropout_p) @ value


def draws(model: nn.Module) -> bool:
    """Whether the model has dropout, by its modules and its configurations.

    Functions read rates such as ``attention_dropout`` from a configuration.
    """
    for module in model.modules():
        if "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0:
            return True
        config = getattr(module, "config", None)
        for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                return True
    return False


def _refuse_dropout(func: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> None:
    values = inspect.signature(func).bind(*args, **kwargs)
    values.apply_defaults()
    arguments = values.arguments
    if arguments["training"] and arguments.get("dropout_p", arguments.get("p", 1.0)) > 0:
        raise ConfigError(
            f"the model uses {func.__name__} with dropout, which cannot be drawn for each client "
            "from its own seed: set the model's dropout to 0"
        )


def torch_dropout_arguments(input: Tensor, p: float, train: bool) -> tuple[Tensor, float, bool]:
    """The arguments of `torch.dropout` in the order of `F.dropout`."""
    return input, p, train
