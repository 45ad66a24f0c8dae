"""A sweep on real Ray Tune: what it leaves behind, and what it must not leave."""

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util import placement_group_table

from pipeline.ingest import IngestConfig, ingest
from pipeline.street_scenes import write_street_scenes
from pipeline.sweep import SweepConfig, sweep
from tests.workflows.conftest import TRAIN

pytestmark = pytest.mark.slow


def _held_groups() -> list[str]:
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


class _StopsAllButTheFirst(FIFOScheduler):
    """Which trials a real scheduler stops hangs on scores, and those of a few iterations on the machine."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        first = trial is tune_controller.get_trials()[0]
        return TrialScheduler.CONTINUE if first else TrialScheduler.STOP


@pytest.mark.usefixtures("ray_cluster")
def test_a_stopped_trial_is_called_so_and_frees_what_its_workers_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sweep.ASHAScheduler", _StopsAllButTheFirst)
    write_street_scenes(tmp_path / "scenes", train=12, val=4, photos=0, size=(96, 128))
    ingest(IngestConfig(str(tmp_path / "scenes" / "labelled"), str(tmp_path / "dataset")))
    base = {**TRAIN, "iterations": 12, "evaluate_every": 6, "checkpoint_every": 12}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(base))
    config = SweepConfig(
        dataset=str(tmp_path / "dataset"),
        run=str(tmp_path / "sweep"),
        base=str(tmp_path / "train.yaml"),
        space={"optimizer.lr": {"loguniform": [1e-5, 1e-3]}},
        trials=3,
        searcher="random",
        grace_iterations=6,
    )
    record = sweep(config)
    assert record.counts == {"trials": 3, "failed": 0}
    trials = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert (trials[0]["state"], trials[0]["iterations"]) == ("finished", 12)
    assert [(trial["state"], trial["iterations"]) for trial in trials[1:]] == [("stopped", 6)] * 2

    time.sleep(20)  # a controller that outlived its trial would start its workers anew by then
    assert _held_groups() == []
