"""Several methods on the same rows: these are read and tokenised once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prelort.config import Config
from prelort.experiment.assemble import DataCache, assemble


def test_the_second_method_has_the_same_rows_and_examples_but_a_model_of_its_own(
    make_config: Callable[..., Config],
) -> None:
    cache = DataCache()
    first = assemble(make_config(), cache=cache)
    second = assemble(make_config(method={"name": "zero-padding"}), cache=cache)
    assert second.rows is first.rows
    for one, other in zip(first.clients, second.clients, strict=True):
        assert other.examples is one.examples
    assert second.test is first.test
    assert second.runtime.model is not first.runtime.model


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"data": {"max_length": 16}},
        {"partition": {"by": "iid", "clients": 6}},
        {"ranks": {"mix": "1*0.5, 2*0.5"}},
    ],
)
def test_other_rows_or_tokens_are_made_anew(
    make_config: Callable[..., Config], changes: dict[str, Any]
) -> None:
    cache = DataCache()
    config = make_config()
    values = config.model_dump()
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    other = Config.model_validate(values)
    before = assemble(config, cache=cache)
    found, alone = assemble(other, cache=cache), assemble(other)
    assert [(s.name, s.rank, list(s.examples)) for s in found.clients] == [
        (s.name, s.rank, list(s.examples)) for s in alone.clients
    ]
    assert list(found.test) == list(alone.test)
    assert found.rows is not before.rows
