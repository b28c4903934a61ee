"""Measuring the global adapter at every rank, and the untuned base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.federation.site import Workspace
from prelort.methods.interface import Method, ServerState
from prelort.metrics.evaluate import evaluate
from prelort.models.lora import install
from prelort.tasks.interface import Example

Measured = dict[int, dict[str, float]]
"""Rank (0: the base without the adapter's factors) -> metric -> value."""


def measure(
    config: Config,
    work: Workspace,
    examples: Sequence[Example],
    adapters: Mapping[int, LoraAdapter],
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """The configured metrics of each of ``adapters`` (by the rank they stand for) on examples.

    Rank 0 is the base: its adapter's extras count, its factors do not.
    """
    settings = config.evaluation
    measured: Measured = {}
    for index, (rank, adapter) in enumerate(adapters.items()):
        install(work.model, adapter)

        def told(done: int, total: int, before: int = index) -> None:
            if progress is not None:
                progress(before * total + done, len(adapters) * total)

        measured |= evaluate(
            work.model,
            work.task,
            examples,
            (rank,),
            lambda rank: work.truncation.at(0 if rank == 0 else None),
            metrics=settings.metrics or work.task.metrics,
            tokenizer=work.tokenizer,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            max_generated=settings.max_generated,
            device=work.model.device,
            progress=told,
        )
    return measured


def readouts(
    config: Config, method: Method, state: ServerState, levels: Sequence[int]
) -> dict[int, LoraAdapter]:
    """The global adapters to measure and to leave: one for each rank, by that rank.

    Where the method keeps more than the highest level holds, that whole is one of them.
    """
    whole = method.readout(state)
    wanted = tuple(sorted(set(config.evaluation.prefixes or levels)))
    found = {rank: method.readout(state, min(rank, whole.rank)) for rank in wanted}
    if config.evaluation.prefixes is None and whole.rank > wanted[-1]:
        found[whole.rank] = whole
    return found


def prefixes(config: Config, levels: Sequence[int], rank: int) -> tuple[int, ...]:
    """The ranks to measure at. Raises `ConfigError` for one above the global adapter's."""
    wanted = tuple(sorted(set(config.evaluation.prefixes or levels)))
    if wanted[-1] > rank:
        raise ConfigError(
            f"evaluation.prefixes: {wanted[-1]} is above the global adapter's rank {rank}"
        )
    return wanted
