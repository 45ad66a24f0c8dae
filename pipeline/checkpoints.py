"""What a training run keeps to go on from, uploaded while the steps go on, and its best models.

A checkpoint counts only once it lies whole in the run's folder and Ray Train has written down that it does. So a run
that is killed at any moment goes on from the last one that was finished.
"""

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.storage_errors import StorageError, patiently

CHECKPOINTS_FOLDER = "checkpoints"
_STATE_FILE = "state.pt"


class Checkpoints:
    """The checkpoints of a run, in one of its workers.

    Args:
        run: URL of the run.
        writes: whether this worker writes them; the others take part in the reports.
    """

    def __init__(self, run: str, writes: bool) -> None:
        self.run, self.writes = run, writes
        self._uploaded = threading.Event()
        self._uploaded.set()
        name = hashlib.sha256(run.encode()).hexdigest()[:16]
        # The same folder for the same run: what a killed process has left is not left for ever.
        self._folder = Path(tempfile.gettempdir()) / f"rssnet-checkpoint-{name}"

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint; None for a run that has none.

        Raises:
            PipelineError: if it is not one of this version.
        """
        if self.writes:
            shutil.rmtree(self._folder, ignore_errors=True)
            patiently(self._delete_unfinished)
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else self._loaded(checkpoint, self.run)

    def read(self, url: str) -> dict[str, Any]:
        """The state of another run's checkpoint at a URL; raises what `restore` raises."""
        filesystem, path = storage.arrow_filesystem(url)
        return self._loaded(Checkpoint(path, filesystem), url)

    def _loaded(self, checkpoint: Checkpoint, run: str) -> dict[str, Any]:
        def loaded() -> Any:
            with storage.explained(storage.join(run, CHECKPOINTS_FOLDER)), checkpoint.as_directory() as folder:
                return torch.load(Path(folder) / _STATE_FILE, map_location="cpu", weights_only=True)

        state = patiently(loaded)
        if not isinstance(state, dict) or not {"step", "history"} <= state.keys():
            raise PipelineError(f"{run} has checkpoints of another version: start afresh with --new true.")
        return state

    def report(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Tell Ray Train, and keep a checkpoint if there is a state. All workers have to call this.

        The state is written to the disk of this machine at once, and uploaded from there while training goes on; one
        at a time, so that storage which is slower than training slows it down, and does not fill the disk. An upload
        that fails for good ends the training: Ray Train raises its error in place of the training's.

        Raises:
            StorageError: if this machine's disk is full.
        """
        checkpoint = None
        if self.writes and state is not None:
            self._uploaded.wait()
            with storage.explained(str(self._folder)):
                self._folder.mkdir(parents=True, exist_ok=True)
                _require_space(self._folder, state)
                folder = tempfile.mkdtemp(dir=self._folder)
                torch.save(state, Path(folder) / _STATE_FILE)
            self._uploaded.clear()
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # `_upload` does
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Copy a local checkpoint to the run's folder. Ray Train calls this in a thread of its own."""
        url = storage.join(self.run, CHECKPOINTS_FOLDER, name)
        filesystem, path = storage.arrow_filesystem(url)

        def copy() -> None:
            with storage.explained(url):
                filesystem.create_dir(path)
                arrow_fs.copy_files(checkpoint.path, path, arrow_fs.LocalFileSystem(), filesystem)

        try:
            patiently(copy)
            shutil.rmtree(checkpoint.path)
        finally:
            self._uploaded.set()
        return Checkpoint(path, filesystem)

    def _delete_unfinished(self) -> None:
        """Delete what killed uploads have left."""
        folder = storage.join(self.run, CHECKPOINTS_FOLDER)
        finished = {Path(reported.checkpoint.path).name for reported in ray.train.get_all_reported_checkpoints()}
        there = [found.url[len(folder) :].strip("/").split("/") for found in storage.list_objects(folder)]
        for name in {parts[0] for parts in there if len(parts) > 1} - finished:  # what has one part is Ray's own
            storage.delete(storage.join(folder, name))


def _require_space(folder: Path, state: dict[str, Any]) -> None:
    """What torch says of a full disk names neither the disk nor that it is full."""
    needed = _tensor_bytes(state)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: no space left on the device for a checkpoint of {needed:,} bytes, of which there are {free:,}: "
            "free some, or set TMPDIR to a larger disk."
        )


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return 0


def best_iterations(validation: Sequence[dict[str, Any]], keep: int) -> list[int]:
    """The iterations of the validations with the highest mIoU, the best first; of equal ones the earlier."""
    ranked = sorted(validation, key=lambda found: (-found["miou"], found["iteration"]))
    return [int(found["iteration"]) for found in ranked[:keep]]
