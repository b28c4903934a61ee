"""Encoded examples on disk: the data of a client need not fit into memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from prelort.config import DataConfig
from prelort.errors import ConfigError
from prelort.extensions import calling
from prelort.tasks.interface import Example, Task

ROWS = 1000
"""Rows that are read and encoded together."""


class StoredExamples(Sequence[Example]):
    """Examples in a file; each is read when it is used, by any thread."""

    def __init__(self, file: IO[bytes], spans: npt.NDArray[np.int64]) -> None:
        """``spans`` [examples, 2]: where each example starts and ends."""
        self._file = file
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        start, end = self._spans[index].tolist()
        return Example(*json.loads(os.pread(self._file.fileno(), end - start, start)))

    def select(self, indices: npt.NDArray[np.int64]) -> StoredExamples:
        """The examples of these indices, in this order."""
        return StoredExamples(self._file, self._spans[indices])


class ExampleStore:
    """A temporary file without a name, which is gone when the last of its examples is."""

    def __init__(self) -> None:
        """Raises `ConfigError` if there is no folder for it."""
        with _writing():
            self._file = tempfile.TemporaryFile(prefix="prelort-")  # noqa: SIM115
        self._end = 0

    def encode(
        self, task: Task, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> StoredExamples:
        """Encode one client's rows, a thousand at a time.

        Raises `ConfigError` where the task's examples cannot be stored, or the disk is full.
        """
        ends = [self._end]
        with _writing():
            for start in range(0, len(rows), ROWS):
                part = rows.select(range(start, min(start + ROWS, len(rows))))
                with calling(f"task {type(task).__name__}", "encode()"):
                    examples = list(task.encode(part, tokenizer, config, labels))
                for example in examples:
                    self._end += self._file.write(_line(task, example))
                    ends.append(self._end)
            self._file.flush()
        return StoredExamples(self._file, np.stack([ends[:-1], ends[1:]], axis=1))


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            "the examples cannot be written to the folder of temporary files, which TMPDIR names: "
            f"{error.strerror or error}"
        ) from None


def _line(task: Task, example: object) -> bytes:
    try:
        if isinstance(example, Example) and example.input_ids:
            values = [example.input_ids, example.labels, example.prompt_length, example.reference]
            line = json.dumps(values, allow_nan=False)
            if json.loads(line) == values:
                return line.encode()
    except (TypeError, ValueError):  # a tensor, or numpy's numbers
        pass
    raise ConfigError(
        f"task {type(task).__name__}: encode() must return Examples of one token or more, made of "
        f"Python's numbers, texts and lists, but returned {example!r:.200}"
    )
