"""What server and clients say to each other, and the checks before anything is believed.

A message is one header (JSON, a pydantic model) and, where an adapter travels, one safetensors
blob: it carries bfloat16 as it is, is read without unpickling, and fails as a whole if a byte of
its structure is wrong. The same bytes go through every engine.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError
from safetensors import SafetensorError

from prelort.adapters import AdapterSchema, LoraAdapter, ScaleRule
from prelort.config import TrainingConfig
from prelort.errors import AdapterError, UpdateRefused
from prelort.federation.flower import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from prelort.methods.objective import Kind, Objective

PROTOCOL = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]
Seconds = Annotated[float, PlainSerializer(lambda value: f"{value:.6e}", when_used="json")]
"""A time, always as many bytes long, so that equal runs count equal bytes."""

_HEADER, _ADAPTER = "header", "adapter"


class Header(BaseModel):
    """What every message states about the adapter it is about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: int = PROTOCOL
    base: str
    """Fingerprint of the base model."""
    layers: str
    """Digest of the adapter's layer names and shapes."""
    scale_rule: Literal["constant", "rslora"]
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    rank: Annotated[int, Field(ge=1)]

    @property
    def rule(self) -> ScaleRule:
        """The scale rule that the sender uses."""
        return ScaleRule(self.scale_rule, self.scale)


class Introduction(Header):
    """A client's answer to the server's first question."""

    client: Annotated[str, Field(min_length=1, max_length=200)]
    examples: Annotated[int, Field(ge=1)]


class TrainRequest(Header):
    """The server's order to train the adapter that comes with it. ``round`` counts from 0."""

    dtype: Dtype
    round: int
    rounds: int
    seed: int
    training: TrainingConfig
    objective: Kind
    levels: tuple[int, ...]
    level_weights: tuple[float, ...]
    timeout: float

    def to_objective(self) -> Objective:
        """The objective that the client optimises."""
        return Objective(self.objective, self.levels, self.level_weights)


class TrainReply(Header):
    """What a client says with its trained adapter. ``round`` counts from 0."""

    dtype: Dtype
    client: str
    round: int
    examples: int
    steps: int
    loss: float
    seconds: Seconds


H = TypeVar("H", bound=Header)


def pack(header: Header, adapter: LoraAdapter | None = None) -> RecordDict:
    """A message's content. ``adapter`` is sent in the header's dtype, values rounded to it."""
    content = RecordDict({_HEADER: ConfigRecord({"json": header.model_dump_json()})})
    if adapter is not None:
        content[_ADAPTER] = record(adapter.to(DTYPES[header.dtype]))  # type: ignore[attr-defined]
    return content


def record(adapter: LoraAdapter) -> ArrayRecord:
    """An adapter as Flower's record: one safetensors blob."""
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors().items()}
    data = safetensors.torch.save(tensors)
    blob = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
    return ArrayRecord({_ADAPTER: blob})


def size(content: RecordDict) -> int:
    """The bytes of header and adapter, as they travel."""
    total = len(_text(content).encode())
    blob = _blob(content)
    return total if blob is None else total + len(blob.data)


def header(content: RecordDict, kind: type[H]) -> H:
    """The message's header. Raises `UpdateRefused` if it is not of this kind."""
    text = _text(content)
    try:
        found = kind.model_validate_json(text)
    except ValidationError as error:
        _check_protocol(_stated_protocol(text))  # another protocol has other keys
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise UpdateRefused(f"malformed header: {where}: {first['msg']}") from None
    _check_protocol(found.protocol)
    return found


def adapter(content: RecordDict, head: TrainRequest | TrainReply) -> LoraAdapter:
    """The adapter that came with a header, in the type it travelled in.

    Raises `UpdateRefused` for truncated or foreign bytes and for a type that is not the stated
    one. Shapes and values are checked by `check_adapter`.
    """
    blob = _blob(content)
    if blob is None or blob.stype != "safetensors":
        raise UpdateRefused("carries no adapter")
    try:
        tensors = safetensors.torch.load(blob.data)
        found = LoraAdapter.from_tensors(tensors, head.rule)
    except (SafetensorError, AdapterError, ValueError, KeyError, RuntimeError) as error:
        raise UpdateRefused(f"adapter cannot be read: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != DTYPES[head.dtype]:
            raise UpdateRefused(f"tensor {name!r} is {tensor.dtype}, stated was {head.dtype}")
    return found


def check_adapter(
    found: LoraAdapter, schema: AdapterSchema, rank: int, max_abs_value: float
) -> None:
    """Raise `UpdateRefused` for a tensor of a wrong name or shape, or absurd or no numbers."""
    try:
        schema.check(found, rank)
    except AdapterError as error:
        raise UpdateRefused(str(error)) from None
    for name, tensor in found.tensors().items():
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not math.isfinite(largest):
            raise UpdateRefused(f"tensor {name!r} holds a value that is not finite")
        if largest > max_abs_value:
            raise UpdateRefused(
                f"tensor {name!r} holds {largest:.3g}, above federation.max_abs_value = "
                f"{max_abs_value:g}"
            )


def content_of(reply: Message) -> RecordDict:
    """A reply's content. Raises `UpdateRefused` with the reason where there is none."""
    if reply.has_error():
        raise UpdateRefused(reply.error.reason or f"failed with error code {reply.error.code}")
    return reply.content


def _check_protocol(stated: object) -> None:
    if stated != PROTOCOL:
        raise UpdateRefused(f"speaks protocol {stated}, expected {PROTOCOL}")


def _stated_protocol(text: str) -> object:
    """The protocol that a header of unknown keys states; ours where it states none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return PROTOCOL
    stated = values.get("protocol", PROTOCOL) if isinstance(values, dict) else PROTOCOL
    return stated if isinstance(stated, int) else PROTOCOL


# Not by `content.array_records` and its like: these views make a cycle of references with the
# content (flwr 1.41), and it then waits with its adapter for the garbage collector.


def _blob(content: RecordDict) -> Array | None:
    arrays = content.get(_ADAPTER)
    return arrays.get(_ADAPTER) if isinstance(arrays, ArrayRecord) else None


def _text(content: RecordDict) -> str:
    config = content.get(_HEADER)
    text: Any = config.get("json") if isinstance(config, ConfigRecord) else None
    if not isinstance(text, str):
        raise UpdateRefused("carries no header")
    return text
