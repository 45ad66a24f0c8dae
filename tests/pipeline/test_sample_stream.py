"""What a training worker sees: fixed by seed, world size and position alone, each sample once an epoch over all."""

import itertools
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import dataset, storage
from pipeline.augmentation_config import AugmentationConfig
from pipeline.dataset import SCHEMA, Chunk, DatasetInfo, SplitInfo
from pipeline.images import encode_png
from pipeline.parquet_files import write_table
from pipeline.sample_stream import Window, batches_ahead, plan_windows, sample_batches
from pipeline.transforms import Augmentation

HEIGHT, WIDTH = 6, 8


def chunks_of(rows: list[int]) -> list[Chunk]:
    return [Chunk(f"/data/train/part-{index:02}.parquet", 0, count) for index, count in enumerate(rows)]


# Row groups of unequal sizes, fewer and more of them than workers.
CHUNKS = st.lists(st.integers(1, 9), min_size=1, max_size=11).map(chunks_of)
SEEDS = st.integers(0, 2**31)
WORLD_SIZES = st.integers(1, 3)

Place = tuple[int, tuple[Chunk, ...], int]


def places(windows: list[Window]) -> list[Place]:
    """A stream without its bytes: for each sample, its window and its place in that window's order."""
    return [
        (window.epoch, window.chunks, place)
        for window in windows
        for place in range(window.skip, window.skip + window.samples)
    ]


def entries(windows: list[Window]) -> list[tuple[int, Chunk]]:
    """What is read, in order: each chunk with its epoch."""
    return [(window.epoch, chunk) for window in windows for chunk in window.chunks]


@settings(deadline=None)
@given(CHUNKS, SEEDS, WORLD_SIZES, st.integers(1, 3))
def test_each_epoch_reads_each_chunk_once_over_all_workers(
    chunks: list[Chunk], seed: int, world_size: int, epochs: int
) -> None:
    stop = epochs * sum(chunk.rows for chunk in chunks)  # no worker has as many samples in these epochs
    read = Counter(
        epoch_and_chunk
        for rank in range(world_size)
        for epoch_and_chunk in entries(plan_windows(chunks, seed, (rank, world_size), 0, stop))
    )
    assert max(read.values()) == 1
    assert {(epoch, chunk) for epoch in range(epochs) for chunk in chunks} <= read.keys()


@settings(deadline=None)
@given(CHUNKS, SEEDS, WORLD_SIZES, st.integers(0, 80), st.integers(1, 80))
def test_resuming_gives_the_tail_of_the_undisturbed_stream(
    chunks: list[Chunk], seed: int, world_size: int, start: int, count: int
) -> None:
    for rank in range(world_size):
        whole = places(plan_windows(chunks, seed, (rank, world_size), 0, start + count))
        resumed = places(plan_windows(chunks, seed, (rank, world_size), start, start + count))
        assert resumed == whole[start:]
        assert len(resumed) >= count


@settings(deadline=None)
@given(CHUNKS, SEEDS, WORLD_SIZES, st.integers(0, 80))
def test_no_window_is_read_that_holds_nothing_asked_for(
    chunks: list[Chunk], seed: int, world_size: int, start: int
) -> None:
    stop = start + 1
    windows = plan_windows(chunks, seed, (0, world_size), start, stop)
    assert len(windows) == 1
    assert windows[0].samples >= 1


@given(CHUNKS, SEEDS)
def test_one_worker_reads_an_epoch_and_nothing_of_the_next(chunks: list[Chunk], seed: int) -> None:
    windows = plan_windows(chunks, seed, (0, 1), 0, sum(chunk.rows for chunk in chunks))
    assert {window.epoch for window in windows} == {0}
    assert Counter(chunk for _, chunk in entries(windows)) == Counter(chunks)


def test_workers_take_turns_so_that_none_has_more_chunks_of_an_epoch_than_another() -> None:
    chunks = chunks_of([4] * 7)
    for epoch in range(3):
        shares = [
            sum(number == epoch for number, _ in entries(plan_windows(chunks, 0, (rank, 3), 0, 3 * 7 * 4)))
            for rank in range(3)
        ]
        assert sorted(shares) == [2, 2, 3]


def test_another_seed_and_another_epoch_have_another_order() -> None:
    chunks = chunks_of([1] * 12)
    first, same, other = (entries(plan_windows(chunks, seed, (0, 1), 0, 24)) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    orders = [[chunk for epoch, chunk in first if epoch == number] for number in (0, 1)]
    assert set(orders[0]) == set(orders[1]) == set(chunks)
    assert orders[0] != orders[1]


def _row(number: int) -> dict:
    rng = np.random.default_rng(number)
    return {
        "image_id": f"train/{number:02}",
        "image": encode_png(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)),
        "label": encode_png(rng.integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)),
        "height": HEIGHT,
        "width": WIDTH,
        "source_uri": f"/raw/{number:02}.png",
    }


def write_chunks(folder: Path, files: int, rows: int) -> list[Chunk]:
    """A dataset of so many files of so many rows, opened."""
    written = {}
    for file in range(files):
        path = f"train/part-{file:02}.parquet"
        table = pa.Table.from_pylist([_row(file * rows + row) for row in range(rows)], schema=SCHEMA)
        write_table(storage.join(str(folder), path), table)
        written[path] = rows
    total = files * rows
    split = SplitInfo(total, total, [total * HEIGHT * WIDTH, 0, 0], written)
    colours = [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    dataset.write_info(
        str(folder), DatasetInfo(["a", "b", "c"], colours, {"train": split}, 0, "/raw", "folders", "0" * 64)
    )
    return dataset.open(str(folder)).chunks("train")


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> list[Chunk]:
    """24 samples in 8 chunks: an epoch is two windows of one worker, or one window of each of two."""
    return write_chunks(tmp_path_factory.mktemp("stream"), files=8, rows=3)


AUGMENTATION = Augmentation(AugmentationConfig(), (5, 7), (0, 0, 0))
EPOCH = 24


def samples(
    chunks: list[Chunk], seed: int, shard: tuple[int, int], start: int, stop: int, batch_size: int = 2, ahead: int = 2
) -> list[tuple[str, bytes, bytes]]:
    """A stream from `start` to `stop`, sample by sample: its id, and the bytes of what the model sees."""
    found = []
    windows = plan_windows(chunks, seed, shard, start, stop)
    for batch in sample_batches(windows, AUGMENTATION, seed, batch_size, ahead):
        assert batch["image"].shape == (batch_size, 3, 5, 7)
        assert batch["label"].shape == (batch_size, 5, 7)
        assert batch["image"].dtype == batch["label"].dtype == np.uint8
        found += [
            (str(name), image.tobytes(), label.tobytes())
            for name, image, label in zip(batch["image_id"], batch["image"], batch["label"], strict=True)
        ]
    assert len(found) >= stop - start
    return found[: stop - start]


@pytest.fixture(scope="module")
def two_epochs(ray_cluster: None, chunks: list[Chunk]) -> list[tuple[str, bytes, bytes]]:  # noqa: ARG001
    return samples(chunks, 5, (0, 1), 0, 2 * EPOCH)


def test_an_epoch_has_every_sample_once_and_the_next_in_another_order(two_epochs) -> None:
    first, second = ([name for name, *_ in epoch] for epoch in (two_epochs[:EPOCH], two_epochs[EPOCH:]))
    everything = [f"train/{number:02}" for number in range(EPOCH)]
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert first != everything


def test_a_sample_is_augmented_anew_in_each_epoch(two_epochs) -> None:
    seen = {epoch: {name: pixels for name, *pixels in two_epochs[epoch * EPOCH :][:EPOCH]} for epoch in (0, 1)}
    assert sum(seen[0][name] != seen[1][name] for name in seen[0]) > EPOCH // 2


def test_rows_of_a_window_are_shuffled_among_each_other(two_epochs) -> None:
    """Not chunk by chunk: neighbours in a file are seldom neighbours in the stream."""
    files = [int(name[-2:]) // 3 for name, *_ in two_epochs]
    assert sum(left == right for left, right in itertools.pairwise(files)) < len(files) // 2


def test_the_same_seed_gives_the_same_samples_whatever_the_batch_size(chunks, two_epochs) -> None:
    assert samples(chunks, 5, (0, 1), 0, EPOCH, batch_size=6) == two_epochs[:EPOCH]


@pytest.mark.parametrize("ahead", [1, 5, 99])
def test_more_tasks_that_decode_ahead_change_nothing(chunks, two_epochs, ahead: int) -> None:
    assert samples(chunks, 5, (0, 1), 0, EPOCH, ahead=ahead) == two_epochs[:EPOCH]


@pytest.mark.usefixtures("ray_cluster")
def test_several_tasks_decode_at_a_time(chunks, tmp_path: Path) -> None:
    """Each waits here until the other has begun."""
    windows = plan_windows(chunks, 5, (0, 1), 0, 4)
    batches = sample_batches(windows, cast(Augmentation, Meeting(tmp_path)), 5, batch_size=1, ahead=2, beside=True)
    assert [batch["image"].shape for batch in itertools.islice(batches, 2)] == [(1, 3, 5, 7)] * 2


@dataclass(frozen=True)
class Meeting:
    """An augmentation that waits for another one."""

    place: Path

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        (self.place / str(seed)).touch()
        deadline = time.monotonic() + 60
        while len(list(self.place.iterdir())) < 2:
            assert time.monotonic() < deadline, "nobody else decodes"
            time.sleep(0.01)
        return AUGMENTATION(image, label, seed)


@pytest.mark.parametrize(
    ("cpus", "workers", "cpus_per_worker", "expected"),
    [(2, 1, 1.0, 2), (16, 1, 2.0, 14), (64, 8, 2.0, 6), (999, 1, 1, 16)],
)
def test_as_many_batches_are_decoded_ahead_as_the_cluster_has_cpus_beside_its_workers(
    monkeypatch: pytest.MonkeyPatch, cpus: int, workers: int, cpus_per_worker: float, expected: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    assert batches_ahead(workers, cpus_per_worker) == expected


def test_another_seed_gives_another_stream(chunks, two_epochs) -> None:
    other = samples(chunks, 6, (0, 1), 0, EPOCH)
    assert [name for name, *_ in other] != [name for name, *_ in two_epochs[:EPOCH]]
    assert not set(other) & set(two_epochs)


@pytest.mark.parametrize("position", [EPOCH // 2, 2 * EPOCH - 8])
def test_a_resumed_stream_goes_on_with_the_very_next_sample(chunks, two_epochs, position: int) -> None:
    assert samples(chunks, 5, (0, 1), position, 2 * EPOCH) == two_epochs[position:]


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_share_an_epoch(chunks) -> None:
    shares = [samples(chunks, 5, (rank, 2), 0, EPOCH // 2) for rank in range(2)]
    names = [name for share in shares for name, *_ in share]
    assert sorted(names) == [f"train/{number:02}" for number in range(EPOCH)]


@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_of_fewer_chunks_than_workers_feeds_them_all(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path, files=1, rows=2)
    streams = [samples(chunks, 5, (rank, 3), 0, 4) for rank in range(3)]
    assert all({name for name, *_ in stream} == {"train/00", "train/01"} for stream in streams)
    assert len({tuple(stream) for stream in streams}) == 3
