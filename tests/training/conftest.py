from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["llama", "gpt2", "bert"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each tiny base model in turn: plain layers, transposed layers, a classifier head."""
    return request.getfixturevalue(f"tiny_{request.param}")
