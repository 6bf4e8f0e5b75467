"""Reads what trackers hold of a run, each by its library's own reader."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
from typing import Any

from core.trackers.cursor import path_of
from tests.core.tracked import STARTED, TrackedRun
from tests.core.wandb_server import KEY, WandbServer


class Reader:
    """Reads runs back: each library's own reader."""

    def __init__(self, server: WandbServer) -> None:
        self.server = server
        self._trackio_runs: list[Any] | None = None
        """Of the one project that is read: a process for it takes a second."""

    def read(self, name: str, run: TrackedRun) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]:
        """Metric -> steps and values, in the library's order; and settings, summary and pictures as it has them."""
        found: tuple[dict[str, list[tuple[int, float]]], dict[str, Any]] = getattr(self, f"_{name}")(run)
        return found

    def _tensorboard(self, run: TrackedRun) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()
        scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
        words = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
        return scalars, {
            "rank": "| lora.rank | 4 |" in words["settings"],
            "best": "| best_val_loss | 2.75 |" in words["summary"],
            "picture": tags["images"] == ["training_curves"] and events.Images("training_curves")[0].width == 1,
        }

    def _mlflow(self, run: TrackedRun) -> Any:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{run.folder.parent}/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("twinkeel")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id], f"run_name = '{name_of(run)}' AND tags.group = 'cv'")
        assert found.info.status == "FINISHED"
        names = [name for name in found.data.metrics if not name.startswith("summary/")]
        histories = {name: client.get_metric_history(found.info.run_id, name) for name in names}
        summary = found.data.metrics["summary/best_val_loss"], found.data.tags["summary.grade"]
        return (
            {name: [(one.step, one.value) for one in history] for name, history in histories.items()},
            {
                "rank": found.data.params["lora.rank"] == "4",
                "best": summary == (2.75, "MODERATE"),
                "picture": [one.path for one in client.list_artifacts(found.info.run_id)] == ["training_curves.png"],
            },
        )

    def _trackio(self, run: TrackedRun) -> Any:
        code = (
            "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage\n"
            "logs = lambda run: SQLiteStorage.get_logs('twinkeel', run.name, run_id=run.id)\n"
            "found = [[run.name, run.config, logs(run)] for run in trackio.Api().runs('twinkeel')]\n"
            "print(json.dumps(found, default=str))"
        )
        if self._trackio_runs is None:
            environment = {**os.environ, "TRACKIO_DIR": str(run.folder.parent / "trackio")}
            command = [sys.executable, "-c", code]
            out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            self._trackio_runs = json.loads(out.stdout)
        ((_, config, logs),) = [one for one in self._trackio_runs if one[0].startswith(name_of(run))]
        assert config["_Group"] == "cv"
        scalars: dict[str, list[tuple[int, float]]] = {}
        for log in logs:
            for key, value in log.items():
                if key.startswith(("train/", "eval/", "general/", "routing/")):
                    scalars.setdefault(key, []).append((log["step"], value))
        return scalars, {
            "rank": config["lora.rank"] == 4,
            "best": logs[-1]["summary/best_val_loss"] == 2.75,
            "picture": "training_curves" in logs[-1]
            and len(list(run.folder.parent.glob(f"trackio/media/**/{name_of(run)}*/**/*.png"))) == 1,
        }

    def _wandb(self, run: TrackedRun) -> Any:
        """Reads offline files by handing them to a server, as `wandb sync` does; what came online is there."""
        if files := sorted(glob.glob(f"{run.folder}/wandb/offline-run-*")):
            own = {"WANDB_BASE_URL": self.server.url, "WANDB_API_KEY": KEY, "WANDB_CACHE_DIR": str(run.folder)}
            environment = {**os.environ, **own}
            command = [sys.executable, "-m", "wandb", "sync", *files]
            subprocess.run(command, env=environment, cwd=run.folder, capture_output=True, text=True, check=True)
        run_id = json.loads(path_of(run.folder, "wandb").read_text())["run_id"]
        facts, summary = self.server.runs[run_id], self.server.summaries[run_id]
        scalars: dict[str, list[tuple[int, float]]] = {}
        for line in self.server.history(run_id):
            for key, value in line.items():
                if "/" in key:
                    scalars.setdefault(key, []).append((line["_step"], value))
        assert self.server.unknown == []
        assert (facts["displayName"], facts["groupName"]) == (name_of(run), "cv")
        assert summary["_timestamp"] == STARTED + 50
        return scalars, {
            "rank": json.loads(facts["config"])["lora.rank"]["value"] == 4,
            "best": summary["best_val_loss"] == 2.75 and summary["grade"] == "MODERATE",
            "picture": "training_curves" in summary and any(".png" in path for path in self.server.uploads),
        }


def name_of(fold: TrackedRun) -> str:
    return f"{fold.folder.parent.name}-{fold.folder.name}"
