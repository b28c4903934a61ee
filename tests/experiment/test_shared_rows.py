"""Several methods on the same rows: these are read and tokenised once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prelort.config import Config
from prelort.experiment.assemble import Encoded, assemble
from prelort.tasks.causal_lm import CausalLM


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were tokenised, one by one."""
    counted: list[int] = []
    encode = CausalLM.encode

    def counting(self: CausalLM, rows: Any, *others: Any) -> Any:
        counted.append(len(rows))
        return encode(self, rows, *others)

    monkeypatch.setattr(CausalLM, "encode", counting)
    return counted


def test_the_second_method_tokenises_nothing(
    make_config: Callable[..., Config], encodings: list[int]
) -> None:
    encoded = Encoded()
    first = assemble(make_config(), encoded=encoded)
    before = len(encodings)
    assert before == len(first.clients) + 1
    second = assemble(make_config(method={"name": "zero-padding"}), encoded=encoded)
    assert len(encodings) == before
    assert second.rows is first.rows
    assert [client.examples for client in second.clients] == [
        client.examples for client in first.clients
    ]
    assert second.test == first.test
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
    encoded = Encoded()
    config = make_config()
    values = config.model_dump()
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    other = Config.model_validate(values)
    before = assemble(config, encoded=encoded)
    found, alone = assemble(other, encoded=encoded), assemble(other)
    assert [(s.name, s.rank, s.examples) for s in found.clients] == [
        (s.name, s.rank, s.examples) for s in alone.clients
    ]
    assert found.test == alone.test
    assert found.rows is not before.rows
