from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prelort.config import Config, check


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Callable[..., Config]:
    """A configuration for one of the tiny models, "llama", "gpt2" or "bert", with changes."""

    def make(base: str = "llama", /, **changes: dict[str, object] | str) -> Config:
        folder: Path = request.getfixturevalue(f"tiny_{base}")
        values: dict[str, dict[str, object] | str] = {
            "model": {"name": str(folder), "device": "cpu"},
            "data": {"max_length": 48},
            "training": {"batch_size": 4},
            "task": "classification" if base == "bert" else "causal-lm",
        }
        for section, change in changes.items():
            old = values.get(section, {})
            both = isinstance(change, dict) and isinstance(old, dict)
            values[section] = {**old, **change} if both else change  # type: ignore[dict-item]
        return check(values)

    return make
