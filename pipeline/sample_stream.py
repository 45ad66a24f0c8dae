"""The endless, reproducible stream of training samples of one worker, made by tasks on the CPUs of any node.

The row groups of the dataset, in another order each epoch, make one endless sequence; worker `r` of `n` takes every
n-th of it, beginning with the r-th. So each epoch reads each byte once, no sample is dropped or doubled to make shards
equal, and what a worker sees is fixed by seed, world size and position alone: a resumed run goes on with the very next
sample. With another number of workers it goes on from the same place of the sequence, to within the windows that they
were in.

The tasks are Ray generators with back-pressure, not a Ray Data plan: the streaming executor of ray 2.60 polls without
pause while its consumer is the slower side, in the process of the training worker, and took half a core of two there.
"""

import zlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.dataset import Chunk
from pipeline.images import decode_label, decode_photograph
from pipeline.transforms import Augmentation

WINDOW_CHUNKS = 4  # row groups whose rows are shuffled among each other
WINDOWS_AHEAD = 2  # windows that are being read at a time
BATCHES_AHEAD = 4  # that a task makes before it waits for its consumer
TASK_CPUS = 0.2
FEEDING_CPUS = WINDOWS_AHEAD * TASK_CPUS  # that a worker needs beside its own, or a task that waits could stop the rest


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
    windows: list[Window], augmentation: Augmentation, seed: int, batch_size: int, beside: bool = False
) -> Generator[dict[str, np.ndarray]]:
    """Batches of augmented samples, in the order that the windows and the seed fix.

    Args:
        windows: what to read.
        augmentation, seed, batch_size: of the samples.
        beside: whether the tasks run on the node of the caller, which has `FEEDING_CPUS` reserved for them; else on
            whatever node of the cluster has CPUs.

    Yields:
        `image` (B, 3, h, w) uint8, `label` (B, h, w) uint8 and `image_id` (B,). A last, smaller batch is left out.
    """
    strategy: Any = "SPREAD"  # else a trial's placement group would hold it, without a CPU for it
    if beside:
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    task = ray.remote(_read_window).options(
        num_cpus=0 if beside else TASK_CPUS,
        num_returns="streaming",
        scheduling_strategy=strategy,
        _generator_backpressure_num_objects=BATCHES_AHEAD,
    )
    shared = ray.put(augmentation)

    def started(window: Window) -> Any:
        return task.remote(window, shared, seed, batch_size)

    upcoming = iter(windows)
    running = deque(map(started, islice(upcoming, WINDOWS_AHEAD)))
    gathered: list[dict[str, np.ndarray]] = []
    try:
        while running:
            for reference in running[0]:
                gathered.append(ray.get(reference))
                if sum(len(part["image"]) for part in gathered) >= batch_size:
                    joined = {name: np.concatenate([part[name] for part in gathered]) for name in gathered[0]}
                    yield {name: values[:batch_size] for name, values in joined.items()}
                    gathered = [{name: values[batch_size:] for name, values in joined.items()}]
            running.popleft()
            running.extend(map(started, islice(upcoming, 1)))
    finally:
        for generator in running:  # else they would wait for their consumer, and keep their CPUs
            ray.cancel(generator)


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


def _read_window(
    window: Window, augmentation: Augmentation, seed: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Runs as a task: reads a window, shuffles it, and yields its samples decoded and augmented."""
    rows = [
        (epoch, row) for epoch, chunk in window.chunks for row in chunk.read(["image_id", "image", "label"]).to_pylist()
    ]
    first_epoch, first = window.chunks[0]
    place = zlib.crc32(f"{PurePosixPath(first.url).name}:{first.row_group}".encode())
    order = np.random.default_rng([seed, first_epoch, place]).permutation(len(rows))[window.skip :]
    for begin in range(0, len(order), batch_size):
        chosen = [rows[index] for index in order[begin : begin + batch_size]]
        yield _samples(chosen, augmentation, seed)


def _samples(rows: list[tuple[int, dict[str, Any]]], augmentation: Augmentation, seed: int) -> dict[str, np.ndarray]:
    images, labels = [], []
    for epoch, row in rows:
        sample_seed = zlib.crc32(f"{seed}:{epoch}:{row['image_id']}".encode())
        image, label = augmentation(decode_photograph(row["image"]), decode_label(row["label"]), sample_seed)
        images.append(image)
        labels.append(label)
    ids = np.asarray([row["image_id"] for _, row in rows])
    return {"image": np.stack(images), "label": np.stack(labels), "image_id": ids}
