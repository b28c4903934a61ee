"""The messages between server and clients: one header for each kind.

Compatibility: within one `PROTOCOL` messages may gain optional fields. A receiver ignores a field
that it does not know, so a newer server works with an older site. A field that changes what a
client must do is named in ``TrainRequest.requires`` where it is used: a site that does not know the
name refuses, with a sentence that says so. Everything else is a new protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from prelort.adapters import AdapterSchema, ScaleRule, Trained
from prelort.errors import UpdateRefused
from prelort.federation.encoding import Dtype
from prelort.methods.objective import Kind, Objective, TailPenalty
from prelort.privacy.example import EXAMPLE_PRIVACY, ExamplePrivacy
from prelort.secure.messages import FEATURE, HIDDEN_RANKS, MaskedInput
from prelort.training.settings import LocalTraining

PROTOCOL = 4
MAX_NAME = 200
"""Characters of a client's name."""
B_RATE_RATIO = "b-rate-ratio"
MAGNITUDES = "magnitudes"
FEATURES = frozenset({FEATURE, HIDDEN_RANKS, B_RATE_RATIO, MAGNITUDES, EXAMPLE_PRIVACY})
"""What this version knows of the names in ``TrainRequest.requires``."""

Seconds = Annotated[float, PlainSerializer(lambda value: f"{value:.6e}", when_used="json")]
"""A time with a fixed length in bytes, so that equal runs count equal traffic."""

MetricValue = Annotated[
    float | None,
    AfterValidator(lambda value: value if value is not None and isfinite(value) else None),
]
"""A metric; a value that is not finite is None."""

Factors = Literal["nothing", "A", "A and B"]


class Header(BaseModel):
    """The part that all messages share: which adapter they are about."""

    model_config = ConfigDict(extra="ignore", frozen=True)

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


class PropertiesRequest(Header):
    """The server's first message. ``hide_rank``: the client is to state ``rank`` as its own."""

    hide_rank: bool = False


class ClientProperties(Header):
    """A client's reply to the server's first message."""

    client: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    examples: Annotated[int, Field(ge=1)]
    max_rank: Annotated[int, Field(ge=1)]
    """The largest rank that the client can be raised to; ``rank`` is the one to begin with."""


class Delivery(Header):
    """How to complete the adapter in a request.

    ``rank`` is the adapter's. ``seeded_factors`` are drawn by the client from ``factor_seed``, and
    with ``personal`` B and the modules to save are the client's own from its last round: these do
    not travel.
    """

    dtype: Dtype
    round: int
    """Counts from 0."""
    seeded_factors: Factors = "nothing"
    factor_seed: int = 0
    personal: bool = False
    scale_multiplier: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0


class AtRank(BaseModel):
    """What a client of one rank is asked to train, where the server does not know its rank."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    learning_rate: float
    levels: tuple[int, ...]
    level_weights: tuple[float, ...]


class TrainRequest(Delivery):
    """A request to train the adapter in the message.

    All numbers are resolved: the learning rate is this client's.
    """

    rounds: Annotated[int, Field(ge=1)]
    seed: int
    training: LocalTraining
    objective: Kind
    levels: tuple[int, ...]
    level_weights: tuple[float, ...]
    tail: TailPenalty | None = None
    trains: Trained = "AB"
    with_validation: bool = False
    """Whether the server wants the loss on the client's validation rows."""
    timeout: float
    """Seconds."""
    requires: tuple[str, ...] = ()
    """Features that the client must know."""
    masked: MaskedInput | None = None
    """How the reply is masked, a float32 change; None: it is sent as it is."""
    private: ExamplePrivacy | None = None
    """Differential privacy of the client's examples; None: not asked for."""
    by_rank: dict[int, AtRank] = Field(default_factory=dict)
    """Where ranks are hidden: every rank -> its request, which a client takes the adapter's prefix
    for. Empty: the request is for its ``rank``."""

    def at(self, rank: int) -> TrainRequest:
        """The request for a client of this rank.

        Raises `UpdateRefused`, without the rank, if there is nothing to train at it.
        """
        own = self.by_rank.get(rank)
        if own is None:
            raise UpdateRefused("has nothing to train at its rank (method.level_weights)")
        changes = {
            "rank": rank,
            "training": replace(self.training, learning_rate=own.learning_rate),
            "levels": own.levels,
            "level_weights": own.level_weights,
        }
        return self.model_copy(update=changes)

    @property
    def reply_dtype(self) -> Dtype:
        """The type of the reply's adapter: what is masked is not rounded before."""
        return "float32" if self.masked is not None else self.dtype

    def check_features(self) -> None:
        """Raise `UpdateRefused` for a feature that this version does not know."""
        unknown = sorted(set(self.requires) - FEATURES)
        if unknown:
            raise UpdateRefused(
                f"does not know {unknown[0]!r}, which this run uses: update prelort at the site"
            )

    def to_objective(self) -> Objective:
        """The objective that the client optimises."""
        return Objective(self.objective, self.levels, self.level_weights, self.tail)


class EvaluateRequest(Delivery):
    """A request to measure the adapter in the message on the client's test rows."""

    prefixes: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ranks of prefixes to measure too (0: the base model with the modules to save)."""
    metrics: tuple[str, ...] | None
    batch_size: int
    max_new_tokens: int
    max_generated: int


class EvaluateReply(Header):
    """A client's measurements: metric -> value over its test examples.

    ``prefixes``: rank -> the same for each requested prefix. ``weight``: the number of
    tokens (causal) or examples that the loss is a mean over.
    """

    client: str
    round: int
    examples: Annotated[int, Field(ge=1)]
    weight: Annotated[int, Field(ge=1)]
    metrics: dict[str, MetricValue]
    prefixes: dict[int, dict[str, MetricValue]] = Field(default_factory=dict)


class TrainReply(Header):
    """A client's statement about the trained adapter in the message. ``round`` counts from 0."""

    dtype: Dtype
    change: bool
    """Whether the message has the change of the received adapter instead of the trained one."""
    client: str
    round: int
    examples: int
    steps: Annotated[int, Field(ge=0)]
    loss: float | None
    """None: not stated, where noise protects from the server too."""
    seconds: Annotated[Seconds, Field(ge=0.0, allow_inf_nan=False)]
    next_rank: Annotated[int, Field(ge=1)] | None = None
    """The rank that the client offers from the next round on; None: no change."""
    validation_loss: MetricValue = None
    epsilon: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """What the client has spent of the privacy of its examples; None: nothing was asked for."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What all participants must share: base model (fingerprint), adapter shapes, scale rule."""

    base: str
    schema: AdapterSchema
    scale: ScaleRule

    def header(self, rank: int) -> Header:
        """The header of a message about an adapter of ``rank``."""
        return Header(
            base=self.base,
            layers=self.schema.digest(),
            scale_rule=self.scale.kind,
            scale=self.scale.value,
            rank=rank,
        )

    def check(self, head: Header, rank: int | None = None) -> None:
        """Raise `UpdateRefused` for the first value in which the sender differs."""
        if head.base != self.base:
            raise UpdateRefused(
                f"has another base model: fingerprint {head.base}, expected {self.base}"
            )
        digest = self.schema.digest()
        if head.layers != digest:
            raise UpdateRefused(f"adapts other layers: digest {head.layers}, expected {digest}")
        if head.rule != self.scale:
            raise UpdateRefused(
                f"uses another scale rule: {head.rule}, but the federation's is {self.scale}; "
                "set lora.scale_rule and lora.scale alike at every site"
            )
        if rank is not None and head.rank != rank:
            raise UpdateRefused(f"answers with rank {head.rank}, expected {rank}")
