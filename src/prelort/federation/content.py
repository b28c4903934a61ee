"""What travels in a message: a header (text) and, where an adapter travels, one blob.

Without torch, so that a process which only passes messages on starts quickly.
"""

from __future__ import annotations

from prelort.federation.flower import Array, ArrayRecord, ConfigRecord, RecordDict

SAFETENSORS = "safetensors"
"""The blob's type: nothing else is ever read."""

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


# Not by `content.array_records` and its like: these views make a cycle of references with the
# content (flwr 1.41), and it then waits with its adapter for the garbage collector.


def text_in(content: RecordDict) -> str | None:
    """The header, None where there is none."""
    config = content.get(_HEADER)
    text = config.get("json") if isinstance(config, ConfigRecord) else None
    return text if isinstance(text, str) else None


def blob_in(content: RecordDict) -> bytes | None:
    """The blob, None where there is none or where it is of another type."""
    arrays = content.get(_ADAPTER)
    array = arrays.get(_ADAPTER) if isinstance(arrays, ArrayRecord) else None
    return array.data if isinstance(array, Array) and array.stype == SAFETENSORS else None
