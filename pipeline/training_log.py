"""What a training run leaves to look at: history, curves for TensorBoard and tracking servers, strips of pictures.

All of it is written beside the steps, and waits for storage that is out of reach for a while.
"""

import copy
import hashlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tensorboardX import SummaryWriter

from pipeline import storage
from pipeline.contact_sheet import contact_sheet, prediction_panels
from pipeline.errors import PipelineError
from pipeline.run_record import flat
from pipeline.uploads import Uploads
from rssnet.classes import Classes
from rssnet.inference import Predictor

TENSORBOARD_FOLDER = "tensorboard"
PICTURES_FOLDER = "validation"
HISTORY_FILE = "history.json"
PICTURED = 4  # images of a strip
PROJECT = "rssnet"  # among the experiments of a tracking server, unless its own environment variable names another

TrackerName = Literal["mlflow", "wandb"]


class Tracker(Protocol):
    """A tracking server's log of a run; the same run goes on with the same curves."""

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each of some curves."""
        ...

    def close(self) -> None:
        """Nothing more is to come."""
        ...


def require_trackers(names: Sequence[str]) -> None:
    """Raise PipelineError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PipelineError(f"trackers names {name}, which is not installed: pip install {name}, or leave it out.")


class RunLog:
    """The log of one run, which its first worker keeps.

    Args:
        run: URL of the run.
        iteration: that the run goes on from; what an earlier process has drawn beyond it does not count.
        names: of tracking servers to log to beside TensorBoard. Where they are, and who one is there, comes from the
            environment, as their own documentation says.
        config: what the run is started with, as nested plain values.

    Raises:
        Exception: a tracker's own, if its server cannot be reached now. Losing it later does not end a training.

    Attributes:
        uploads: that whoever writes below the run's URL shares.
        lost: why points are missing on a tracking server, for a person to read; empty while none is.
    """

    def __init__(self, run: str, iteration: int, names: Sequence[TrackerName], config: Mapping[str, Any]) -> None:
        self.run, self.uploads, self.lost = run, Uploads(), ""
        kinds = {"mlflow": _MLflowLog, "wandb": _WandbLog}
        self._trackers: dict[str, Tracker] = {name: kinds[name](run, config) for name in names}
        self._folder = tempfile.TemporaryDirectory()
        self._tensorboard = SummaryWriter(self._folder.name, purge_step=iteration + 1)

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each of some curves."""
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, iteration)
        for name, tracker in self._trackers.items():
            self.uploads.add(partial(self._try, name, partial(tracker.add, iteration, scalars)))

    def add_pictures(
        self, iteration: int, rows: Sequence[Mapping[str, Any]], predictor: Predictor, classes: Classes
    ) -> None:
        """Draw rows of a dataset beside their labels and what the model sees at this iteration."""
        panels = [prediction_panels(row, predictor, f"iteration {iteration}") for row in rows]
        place, picture = storage.join(self.run, PICTURES_FOLDER, f"{iteration:07}.png"), contact_sheet(panels, classes)
        self.uploads.add(partial(storage.write_bytes, place, picture))

    def write(self, history: Mapping[str, Any]) -> None:
        """Write down everything so far: the curves, and the history as JSON."""
        self._tensorboard.flush()
        for file in Path(self._folder.name).iterdir():  # of this process alone
            place = storage.join(self.run, TENSORBOARD_FOLDER, file.name)
            self.uploads.add(partial(storage.write_bytes, place, file.read_bytes()))
        place = storage.join(self.run, HISTORY_FILE)
        self.uploads.add(partial(storage.write_json, place, copy.deepcopy(dict(history))))

    def finish(self) -> None:
        """Wait until all is written; nothing more is to come.

        Raises:
            Exception: what a write has failed with for good.
        """
        for name, tracker in self._trackers.items():
            self.uploads.add(partial(self._try, name, tracker.close))
        self.uploads.finish()
        self._tensorboard.close()
        self._folder.cleanup()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of whatever kind the tracker's own client has
            self.lost = f"{name} lacks points ({type(error).__name__})"


class _MLflowLog:
    def __init__(self, run: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)).experiment_id
        tag = f"{PROJECT}.run"
        known = self._client.search_runs([experiment], f"tags.`{tag}` = '{_digest(run)}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            return
        name = run.rstrip("/").rpartition("/")[2]
        self._id = self._client.create_run(experiment, run_name=name, tags={tag: _digest(run), "url": run}).info.run_id
        for field, value in flat(config).items():
            self._client.log_param(self._id, field, str(value)[:500])

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            if math.isfinite(value):
                self._client.log_metric(self._id, name, value, step=iteration)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _WandbLog:
    def __init__(self, run: str, config: Mapping[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        name = run.rstrip("/").rpartition("/")[2]
        settings = wandb.Settings(silent=True)
        self._run = wandb.init(
            project=project, id=_digest(run), name=name, resume="allow", config=dict(config), settings=settings
        )

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=iteration)

    def close(self) -> None:
        self._run.finish()


def _digest(run: str) -> str:
    return hashlib.sha256(run.encode()).hexdigest()[:16]
