"""The content of a message: a header (text) and, with an adapter, one blob.

Imports no torch, so that a process that only forwards messages starts quickly.
"""

from __future__ import annotations

from prelort.federation.flower import Array, ArrayRecord, ConfigRecord, RecordDict

SAFETENSORS = "safetensors"
"""The blob's type; no other is read."""

_HEADER, _ADAPTER = "header", "adapter"


def content_of(text: str, blob: bytes | None = None) -> RecordDict:
    """A message's content of a header and perhaps a safetensors blob."""
    content = RecordDict({_HEADER: ConfigRecord({"json": text})})
    if blob is not None:
        content[_ADAPTER] = record_of(blob)
    return content


def record_of(blob: bytes) -> ArrayRecord:
    """A safetensors blob as Flower's record."""
    array = Array(dtype="uint8", shape=(len(blob),), stype=SAFETENSORS, data=blob)
    return ArrayRecord({_ADAPTER: array})


# Not through `content.array_records` or similar: these views form a reference cycle with the
# content (flwr 1.41), which keeps the adapter in memory until the garbage collector runs.


def text_in(content: RecordDict) -> str | None:
    """The header; None if there is none."""
    config = content.get(_HEADER)
    text = config.get("json") if isinstance(config, ConfigRecord) else None
    return text if isinstance(text, str) else None


def blob_in(content: RecordDict) -> bytes | None:
    """The blob; None if there is none or its type is another."""
    arrays = content.get(_ADAPTER)
    array = arrays.get(_ADAPTER) if isinstance(arrays, ArrayRecord) else None
    return array.data if isinstance(array, Array) and array.stype == SAFETENSORS else None
