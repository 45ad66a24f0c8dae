"""The endless, reproducible stream of training samples of one worker, decoded and augmented on Ray Data tasks.

The row groups of the dataset, in another order each epoch, make one endless sequence; worker `r` of `n` takes every
n-th of it, beginning with the r-th. So each epoch reads each byte once, no sample is dropped or doubled to make shards
equal, and what a worker sees is fixed by seed, world size and position alone: a resumed run goes on with the very next
sample.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast

import numpy as np
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from pipeline.dataset import Chunk
from pipeline.images import decode_label, decode_photograph
from pipeline.transforms import Augmentation

WINDOW_CHUNKS = 4  # row groups whose rows are shuffled among each other
TASK_CPUS = 0.25


@dataclass(frozen=True)
class Window:
    """Row groups that are read and shuffled together.

    Args:
        chunks: each with the epoch that it is read in.
        skip: samples at the beginning that are already done.
    """

    chunks: tuple[tuple[int, Chunk], ...]
    skip: int = 0

    @property
    def samples(self) -> int:
        """Samples still to come from this window."""
        return sum(chunk.rows for _, chunk in self.chunks) - self.skip


def plan_windows(chunks: list[Chunk], seed: int, shard: tuple[int, int], start: int, stop: int) -> list[Window]:
    """The windows that hold samples `start` to `stop` of a worker's stream.

    Args:
        chunks: all row groups of the split.
        seed: of the order.
        shard: (rank, world size).
        start, stop: positions in this worker's stream; `stop` is exclusive.
    """
    windows: list[Window] = []
    gathered: list[tuple[int, Chunk]] = []
    position = 0
    for epoch_and_chunk in _worker_sequence(chunks, seed, shard):
        if position >= stop:
            break
        gathered.append(epoch_and_chunk)
        if len(gathered) == WINDOW_CHUNKS:
            windows += _from_position(gathered, position, start)
            position += sum(chunk.rows for _, chunk in gathered)
            gathered = []
    return windows


def sample_batches(
    windows: list[Window], augmentation: Augmentation, seed: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of augmented samples, in the order that the windows and the seed fix.

    Yields:
        `image` (B, 3, h, w) uint8, `label` (B, h, w) uint8 and `image_id` (B,).
    """
    source = _SampleSource(windows, augmentation, seed, batch_size)
    stream = ray.data.read_datasource(source, num_cpus=TASK_CPUS, override_num_blocks=len(windows))
    stream.context.execution_options.preserve_order = True
    for batch in stream.iter_batches(batch_size=batch_size, drop_last=True, prefetch_batches=2):
        yield cast(dict[str, np.ndarray], batch)


def _worker_sequence(chunks: list[Chunk], seed: int, shard: tuple[int, int]) -> Iterator[tuple[int, Chunk]]:
    rank, world_size = shard
    position = epoch = 0
    while True:
        for index in np.random.default_rng([seed, epoch]).permutation(len(chunks)):
            if position % world_size == rank:
                yield epoch, chunks[index]
            position += 1
        epoch += 1


def _from_position(gathered: list[tuple[int, Chunk]], position: int, start: int) -> list[Window]:
    rows = sum(chunk.rows for _, chunk in gathered)
    if position + rows <= start:
        return []
    return [Window(tuple(gathered), skip=max(0, start - position))]


@dataclass(frozen=True)
class _SampleSource(Datasource):
    """One read task for each window: reads it, shuffles it, and yields its samples decoded and augmented.

    Reading and augmenting are one operator, so that all CPUs that decoding needs are those of these tasks.
    """

    windows: list[Window]
    augmentation: Augmentation
    seed: int
    batch_size: int

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all samples; Ray plans its memory with it."""
        height, width = self.augmentation.crop_size
        return sum(window.samples for window in self.windows) * height * width * 4

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Ray's interface: what each task runs."""
        return [self._task(window) for window in self.windows]

    def _task(self, window: Window) -> ReadTask:
        height, width = self.augmentation.crop_size
        metadata = BlockMetadata(
            num_rows=window.samples, size_bytes=window.samples * height * width * 4, input_files=None, exec_stats=None
        )
        read = partial(_read_window, window, self.augmentation, self.seed, self.batch_size)
        return ReadTask(read, metadata)


def _read_window(window: Window, augmentation: Augmentation, seed: int, batch_size: int) -> Iterator[Block]:
    """Runs on a data task."""
    rows = [
        (epoch, row) for epoch, chunk in window.chunks for row in chunk.read(["image_id", "image", "label"]).to_pylist()
    ]
    first_epoch, first = window.chunks[0]
    place = zlib.crc32(f"{PurePosixPath(first.url).name}:{first.row_group}".encode())
    order = np.random.default_rng([seed, first_epoch, place]).permutation(len(rows))[window.skip :]
    for begin in range(0, len(order), batch_size):
        chosen = [rows[index] for index in order[begin : begin + batch_size]]
        yield BlockAccessor.batch_to_block(_samples(chosen, augmentation, seed))


def _samples(rows: list[tuple[int, dict[str, Any]]], augmentation: Augmentation, seed: int) -> dict[str, np.ndarray]:
    images, labels = [], []
    for epoch, row in rows:
        sample_seed = zlib.crc32(f"{seed}:{epoch}:{row['image_id']}".encode())
        image, label = augmentation(decode_photograph(row["image"]), decode_label(row["label"]), sample_seed)
        images.append(image)
        labels.append(label)
    ids = np.asarray([row["image_id"] for _, row in rows])
    return {"image": np.stack(images), "label": np.stack(labels), "image_id": ids}
