"""A record says what was done where, and whether it still counts; nothing that another work left is overwritten."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.run_record import (
    differences,
    finished_record,
    identity,
    read_record,
    record_run,
    refuse_other_work,
    versions,
)


@dataclass(frozen=True)
class _Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class _Config:
    source: str = "s3://raw/photos"
    optimizer: _Optimizer = field(default_factory=_Optimizer)
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = field(default=1, metadata={"identity": False})


CONFIG, INPUTS = _Config(), {"source": "abc"}


def finish(url: str, config: _Config = CONFIG, outputs: tuple[str, ...] = ("rows",), keep: bool = True) -> None:
    with record_run(url, "ingest", config, INPUTS, list(outputs), keep=keep) as record:
        for output in outputs:
            storage.write_bytes(storage.join(url, output, "part"), b"rows")
        record.counts = {"in": 1}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def test_finished_work_is_found_again(url: str) -> None:
    assert finished_record(url, "ingest", CONFIG, INPUTS) is None
    finish(url)
    record = finished_record(url, "ingest", CONFIG, INPUTS)
    assert record is not None
    assert record == read_record(url)
    assert (record.outcome, record.counts, record.error) == ("done", {"in": 1}, None)
    assert record.finished is not None
    assert record.finished >= record.started
    assert record.versions == versions()
    assert {"python", "rssnet", "torch", "ray"} <= record.versions.keys()
    refuse_other_work(url, "ingest", CONFIG, INPUTS)


def test_on_an_object_store_too(bucket: str) -> None:
    finish(bucket)
    assert finished_record(bucket, "ingest", CONFIG, INPUTS) is not None
    storage.delete(storage.join(bucket, "rows"))
    assert finished_record(bucket, "ingest", CONFIG, INPUTS) is None


def test_work_of_another_workflow_configuration_or_input_does_not_count(url: str) -> None:
    finish(url)
    assert finished_record(url, "train", CONFIG, INPUTS) is None
    assert finished_record(url, "ingest", _Config(source="s3://raw/other"), INPUTS) is None
    assert finished_record(url, "ingest", _Config(optimizer=_Optimizer(lr=0.1)), INPUTS) is None
    assert finished_record(url, "ingest", CONFIG, {"source": "abd"}) is None


def test_how_it_is_executed_makes_no_other_work(url: str) -> None:
    finish(url)
    assert finished_record(url, "ingest", _Config(workers=8), INPUTS) is not None
    assert "workers" not in identity(_Config(workers=8))


def test_while_it_runs_and_when_it_was_killed_it_does_not_count(url: str) -> None:
    with record_run(url, "ingest", CONFIG, INPUTS, []):
        running = read_record(url)
        assert running is not None
        assert (running.outcome, running.finished) == ("running", None)
        assert finished_record(url, "ingest", CONFIG, INPUTS) is None


@pytest.mark.parametrize("failure", [PipelineError("no space left: free some."), KeyboardInterrupt(), ValueError("x")])
def test_a_failure_is_recorded_and_passed_on(url: str, failure: BaseException) -> None:
    with pytest.raises(type(failure)), record_run(url, "ingest", CONFIG, INPUTS, []):
        raise failure
    record = read_record(url)
    assert record is not None
    assert record.outcome == "failed"
    assert record.error is not None
    assert str(failure) in record.error
    assert finished_record(url, "ingest", CONFIG, INPUTS) is None


def test_a_begun_repetition_hides_the_earlier_success(url: str) -> None:
    finish(url)
    with pytest.raises(ValueError, match="x"), record_run(url, "ingest", CONFIG, INPUTS, ["rows"]):
        raise ValueError("x")
    assert finished_record(url, "ingest", CONFIG, INPUTS) is None


def test_work_whose_outputs_are_gone_does_not_count(url: str) -> None:
    finish(url, outputs=("rows", "rejects"))
    assert finished_record(url, "ingest", CONFIG, INPUTS) is not None
    storage.delete(storage.join(url, "rejects"))
    assert finished_record(url, "ingest", CONFIG, INPUTS) is None


def test_starting_afresh_deletes_what_was_written_before_and_nothing_else(url: str) -> None:
    finish(url, outputs=("rows", "train"))
    storage.write_bytes(storage.join(url, "notes.txt"), b"mine")
    with record_run(url, "ingest", CONFIG, INPUTS, ["rows"], keep=False):
        assert sorted(item.url for item in storage.list_objects(url)) == [f"{url}/notes.txt", f"{url}/run.json"]


def test_going_on_keeps_what_was_written_before(url: str) -> None:
    finish(url)
    with record_run(url, "ingest", CONFIG, INPUTS, ["rows"], keep=True):
        assert storage.exists(storage.join(url, "rows/part"))


def test_another_configuration_is_refused_with_what_differs(url: str) -> None:
    finish(url)
    other = _Config(optimizer=_Optimizer(lr=0.1), options={"depth": 6})
    with pytest.raises(PipelineError) as refusal:
        refuse_other_work(url, "ingest", other, {"source": "abd"})
    message = str(refusal.value)
    assert message.startswith(f"{url} holds the ingest of another configuration (")
    assert "optimizer.lr: 0.001 -> 0.1" in message
    assert "options.depth: (absent) -> 6" in message
    assert "another source" in message
    assert "optimizer.betas" not in message
    assert message.endswith("choose another place, or pass --new true to replace what is there.")


def test_the_place_of_another_workflow_is_refused_even_afresh(url: str) -> None:
    finish(url)
    with pytest.raises(PipelineError, match="holds the output of ingest, not of train: choose another place"):
        refuse_other_work(url, "train", CONFIG, INPUTS)
    for keep in (True, False):
        with (
            pytest.raises(PipelineError, match="holds the output of ingest, not of train"),
            record_run(url, "train", CONFIG, INPUTS, ["rows"], keep=keep),
        ):
            pytest.fail("the work was begun")
    assert finished_record(url, "ingest", CONFIG, INPUTS) is not None


def test_differences_name_each_field_once_and_in_order(url: str) -> None:
    finish(url)
    record = read_record(url)
    assert record is not None
    assert differences(record, CONFIG, INPUTS) == []
    assert differences(record, dataclasses.replace(CONFIG, source="s3://other"), {"labels": "x", "source": "abc"}) == [
        "source: s3://raw/photos -> s3://other",
        "another labels",
    ]


def test_credentials_never_reach_the_record(url: str) -> None:
    config = _Config(source="s3://KEY:hush@raw/photos", options={"urls": ["https://u:hush@host/x?sig=hush&n=1"]})
    with (
        pytest.raises(RuntimeError),
        record_run(url, "ingest", config, {}, []),
    ):
        raise RuntimeError("cannot reach s3://KEY:hush@raw/photos")
    text = storage.read_bytes(storage.join(url, "run.json")).decode()
    assert "hush" not in text
    assert "KEY" not in text
    assert "s3://***@raw/photos" in text
    record = read_record(url)
    assert record is not None
    assert differences(record, config, {}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run.json is not valid JSON"),
        ("[]", "run.json is not a run record of schema version 1"),
        ('{"schema_version": 1, "colour": "red"}', "run.json is not a run record of schema version 1"),
        ('{"schema_version": 2}', "run.json is not a run record of schema version 1"),
    ],
)
def test_what_is_no_record_is_refused(url: str, text: str, message: str) -> None:
    storage.write_bytes(storage.join(url, "run.json"), text.encode())
    with pytest.raises(PipelineError, match=message):
        read_record(url)


def test_it_is_json_that_a_person_can_read(url: str) -> None:
    finish(url)
    text = Path(url, "run.json").read_text("utf-8")
    document = json.loads(text)
    assert document["config"] == {
        "source": "s3://raw/photos",
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999]},
        "options": {},
    }
    assert '\n  "workflow": "ingest"' in text
