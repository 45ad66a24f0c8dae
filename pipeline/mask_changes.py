"""Changes of rows that are there: taking some away, and merging small files. Made on the cluster, committed at once.

A file is never changed: what is kept of it is staged anew, and takes its place in one transaction.
"""

import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray import ObjectRef

from pipeline import mask_store, masks, storage
from pipeline.census import ROW_KEYS, Rows
from pipeline.cluster import io_task
from pipeline.errors import PipelineError
from pipeline.mask_store import MaskStore, Move
from pipeline.parquet_files import read_table, write_table

MERGED_BYTES = 256 * 2**20  # of a file that compaction makes
MERGED_ROW_GROUP_ROWS = 2048  # of such a file: to read a few columns of it is to take few requests
PRUNED_FOLDER = "pruned"
PRUNED_SCHEMA = pa.schema(
    [
        *(masks.PREDICTION_SCHEMA.field(name) for name in masks.KEY),
        ("run_id", pa.string()),
        ("pruned", pa.timestamp("s", "UTC")),
    ]
)
_FILES_TOGETHER, _MOST_TASKS = 16, 64  # that a task rewrites, if that makes no more tasks
_FOOTERS_TOGETHER = 256  # that a task reads


def remove_rows(store: MaskStore, *removed: Rows, record: Rows | None = None, add: Sequence[Move] = ()) -> None:
    """Take rows away, all at one moment.

    Args:
        store: of the output that the rows are of.
        removed: the rows; the same one may occur in several of these.
        record: more of them, which are also written down in `pruned/*.parquet`.
        add: staged files that come at the same moment.
    """
    recorded = [] if record is None else record.tables
    tables = [*(table for rows in removed for table in rows.tables), *recorded]
    files = sorted({file for rows in (*removed, record) if rows is not None for file in rows.files})
    together = max(_FILES_TOGETHER, math.ceil(len(files) / _MOST_TASKS))
    groups = [files[start : start + together] for start in range(0, len(files), together)]
    kept: list[list[Move]] = ray.get([_kept.remote(store.url, store.run_id, group, tables) for group in groups])
    noted: list[Move] = ray.get([_recorded.remote(store.url, store.run_id, table) for table in recorded])
    store.commit(add=[*(move for moves in kept for move in moves), *noted, *add], remove=files)


@io_task
def _kept(url: str, run_id: str, files: list[str], removed: list[ObjectRef]) -> list[Move]:
    """Stage what stays of some files, each as a file of its own."""
    keys = [*masks.KEY, "file"]
    of_files = pc.field("file").isin(files)
    # One table after the other: together they may be more than this task's memory.
    drop = pa.concat_tables([ROW_KEYS.empty_table(), *(ray.get(table).filter(of_files) for table in removed)])
    moves = []
    for file in files:
        rows = read_table(storage.join(url, file))
        numbered = rows.select(masks.KEY).append_column("file", pa.array([file] * rows.num_rows, pa.string()))
        numbered = numbered.append_column("number", pa.array(range(rows.num_rows), pa.int64()))
        kept = numbered.join(drop.select(keys), keys, join_type="left anti")["number"]
        if len(kept):
            moves.append(mask_store.staged(run_id, file.rpartition("/")[2].partition("-")[0]))
            write_table(storage.join(url, moves[-1].staged), rows.take(kept.sort()), MERGED_ROW_GROUP_ROWS)
    return moves


@io_task
def _recorded(url: str, run_id: str, taken: pa.Table) -> Move:
    """Stage the record of rows that are taken away."""
    now = pa.scalar(datetime.datetime.now(datetime.UTC), PRUNED_SCHEMA.field("pruned").type)
    table = taken.select(masks.KEY)
    table = table.append_column("run_id", pa.repeat(run_id, table.num_rows))
    table = table.append_column(PRUNED_SCHEMA.field("pruned"), pa.repeat(now, table.num_rows))
    move = mask_store.staged(run_id, PRUNED_FOLDER)
    write_table(storage.join(url, move.staged), table.cast(PRUNED_SCHEMA))
    return Move(move.staged, f"{PRUNED_FOLDER}/{move.name.rpartition('/')[2]}")


@dataclass(frozen=True)
class _File:
    """A file of rows, its size in bytes, and the id of the model that made them; None if the file mixes several."""

    name: str
    size: int
    model: str | None


def compact(store: MaskStore) -> tuple[int, int]:
    """Merge small files of rows into ones of about `MERGED_BYTES`, each of one model and sorted by `image_uri`.

    One transaction for each new file: readers with `pipeline.masks` see the rows once all the time, others of the
    folder miss some for the moment of the change. Rows that the next run tries again stay where they are.

    Returns:
        How many files were merged, and into how many.
    """
    url = store.url
    place = storage.join(url, mask_store.FOLDER)
    small = [
        (mask_store.name_of(url, item.url), item.size)
        for item in storage.list_objects(place)
        if item.url.rpartition("/")[2].startswith(mask_store.STANDING) and item.size < MERGED_BYTES // 2
    ]
    groups = [small[start : start + _FOOTERS_TOGETHER] for start in range(0, len(small), _FOOTERS_TOGETHER)]
    found: list[list[_File]] = ray.get([_looked_into.remote(url, group) for group in groups])
    before = after = 0
    waiting: dict[ObjectRef, list[str]] = {}
    merged = io_task(_merged, num_cpus=1)  # each holds a large file in memory
    for group in _merge_groups([file for files in found for file in files]):
        waiting[merged.remote(url, store.run_id, group)] = group
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        group = waiting.pop(ready)
        store.commit(add=[ray.get(ready)], remove=group)
        before, after = before + len(group), after + 1
    return before, after


@io_task
def _looked_into(url: str, files: list[tuple[str, int]]) -> list[_File]:
    found = []
    for name, size in files:
        models = read_table(storage.join(url, name), ["model_id"])["model_id"].unique().to_pylist()
        found.append(_File(name, size, models[0] if len(models) == 1 else None))
    return found


def _merge_groups(files: list[_File]) -> Iterator[list[str]]:
    """Names of at least two files of one model that come to about `MERGED_BYTES` together."""
    for model in sorted({file.model for file in files if file.model is not None}):
        group: list[str] = []
        size = 0
        for file in sorted((file for file in files if file.model == model), key=lambda file: file.name):
            if group and size + file.size > MERGED_BYTES:
                yield group
                group, size = [], 0
            group.append(file.name)
            size += file.size
        if len(group) > 1:
            yield group


def _merged(url: str, run_id: str, files: list[str]) -> Move:
    """Stage the rows of some files as one; raises if a row is there twice, which compaction must not hide."""
    tables = [read_table(storage.join(url, file)) for file in files]
    table = pa.concat_tables(tables, promote_options="default").sort_by("image_uri")
    keys = table.select(masks.KEY)
    if keys.group_by(list(masks.KEY)).aggregate([]).num_rows < keys.num_rows:
        raise PipelineError(
            f"{url} has rows of the same image, version and model in several of its files, of which {files[0]} is one: "
            "something else has written there; segment into a new place."
        )
    move = mask_store.staged(run_id, mask_store.STANDING)
    write_table(storage.join(url, move.staged), table, MERGED_ROW_GROUP_ROWS)
    return move
