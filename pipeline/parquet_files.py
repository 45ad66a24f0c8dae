"""Parquet files, each of which appears whole or not at all."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

ROW_GROUP_ROWS = 32


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
