"""Measuring the global adapter at every prefix, and the untuned base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.experiment.assemble import Assembly
from prelort.metrics.evaluate import evaluate
from prelort.models.lora import install

Measured = dict[int, dict[str, float]]
"""Rank (0: the base without the adapter's factors) -> metric -> value."""


def measure(
    assembly: Assembly,
    adapter: LoraAdapter,
    ranks: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """The configured metrics of ``adapter`` cut to each rank, on the test examples."""
    work, settings = assembly.workspace, assembly.config.evaluation
    install(work.model, adapter)
    return evaluate(
        work.model,
        work.task,
        assembly.test,
        ranks,
        work.truncation.at,
        metrics=settings.metrics or work.task.metrics,
        tokenizer=assembly.tokenizer,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        max_generated=settings.max_generated,
        device=work.model.device,
        progress=progress,
    )


def prefixes(config: Config, levels: Sequence[int], rank: int) -> tuple[int, ...]:
    """The ranks to measure at. Raises `ConfigError` for one above the global adapter's."""
    wanted = tuple(sorted(set(config.evaluation.prefixes or levels)))
    if wanted[-1] > rank:
        raise ConfigError(
            f"evaluation.prefixes: {wanted[-1]} is above the global adapter's rank {rank}"
        )
    return wanted
