"""What each rank needs on a machine, and the largest rank that fits: `prelort plan` from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prelort.config import Config
from prelort.errors import ConfigError
from prelort.library_logging import quiet
from prelort.planning import sizes, tables
from prelort.planning.measured import free_memory
from prelort.planning.memory import Estimate, Planner

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Estimates for a machine.

    ``budget``: its memory in bytes, and ``where`` that number is from. ``largest``: the estimate of
    the largest rank up to ``max_rank`` that fits, None if not even rank 1 does; then ``refusal``
    says what would help.
    """

    estimates: tuple[Estimate, ...]
    budget: int
    where: str
    max_rank: int
    largest: Estimate | None
    refusal: str = ""

    def __repr__(self) -> str:
        if self.largest is None:
            return f"<Plan: {self.refusal}>"
        return f"<Plan: {tables.conclusion(self.largest, self.budget, self.where, self.max_rank)}>"

    def to_pandas(self) -> pd.DataFrame:
        """A row for each rank: its memory by parts, its messages (bytes), and whether it fits."""
        import pandas as pd

        return pd.DataFrame(tables.as_values(self.estimates, self.budget, self.largest)["ranks"])


@quiet()
def plan(
    config: Config,
    *,
    memory: int | str | None = None,
    ranks: Sequence[int] = (),
    labels: int = 2,
) -> Plan:
    """Estimate the memory and traffic of each rank, from the model's configuration alone.

    Args:
        config: as for `prelort.run`.
        memory: of the machine, in bytes or as ``"8GiB"``; default: what is free here.
        ranks: the ranks to estimate; default: powers of two up to 256.
        labels: the number of classes, for a classification.

    Raises:
        ConfigError: for a model that cannot be planned.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a prelort.Config, not {config!r}")
    if not isinstance(ranks, Sequence) or not all(isinstance(rank, int) for rank in ranks):
        raise ConfigError(f"ranks must be a list of whole numbers, not {ranks!r}")
    if memory is None:
        budget, where = free_memory(config.model.device)
    else:
        budget = sizes.parse(memory, "memory") if isinstance(memory, str) else memory
        where = "given"
    planner = Planner(config, labels)
    most = max(min(256, planner.max_rank), *ranks, 1)
    shown = list(ranks) or [2**power for power in range(1, 9) if 2**power <= most] or [1]
    estimates = tuple(planner.estimate(rank, most) for rank in shown)
    try:
        return Plan(estimates, budget, where, most, planner.largest(budget, most))
    except ConfigError as error:
        return Plan(estimates, budget, where, most, None, str(error))
