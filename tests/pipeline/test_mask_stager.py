"""Each image of a run gets one row, whatever tasks stage, and however often."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import mask_stager, mask_store, masks, storage
from pipeline.census import PendingFile
from pipeline.mask_stager import Ledger, MaskStager, in_rounds
from pipeline.mask_store import MaskStore
from pipeline.prediction_rows import NUMBER
from tests.pipeline.prediction_table import prediction_row, prediction_table


def _numbered(*numbers: int, **statuses: str) -> pa.Table:
    """Rows for the images of these numbers, each with a URI of its own."""
    rows = prediction_table(*(prediction_row(f"{n}.jpg", status=statuses.get(f"n{n}", "ok")) for n in numbers))
    return rows.append_column(NUMBER, pa.array(numbers, pa.int64()))


def _uris(url: str) -> list[str]:
    return sorted(masks.read_masks(url, columns=["image_uri"])["image_uri"].to_pylist())


@pytest.fixture
def store(tmp_path) -> Any:
    with MaskStore(str(tmp_path), "run") as store:
        yield store


def test_rows_that_the_next_run_tries_again_have_files_of_their_own(store):
    staged = MaskStager(store.url, "run")(_numbered(0, 1, 2, 3, n1="storage_error", n2="damaged")).to_pylist()
    assert [(file[NUMBER], file["status"]) for file in staged] == [
        ([0, 2, 3], ["ok", "damaged", "ok"]),
        ([1], ["storage_error"]),
    ]
    names = [file["name"].rpartition("/")[2].partition("-")[0] for file in staged]
    assert names == [mask_store.STANDING, mask_store.TRIED_AGAIN]
    assert [failure["image_uri"] for file in staged for failure in json.loads(file["failures"])] == ["2.jpg", "1.jpg"]
    rows = pq.read_table(storage.join(store.url, staged[0]["staged"]))
    assert rows.schema.names == masks.PREDICTION_SCHEMA.names
    assert MaskStager(store.url, "run")(_numbered()).num_rows == 0


def test_a_task_that_is_repeated_doubles_no_row(store):
    ledger, stager = Ledger(store, 4), MaskStager(store.url, "run")
    taken = [ledger.take(file) for file in stager(_numbered(0, 1)).to_pylist()]
    # Repeated with other neighbours, and another outcome for one of them.
    taken += [ledger.take(file) for file in stager(_numbered(1, 2, n1="storage_error")).to_pylist()]
    taken += [ledger.take(file) for file in stager(_numbered(0, 1)).to_pylist()]
    taken += [ledger.take(file) for file in stager(_numbered(2, 3, 3)).to_pylist()]
    assert taken == [2, 1, 0, 0, 1]
    assert ledger.missing == 0
    ledger.commit()
    assert _uris(store.url) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert dict(ledger.summary.statuses) == {"ok": 4}
    assert ledger.summary.failures == []


@settings(max_examples=25)
@given(tasks=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), max_size=8))
def test_whatever_tasks_stage_the_first_row_of_each_image_counts(tasks, tmp_path_factory):
    url = str(tmp_path_factory.mktemp("output"))
    with MaskStore(url, "run") as store:
        ledger, stager = Ledger(store, 8), MaskStager(url, "run")
        for numbers in tasks:
            for file in stager(_numbered(*numbers)).to_pylist():
                ledger.take(file)
        ledger.commit()
    wanted = {number for numbers in tasks for number in numbers}
    assert _uris(url) == sorted(f"{number}.jpg" for number in wanted)
    assert ledger.missing == 8 - len(wanted)


def test_what_is_staged_is_committed_when_it_is_due(store, monkeypatch):
    ledger, stager = Ledger(store, 3), MaskStager(store.url, "run")
    (file,) = stager(_numbered(0)).to_pylist()
    ledger.take(file)
    ledger.commit_if_due()
    assert _uris(store.url) == []
    monkeypatch.setattr(mask_stager, "COMMIT_SECONDS", 0.0)
    ledger.commit_if_due()
    assert _uris(store.url) == ["0.jpg"]


@given(sizes=st.lists(st.integers(1, 9), max_size=20), most=st.integers(1, 20))
def test_rounds_hold_everything_once_in_order(sizes, most):
    files = [(number, PendingFile("", size, again=False)) for number, size in enumerate(sizes)]
    rounds = list(in_rounds(files, most))
    assert [file for together in rounds for file in together] == files
    for together in rounds:
        assert sum(file.rows for _, file in together) <= most or len(together) == 1
