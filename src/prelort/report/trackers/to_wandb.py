"""Weights & Biases, as its environment says: WANDB_MODE, WANDB_PROJECT (default: ``prelort``)."""

from __future__ import annotations

import os
from collections.abc import Mapping

from prelort.report.trackers.follow import TrackedRun


class WeightsAndBiases:
    """One W&B run; its files are in the run's folder unless WANDB_DIR says otherwise."""

    def open(self, run: TrackedRun, known: str | None, first: int) -> str:
        """Begin a run, or go on with the old one under its id."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "prelort"),
            name=run.name,
            id=known,
            resume="allow" if known else None,
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.params),
            reinit="create_new",
            # The terminal is the progress bars'.
            settings=wandb.Settings(console="off", silent=True),
        )
        return str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row a round."""
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=0 if finished else 1)


def make() -> WeightsAndBiases:
    """A tracker that is not open yet."""
    return WeightsAndBiases()
