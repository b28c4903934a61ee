"""Messages as bytes, and the checks before anything in them is used.

A message is one header (JSON) and, where an adapter travels, one safetensors blob: it carries
bfloat16 as it is, is read without unpickling, and fails as a whole if a byte of its structure is
wrong. The same bytes go through every engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from prelort.adapters import AdapterSchema, LoraAdapter, Trained
from prelort.errors import AdapterError, UpdateRefused
from prelort.federation.content import blob_in, content_of, text_in
from prelort.federation.encoding import Dtype, carries_change, decode, encode
from prelort.federation.flower import Message, RecordDict
from prelort.federation.messages import PROTOCOL, Delivery, Header, TrainReply

_FROZEN = "frozen:"
"""Before the names of the tensors that are folded into the base for the round."""
_A, _B, _MODULES = "A", "B", "modules to save"

H = TypeVar("H", bound=Header)


def pack(
    header: Header,
    adapter: LoraAdapter | None = None,
    frozen: LoraAdapter | None = None,
    without: Sequence[str] = (),
) -> RecordDict:
    """A message's content, in the header's dtype (values are rounded to it, see `encoding`).

    ``without``: the kinds of the adapter's tensors that do not travel.
    """
    if adapter is None:
        return content_of(header.model_dump_json())
    dtype: str = header.dtype  # type: ignore[attr-defined]
    tensors = {n: t for n, t in adapter.tensors().items() if kind_of(n) not in without}
    if frozen is not None:
        # Copies: safetensors refuses tensors that share memory, as views of one state may.
        tensors |= {_FROZEN + name: tensor.clone() for name, tensor in frozen.tensors().items()}
    return content_of(header.model_dump_json(), _bytes(encode(tensors, dtype)))


def size(content: RecordDict) -> int:
    """The bytes of header and adapter, as they travel."""
    return len(_text(content).encode()) + len(blob_in(content) or b"")


def header(content: RecordDict, kind: type[H]) -> H:
    """The message's header. Raises `UpdateRefused` if it is not of this kind."""
    text = _text(content)
    try:
        head = kind.model_validate_json(text)
    except ValidationError as error:
        _check_protocol(_stated_protocol(text))  # another protocol has other keys
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise UpdateRefused(f"malformed header: {where}: {first['msg']}") from None
    _check_protocol(head.protocol)
    return head


def adapter(
    content: RecordDict, head: Delivery | TrainReply, known: Mapping[str, Tensor] | None = None
) -> tuple[LoraAdapter, LoraAdapter | None]:
    """The adapter that came with a header, completed by the tensors ``known`` already, and the
    frozen one beside it, if there is one; in the header's dtype, or float32 where that is int8.

    Raises `UpdateRefused` for truncated or foreign bytes, for a type that is not the stated one,
    for scales that do not fit and for a tensor that should not have travelled. Shapes and values
    are checked by `check_adapter`.
    """
    blob = blob_in(content)
    if blob is None:
        raise UpdateRefused("carries no adapter")
    try:
        tensors = decode(safetensors.torch.load(blob), head.dtype)
        for name in tensors.keys() & (known or {}).keys():
            raise UpdateRefused(f"tensor {name!r} is surplus: it is not trained")
        second = {n.removeprefix(_FROZEN): t for n, t in tensors.items() if n.startswith(_FROZEN)}
        first = {name: t for name, t in tensors.items() if not name.startswith(_FROZEN)}
        received = LoraAdapter.from_tensors(first | dict(known or {}), head.rule)
        frozen = LoraAdapter.from_tensors(second, head.rule) if second else None
    except (SafetensorError, AdapterError, ValueError, KeyError, RuntimeError) as error:
        raise UpdateRefused(f"adapter cannot be read: {error}") from None
    return received, frozen


def check_dtype(head: TrainReply, expected: Dtype) -> None:
    """Raise `UpdateRefused` for a reply of another type, or with values in place of a change."""
    if head.dtype != expected:
        raise UpdateRefused(f"answers in {head.dtype}, expected {expected}")
    if head.change != carries_change(expected):
        names = {True: "a change", False: "values"}
        raise UpdateRefused(
            f"answers with {names[head.change]}, but {expected} carries {names[not head.change]}"
        )


def not_sent_down(request: Delivery) -> tuple[str, ...]:
    """The kinds of tensors that do not travel with a request."""
    seeded = {"nothing": (), "A": (_A,), "A and B": (_A, _B)}[request.seeded_factors]
    return (*seeded, _B, _MODULES) if request.personal else seeded


def not_sent_up(trains: Trained, personal: bool) -> tuple[str, ...]:
    """The kinds of tensors that do not travel back with a reply."""
    if personal:
        return (_B, _MODULES)
    return {"AB": (), "A": (_B,), "B": (_A,)}[trains]


def of_kinds(adapter: LoraAdapter, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The adapter's tensors of these kinds, by name."""
    return {name: t for name, t in adapter.tensors().items() if kind_of(name) in kinds}


def check_frozen(frozen: LoraAdapter, schema: AdapterSchema) -> None:
    """Raise `UpdateRefused` for a frozen adapter that does not fit or is not finite.

    Its layers may have any rank.
    """
    for name, factors in frozen.layers.items():
        shape = (factors.A.shape[1], factors.B.shape[0])
        if name not in schema.layers or shape != schema.layers[name][:2]:
            raise UpdateRefused(f"frozen layer {name!r} of {list(shape)} does not fit the model")
    if frozen.modules_to_save:
        raise UpdateRefused(f"frozen tensor {min(frozen.modules_to_save)!r} is surplus")
    for name, tensor in frozen.tensors().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateRefused(f"frozen tensor {name!r} holds a value that is not finite")


def check_adapter(
    received: LoraAdapter, schema: AdapterSchema, rank: int, max_abs_value: float
) -> None:
    """Raise `UpdateRefused` for a wrong name or shape, or a value not finite or too large."""
    try:
        schema.check(received, rank)
    except AdapterError as error:
        raise UpdateRefused(str(error)) from None
    for name, tensor in received.tensors().items():
        # One pass without a copy; NaN is both the smallest and the largest value.
        low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()),) * 2
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            raise UpdateRefused(f"tensor {name!r} holds a value that is not finite")
        if largest > max_abs_value:
            raise UpdateRefused(
                f"tensor {name!r} holds {largest:.3g}, above federation.max_abs_value = "
                f"{max_abs_value:g}"
            )


def reply_content(reply: Message) -> RecordDict:
    """A reply's content. Raises `UpdateRefused` with the reason for an error reply."""
    if reply.has_error():
        raise UpdateRefused(reply.error.reason or f"failed with error code {reply.error.code}")
    return reply.content


def kind_of(name: str) -> str:
    """Whether a tensor is an A, a B or of a module that is trained in full."""
    if name.endswith(".lora_A.weight"):
        return _A
    return _B if name.endswith(".lora_B.weight") else _MODULES


def _check_protocol(stated: object) -> None:
    if stated != PROTOCOL:
        raise UpdateRefused(f"speaks protocol {stated}, expected {PROTOCOL}")


def _stated_protocol(text: str) -> object:
    """The protocol that a malformed header states; ours if it states none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return PROTOCOL
    stated = values.get("protocol", PROTOCOL) if isinstance(values, dict) else PROTOCOL
    return stated if isinstance(stated, int) else PROTOCOL


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    data: bytes = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    return data


def _text(content: RecordDict) -> str:
    text = text_in(content)
    if text is None:
        raise UpdateRefused("carries no header")
    return text
