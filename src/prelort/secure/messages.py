"""The messages of secure aggregation, in the order in which they are sent.

Participants have numbers from 1; bytes travel as base64. Imports no torch, so that the process that
answers them starts quickly.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prelort.errors import PrelortError

FEATURE = "secure-aggregation"
"""The feature's name in ``TrainRequest.requires``."""
HIDDEN_RANKS = "hidden-ranks"
"""The name of the feature that clients keep their ranks to themselves."""

Number = Annotated[int, Field(ge=1)]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
Blocks = tuple[Annotated[int, Field(ge=0)], ...]


class Part(BaseModel):
    """Immutable; fields of a newer version are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )

    def text(self) -> str:
        """As it travels: fields that have their default, such as an absent signature, do not."""
        return self.model_dump_json(exclude_defaults=True)


class Step(Part):
    """What all messages have: the session, which is one attempt at one round."""

    session: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Noise(Part):
    """Differential privacy, where clients add the noise.

    ``clip``: the largest norm of a client's weighted change. ``deviation``: the standard deviation
    of the noise on every number of the sum, at least.
    """

    clip: Annotated[float, Field(gt=0.0)]
    deviation: Annotated[float, Field(gt=0.0)]


class KeysRequest(Step):
    """``query.keys``: a request for fresh public keys from a participant with these blocks.

    ``noise``: what it will have to add its share of.
    """

    number: Number
    blocks: Blocks
    noise: Noise | None = None


class Keys(Part):
    """A participant's public keys: of its masks, and of the shares that are sent to it.

    ``seed``: the commitment to the seed of its own mask. ``signer``: the fingerprint of the key
    that signed all this; empty where the participant does not sign.
    """

    mask_key: Key
    share_key: Key
    seed: Key
    signer: str = ""
    signature: bytes = b""


class KeysReply(Step, Keys):
    """The keys of one participant."""


class Peer(Keys):
    """A neighbour: its keys, the blocks that it sends, and the noise of which it adds a share."""

    blocks: Blocks
    noise: Noise | None = None


class SharesRequest(Step):
    """``query.shares``: the neighbours, among whom the receiver's secrets are shared.

    ``threshold``: shares that restore a secret; the participant and each neighbour have one.
    ``min_holders``: of each block among the participant and its neighbours.
    """

    threshold: Annotated[int, Field(ge=2)]
    min_holders: Annotated[int, Field(ge=2)]
    peers: dict[Number, Peer]


class SharesReply(Step):
    """For each neighbour its shares, sealed so that only it can read them."""

    sealed: dict[Number, bytes]


class MaskedInput(Step):
    """The part of a request to train that says how its reply is masked.

    ``sealed``: what each neighbour that has shared its secrets has sealed for this client.
    ``holds``: the block of each part of the trained adapter. ``lengths``: of all blocks.
    ``weight``: of this client. ``fraction_bits``: of the fixed-point numbers. ``bound``: the
    largest magnitude of a change.
    """

    sealed: dict[Number, bytes]
    holds: Blocks
    lengths: tuple[Annotated[int, Field(ge=0)], ...]
    weight: Annotated[float, Field(ge=0.0)]
    fraction_bits: Annotated[int, Field(ge=0, le=1000)]
    bound: Annotated[float, Field(gt=0.0)]


class CountReply(Step):
    """``query.count``: a masked 1 for each rank dimension that the client holds, and 0 for others.

    The request is a `MaskedInput` with one block of all rank dimensions. ``words``: elements of the
    ring, 8 bytes each, little-endian.
    """

    words: bytes


class UnmaskRequest(Step):
    """``query.unmask``: whose masked vectors have arrived.

    For each of ``survivors`` the receiver reveals its share of the seed, for every other neighbour
    that has joined its share of the mask key.
    """

    survivors: tuple[Number, ...]


class UnmaskReply(Step):
    """Shares by the participant whose secret they restore: of seeds, or of mask keys."""

    seeds: dict[Number, bytes]
    keys: dict[Number, bytes]


S = TypeVar("S", bound=BaseModel)


def read(text: str, kind: type[S]) -> S:
    """The message in a JSON text. Raises `PrelortError` if it is not of this kind."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "message"
        raise PrelortError(f"malformed {kind.__name__}: {where}: {first['msg']}") from None
