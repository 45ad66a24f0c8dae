"""What a training run keeps to go on from, uploaded while the steps go on, and its best models.

A checkpoint counts only once it lies whole in the run's folder and Ray Train has written down that it does. So a run
that is killed at any moment goes on from the last one that was finished.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.fs as arrow_fs
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.run_folder import CHECKPOINTS_FOLDER
from pipeline.storage_errors import patiently

_STATE_FILE = "state.pt"
_REPORT_SECONDS = 3.0  # after which Ray Train, which asks every two, has written down what it was told


class Checkpoints:
    """The checkpoints of a run, in one of its workers.

    Args:
        run: URL of the run.
        writes: whether this worker writes them; the others take part in the reports.
    """

    def __init__(self, run: str, writes: bool) -> None:
        self.run, self.writes = run, writes
        self._uploaded, self._uploaded_at = threading.Event(), 0.0
        self._uploaded.set()
        on_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,  # the next step changes what is copied
                use_non_blocking_copy=on_gpu,
            )
        )
        self._staged: Any = None

    @property
    def idle(self) -> bool:
        """Whether this worker could write another checkpoint that would neither wait nor pile up with others."""
        return self._uploaded.is_set() and time.monotonic() - self._uploaded_at > _REPORT_SECONDS

    def restore(self) -> dict[str, Any] | None:
        """The state of the last checkpoint; None for a run that has none.

        Raises:
            PipelineError: if it is not one of this version.
        """
        if self.writes:
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

        Training goes on as soon as the state is copied in memory. Another thread writes the copy to storage; one at a
        time, so that storage which is slower than training slows it down, and memory holds but one copy. An upload that
        fails for good ends the training: Ray Train raises its error in place of the training's.

        Args:
            metrics: for Ray Train.
            state: with tensors on any device, which may change after this call.
        """
        checkpoint = None
        if self.writes and state is not None:
            self._uploaded.wait()
            self._staged = self._stager.stage(state)
            self._uploaded.clear()
            checkpoint = Checkpoint("in-memory", arrow_fs.LocalFileSystem())  # Ray wants one to call `_upload` with
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, _: Checkpoint, name: str) -> Checkpoint:
        """Write the staged state to the run's folder. Ray Train calls this in a thread of its own."""
        url = storage.join(self.run, CHECKPOINTS_FOLDER, name)

        def write() -> Checkpoint:
            filesystem, path = storage.arrow_filesystem(url)
            with storage.explained(url):
                filesystem.create_dir(path)
                with filesystem.open_output_stream(f"{path}/{_STATE_FILE}") as stream:
                    _save(self._staged, stream)
            return Checkpoint(path, filesystem)

        try:
            return patiently(write)
        finally:
            self._uploaded_at = time.monotonic()
            self._uploaded.set()

    def _delete_unfinished(self) -> None:
        """Delete what killed uploads have left."""
        folder = storage.join(self.run, CHECKPOINTS_FOLDER)
        finished = {Path(reported.checkpoint.path).name for reported in ray.train.get_all_reported_checkpoints()}
        for name in set(storage.folder_names(folder)) - finished:
            storage.delete(storage.join(folder, name))


class _Sink:
    """A stream that remembers why it could not be written to."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self.failure = stream, None

    def write(self, data: memoryview) -> int:
        try:
            return self._stream.write(data)
        except Exception as error:
            self.failure = error
            raise

    def flush(self) -> None:
        """There is nothing that `write` keeps back."""


def _save(state: Any, stream: pa.NativeFile) -> None:
    """As torch.save, which of a stream that fails says no more than that its position is unexpected."""
    sink = _Sink(stream)
    try:
        torch.save(state, cast(IO[bytes], sink))
    except RuntimeError as error:
        raise sink.failure or error from error


def best_iterations(validation: Sequence[dict[str, Any]], keep: int) -> list[int]:
    """The iterations of the validations with the highest mIoU, the best first; of equal ones the earlier."""
    ranked = sorted(validation, key=lambda found: (-found["miou"], found["iteration"]))
    return [int(found["iteration"]) for found in ranked[:keep]]
