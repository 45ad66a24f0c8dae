"""The canonical dataset: `dataset.json` and `<split>/*.parquet`. Schema, metadata, opening, reading."""

import bisect
import dataclasses
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
import torch.utils.data

from pipeline import images, storage
from pipeline.cluster import IO_TASK_CPUS, connect
from pipeline.errors import PipelineError
from pipeline.storage_errors import patiently
from rssnet.classes import Classes

IGNORE_LABEL = 255
INFO_FILE = "dataset.json"
REJECTS_FOLDER = "_rejects"
DUPLICATES_FOLDER = "_duplicates"
SCHEMA_VERSION = 1
_FOOTER_BYTES = 8192  # of a file's end, in which the footers of files of a few row groups lie

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("label", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("source_uri", pa.string()),
    ]
)
REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("source_uri", "split", "reason", "detail")])


@dataclass(frozen=True)
class SplitInfo:
    """One split of a dataset.

    Args:
        rows: images.
        labelled: images that have a label.
        pixels: labelled pixels per class, in class order; ignored pixels are not counted.
        files: Parquet files below the dataset's URL and their numbers of rows.
    """

    rows: int
    labelled: int
    pixels: list[int]
    files: dict[str, int]


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` holds. It is written last: a dataset without it is unfinished.

    Args:
        names, palette: of the classes, by training id.
        splits: by name.
        rejected: how many inputs were refused; they are listed below `_rejects/`.
        source: the URL that was ingested.
        layout: how it was read.
        fingerprint: digest of all rows, whatever their order, and of the classes: same content, same fingerprint.
        duplicates: images that are byte for byte those of another row; they are listed below `_duplicates/`.
        sizes: of images in pixels, `height` and `width` each by quantile: `min`, `q05`, `q25`, `median`, `q75`, `q95`,
            `max`.
    """

    names: list[str]
    palette: list[list[int]]
    splits: dict[str, SplitInfo]
    rejected: int
    source: str
    layout: str
    fingerprint: str
    duplicates: int = 0
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    ignore_label: int = IGNORE_LABEL
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class SegmentationDataset:
    """An opened canonical dataset: `info`, and its rows as Arrow tables or as a Ray dataset."""

    url: str
    info: DatasetInfo
    _chunks: dict[str, list["Chunk"]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def classes(self) -> Classes:
        """Names and colours of the classes.

        Raises:
            PipelineError: if the dataset is unlabelled and has none.
        """
        if not self.info.names:
            raise PipelineError(f"The dataset {self.url} is unlabelled, it has no classes: choose a labelled one.")
        return Classes(tuple(self.info.names), tuple((r, g, b) for r, g, b in self.info.palette))

    def split(self, name: str) -> SplitInfo:
        """One split's metadata.

        Raises:
            PipelineError: if the dataset has no such split.
        """
        if name not in self.info.splits:
            raise PipelineError(
                f"The dataset {self.url} has no split {name!r}: choose one of {', '.join(self.info.splits)}."
            )
        return self.info.splits[name]

    def require_labels(self, name: str) -> SplitInfo:
        """One split's metadata, if all its images have labels; else PipelineError."""
        split = self.split(name)
        if split.labelled < split.rows or not split.rows:
            raise PipelineError(
                f"The split {name!r} of {self.url} has {split.labelled} labels for {split.rows} images: "
                "choose a split whose images all have labels."
            )
        return split

    def chunks(self, name: str) -> list["Chunk"]:
        """The row groups of a split, in a fixed order: the unit in which training reads and shuffles.

        The footers of its files are read the first time, and kept with the chunks.
        """
        if name not in self._chunks:
            chunks = []
            for path in sorted(self.split(name).files):
                url = storage.join(self.url, path)
                footer = _footer(url)
                for group in range(footer.num_row_groups):
                    chunks.append(Chunk(url, group, footer.row_group(group).num_rows, footer))
            self._chunks[name] = chunks
        return list(self._chunks[name])

    def rows(self, name: str, columns: Sequence[str] | None = None, shard: tuple[int, int] = (0, 1)) -> Iterator[dict]:
        """The rows of a split as dicts, one row group in memory at a time.

        Args:
            columns: only these.
            shard: (index, count): the `index`-th of `count` parts of the split, each of consecutive rows and as large
                as the others to within one row.
        """
        index, count = shard
        rows = self.split(name).rows
        yield from self._rows_at(name, range(index * rows // count, (index + 1) * rows // count), columns)

    def spread_rows(self, name: str, count: int, columns: Sequence[str] | None = None) -> Iterator[dict]:
        """At most `count` rows of a split, evenly spread over it, as `rows` gives them."""
        rows = self.split(name).rows
        count = min(count, rows)
        yield from self._rows_at(name, {index * rows // count for index in range(count)}, columns)

    def _rows_at(self, name: str, positions: Container[int], columns: Sequence[str] | None) -> Iterator[dict]:
        position = 0
        for chunk in self.chunks(name):
            wanted = [row for row in range(chunk.rows) if position + row in positions]
            position += chunk.rows
            if wanted:
                yield from chunk.read(columns).take(wanted).to_pylist()

    def arrow(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole split as one Arrow table in memory."""
        return pa.concat_tables([chunk.read(columns) for chunk in self.chunks(name)])

    def torch(self, name: str) -> "TorchSplit":
        """The split as a plain PyTorch dataset of decoded images and labels, for a loop or a notebook without Ray."""
        return TorchSplit(self, name)

    def ray(self, name: str, columns: Sequence[str] | None = None) -> ray.data.Dataset:
        """The split as a Ray dataset, in blocks of one row group; connects to Ray where nobody has yet.

        Not `ray.data.read_parquet`: its tasks ask for a whole CPU each to wait for storage, and may make one block of
        many files, which then a single worker gets.
        """
        connect()
        places = [{"url": chunk.url, "row_group": chunk.row_group, "rows": chunk.rows} for chunk in self.chunks(name)]
        chunks = pa.Table.from_pylist(places)
        reader = _ChunkReader(tuple(columns) if columns else None)
        listed = ray.data.from_arrow([chunks.slice(index, 1) for index in range(chunks.num_rows)])
        return listed.map_batches(reader, batch_format="pyarrow", num_cpus=IO_TASK_CPUS)


@dataclass(frozen=True)
class Chunk:
    """One row group of one Parquet file.

    Args:
        url: of the file.
        row_group: its index in the file.
        rows: their number.
        footer: of the file; without it, it is read with the rows.
    """

    url: str
    row_group: int
    rows: int
    footer: pq.FileMetaData | None = field(default=None, repr=False, compare=False)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Its rows; no bytes are read but its own. Waits for a store that is out of reach.

        Raises:
            StorageError: if the store does not give them.
        """
        chosen = list(columns) if columns else None

        def attempt() -> pa.Table:
            with storage.explained(self.url):
                filesystem, path = storage.arrow_filesystem(self.url)
                with pq.ParquetFile(path, filesystem=filesystem, metadata=self.footer) as file:
                    return file.read_row_group(self.row_group, columns=chosen)

        return patiently(attempt)


class TorchSplit(torch.utils.data.Dataset[dict[str, Any]]):
    """A split for `torch.utils.data.DataLoader`, read a row group at a time: read in order it is fast.

    An item has `image_id`, `image` (3, H, W) uint8, upright, and `label` (H, W) int64 with 255 for ignored pixels, or
    None where there is none. Images differ in size: crop or pad them before they are put in a batch.
    """

    def __init__(self, data: SegmentationDataset, split: str) -> None:
        self._chunks = data.chunks(split)
        self._ends = list(itertools.accumulate(chunk.rows for chunk in self._chunks))
        self._read: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index} of {len(self)}.")
        number = bisect.bisect_right(self._ends, index)
        if self._read is None or self._read[0] != number:
            self._read = number, self._chunks[number].read(["image_id", "image", "label"])
        chunk = self._read[1]
        row = chunk.slice(index - self._ends[number] + chunk.num_rows, 1).to_pylist()[0]
        label = None if row["label"] is None else torch.from_numpy(images.decode_label(row["label"]).astype(np.int64))
        image = torch.from_numpy(images.decode_photograph(row["image"]).copy()).permute(2, 0, 1)
        return {"image_id": row["image_id"], "image": image, "label": label}


@dataclass(frozen=True)
class _ChunkReader:
    """Chunks, given as rows of their fields, to their rows."""

    columns: tuple[str, ...] | None

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables([Chunk(**fields).read(self.columns) for fields in batch.to_pylist()])


def open(url: str) -> SegmentationDataset:
    """Open the canonical dataset at `url`.

    Raises:
        PipelineError: if there is none, or one of another schema version.
    """
    url = storage.absolute(url)
    place = storage.join(url, INFO_FILE)
    try:
        document = storage.read_json(place)
    except FileNotFoundError:
        storage.require_bucket(url)
        raise PipelineError(
            f"There is no finished dataset at {url} (no {INFO_FILE}): correct the URL, or run workflows/ingest.py."
        ) from None
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise PipelineError(
            f"{place} is not a dataset of schema version {SCHEMA_VERSION}: ingest it again with this version."
        )
    try:
        splits = {name: SplitInfo(**split) for name, split in document.pop("splits").items()}
        return SegmentationDataset(url, DatasetInfo(splits=splits, **document))
    except (KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{place} is damaged ({error}): ingest the dataset again with --new true.") from error


def write_info(url: str, info: DatasetInfo) -> None:
    """Write `dataset.json`, which finishes the dataset."""
    storage.write_json(storage.join(url, INFO_FILE), dataclasses.asdict(info))


def quantiles(counts: Mapping[int, int]) -> dict[str, int]:
    """Quantiles, each a value that occurs, of values and how often they do; empty if none does."""
    if not counts:
        return {}
    values = sorted(counts)
    reached = list(itertools.accumulate(counts[value] for value in values))
    shares = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
    return {name: values[bisect.bisect_left(reached, max(1, share * reached[-1]))] for name, share in shares.items()}


def _footer(url: str) -> pq.FileMetaData:
    """The footer of a Parquet file, for which pyarrow by itself would fetch 64 KiB of each."""

    def attempt() -> pq.FileMetaData:
        with storage.explained(url):
            filesystem, path = storage.arrow_filesystem(url)
            with filesystem.open_input_file(path) as file:
                size = file.size()
                end = file.read_at(min(size, _FOOTER_BYTES), max(0, size - _FOOTER_BYTES))
                needed = int.from_bytes(end[-8:-4], "little") + 8  # its own length and four letters come last
                if len(end) < needed <= size:
                    end = file.read_at(needed - len(end), size - needed) + end
            return pq.read_metadata(pa.BufferReader(end))

    return patiently(attempt)
