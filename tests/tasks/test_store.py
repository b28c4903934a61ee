"""Examples that are kept on disk."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.tasks.causal_lm import CausalLM
from prelort.tasks.interface import Example
from prelort.tasks.store import ExampleStore, StoredExamples


class Numbered(CausalLM):
    """Example n has token n often, and labels of some kind."""

    def encode(self, rows: Dataset, *of: Any) -> Iterator[Example]:
        kinds: list[Any] = [3, [1.5, None], "ü", [[1], [2]]]
        for n in rows["n"]:
            yield Example([n] * 200, kinds[n % 4], n % 7, f"{n} ü")


def stored(examples: int) -> StoredExamples:
    rows = Dataset.from_dict({"n": range(examples)})
    return ExampleStore().encode(Numbered(), rows, None, DataConfig(), ())


def test_examples_come_back_as_they_were_and_in_any_order() -> None:
    examples = stored(2500)
    made = list(Numbered().encode(Dataset.from_dict({"n": range(2500)})))
    assert list(examples) == made
    assert examples[-1] == made[-1]
    assert list(examples[5:9:2]) == made[5:9:2]
    assert list(examples.select(np.array([2000, 3]))) == [made[2000], made[3]]
    with pytest.raises(IndexError):
        examples[2500]
    assert not stored(0)


@pytest.mark.parametrize("labels", [{3: 0.5}, (1, 2), float("nan")], ids=str)
def test_labels_that_would_come_back_as_others_are_refused(labels: object) -> None:
    class Labelled(CausalLM):
        def encode(self, *of: Any) -> Iterator[Example]:
            yield Example([1], labels)

    rows = Dataset.from_dict({"n": [0]})
    with pytest.raises(ConfigError, match=r"encode\(\) must return Examples"):
        ExampleStore().encode(Labelled(), rows, None, DataConfig(), ())


def test_memory_does_not_grow_with_the_examples() -> None:
    def peak(examples: int) -> int:
        tracemalloc.start()
        list(map(len, (e.input_ids for e in stored(examples))))
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    assert peak(4000) < peak(2000) + 2000 * 400  # a list of 200 tokens has 1600 bytes and more


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(ConfigError, match=r"TMPDIR names: No space left"):
        stored(2000)
