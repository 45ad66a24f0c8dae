"""The endless, reproducible stream of training samples of one worker, made by tasks on the CPUs of any node.

The row groups of the dataset, in another order each epoch, make one endless sequence; worker `r` of `n` takes every
n-th of it, beginning with the r-th. So each epoch reads each byte once, no sample is dropped or doubled to make shards
equal, and what a worker sees is fixed by seed, world size and position alone: a resumed run goes on with the very next
sample. With another number of workers it goes on from the same place of the sequence, to within the windows that they
were in.

One task reads a window of row groups, and leaves its rows in the object store, shuffled and still encoded; many decode
and augment them, as far ahead as the cluster has CPUs for, and the worker takes what they make in order. No task waits
for the worker that it feeds, so none keeps a CPU from another.

Not a Ray Data plan: the streaming executor of ray 2.60 polls without pause while its consumer is the slower side, in
the process of the training worker, and took half a core of two there.
"""

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster import IO_TASK_CPUS
from pipeline.dataset import Chunk
from pipeline.images import decode_label, decode_photograph
from pipeline.train_resources import DECODE_CPUS
from pipeline.transforms import Augmentation

WINDOW_CHUNKS = 4  # row groups whose rows are shuffled among each other
WINDOWS_AHEAD = 2  # windows in the object store: that in use, and the next
FEWEST_AHEAD, MOST_AHEAD = 2, 16  # batches that are decoded, or have been, before a worker asks for them


@dataclass(frozen=True)
class Window:
    """Row groups that are read and shuffled together.

    Args:
        epoch: that they are read in.
        chunks: the row groups.
        skip: samples at the beginning that are already done.
    """

    epoch: int
    chunks: tuple[Chunk, ...]
    skip: int = 0

    @property
    def samples(self) -> int:
        """Samples still to come from this window."""
        return sum(chunk.rows for chunk in self.chunks) - self.skip


def plan_windows(chunks: list[Chunk], seed: int, shard: tuple[int, int], start: int, stop: int) -> list[Window]:
    """The windows that hold samples `start` to `stop` of a worker's stream; none spans two epochs.

    Args:
        chunks: all row groups of the split.
        seed: of the order.
        shard: (rank, world size).
        start, stop: positions in this worker's stream; `stop` is exclusive.
    """
    windows: list[Window] = []
    position = 0
    for epoch, together in _worker_sequence(chunks, seed, shard):
        if position >= stop:
            break
        rows = sum(chunk.rows for chunk in together)
        if position + rows > start:
            windows.append(Window(epoch, together, skip=max(0, start - position)))
        position += rows
    return windows


def batches_ahead(workers: int, cpus_per_worker: float) -> int:
    """How many batches are decoded at a time for each worker: as many as the cluster has CPUs beside the workers.

    Where others use the cluster too, the tasks that find no CPU wait for one.
    """
    spare = ray.cluster_resources().get("CPU", 0.0) - workers * cpus_per_worker
    return min(max(int(spare / workers / DECODE_CPUS), FEWEST_AHEAD), MOST_AHEAD)


def sample_batches(
    windows: list[Window],
    augmentation: Augmentation,
    seed: int,
    batch_size: int,
    ahead: int = FEWEST_AHEAD,
    beside: bool = False,
) -> Generator[dict[str, np.ndarray]]:
    """Batches of augmented samples, in the order that the windows and the seed fix.

    Args:
        windows: what to read.
        augmentation, seed, batch_size: of the samples.
        ahead: batches that are decoded at a time, or wait to be asked for. It does not change what they are.
        beside: whether the tasks run on the node of the caller, which has `FEEDING_CPUS` reserved for them; else on
            whatever node of the cluster has CPUs.

    Yields:
        `image` (B, 3, h, w) uint8, `label` (B, h, w) uint8 and `image_id` (B,). A last, smaller batch is left out.
    """
    strategy: Any = "SPREAD"  # else a trial's placement group would hold it, without a CPU for it
    if beside:
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    where: dict[str, Any] = {"scheduling_strategy": strategy}
    decode = ray.remote(_samples).options(num_cpus=0 if beside else DECODE_CPUS, **where)

    def read(window: Window) -> deque[Any]:
        """References to its parts."""
        parts = -(-window.samples // batch_size)
        task = ray.remote(_read_window).options(num_cpus=0 if beside else IO_TASK_CPUS, num_returns=parts, **where)
        found: Any = task.remote(window, seed, batch_size)
        return deque(found if parts > 1 else [found])

    shared = ray.put(augmentation)
    encoded = _encoded_parts(windows, read)
    decoding: deque[Any] = deque()

    def started() -> Iterator[Any]:
        return (decode.remote(part, shared, seed) for part in itertools.islice(encoded, ahead - len(decoding)))

    decoding.extend(started())
    gathered: list[dict[str, np.ndarray]] = []
    while decoding:
        gathered.append(ray.get(decoding.popleft()))
        decoding.extend(started())
        if sum(len(part["image"]) for part in gathered) >= batch_size:
            joined = {name: np.concatenate([part[name] for part in gathered]) for name in gathered[0]}
            yield {name: values[:batch_size] for name, values in joined.items()}
            gathered = [{name: values[batch_size:] for name, values in joined.items()}]


def _worker_sequence(chunks: list[Chunk], seed: int, shard: tuple[int, int]) -> Iterator[tuple[int, tuple[Chunk, ...]]]:
    """Each epoch, and the row groups of a window in it, without end."""
    rank, world_size = shard
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(chunks))
        mine = [chunks[index] for index in order[(rank - epoch * len(chunks)) % world_size :: world_size]]
        for begin in range(0, len(mine), WINDOW_CHUNKS):
            yield epoch, tuple(mine[begin : begin + WINDOW_CHUNKS])


def _encoded_parts(windows: list[Window], read: Callable[[Window], deque[Any]]) -> Iterator[Any]:
    """References to the parts of all windows in order; the next window is being read while one is in use."""
    upcoming, under_way = iter(windows), deque[deque[Any]]()
    while True:
        under_way.extend(map(read, itertools.islice(upcoming, WINDOWS_AHEAD - len(under_way))))
        if not under_way:
            return
        while under_way[0]:
            yield under_way[0].popleft()  # and is forgotten here, so that the store can free it once it is decoded
        under_way.popleft()


Rows = list[dict[str, Any]]


def _read_window(window: Window, seed: int, batch_size: int) -> list[tuple[int, Rows]] | tuple[int, Rows]:
    """Runs as a task: the rows of a window, shuffled, in parts of `batch_size`, each with its epoch."""
    columns = ["image_id", "image", "label"]
    rows = [row for chunk in window.chunks for row in chunk.read(columns).to_pylist()]
    first = window.chunks[0]
    place = zlib.crc32(f"{PurePosixPath(first.url).name}:{first.row_group}".encode())
    order = np.random.default_rng([seed, window.epoch, place]).permutation(len(rows))[window.skip :]
    parts = [
        (window.epoch, [rows[index] for index in order[begin : begin + batch_size]])
        for begin in range(0, len(order), batch_size)
    ]
    return parts if len(parts) > 1 else parts[0]


def _samples(part: tuple[int, Rows], augmentation: Augmentation, seed: int) -> dict[str, np.ndarray]:
    """Runs as a task: rows decoded and augmented."""
    epoch, rows = part
    images, labels = [], []
    for row in rows:
        sample_seed = zlib.crc32(f"{seed}:{epoch}:{row['image_id']}".encode())
        image, label = augmentation(decode_photograph(row["image"]), decode_label(row["label"]), sample_seed)
        images.append(image)
        labels.append(label)
    ids = np.asarray([row["image_id"] for row in rows])
    return {"image": np.stack(images), "label": np.stack(labels), "image_id": ids}
