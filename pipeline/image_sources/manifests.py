"""Images that a list names: plain text, CSV or Parquet.

- Text (`.txt`): a URI a line. Blank lines are passed over, and lines that begin with `#`. Blanks around a URI are taken
  away: names that have them, or begin with `#`, need CSV or Parquet.
- CSV (`.csv`): commas, and a first line that names the columns, or one column without such a line.
- Parquet (`.parquet`).

The column of the URIs is the first of `URI_COLUMNS` that there is, in letters of either case; beside it, `key` may be
in the bucket that a column `bucket` names. A column of `VERSION_COLUMNS` may say which version is meant, as the store's
ETag. A URI without a version is looked up: that of an object which is not there becomes a row that says so.

What is no URL or absolute path is taken to be relative to the manifest's folder.
"""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_sources.listing import (
    BAD_URI,
    MISSING,
    ROWS_TOGETHER,
    STORAGE_ERROR,
    ImageSource,
    Row,
    printable,
)
from pipeline.storage_errors import StorageError, StorageOutage, patiently

SUFFIXES = (".csv", ".txt", ".parquet")
URI_COLUMNS = ("image_uri", "uri", "url", "image_url", "path", "file", "filename", "key", "image")
VERSION_COLUMNS = ("version", "etag", "e_tag")
BUCKET_COLUMN = "bucket"
TEXT_BYTES = 16 * 2**20  # of a text that a part has: some 200,000 lines
LOOKED_UP_TOGETHER = 32

_READ_AHEAD = 2**20
_TOGETHER = 1000  # entries that are looked up before the next are read


class Entry(NamedTuple):
    """What a manifest says of one image: its URI, or the bucket's name and the key in it; and the version, if any."""

    uri: str | None
    version: str | None = None
    bucket: str | None = None


@dataclass(frozen=True)
class Columns:
    """Where the columns are among others, by number."""

    uri: int
    version: int | None = None
    bucket: int | None = None

    @classmethod
    def of(cls, names: Sequence[str]) -> "Columns | None":
        """Those of a table with columns of these names; None if there are no URIs."""
        places = {name.strip().lower(): number for number, name in reversed(list(enumerate(names)))}
        uri = next((name for name in URI_COLUMNS if name in places), None)
        if uri is None:
            return None
        version = next((places[name] for name in VERSION_COLUMNS if name in places), None)
        return cls(places[uri], version, places.get(BUCKET_COLUMN) if uri == "key" else None)

    def entry(self, values: Sequence[Any]) -> Entry:
        """What a row says; of a row that is too short, nothing."""

        def text(number: int | None) -> str | None:
            return None if number is None or number >= len(values) or values[number] is None else str(values[number])

        return Entry(text(self.uri), text(self.version), text(self.bucket))


@dataclass(frozen=True)
class TextPart:
    """The lines of a text that begin at a byte from `start` to before `end`."""

    source: ImageSource
    url: str
    start: int
    end: int

    def rows(self) -> Iterator[Row | None]:
        """One for each image."""
        return resolved(self.source, self.url, storage.explained_items(self.url, self._entries()))

    def _entries(self) -> Iterator[Entry]:
        with _opened(self.url) as stream:
            if self.start:
                stream.seek(self.start - 1)
                stream.readline()  # what is left of a line that the part before has
            while stream.tell() < self.end and (line := stream.readline()):
                encoding = "utf-8" if self.start else "utf-8-sig"
                text = line.decode(encoding, "surrogateescape").strip()
                if text and not text.startswith("#"):
                    yield Entry(text)


@dataclass(frozen=True)
class CsvPart:
    """A whole CSV file."""

    source: ImageSource
    url: str
    columns: Columns
    header: bool

    def rows(self) -> Iterator[Row | None]:
        """One for each image."""
        return resolved(self.source, self.url, storage.explained_items(self.url, self._entries()))

    def _entries(self) -> Iterator[Entry]:
        with _opened(self.url) as stream:
            for number, values in enumerate(csv_rows(stream)):
                if values and (number or not self.header):
                    yield self.columns.entry(values)


@dataclass(frozen=True)
class ParquetPart:
    """One row group of a Parquet file."""

    source: ImageSource
    url: str
    columns: Columns
    row_group: int

    def rows(self) -> Iterator[Row | None]:
        """One for each image."""
        return resolved(self.source, self.url, storage.explained_items(self.url, self._entries()))

    def _entries(self) -> Iterator[Entry]:
        filesystem, path = storage.arrow_filesystem(self.url)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            numbers = sorted({self.columns.uri, self.columns.version, self.columns.bucket} - {None})
            names = [file.schema_arrow.names[number] for number in numbers if number is not None]
            columns = Columns.of(names)
            assert columns is not None
            for batch in file.iter_batches(ROWS_TOGETHER, row_groups=[self.row_group], columns=names):
                values = [batch[name].to_pylist() for name in names]
                for row in zip(*values, strict=True):
                    yield columns.entry(row)


def is_one(url: str) -> bool:
    """Whether a name is that of a manifest."""
    return url.lower().endswith(SUFFIXES)


def parts(source: ImageSource) -> list[TextPart | CsvPart | ParquetPart]:
    """Of a manifest, or of all below a prefix.

    Raises:
        PipelineError: if there is none, or one without URIs.
    """
    found: list[TextPart | CsvPart | ParquetPart] = []
    for item in storage.list_objects(source.images):
        name = item.url.lower()
        if name.endswith(".txt"):
            starts = range(0, item.size, TEXT_BYTES)
            found += [TextPart(source, item.url, start, min(start + TEXT_BYTES, item.size)) for start in starts]
        elif name.endswith(".csv"):
            found += _csv_parts(source, item.url)
        elif name.endswith(".parquet"):
            found += _parquet_parts(source, item.url)
    if not found and not any(is_one(item.url) for item in storage.list_objects(source.images)):
        storage.require_bucket(source.images)
        raise PipelineError(
            f"There is no manifest at {source.images}: name a file that ends with {', '.join(SUFFIXES)}, or the "
            "manifest.json of an S3 Inventory."
        )
    return found


def _csv_parts(source: ImageSource, url: str) -> list[CsvPart]:
    with storage.explained(url), _opened(url) as stream:
        first = next(csv_rows(stream), None)
    if not first:
        return []
    columns = Columns.of(first)
    if columns is None and len(first) > 1:
        raise _no_uris(url, first)
    return [CsvPart(source, url, columns or Columns(0), header=columns is not None)]


def _parquet_parts(source: ImageSource, url: str) -> list[ParquetPart]:
    with storage.explained(url):
        filesystem, path = storage.arrow_filesystem(url)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            names, groups = file.schema_arrow.names, file.metadata.num_row_groups
    columns = Columns.of(names)
    if columns is None:
        raise _no_uris(url, names)
    return [ParquetPart(source, url, columns, group) for group in range(groups)]


def _no_uris(url: str, names: Iterable[str]) -> PipelineError:
    said = ", ".join(printable(name)[:40] for name in names)
    return PipelineError(f"{url} has the columns {said}: name that of the images one of {', '.join(URI_COLUMNS)}.")


def _opened(url: str) -> io.BufferedReader:
    # fsspec's own files look for the end of a line in all that they have read ahead, anew for each line.
    return io.BufferedReader(storage.open_input(url, _READ_AHEAD), _READ_AHEAD)  # pyright: ignore[reportArgumentType]


def csv_rows(stream: Any) -> Iterator[list[str]]:
    """The rows of a CSV file in UTF-8; bytes that are none stay recognizable as such."""
    return csv.reader(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""))


def resolved(source: ImageSource, manifest: str, entries: Iterable[Entry | None]) -> Iterator[Row | None]:
    """Entries of a manifest to rows, None to None. What is named again within some thousands of entries is left out.

    Args:
        source: what is wanted.
        manifest: its URL; relative entries are relative to its folder.
        entries: in their order.
    """
    folder = manifest.rpartition("/")[0]
    entries = iter(entries)
    seen: set[str] = set()
    with ThreadPoolExecutor(LOOKED_UP_TOGETHER) as pool:
        while together := list(itertools.islice(entries, _TOGETHER)):
            rows: list[Row | None] = []
            for entry in together:
                row = None if entry is None else _row(source, folder, entry)
                if row is None or row.image_uri not in seen:
                    rows.append(row)
                if row is not None:
                    seen.add(row.image_uri)
            looked_up = pool.map(_looked_up, [row.image_uri for row in rows if row and _is_unknown(row)])
            yield from (next(looked_up) if row and _is_unknown(row) else row for row in rows)
            if len(seen) >= ROWS_TOGETHER:
                seen.clear()


def _row(source: ImageSource, folder: str, entry: Entry) -> Row | None:
    try:
        uri = _absolute(folder, entry)
    except StorageError as error:
        return Row(printable(entry.uri or "(empty)"), "", status=BAD_URI, error=str(error))
    return Row(uri, (entry.version or "").strip('"')) if source.wants(_key(uri)) else None


def _is_unknown(row: Row) -> bool:
    return not row.version and row.status is None


def _absolute(folder: str, entry: Entry) -> str:
    uri = entry.uri
    if not uri:
        raise StorageError("The entry names no image: remove it.")
    if entry.bucket:
        uri = f"s3://{entry.bucket}/{uri}"
    elif "://" not in uri and not uri.startswith("/"):
        while uri.startswith(("./", "../")):
            step, _, uri = uri.partition("/")
            folder = folder if step == "." else folder.rpartition("/")[0]
        uri = f"{folder}/{uri}"
    if uri.endswith("/"):
        raise StorageError(f"{printable(uri)} names a folder: name the image itself.")
    absolute = storage.absolute(uri)
    if "://" in absolute and not absolute.partition("://")[2].partition("/")[2]:
        raise StorageError(f"{absolute} is a bucket: name an object in it.")
    return absolute


def _key(uri: str) -> str:
    scheme, path = storage.split(uri)
    return path.lstrip("/") if scheme == "file" else path.partition("/")[2]


def _looked_up(uri: str) -> Row:
    try:
        return Row(uri, patiently(lambda: storage.stat(uri)).version)
    except FileNotFoundError:
        return Row(uri, "", status=MISSING, error=f"{uri} is named by the manifest, but is not there")
    except StorageOutage:
        raise
    except StorageError as error:
        return Row(uri, "", status=STORAGE_ERROR, error=str(error))
