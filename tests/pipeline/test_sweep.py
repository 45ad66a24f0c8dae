"""A sweep on real Ray Tune: what it leaves behind, and what it must not leave."""

import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from ray.util import placement_group_table

from pipeline.ingest import IngestConfig, ingest
from pipeline.street_scenes import write_street_scenes
from pipeline.sweep import SweepConfig, sweep
from tests.workflows.conftest import TRAIN

pytestmark = pytest.mark.slow


def _held_groups() -> list[str]:
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_stopped_trial_is_called_so_and_frees_what_its_workers_held(tmp_path: Path) -> None:
    write_street_scenes(tmp_path / "scenes", train=12, val=4, photos=0, size=(96, 128))
    ingest(IngestConfig(str(tmp_path / "scenes" / "labelled"), str(tmp_path / "dataset")))
    # An untrained model finds one class or two; most of these learning rates leave it so.
    base = {**TRAIN, "iterations": 12, "evaluate_every": 6, "checkpoint_every": 12}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(base))
    config = SweepConfig(
        dataset=str(tmp_path / "dataset"),
        run=str(tmp_path / "sweep"),
        base=str(tmp_path / "train.yaml"),
        space={"optimizer.lr": {"loguniform": [1e-12, 1e-3]}},
        trials=3,
        searcher="random",
        grace_iterations=6,
    )
    record = sweep(config)
    assert record.counts == {"trials": 3, "failed": 0}
    trials = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert (trials[0]["state"], trials[0]["iterations"]) == ("finished", 12)
    stopped = [trial for trial in trials if trial["state"] == "stopped"]
    assert stopped
    assert {trial["iterations"] for trial in stopped} == {6}

    time.sleep(20)  # a controller that outlived its trial would start its workers anew by then
    assert _held_groups() == []
