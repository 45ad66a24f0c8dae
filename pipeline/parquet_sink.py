"""Writing a Ray dataset as Parquet files, each of which appears whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from pipeline import storage
from pipeline.progress import Reporter

ROW_GROUP_ROWS = 32


@dataclass(frozen=True)
class WrittenFile:
    """One Parquet file of a finished write: its place below the output, and how many rows it has."""

    path: str
    rows: int


@dataclass
class Written:
    """What one write task, or a whole write, has produced: the files, and a summary of their rows."""

    files: list[WrittenFile] = field(default_factory=list)
    summaries: list[Any] = field(default_factory=list)


class ParquetSink(Datasink[Written]):
    """Writes each block of a dataset below `url`; used with `Dataset.write_datasink`, then read `written`.

    A file is encoded in memory and stored in one atomic step, so readers never see a part of one, also on a local disk.
    Its name is made of its rows' ids: a task that Ray runs again replaces its file instead of doubling its rows.

    Args:
        url: the output place.
        route: splits a table into parts, each with the folder (below `url`) and the columns that it is written with.
        key: the columns that together tell a row from every other; their values name the file.
        summarize: what to send back to the driver about a table; must stay small.
        reporter: is told how many rows were written.
        rows_per_file: rows that Ray gathers for one file.
    """

    def __init__(
        self,
        url: str,
        route: Callable[[pa.Table], Iterable[tuple[str, pa.Table]]],
        key: str | Sequence[str],
        summarize: Callable[[pa.Table], Any],
        reporter: Reporter,
        rows_per_file: int,
    ) -> None:
        self.url, self.route, self.summarize = url, route, summarize
        self.key = [key] if isinstance(key, str) else list(key)
        self.reporter, self.rows_per_file = reporter, rows_per_file
        self.written = Written()

    def write(self, blocks: Iterable[Block], ctx: Any) -> Written:  # noqa: ARG002 - Ray's signature
        """Runs on a worker: one file for each part of these blocks."""
        written = Written()
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return written
        table = pa.concat_tables(tables, promote_options="permissive")
        for folder, part in self.route(table):
            path = f"{folder}/{file_name(part, self.key)}"
            write_table(storage.join(self.url, path), part)
            written.files.append(WrittenFile(path, part.num_rows))
        written.summaries.append(self.summarize(table))
        self.reporter.advance(table.num_rows)
        return written

    def on_write_complete(self, write_result: WriteResult[Written]) -> None:
        """Runs on the driver, once, after the last task."""
        for part in write_result.write_returns:
            self.written.files.extend(part.files)
            self.written.summaries.extend(part.summaries)
        self.written.files.sort(key=lambda file: file.path)

    @property
    def min_rows_per_write(self) -> int:
        """How many rows Ray gathers before it calls `write`."""
        return self.rows_per_file


def file_name(table: pa.Table, key: Sequence[str]) -> str:
    """The name of the file that holds these rows, made of their `key` columns: the same rows in any order, one name."""
    rows = sorted(zip(*(table[column].to_pylist() for column in key), strict=True))
    return f"part-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:20]}.parquet"


def write_table(url: str, table: pa.Table, row_group_rows: int = ROW_GROUP_ROWS) -> None:
    """Store a table as one Parquet file, atomically. Encoded images inside are not compressed twice."""
    file = BufferedParquet(table.schema)
    file.write(table, row_group_rows)
    file.store(url)


def read_table(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one Parquet file.

    Raises:
        StorageError: if it is not there, or the store fails.
    """
    with storage.explained(url):
        filesystem, path = storage.arrow_filesystem(url)
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
            return file.read(None if columns is None else list(columns))


class BufferedParquet:
    """A Parquet file that is written in memory, and stored atomically when it is whole.

    Args:
        schema: of its rows. Binary columns, which hold encoded images, are not compressed.
    """

    def __init__(self, schema: pa.Schema) -> None:
        binary = {name for name, kind in zip(schema.names, schema.types, strict=True) if pa.types.is_binary(kind)}
        options: Any = {"compression": {name: "NONE" if name in binary else "ZSTD" for name in schema.names}}
        self.rows = 0
        self._buffer = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._buffer, schema, write_page_index=True, **options)

    def write(self, table: pa.Table, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        """Add rows, in row groups of so many."""
        self.rows += table.num_rows
        self._writer.write_table(table, row_group_size=row_group_rows)

    def store(self, url: str) -> None:
        """Finish the file and store it."""
        self._writer.close()
        storage.write_bytes(url, self._buffer.getvalue().to_pybytes())
