"""Prediction rows on their way to an output: staged as files by tasks, committed by the driver, each image once.

A task that Ray repeats, because a node was lost, may stage rows that were staged before. Each image of a run has a
number, and the ledger commits the first row of each number that it hears of. Nothing here imports torch.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import mask_store, storage
from pipeline.census import PendingFile
from pipeline.mask_store import MaskStore, Move
from pipeline.parquet_files import read_table, write_table
from pipeline.prediction_rows import NUMBER, TRIED_AGAIN, Summary
from pipeline.storage_errors import patiently

ROWS_PER_FILE = 64
COMMIT_SECONDS = 20.0  # what a killed run has done since its last commit, the next one does again
COMMIT_FILES = 512

STAGED = pa.schema(
    [
        ("staged", pa.string()),  # of a `Move`, as is the next
        ("name", pa.string()),
        (NUMBER, pa.list_(pa.int64())),  # of each row
        ("status", pa.list_(pa.string())),  # of each row
        ("failures", pa.string()),  # of a `Summary`, as JSON
    ]
)


@dataclass(frozen=True)
class MaskStager:
    """Numbered prediction rows to files below an output, and these to rows of `STAGED`.

    Args:
        url: the output.
        run_id: of the run.
    """

    url: str
    run_id: str

    def __call__(self, batch: pa.Table) -> pa.Table:
        again = pc.field("status").isin(TRIED_AGAIN)
        parts = ((mask_store.STANDING, batch.filter(~again)), (mask_store.TRIED_AGAIN, batch.filter(again)))
        return pa.Table.from_pylist([self._staged(name, part) for name, part in parts if part.num_rows], STAGED)

    def _staged(self, name: str, rows: pa.Table) -> dict[str, Any]:
        move = mask_store.staged(self.run_id, name)
        patiently(lambda: write_table(storage.join(self.url, move.staged), rows.drop_columns(NUMBER)))
        return {
            "staged": move.staged,
            "name": move.name,
            NUMBER: rows[NUMBER].to_pylist(),
            "status": rows["status"].to_pylist(),
            "failures": json.dumps(Summary.of(rows).failures),
        }


class Ledger:
    """Which images of a run have their row, and what is staged but not committed. Lives in the driver.

    Args:
        store: of the output.
        images: of the run; a byte is kept for each.
    """

    def __init__(self, store: MaskStore, images: int) -> None:
        self.store, self.summary = store, Summary.total([])
        self._done = np.zeros(images, bool)
        self._staged: list[Move] = []
        self._committed_at = time.monotonic()

    @property
    def missing(self) -> int:
        """How many images have no row yet."""
        return int(self._done.size - self._done.sum())

    def take(self, file: dict[str, Any]) -> int:
        """Note a staged file, one of `STAGED`; the number of images that got their row with it."""
        numbers = np.asarray(file[NUMBER])
        fresh = ~self._done[numbers]
        _, first = np.unique(numbers, return_index=True)
        fresh &= np.isin(np.arange(len(numbers)), first)
        move = Move(file["staged"], file["name"])
        failures = json.loads(file["failures"])
        if not fresh.all():
            move, failures = self._without_others(move, fresh)
        if fresh.any():
            self._staged.append(move)
            self._done[numbers[fresh]] = True
            statuses = np.asarray(file["status"], dtype=object)[fresh].tolist()
            self.summary = Summary.total([self.summary, Summary.counted(statuses, failures)])
        return int(fresh.sum())

    @property
    def staged(self) -> list[Move]:
        """What is staged but not committed."""
        return list(self._staged)

    def commit_if_due(self) -> None:
        """Commit when it was long ago, or much is waiting."""
        if time.monotonic() - self._committed_at > COMMIT_SECONDS or len(self._staged) >= COMMIT_FILES:
            self.commit()

    def commit(self) -> None:
        """Make what is staged part of the output."""
        self.store.commit(add=self._staged)
        self._staged, self._committed_at = [], time.monotonic()

    def _without_others(self, move: Move, wanted: np.ndarray) -> tuple[Move, list[dict[str, str]]]:
        """The same file with the wanted rows alone, and their failures."""
        place = storage.join(self.store.url, move.staged)
        rows = read_table(place).filter(pa.array(wanted))
        write_table(place, rows)
        return move, Summary.of(rows).failures


def in_rounds(files: Sequence[tuple[int, PendingFile]], most: int) -> Iterator[list[tuple[int, PendingFile]]]:
    """Consecutive files of pending images, as many at a time as have at most `most`; at least one."""
    together: list[tuple[int, PendingFile]] = []
    images = 0
    for number, file in files:
        if together and images + file.rows > most:
            yield together
            together, images = [], 0
        together.append((number, file))
        images += file.rows
    if together:
        yield together
