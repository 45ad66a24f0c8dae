"""What a checkpoint holds, what of a run's folder is kept when the run goes on, and which models are its best."""

import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import pytest
import ray.train
import torch

from pipeline import storage
from pipeline.checkpoints import Checkpoints, best_iterations
from pipeline.storage_errors import StorageError


class Reports:
    """What Ray Train is told; it calls the upload in a thread of its own when `upload` is asked for."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self._uploads: list[Any] = []

    def __call__(self, metrics: dict[str, Any], checkpoint: Any, checkpoint_upload_fn: Any, **_: Any) -> None:
        self.metrics.append(metrics)
        if checkpoint is not None:
            name = f"checkpoint_{len(self._uploads)}"
            self._uploads.append(lambda: checkpoint_upload_fn(checkpoint, name))

    def upload(self) -> Any:
        return self._uploads[-1]()


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    told = Reports()
    monkeypatch.setattr(ray.train, "report", told)
    return told


def restored(checkpoint: Any, run: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    reported = type("Reported", (), {"checkpoint": checkpoint})
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: [reported])
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: checkpoint)
    return Checkpoints(run, writes=True).restore()


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_a_checkpoint_is_what_the_state_was_when_it_was_reported(
    reports: Reports, bucket: str, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run") if store == "disk" else bucket
    checkpoints = Checkpoints(run, writes=True)
    weights, history = torch.zeros(1000), [{"loss": 1.0}]
    for iteration in range(2):  # the second time the same memory is used again
        state = {"step": {"weights": weights, "iteration": iteration, "optimizer": None}, "history": {"all": history}}
        checkpoints.report({"iteration": iteration}, state)
        weights += 1  # as the next step does
        history.append({"loss": 0.5})
        kept = reports.upload()
        found = restored(kept, run, monkeypatch)
        assert torch.equal(found["step"]["weights"], torch.full((1000,), float(iteration)))
        assert found["step"]["iteration"] == iteration
        assert len(found["history"]["all"]) == 1 + iteration
    assert [metrics["iteration"] for metrics in reports.metrics] == [0, 1]


def test_a_worker_that_does_not_write_reports_without_a_checkpoint(reports: Reports, tmp_path: Path) -> None:
    Checkpoints(str(tmp_path), writes=False).report({}, {"step": {}, "history": {}})
    assert len(reports.metrics) == 1
    with pytest.raises(IndexError):
        reports.upload()


def test_the_next_checkpoint_waits_for_the_last(reports: Reports, tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), writes=True)
    checkpoints.report({}, {"step": {"weights": torch.zeros(10)}})
    second = threading.Thread(target=checkpoints.report, args=({}, {"step": {"weights": torch.ones(10)}}))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    reports.upload()
    second.join(timeout=10)
    assert not second.is_alive()
    assert len(reports.metrics) == 2


def test_a_checkpoint_does_not_pile_up_with_one_that_is_stored_but_not_yet_written_down(
    reports: Reports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(str(tmp_path), writes=True)
    assert checkpoints.idle
    checkpoints.report({}, {"step": {"weights": torch.zeros(10)}})
    assert not checkpoints.idle
    reports.upload()
    assert not checkpoints.idle
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 4.0)
    assert checkpoints.idle


def test_a_run_without_space_for_a_checkpoint_is_named(
    reports: Reports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though torch says of a stream that fails no more than that its position is unexpected."""

    class Full(arrow_fs.LocalFileSystem):
        def open_output_stream(self, path: str, **_: Any) -> Any:  # noqa: ARG002
            return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr(storage, "arrow_filesystem", lambda url: (Full(), url))
    checkpoints = Checkpoints(str(tmp_path), writes=True)
    checkpoints.report({}, {"step": {"weights": torch.zeros(1000)}})
    with pytest.raises(StorageError, match="no space left on the device"):
        reports.upload()


def test_what_a_killed_upload_has_left_is_deleted_and_rays_own_record_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("checkpoint_finished", "checkpoint_half"):
        (folder / name).mkdir(parents=True)
        torch.save({"step": {}, "history": {}}, folder / name / "state.pt")
    (folder / "checkpoint_manager_snapshot.json").write_text("{}")
    finished = ray.train.Checkpoint(str(folder / "checkpoint_finished"))
    assert restored(finished, str(tmp_path), monkeypatch) == {"step": {}, "history": {}}
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_finished", "checkpoint_manager_snapshot.json"]


def test_the_best_iterations_are_those_of_the_highest_miou_the_earlier_of_equal_ones() -> None:
    found = [{"iteration": 10 * number, "miou": miou} for number, miou in enumerate([0.1, 0.5, 0.3, 0.5])]
    assert best_iterations(found, 2) == [10, 30]
    assert best_iterations(found, 9) == [10, 30, 20, 0]
    assert best_iterations(found, 0) == []
