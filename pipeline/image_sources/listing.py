"""What every kind of source is listed as: rows of `LISTED`, some thousands at a time."""

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import pyarrow as pa

from pipeline import storage
from pipeline.redaction import redacted

ROWS_TOGETHER = 10_000  # of a table that a listing gives
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".avif", ".heic", ".heif", ".hif"),  # listed everywhere, decoded where Pillow can
)

# Why an image could not be read, which may be otherwise the next time.
STORAGE_ERROR = "storage_error"  # storage did not give it
CHANGED = "changed"  # the version that was listed was overwritten or deleted before it was read
# Why a listed image cannot be read at all. A row with such a status has all that can be said of it.
MISSING = "missing"  # a manifest names what is not there
BAD_URI = "bad_uri"  # a manifest's entry that is no URL of an object
BAD_NAME = "bad_name"  # a name that cannot be read back or written down
DAMAGED_ARCHIVE = "damaged_archive"  # of a tar file: what follows in it is lost

Kind = Literal["auto", "prefix", "manifest", "dataset", "tar"]

LISTED = pa.schema(
    [
        ("image_uri", pa.string()),  # what the image is called in the predictions
        ("version", pa.string()),  # of the object that holds it, as a listing has it; empty if there is none
        ("container", pa.string()),  # URL of the tar or Parquet file that holds it; null: an object of its own
        ("offset", pa.int64()),  # in a tar its first byte, in a Parquet file the number of its row, else null
        ("length", pa.int64()),  # in a tar its bytes, else null
        ("status", pa.string()),  # why there is nothing to read, else null
        ("error", pa.string()),  # the same as a sentence
    ]
)


@dataclass(frozen=True)
class ImageSource:
    """Some images to be segmented.

    Args:
        images: URL of a folder or prefix, a manifest, a canonical dataset or a tar file.
        kind: which of these it is. `auto` sees a tar file, a manifest (`.csv`, `.txt`, `.parquet`, or the
            `manifest.json` of an S3 Inventory) and a dataset, and takes everything else for a prefix. `tar` and
            `manifest` also name prefixes with several such files, which `auto` would pass over.
        include: patterns such as `*/front/*`, of which one must fit. They are matched against the place below `images`;
            of a dataset, `<split>/<image_id>`; of a tar, the name inside; of a manifest, the key in its bucket, or the
            path without its first slash.
        exclude: patterns of which none may fit.
    """

    images: str
    kind: Kind = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def covers(self, image_uri: str) -> bool:
        """Whether this source would list an image of this name if it were there; for prefixes and tar files alone.

        A tar file itself, of which a row may say that it is damaged, is covered too.
        """
        base = self.images.rstrip("/")
        place = image_uri.lower().find(".tar#")
        if self.kind == "tar":
            archive = image_uri if place < 0 else image_uri[: place + len(".tar")]
            within = archive == base or (archive.startswith(f"{base}/") and archive.lower().endswith(".tar"))
            return within and (place < 0 or self.wants(image_uri[len(archive) + 1 :]))
        if self.kind != "prefix" or place >= 0 or not image_uri.lower().endswith(SUFFIXES):
            return False
        if image_uri == base:
            return self.wants(image_uri.rpartition("/")[2])
        below = image_uri[len(base) + 1 :]
        return image_uri.startswith(f"{base}/") and "/." not in f"/{below}" and self.wants(below)

    def wants(self, place: str) -> bool:
        """Whether the patterns admit a place."""
        return any(fnmatch.fnmatchcase(place, pattern) for pattern in self.include) and not any(
            fnmatch.fnmatchcase(place, pattern) for pattern in self.exclude
        )


class Row(NamedTuple):
    """One row of `LISTED`."""

    image_uri: str
    version: str
    container: str | None = None
    offset: int | None = None
    length: int | None = None
    status: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Listed:
    """Some of the images of a part.

    Args:
        table: rows of `LISTED`, at most `ROWS_TOGETHER`.
        others: how many objects, or members of an archive, were passed over, since the table before.
    """

    table: pa.Table
    others: int


class Part(Protocol):
    """A unit of listing: small, picklable, independent of the others. Parts of a source have no image in common,
    but for manifests that name one twice."""

    def rows(self) -> Iterator[Row | None]:
        """Its images, None in place of everything that is passed over.

        Raises:
            PipelineError: if the store or a file cannot be read.
        """
        ...


def in_tables(rows: Iterable[Row | None]) -> Iterator[Listed]:
    """Rows gathered into tables; what is passed over is counted."""
    waiting: list[Row] = []
    others = 0
    for row in rows:
        if row is None:
            others += 1
            continue
        waiting.append(row)
        if len(waiting) == ROWS_TOGETHER:
            yield Listed(_table(waiting), others)
            waiting, others = [], 0
    if waiting or others:
        yield Listed(_table(waiting), others)


def _table(rows: list[Row]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ([] for _ in LISTED)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, LISTED, strict=True)], LISTED)


def named(row: Row) -> Row:
    """The row; if no store or record could hold its name, it says so instead of where the image is."""
    if storage.usable_name(row.image_uri):
        return row
    error = "its name has characters that cannot be read back or written down: rename it"
    return Row(printable(row.image_uri), row.version, status=BAD_NAME, error=error)


def printable(uri: str) -> str:
    """A name fit for a record, whatever it holds."""
    return redacted(storage.printable(uri))
