"""Several examples in one row, each as if it were alone.

An example's positions begin at 0, from which transformers' attention takes that it sees itself
only: by a block-diagonal mask in eager and sdpa attention, by the sequences' lengths in flash
attention, which wants all of them in one row. `ModelRuntime.check_packing` tries whether a model
keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prelort.tasks._batches import pad_right
from prelort.tasks.interface import IGNORED, Batch, Example


def pack(examples: Sequence[Example], pad_id: int, *, one_row: bool) -> Batch:
    """A batch of causal examples in as few rows as they fit in, or in one.

    Rows are as long as the longest example; the longest are placed first, each where it fits.
    ``input_ids``, ``position_ids``, ``labels`` and ``example`` (the index of the example that a
    token belongs to) are int64 [rows, length], ``lengths`` int64 [examples]. The padding at the end
    of a row is like an example of its own; the first token of an example has no label.
    """
    lengths = [len(example.input_ids) for example in examples]
    width = sum(lengths) if one_row else max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(index)
        room[row] -= lengths[index]

    def joined(parts: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        return pad_right([[token for i in row for token in parts[i]] for row in rows], value)

    labels = [e.labels for e in examples if not isinstance(e.labels, int)]
    batch = {
        "input_ids": joined([e.input_ids for e in examples], pad_id),
        "position_ids": joined([range(length) for length in lengths], -1),
        "labels": joined([[IGNORED, *own[1:]] for own in labels], IGNORED),
        "example": joined([[i] * length for i, length in enumerate(lengths)], 0),
        "lengths": torch.tensor(lengths),
    }
    places = batch["position_ids"]
    padding = places < 0
    batch["position_ids"] = torch.where(padding, padding.cumsum(dim=1) - 1, places)
    return batch
