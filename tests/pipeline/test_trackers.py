"""Curves on tracking servers: they arrive, go on, and never hold up who draws them."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline import trackers
from pipeline.errors import PipelineError
from pipeline.trackers import Tracker, start_tracker, tracker_names
from pipeline.train_config import TrainConfig

CONFIG = TrainConfig("s3://data/set", "s3://runs/first", seed=7)


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri(f"file:{tmp_path}")
    yield
    mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType] the environment's again


@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_gets_the_curves_the_config_and_the_outcome_and_a_resumed_run_goes_on() -> None:
    from mlflow import MlflowClient

    known: dict[str, str] = {}
    first = start_tracker("mlflow", CONFIG, known)
    first.add(1, {"train/loss": 2.0, "train/lr": math.nan})
    first.close(failed=True)
    run = MlflowClient().get_run(known["mlflow"])
    assert (run.info.status, run.info.run_name) == ("FAILED", "first")
    assert run.data.params["seed"] == "7"
    assert run.data.metrics == {"train/loss": 2.0}

    second = start_tracker("mlflow", CONFIG, known)
    assert MlflowClient().get_run(known["mlflow"]).info.status == "RUNNING"
    second.add(2, {"train/loss": 1.0})
    second.close(failed=False)
    points = MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 2.0), (2, 1.0)]
    assert MlflowClient().get_run(run.info.run_id).info.status == "FINISHED"
    assert (first.lost, second.lost) == ("", "")


def test_wandb_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    known: dict[str, str] = {}
    tracker = start_tracker("wandb", CONFIG, known)
    tracker.add(1, {"train/loss": 2.0})
    tracker.close(failed=False)
    assert tracker.lost == ""
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert known["wandb"] in log.name
    assert b"train/loss" in log.read_bytes()


class Server:
    """A tracking server that a test holds up or breaks."""

    run_id = "1"

    def __init__(self, error: Exception | None = None) -> None:
        self.answers, self.error, self.seen = threading.Event(), error, 0

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:  # noqa: ARG002
        self.answers.wait()
        self.seen += 1
        if self.error:
            raise self.error

    def close(self, failed: bool) -> None: ...


def test_a_server_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.1)
    tracker = Tracker("mlflow", Server())
    started = time.monotonic()
    for iteration in range(trackers.WAITING + 10):
        tracker.add(iteration, {"loss": 1.0})
    tracker.close(failed=False)
    assert time.monotonic() - started < 5
    assert tracker.lost == "mlflow lacks points (too slow)"


def test_a_server_that_fails_is_told_of_later_points() -> None:
    server = Server(ConnectionError("gone"))
    server.answers.set()
    tracker = Tracker("wandb", server)
    for iteration in range(3):
        tracker.add(iteration, {"loss": 1.0})
    tracker.close(failed=False)
    assert server.seen == 3
    assert tracker.lost == "wandb lacks points (ConnectionError)"


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else json.__spec__)
    assert tracker_names(None) == []
    assert tracker_names("mlflow") == ["mlflow"]
    with pytest.raises(PipelineError, match="wandb, which is not installed: pip install wandb"):
        tracker_names("mlflow, wandb")
    with pytest.raises(PipelineError, match="'comet' is not known: give some of mlflow, wandb"):
        tracker_names("comet")


@pytest.mark.usefixtures("mlflow_store")
def test_a_server_that_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    with pytest.raises(PipelineError, match=r"The tracker mlflow cannot be started \(.*\): set what"):
        start_tracker("mlflow", CONFIG, {})
