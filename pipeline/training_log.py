"""What a training run leaves to look at: history, curves for TensorBoard and tracking servers, strips of pictures.

All of it is written beside the steps, and waits for storage that is out of reach for a while.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from pipeline import storage
from pipeline.contact_sheet import contact_sheet, prediction_panels
from pipeline.run_folder import HISTORY_FILE, PICTURES_FOLDER, TENSORBOARD_FOLDER
from pipeline.trackers import start_tracker, tracker_names
from pipeline.train_config import TrainConfig
from pipeline.uploads import Uploads
from rssnet.classes import Classes
from rssnet.inference import Predictor

PICTURED = 4  # images of a strip


class RunLog:
    """The log of one run, which its first worker keeps.

    Args:
        config: of the run. Beside TensorBoard it is logged to `config.trackers`; where their servers are, and who one
            is there, comes from the environment, as their own documentation says.
        iteration: that the run goes on from; what an earlier process has drawn beyond it does not count.
        history: of the run; below `trackers` it remembers what the run is called on the servers.

    Raises:
        PipelineError: if a tracker's server cannot be reached now. Losing it later does not end a training.

    Attributes:
        uploads: that whoever writes below the run's URL shares.
    """

    def __init__(self, config: TrainConfig, iteration: int, history: dict[str, Any]) -> None:
        self.run, self.uploads = config.run, Uploads()
        self._trackers = [start_tracker(name, config, history["trackers"]) for name in tracker_names(config.trackers)]
        self._folder = tempfile.TemporaryDirectory()
        self._tensorboard = SummaryWriter(self._folder.name, purge_step=iteration + 1)

    @property
    def lost(self) -> str:
        """Why points are missing on a tracking server, for a person to read; empty while none is."""
        return ", ".join(tracker.lost for tracker in self._trackers if tracker.lost)

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each of some curves."""
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, iteration)
        for tracker in self._trackers:
            tracker.add(iteration, scalars)

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

    def finish(self, failed: bool = False) -> None:
        """Wait until all is written; nothing more is to come.

        Raises:
            Exception: what a write has failed with for good.
        """
        for tracker in self._trackers:
            tracker.close(failed)
        self.uploads.finish()
        self._tensorboard.close()
        self._folder.cleanup()
