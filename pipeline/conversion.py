"""Checking and converting the inputs of an ingest, a chunk at a time: rows, rejects, and what is told of them.

A chunk's files have its plan's digest and its number in their name, and a note that is written last says that they are
whole: converted again after a kill, a chunk replaces its own files, and a noted one is not converted again.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import dataset, images, storage
from pipeline.images import BadImage
from pipeline.inventory import SHOWN, Selection, read_chunk
from pipeline.labels import LabelCoding, training_ids
from pipeline.layouts import Pair, Reject, Shard
from pipeline.parquet_files import ROW_GROUP_ROWS, BufferedParquet
from pipeline.progress import Reporter
from pipeline.records import Record, read_pairs, read_shard

CONTENT_SCHEMA = pa.schema([("image_id", pa.string()), ("split", pa.string()), ("content", pa.binary(32))])


@dataclass
class Tally:
    """What is told of rows and rejects; adds up.

    Args:
        rows, labelled: by split.
        pixels: per class, by split.
        heights, widths: how many images are so high, so wide, in pixels.
        digest: sum of the rows' digests, which does not depend on their order.
        broken_shards: how many of the rejects are shards that could not be read to their end.
        examples: of rejects, a few.
        files: Parquet files of rows and of rejects, by their path below the dataset, and how many they hold.
    """

    rows: collections.Counter[str] = field(default_factory=collections.Counter)
    labelled: collections.Counter[str] = field(default_factory=collections.Counter)
    pixels: dict[str, list[int]] = field(default_factory=dict)
    heights: collections.Counter[int] = field(default_factory=collections.Counter)
    widths: collections.Counter[int] = field(default_factory=collections.Counter)
    digest: int = 0
    rejected: int = 0
    broken_shards: int = 0
    examples: list[Reject] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)

    def add_row(self, row: "Row") -> None:
        """Count one row."""
        self.rows[row.split] += 1
        self.labelled[row.split] += row.values["label"] is not None
        self.heights[row.values["height"]] += 1
        self.widths[row.values["width"]] += 1
        self._add_pixels(row.split, row.pixels)
        self.digest = (self.digest + int.from_bytes(row.digest, "big")) % 2**256

    def add_reject(self, reject: Reject) -> None:
        """Count one reject."""
        self.rejected += 1
        if len(self.examples) < SHOWN:
            self.examples.append(reject)

    def add(self, other: "Tally") -> None:
        """Count what another has counted."""
        for name in ("rows", "labelled", "heights", "widths"):
            getattr(self, name).update(getattr(other, name))
        for split, counts in other.pixels.items():
            self._add_pixels(split, counts)
        self.digest = (self.digest + other.digest) % 2**256
        self.rejected += other.rejected
        self.broken_shards += other.broken_shards
        self.examples = (self.examples + other.examples)[:SHOWN]
        self.files |= other.files

    def _add_pixels(self, split: str, counts: list[int]) -> None:
        known = self.pixels.get(split, [0] * len(counts))
        self.pixels[split] = [a + b for a, b in zip(known, counts, strict=True)]

    def to_json(self) -> str:
        """As text, for a note."""
        return json.dumps(vars(self) | {"examples": [dataclasses.asdict(reject) for reject in self.examples]})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Tally":
        """Reads what `to_json` wrote."""
        values = json.loads(text)
        for name in ("rows", "labelled"):
            values[name] = collections.Counter(values[name])
        for name in ("heights", "widths"):
            values[name] = collections.Counter({int(size): count for size, count in values[name].items()})
        values["examples"] = [Reject(**reject) for reject in values["examples"]]
        return cls(**values)


@dataclass(frozen=True)
class Row:
    """A checked input.

    Args:
        values: by column of the dataset.
        pixels: labelled pixels per class.
        content: digest of the image file.
        digest: of split, id, image and label.
    """

    split: str
    values: dict[str, Any]
    pixels: list[int]
    content: bytes
    digest: bytes


def checked(record: Record, codings: Mapping[str, LabelCoding], num_classes: int) -> Row:
    """Decodes and checks an input, and converts its label.

    Raises:
        BadImage: if it cannot become a row; the reason is what rejects are counted by.
    """
    if record.fault:
        raise record.fault
    height, width = images.decode_photograph(record.image).shape[:2]
    label = None
    if record.label is not None:
        try:
            label = training_ids(record.label, codings[record.coding])
        except BadImage as error:
            raise BadImage(error.reason, f"{record.label_uri}: {error.detail}") from error
        if label.shape != (height, width):
            raise BadImage(
                "size_mismatch",
                f"{record.label_uri} is {label.shape[1]} x {label.shape[0]}, its image {width} x {height} pixels",
            )
    counts = np.zeros(256, np.int64) if label is None else np.bincount(label.ravel(), minlength=256)
    content = hashlib.sha256(record.image).digest()
    label_digest = hashlib.sha256(b"" if label is None else label.tobytes()).digest()
    values = {
        "image_id": record.image_id,
        "image": record.image,
        "label": None if label is None else images.encode_png(label),
        "height": height,
        "width": width,
        "source_uri": record.source_uri,
    }
    name = hashlib.sha256(json.dumps([record.split, record.image_id]).encode()).digest()
    digest = hashlib.sha256(name + content + label_digest).digest()
    return Row(record.split, values, counts[:num_classes].tolist(), content, digest)


def _records_of(work: list[Pair] | Shard, selection: Selection) -> Iterator[Record]:
    """The records of a chunk: of its pairs or of its shard, each in the split that it comes to."""
    if not isinstance(work, Shard):
        yield from read_pairs(work)
        return
    for record in read_shard(work):
        yield dataclasses.replace(record, split=selection.split_of(record.split, record.image_id))


@dataclass(frozen=True)
class ChunkConverter:
    """Converts chunks: a function from numbers of chunks to their tallies, as Ray Data maps it.

    Args:
        dataset: URL of the dataset.
        notes: URL below which the chunks lie, and the notes of converted ones are written.
    """

    dataset: str
    notes: str
    codings: Mapping[str, LabelCoding]
    num_classes: int
    selection: Selection
    reporter: Reporter

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Tables with the column `chunk` to tables with the column `tally`, in JSON."""
        return pa.table({"tally": [self._converted(number) for number in batch["chunk"].to_pylist()]})

    def _converted(self, number: int) -> str:
        note = storage.join(self.notes, f"{number:06}.json")
        work = read_chunk(self.notes, number)
        try:
            text = storage.read_bytes(note).decode()
        except FileNotFoundError:
            text = self._convert(number, _records_of(work, self.selection)).to_json()
            storage.write_bytes(note, text.encode())
        self.reporter.advance(1 if isinstance(work, Shard) else len(work))
        return text

    def _convert(self, number: int, records: Iterable[Record]) -> Tally:
        """Writes the files of a chunk."""
        plan = self.notes.rpartition("/")[2]
        tally, out = Tally(), _Files(self.dataset, f"part-{plan}-{number:06}.parquet")
        for record in records:
            try:
                row = checked(record, self.codings, self.num_classes)
            except BadImage as error:
                reject = Reject(record.source_uri, record.split, error.reason, error.detail)
                tally.add_reject(reject)
                tally.broken_shards += record.is_shard
                out.add(dataset.REJECTS_FOLDER, dataset.REJECT_SCHEMA, dataclasses.asdict(reject))
            else:
                tally.add_row(row)
                out.add(row.split, dataset.SCHEMA, row.values)
                out.content.append((row.values["image_id"], row.split, row.content))
        tally.files = out.store()
        content = BufferedParquet(CONTENT_SCHEMA)
        columns = list(zip(*out.content, strict=True)) or [[], [], []]
        content.write(
            pa.table([pa.array(c, f.type) for c, f in zip(columns, CONTENT_SCHEMA, strict=True)], CONTENT_SCHEMA)
        )
        content.store(storage.join(self.notes, f"{number:06}.content.parquet"))
        return tally


class _Files:
    """The Parquet files of one chunk, one for each folder, being written a row group at a time."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.content: list[tuple[str, str, bytes]] = []
        self._files: dict[str, BufferedParquet] = {}
        self._waiting: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        self._schemas: dict[str, pa.Schema] = {}

    def add(self, folder: str, schema: pa.Schema, row: dict[str, Any]) -> None:
        """Add a row to a folder's file."""
        self._schemas[folder] = schema
        self._waiting[folder].append(row)
        if len(self._waiting[folder]) == ROW_GROUP_ROWS:
            self._flush(folder)

    def store(self) -> dict[str, int]:
        """Store all files; their paths below the dataset, and numbers of rows."""
        for folder in [folder for folder, rows in self._waiting.items() if rows]:
            self._flush(folder)
        stored = {}
        for folder, file in self._files.items():
            path = f"{folder}/{self.name}"
            file.store(storage.join(self.url, path))
            stored[path] = file.rows
        return stored

    def _flush(self, folder: str) -> None:
        if folder not in self._files:
            self._files[folder] = BufferedParquet(self._schemas[folder])
        self._files[folder].write(pa.Table.from_pylist(self._waiting.pop(folder), schema=self._schemas[folder]))
