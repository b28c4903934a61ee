"""The class names of a classifier, beside what was trained.

An adapter's configuration has no place for them, and a ``config.json`` in its folder would be taken
for that of a whole model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FILE = "labels.json"


def write(folder: Path, labels: Sequence[str]) -> None:
    """Write the names, in the order of their numbers, as transformers' configurations have them.

    Nothing where there are none.
    """
    if labels:
        numbers = {name: number for number, name in enumerate(labels)}
        values = {"id2label": dict(enumerate(labels)), "label2id": numbers}
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / FILE).write_text(text, encoding="utf-8")


def read(folder: Path) -> tuple[str, ...]:
    """The names in the order of their numbers; none without the file."""
    if not (folder / FILE).is_file():
        return ()
    numbers: dict[str, int] = json.loads((folder / FILE).read_text(encoding="utf-8"))["label2id"]
    return tuple(sorted(numbers, key=numbers.__getitem__))
