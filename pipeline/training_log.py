"""What a training run leaves to look at: its curves for TensorBoard, and a strip of pictures for each validation."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from pipeline import storage
from pipeline.contact_sheet import contact_sheet, prediction_panels
from rssnet.classes import Classes
from rssnet.inference import Predictor

TENSORBOARD_FOLDER = "tensorboard"
PICTURES_FOLDER = "validation"
PICTURED = 4  # images of a strip


class TensorBoardLog:
    """Scalars as TensorBoard reads them, written on this machine and copied to the run's URL when asked.

    Args:
        run: URL of the run; the log lies below it.
        iteration: that the run goes on from; later points of an earlier process do not count.
    """

    def __init__(self, run: str, iteration: int) -> None:
        self.url = storage.join(run, TENSORBOARD_FOLDER)
        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name, purge_step=iteration + 1)

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each of some curves."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def upload(self) -> None:
        """Copy everything so far to the run's URL; the files are those of this process alone."""
        self._writer.flush()
        storage.upload_folder(Path(self._folder.name), self.url)


def write_pictures(
    run: str, iteration: int, rows: Sequence[Mapping[str, Any]], predictor: Predictor, classes: Classes
) -> None:
    """Draw rows of a dataset beside their labels and what the model sees at this iteration."""
    panels = [prediction_panels(row, predictor, f"iteration {iteration}") for row in rows]
    storage.write_bytes(storage.join(run, PICTURES_FOLDER, f"{iteration:07}.png"), contact_sheet(panels, classes))
