"""Images that an S3 Inventory report lists: its `manifest.json` names data files of CSV or Parquet.

Reports are made daily or weekly: what has come since is not in them, and what is gone is found out when it is read.
"""

import gzip
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_sources.listing import ROWS_TOGETHER, SUFFIXES, ImageSource, Row
from pipeline.image_sources.manifests import Entry, csv_rows, resolved

FORMATS = ("CSV", "Parquet")

_READ_AHEAD = 4 * 2**20
_FIELDS = ("key", "etag", "islatest", "isdeletemarker")
_FLAGS = ("islatest", "isdeletemarker")


@dataclass(frozen=True)
class InventoryPart:
    """One data file of a report.

    Args:
        source: whose URL is that of the report's `manifest.json`.
        url: of the data file.
        bucket: that the report is of.
        format: one of `FORMATS`.
        columns: names of the columns of a CSV file, in its order.
    """

    source: ImageSource
    url: str
    bucket: str
    format: str
    columns: tuple[str, ...]

    def rows(self) -> Iterator[Row | None]:
        """One for each image; other objects, and versions that are not the latest, are passed over."""
        return resolved(self.source, self.source.images, storage.explained_items(self.url, self._entries()))

    def _entries(self) -> Iterator[Entry | None]:
        for values in self._csv() if self.format == "CSV" else self._parquet():
            key = values["key"]
            latest = values.get("islatest") in (None, True) and not values.get("isdeletemarker")
            hidden = any(part.startswith(".") for part in key.split("/"))
            wanted = latest and not hidden and key.lower().endswith(SUFFIXES)
            yield Entry(key, values.get("etag"), self.bucket) if wanted else None

    def _csv(self) -> Iterator[dict[str, Any]]:
        with storage.open_input(self.url, _READ_AHEAD) as stream, gzip.open(stream, "rb") as content:
            for row in csv_rows(content):
                values: dict[str, Any] = dict(zip(self.columns, row, strict=False))
                values["key"] = urllib.parse.unquote_plus(values["key"], errors="surrogateescape")
                yield values | {name: values[name].lower() == "true" for name in _FLAGS if values.get(name)}

    def _parquet(self) -> Iterator[dict[str, Any]]:
        filesystem, path = storage.arrow_filesystem(self.url)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            names = [name for name in file.schema_arrow.names if _field(name) in _FIELDS]
            for batch in file.iter_batches(ROWS_TOGETHER, columns=names):
                fields = [_field(name) for name in batch.schema.names]
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield dict(zip(fields, row, strict=True))


def is_one(url: str) -> bool:
    """Whether a name is that of a report's manifest."""
    return url.rpartition("/")[2] == "manifest.json"


def parts(source: ImageSource) -> list[InventoryPart]:
    """The data files of a report.

    Raises:
        PipelineError: if it is no report, or one in a format that cannot be read.
    """
    url = source.images
    try:
        document = storage.read_json(url)
        files = [file["key"] for file in document["files"]]
        bucket, form, schema = document["sourceBucket"], document["fileFormat"], document["fileSchema"]
        destination = document["destinationBucket"].rpartition(":")[2]  # an ARN
    except FileNotFoundError:
        raise PipelineError(f"{url} does not exist: correct the URL of the images.") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{url} is not the manifest of an S3 Inventory ({type(error).__name__}: {error}): name the manifest.json "
            "of a report, or a list that ends with .csv, .txt or .parquet."
        ) from error
    if form not in FORMATS:
        raise PipelineError(f"{url} is of a report in {form}: have the inventory made in {' or '.join(FORMATS)}.")
    columns = tuple(_field(name) for name in schema.split(",")) if form == "CSV" else ()
    if form == "CSV" and "key" not in columns:
        raise PipelineError(f"{url} is of a report without keys ({schema}): have the inventory made anew.")
    scheme, path = storage.split(url)
    place = f"s3://{path.partition('/')[0] if scheme == 's3' else destination}"  # a report may have been moved
    return [InventoryPart(source, storage.join(place, key), bucket, form, columns) for key in files]


def _field(name: str) -> str:
    """One name for what CSV calls `IsLatest` and Parquet `is_latest`."""
    return name.strip().replace("_", "").lower()
