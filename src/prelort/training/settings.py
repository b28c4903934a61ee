"""The hyperparameters of local training, as one client receives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prelort.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """A client's resolved training settings (docs/configuration.md).

    ``learning_rate`` is the client's own, ``b_rate_ratio`` times it is that of B, and
    ``head_learning_rate`` that of the modules trained in full. With ``local_steps`` 0 the number of
    steps follows from ``local_epochs``. ``magnitude_rate_ratio`` is the broadcast's.
    """

    local_steps: int
    local_epochs: float
    batch_size: int
    gradient_accumulation: int
    optimizer: Literal["adamw", "sgd", "adamw-8bit"]
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    momentum: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float
    max_grad_norm: float
    precision: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool
    batch_truncations: bool
    shuffle: bool
    # What came after protocol 4 has a default: a server may be older.
    b_rate_ratio: float = 1.0
    packing: bool = False
    magnitude_rate_ratio: float | None = None

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        *,
        learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        magnitude_rate_ratio: float | None = None,
    ) -> LocalTraining:
        """The settings of ``[training]``; rates passed here replace the configured ones."""
        values = config.model_dump(exclude={"rank_exponent"})
        values["learning_rate"] = rate = learning_rate or config.learning_rate
        values["head_learning_rate"] = head_learning_rate or config.head_learning_rate or rate
        return cls(**values, magnitude_rate_ratio=magnitude_rate_ratio)
