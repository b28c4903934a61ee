"""MLflow, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say (default: ``prelort``)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from prelort.report.trackers.follow import TrackedRun

PARAMS_AT_ONCE = 100
"""MLflow takes no more in a batch."""

LONGEST = 500
"""Characters of a parameter that every MLflow takes."""


class MLflow:
    """A client of its own, so that a run that the user has open in this process is not touched."""

    def open(self, run: TrackedRun, known: str | None, first: int) -> str:
        """A run with the configuration as parameters, or the old one as running again."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        # A server that does not answer holds the run up for seconds, not for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        self._client = MlflowClient()
        if known:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "prelort")
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = str(self._client.create_run(where, run_name=run.name).info.run_id)
        params = [Param(key, str(value)[:LONGEST]) for key, value in run.params.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + PARAMS_AT_ONCE])
        return self._id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One batch a round."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, finished: bool) -> None:
        """Killed is what MLflow calls a run that was stopped and may go on."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def make() -> MLflow:
    """A tracker that is not open yet."""
    return MLflow()
