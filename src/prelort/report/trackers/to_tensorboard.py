"""TensorBoard: event files in ``tensorboard`` of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping

from prelort.report.trackers.follow import TrackedRun


class TensorBoard:
    """Writes scalars by round, and the configuration as a text."""

    def open(self, run: TrackedRun, known: str | None, first: int) -> str:
        """A file more in the folder, which TensorBoard reads with those that are there."""
        from torch.utils.tensorboard import SummaryWriter

        purge = first if known else None
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        if not known:
            rows = [f"| {key} | `{value}` |" for key, value in run.params.items()]
            self._writer.add_text(
                "configuration", "\n".join(["| key | value |", "|---|---|", *rows])
            )
        return "tensorboard"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars, flushed, so that they are seen while the run goes on."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """Close the file."""
        self._writer.close()


def make() -> TensorBoard:
    """A tracker that is not open yet."""
    return TensorBoard()
