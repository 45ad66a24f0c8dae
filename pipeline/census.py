"""The images of a source beside the rows of an output: which are to be segmented, and which rows are out of date.

Both are listed by tasks on the cluster, divided by a hash of the image's URI, and compared partition by partition. The
driver holds references, counts, and the names of files, whatever the number of images; a partition is what a task holds
in memory.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pandas.util import hash_array
from ray import ObjectRef

from pipeline import image_sources, mask_store, storage
from pipeline.cluster import io_task
from pipeline.image_sources import LISTED, ImageSource, Part
from pipeline.masks import OK, PREDICTION_SCHEMA
from pipeline.parquet_files import read_table, write_table
from pipeline.prediction_rows import TRIED_AGAIN
from pipeline.read_ahead import ahead

PARTITION_ROWS = 250_000  # images or rows, about 40 MB
PENDING_ROWS = 2048  # in a file of images to be segmented
_FILES_TOGETHER = 64  # of rows, that a task looks into
_FILES_AHEAD = 8  # of them, that are fetched at a time

ROW_KEYS = pa.schema(
    [
        *(PREDICTION_SCHEMA.field(name) for name in ("image_uri", "version", "model_id", "status")),
        ("file", pa.string()),  # that the row stands in, below the output
    ]
)


@dataclass(frozen=True)
class PendingFile:
    """Images that are to be segmented, stored as rows of `LISTED`; with `again`, ones that have rows to be replaced."""

    url: str
    rows: int
    again: bool


@dataclass(frozen=True)
class Pending:
    """What a run has to do.

    Args:
        listed: images of the source.
        others: objects of the source that are passed over.
        listed_twice: images that a manifest names once more.
        fingerprint: of the images and their versions, in any order.
        files: of the images without a row that stands.
        outdated: rows that a new attempt replaces.
        masked: rows of this model with a mask, also of images that are not listed any more.
        unusable: listed images whose row stands and says why there is no mask.
    """

    listed: int
    others: int
    listed_twice: int
    fingerprint: str
    files: list[PendingFile]
    outdated: "Rows"
    masked: int
    unusable: int

    @property
    def images(self) -> int:
        """How many are to be segmented."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class Rows:
    """Some rows of an output: references to tables of `ROW_KEYS` on the cluster, and the files that they stand in."""

    tables: list[ObjectRef]
    files: list[str]
    count: int

    @classmethod
    def of(cls, found: Iterable[tuple[ObjectRef, "_Found"]]) -> "Rows":
        """Of what the tasks of all partitions have found."""
        found = [(table, summary) for table, summary in found if summary.count]
        files = sorted({file for _, summary in found for file in summary.files})
        return cls([table for table, _ in found], files, sum(summary.count for _, summary in found))


@dataclass(frozen=True)
class _Found:
    """What the driver is told of a table of rows."""

    files: list[str]
    count: int

    @classmethod
    def of(cls, rows: pa.Table) -> "_Found":
        return cls(rows["file"].unique().to_pylist(), rows.num_rows)


@dataclass(frozen=True)
class _Compared:
    """What the driver is told of a partition of images."""

    listed: int
    listed_twice: int
    fingerprint: int
    files: list[PendingFile]
    masked: int
    unusable: int


class Census:
    """The images of a source, and the rows at an output, divided into the same partitions.

    Args:
        parts: of the source.
        url: the output; None for one without rows.
        model: id of the model whose rows are looked at; None for all rows.

    Raises:
        PipelineError: if the source cannot be listed.
    """

    def __init__(self, parts: Sequence[Part], url: str | None, model: str | None) -> None:
        images, self.others = _gathered([_listed.remote(part) for part in parts])
        rows, _ = _gathered([] if url is None else _row_tasks(url, model))
        partitions = max(1, math.ceil(max(_total(images), _total(rows)) / PARTITION_ROWS))
        self._images = _divided(images, partitions)
        self._rows = _divided(rows, partitions)

    def pending(self, folder: str) -> Pending:
        """Compare, and store what is to be segmented below the URL `folder`.

        Images of a partition are in the order of their containers, so that what lies together is read together; the row
        groups of a dataset of several partitions are read once for each.
        """
        compared = [
            _compared.options(num_returns=3).remote(images, rows, storage.join(folder, f"pending-{number:05}"))
            for number, (images, rows) in enumerate(zip(self._images, self._rows, strict=True))
        ]
        found: list[_Compared] = ray.get([summary for summary, _, _ in compared])
        outdated = ray.get([outdated for _, outdated, _ in compared])
        return Pending(
            listed=sum(part.listed for part in found),
            others=self.others,
            listed_twice=sum(part.listed_twice for part in found),
            fingerprint=f"{sum(part.fingerprint for part in found) % 2**64:016x}",
            files=sorted((file for part in found for file in part.files), key=lambda file: file.again),
            outdated=Rows.of(zip([table for _, _, table in compared], outdated, strict=True)),
            masked=sum(part.masked for part in found),
            unusable=sum(part.unusable for part in found),
        )

    def gone(self, source: ImageSource) -> Rows:
        """Rows of images that are no longer there, or no longer in this version, of all that the source covers."""
        return self._found(_gone, source)

    def superseded(self, model: str) -> Rows:
        """Rows of other models, of the listed images that have a row of this model which stands."""
        return self._found(_superseded, model)

    def _found(self, task: Any, argument: Any) -> Rows:
        """What a task finds in each partition."""
        pairs = zip(self._images, self._rows, strict=True)
        found = [task.options(num_returns=2).remote(images, rows, argument) for images, rows in pairs]
        summaries: list[_Found] = ray.get([summary for _, summary in found])
        return Rows.of(zip([table for table, _ in found], summaries, strict=True))


@dataclass(frozen=True)
class _Table:
    reference: ObjectRef
    rows: int


def _gathered(generators: Sequence[Any]) -> tuple[list[_Table], int]:
    """References to all tables that some tasks yield, each after two counts: its rows, and what was passed over."""
    tables, others = [], 0
    for generator in generators:
        for counts in generator:
            rows, passed_over = ray.get(counts)
            tables.append(_Table(next(generator), rows))
            others += passed_over
    return tables, others


def _total(tables: Iterable[_Table]) -> int:
    return sum(table.rows for table in tables)


def _divided(tables: list[_Table], partitions: int) -> list[list[ObjectRef]]:
    """The parts of some tables for each partition."""
    if partitions == 1:
        return [[table.reference for table in tables]]
    divided = [
        _split.options(num_returns=partitions).remote(partitions, *(table.reference for table in together))
        for together in _together(tables)
    ]
    return [list(parts) for parts in zip(*divided, strict=True)] if divided else [[] for _ in range(partitions)]


def _together(tables: list[_Table]) -> Iterator[list[_Table]]:
    """Tables in groups of about a partition's rows."""
    group: list[_Table] = []
    for table in tables:
        group.append(table)
        if _total(group) >= PARTITION_ROWS:
            yield group
            group = []
    if group:
        yield group


@io_task
def _split(partitions: int, *tables: pa.Table) -> list[pa.Table]:
    table = pa.concat_tables(tables)
    places = _hashes([_object_of(uri) for uri in table["image_uri"].to_pylist()]) % np.uint64(partitions)
    return [table.filter(pa.array(places == number)) for number in range(partitions)]


def _hashes(strings: list[str]) -> np.ndarray:
    """A number from 0 to 2**64 for each string, the same on all machines."""
    hashed: Any = hash_array
    values = np.asarray(strings, dtype=object)
    return hashed(values, categorize=False) if len(values) else np.empty(0, np.uint64)


def _object_of(uri: str) -> str:
    """The URL of the tar file that an image lies in, else its own: what is said of a tar stands with its images."""
    place = uri.lower().find(".tar#")
    return uri if place < 0 else uri[: place + len(".tar")]


@io_task
def _listed(part: Part) -> Iterator[Any]:
    """Tables of the images of a part, each after the number of its rows and of what was passed over."""
    waiting: list[pa.Table] = []
    others = 0
    for listed in image_sources.list_part(part):
        waiting.append(listed.table)
        others += listed.others
        if sum(table.num_rows for table in waiting) >= PARTITION_ROWS:
            yield from _counted(waiting, LISTED, others)
            waiting, others = [], 0
    yield from _counted(waiting, LISTED, others)


def _counted(tables: list[pa.Table], schema: pa.Schema, others: int = 0) -> Iterator[Any]:
    table = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
    yield table.num_rows, others
    yield table


def _row_tasks(url: str, model: str | None) -> list[Any]:
    files = mask_store.files(url)
    return [
        _keys.remote(url, files[start : start + _FILES_TOGETHER], model)
        for start in range(0, len(files), _FILES_TOGETHER)
    ]


@io_task
def _keys(url: str, files: list[str], model: str | None) -> Iterator[Any]:
    """Tables of the keys of the rows in some files, each after the number of its rows."""
    waiting: list[pa.Table] = []
    with ThreadPoolExecutor(_FILES_AHEAD) as pool:
        for keys in ahead(pool, functools.partial(_keys_of_file, url, model), files, _FILES_AHEAD):
            waiting.append(keys)
            if sum(table.num_rows for table in waiting) >= PARTITION_ROWS:
                yield from _counted(waiting, ROW_KEYS)
                waiting = []
    yield from _counted(waiting, ROW_KEYS)


def _keys_of_file(url: str, model: str | None, file: str) -> pa.Table:
    found = read_table(file, ROW_KEYS.names[:-1])
    if model is not None:
        found = found.filter(pc.field("model_id") == model)
    name = pa.repeat(mask_store.name_of(url, file), found.num_rows)
    return found.append_column("file", name).select(ROW_KEYS.names).cast(ROW_KEYS)


@io_task
def _compared(images: list[ObjectRef], rows: list[ObjectRef], place: str) -> tuple[_Compared, _Found, pa.Table]:
    listed, present = _joined(images, LISTED), _joined(rows, ROW_KEYS)
    first = _without_repetition(listed)
    again = pc.field("status").isin(TRIED_AGAIN)
    keys = ["image_uri", "version"]
    pending = first.join(present.filter(~again).select(keys), keys, join_type="left anti")
    pending = pending.sort_by([(name, "ascending") for name in ("container", "offset", "image_uri")])
    # What was said of a tar as a whole is out of date when its images are listed.
    there = {*first["image_uri"].to_pylist(), *first["container"].unique().to_pylist()}
    outdated = present.filter(again)
    outdated = outdated.filter(pa.array([uri in there for uri in outdated["image_uri"].to_pylist()], pa.bool_()))
    replaced = set(outdated["image_uri"].to_pylist())
    has_row = [uri in replaced for uri in pending["image_uri"].to_pylist()]
    has_none = [not found for found in has_row]
    files = [
        *_stored(pending.filter(pa.array(has_none, pa.bool_())), f"{place}-new", again=False),
        *_stored(pending.filter(pa.array(has_row, pa.bool_())), f"{place}-again", again=True),
    ]
    # By addition, so that neither the order nor the number of partitions changes it.
    uris, versions = (_hashes(first[name].to_pylist()) for name in ("image_uri", "version"))
    fingerprint = int((uris * (np.uint64(2) * versions + np.uint64(1))).sum(dtype=np.uint64))
    masked = present.filter(pc.field("status") == OK).num_rows
    refused = present.filter(~again & (pc.field("status") != OK)).select(keys)
    unusable = first.select(keys).join(refused, keys, join_type="left semi").num_rows
    summary = _Compared(first.num_rows, listed.num_rows - first.num_rows, fingerprint, files, masked, unusable)
    return summary, _Found.of(outdated), outdated


def _stored(pending: pa.Table, place: str, again: bool) -> list[PendingFile]:
    files = []
    for start in range(0, pending.num_rows, PENDING_ROWS):
        some = pending.slice(start, PENDING_ROWS)
        files.append(PendingFile(f"{place}-{start // PENDING_ROWS:05}.parquet", some.num_rows, again))
        write_table(files[-1].url, some.select(LISTED.names).cast(LISTED), PENDING_ROWS)
    return files


@io_task
def _gone(images: list[ObjectRef], rows: list[ObjectRef], source: ImageSource) -> tuple[pa.Table, _Found]:
    listed, present = _joined(images, LISTED), _joined(rows, ROW_KEYS)
    covered = pa.array([source.covers(uri) for uri in present["image_uri"].to_pylist()], pa.bool_())
    keys = ["image_uri", "version"]
    gone = present.filter(covered).join(listed.select(keys), keys, join_type="left anti")
    gone = gone.select(ROW_KEYS.names).cast(ROW_KEYS)
    return gone, _Found.of(gone)


@io_task
def _superseded(images: list[ObjectRef], rows: list[ObjectRef], model: str) -> tuple[pa.Table, _Found]:
    listed, present = _joined(images, LISTED), _joined(rows, ROW_KEYS)
    keys = ["image_uri", "version"]
    stands = present.filter((pc.field("model_id") == model) & ~pc.field("status").isin(TRIED_AGAIN)).select(keys)
    replaced = listed.select(keys).join(stands, keys, join_type="left semi").select(["image_uri"])
    others = present.filter(pc.field("model_id") != model).join(replaced, "image_uri", join_type="left semi")
    others = others.select(ROW_KEYS.names).cast(ROW_KEYS)
    return others, _Found.of(others)


def _joined(tables: list[ObjectRef], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *ray.get(tables)]).combine_chunks()


def _without_repetition(listed: pa.Table) -> pa.Table:
    """The first row of each image."""
    seen = pd.Series(listed["image_uri"].to_pylist(), dtype=object).duplicated()
    return listed.filter(pa.array(~seen.to_numpy())) if seen.any() else listed
