"""The encoded bytes of listed images, each of the very version that was listed."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.image_sources.listing import CHANGED, STORAGE_ERROR
from pipeline.read_ahead import ahead
from pipeline.storage_errors import StorageError

READ_WAITS = (0.5, 2.0)  # seconds between attempts to read an image that storage does not give
FETCHED_AHEAD = 8  # images that are read while earlier ones are worked on


@dataclass(frozen=True)
class Unread:
    """An image that was not read.

    Args:
        status: `STORAGE_ERROR` or `CHANGED`, or the status that it was listed with.
        error: the reason in a sentence.
    """

    status: str
    error: str


def read(rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes | Unread]:
    """The encoded bytes of each image, in order, or why there are none; some are read ahead.

    Args:
        rows: of `LISTED`. Of consecutive rows in one Parquet file each row group is read once, and the images that are
            asked for are in memory together: rows in the order of `container` and `offset` are read fastest.
    """
    with ThreadPoolExecutor(FETCHED_AHEAD) as pool:
        for some in ahead(pool, _read_together, _divided(rows), FETCHED_AHEAD):
            yield from some


def _divided(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Consecutive rows of one Parquet file, or one of any other."""
    for file, together in itertools.groupby(rows, _parquet_file):
        if file is None:
            yield from ([row] for row in together)
        else:
            yield list(together)


def _parquet_file(row: Mapping[str, Any]) -> str | None:
    is_row = row.get("container") is not None and row["length"] is None
    return row["container"] if is_row and row["status"] is None else None


def _read_together(rows: list[Mapping[str, Any]]) -> Iterable[bytes | Unread]:
    row = rows[0]
    if row.get("status") is not None:
        return [Unread(row["status"], row["error"])]
    container, version = row.get("container"), row["version"]
    if container is None:
        return _patiently(rows, row["image_uri"], lambda: [_whole(row["image_uri"], version)])
    if row["length"] is None:
        return _patiently(rows, container, lambda: _parquet_rows(container, version, [row["offset"] for row in rows]))
    return _patiently(rows, container, lambda: [_member(container, version, row["offset"], row["length"])])


class _Changed(Exception):
    """The version that was listed is no longer there."""


def _patiently(rows: list[Mapping[str, Any]], url: str, fetch: Callable[[], list[bytes]]) -> Sequence[bytes | Unread]:
    """What `fetch` gives, which is tried some times, or the same reason for each of the rows."""
    unread = Unread(CHANGED, f"{url} was overwritten after it was listed")
    for wait in (*READ_WAITS, None):
        try:
            return fetch()
        except _Changed:
            break
        except FileNotFoundError:
            unread = Unread(CHANGED, f"{url} was listed, but is not there")
            break
        except StorageError as error:
            unread = Unread(STORAGE_ERROR, str(error))
            if wait is not None:
                time.sleep(wait)
    return [unread] * len(rows)


def _whole(url: str, version: str) -> bytes:
    data, found = storage.read_versioned(url)
    if found != version:
        raise _Changed
    return data


def _member(url: str, version: str, start: int, length: int) -> bytes:
    try:
        data, found = storage.read_range(url, start, length)
    except StorageError:
        _require_version(url, version)  # of a file that has become shorter, the range is refused
        raise
    if found != version:
        raise _Changed
    return data


def _parquet_rows(url: str, version: str, numbers: Sequence[int]) -> list[bytes]:
    """The images of some rows of a Parquet file, each row group that holds any read once."""
    images: dict[int, bytes] = {}
    try:
        with storage.explained(url, absence=False):
            filesystem, path = storage.arrow_filesystem(url)
            with pq.ParquetFile(path, filesystem=filesystem) as file:
                for group, (first, wanted) in _by_row_group(file, numbers).items():
                    column = file.read_row_group(group, columns=["image"])["image"]
                    images |= {number: column[number - first].as_py() or b"" for number in wanted}
    except StorageError:
        _require_version(url, version)
        raise
    _require_version(url, version)
    return [images[number] for number in numbers]


def _by_row_group(file: pq.ParquetFile, numbers: Sequence[int]) -> Mapping[int, tuple[int, list[int]]]:
    """By row group: the number of its first row, and those of the rows that are wanted of it."""
    groups: dict[int, tuple[int, list[int]]] = {}
    first = 0
    for group in range(file.metadata.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        wanted = [number for number in numbers if first <= number < end]
        if wanted:
            groups[group] = first, wanted
        first = end
    return groups


def _require_version(url: str, version: str) -> None:
    if storage.stat(url).version != version:
        raise _Changed
