"""What of a run's folder is kept and what is deleted when the run goes on, and which models are its best."""

from pathlib import Path

import pytest
import ray.train
import torch

from pipeline import checkpoints
from pipeline.checkpoints import Checkpoints, best_iterations
from pipeline.storage_errors import StorageError


def test_what_a_killed_upload_has_left_is_deleted_and_rays_own_record_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("checkpoint_finished", "checkpoint_half"):
        (folder / name).mkdir(parents=True)
        torch.save({"step": {}, "history": {}}, folder / name / "state.pt")
    (folder / "checkpoint_manager_snapshot.json").write_text("{}")
    finished = ray.train.Checkpoint(str(folder / "checkpoint_finished"))
    reported = type("Reported", (), {"checkpoint": finished})
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: [reported])
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: finished)
    assert Checkpoints(str(tmp_path), writes=True).restore() == {"step": {}, "history": {}}
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_finished", "checkpoint_manager_snapshot.json"]


def test_a_disk_without_space_for_a_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="no space left on the device for a checkpoint of 4,000 bytes"):
        Checkpoints(str(tmp_path), writes=True).report({}, {"step": {"weights": torch.zeros(1000)}})


def test_the_best_iterations_are_those_of_the_highest_miou_the_earlier_of_equal_ones() -> None:
    found = [{"iteration": 10 * number, "miou": miou} for number, miou in enumerate([0.1, 0.5, 0.3, 0.5])]
    assert best_iterations(found, 2) == [10, 30]
    assert best_iterations(found, 9) == [10, 30, 20, 0]
    assert best_iterations(found, 0) == []
