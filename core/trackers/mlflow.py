"""MLflow: a tracking server, or a SQLite file in the run folder. (Its old folder of files is refused by MLflow 3.)"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.run import COMPLETE
from core.trackers.base import End, Point, RunFacts, Started
from core.trackers.environment import without_credentials
from core.trackers.points import EPOCH

URI = "MLFLOW_TRACKING_URI"
FOLDER, DATABASE, ARTIFACTS = "mlflow", "mlflow.db", "artifacts"
TAG = "twinkeel.run"
_METRICS_AT_ONCE = 1000
_PARAMS_AT_ONCE = 100
_LONGEST_PARAM = 6000
"""The limits of one request, in mlflow/utils/validation.py."""
_STATUS = {"failed": "FAILED", "interrupted": "KILLED", "running": "RUNNING", **dict.fromkeys(COMPLETE, "FINISHED")}


class MlflowTracker:
    """See `core.trackers.base.Tracker`. The run is found by a tag with our own number, on whatever server."""

    def start(self, facts: RunFacts, *, last_step: int | None) -> Started:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get(URI)
        local = facts.home / FOLDER
        if uri is None:
            local.mkdir(exist_ok=True)
            uri = f"sqlite:///{local / DATABASE}"
        self._client: Any = MlflowClient(uri)
        experiment = self._experiment(facts, None if URI in os.environ else local)
        runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{facts.run_id}'")
        if runs:
            self._id = runs[0].info.run_id
            last_step = max((metric.step for metric in self._client.get_metric_history(self._id, EPOCH)), default=None)
            self._client.update_run(self._id, "RUNNING")
        else:
            last_step = None
            self._id = self._create(experiment, facts)
        return Started(last_step, _where(uri))

    def _experiment(self, facts: RunFacts, local: Path | None) -> str:
        known = self._client.get_experiment_by_name(facts.project)
        if known is not None:
            return str(known.experiment_id)
        place = None if local is None else (local / ARTIFACTS).absolute().as_uri()
        return str(self._client.create_experiment(facts.project, artifact_location=place))

    def _create(self, experiment: str, facts: RunFacts) -> str:
        from mlflow.entities import Param

        tags = {TAG: facts.run_id} | ({"group": facts.group} if facts.group else {})
        run = self._client.create_run(experiment, start_time=_ms(facts.started), tags=tags, run_name=facts.name)
        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in facts.config.items()]
        for part in _parts(params, _PARAMS_AT_ONCE):
            self._client.log_batch(run.info.run_id, params=part)
        return str(run.info.run_id)

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        # a step's numbers in one request, to be there whole or not at all; of too many, `EPOCH` goes last and tells
        most = max(len(point.values) for point in points)
        for part in _parts(points, max(_METRICS_AT_ONCE // max(most, 1), 1)):
            metrics = [
                Metric(name, value, _ms(point.time), point.step)
                for point in part
                for name, value in sorted(point.values.items(), key=lambda item: item[0] == EPOCH)
            ]
            for some in _parts(metrics, _METRICS_AT_ONCE):
                self._client.log_batch(self._id, metrics=some)

    def finish(self, end: End) -> None:
        for name, value in end.summary.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._client.log_metric(self._id, f"summary/{name}", value, step=end.step)
            elif value is not None:
                self._client.set_tag(self._id, f"summary.{name}", str(value))
        for path in end.pictures.values():
            self._client.log_artifact(self._id, str(path))
        if (status := _STATUS.get(end.status, "RUNNING")) != "RUNNING":
            self._client.set_terminated(self._id, status)


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _where(uri: str) -> str:
    uri = without_credentials(uri)
    if uri.startswith(("http://", "https://")):
        return uri
    # the page is in the full `mlflow` package, which need not be in this environment
    command = "mlflow" if find_spec("flask") else "uvx mlflow"
    return f"{command} ui --backend-store-uri {shlex.quote(uri)}"
