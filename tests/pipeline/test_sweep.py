"""A sweep on real Ray Tune: what it leaves behind, and what it must not leave."""

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from ray.tune.schedulers import TrialScheduler
from ray.util import placement_group_table
from ray.util.state import list_actors

from pipeline import storage
from pipeline.command_line import load, read_yaml
from pipeline.ingest import IngestConfig, ingest
from pipeline.schedulers import Asha
from pipeline.street_scenes import write_street_scenes
from pipeline.sweep import SweepConfig, sweep
from pipeline.training import TrainConfig
from pipeline.warm_start import read_trials
from tests.workflows.conftest import TRAIN

REPOSITORY = Path(__file__).parents[2]
BASE = {**TRAIN, "iterations": 6, "evaluate_every": 2, "checkpoint_every": 2, "resources": {"cpus_per_worker": 0.4}}
LR = {"optimizer.lr": {"loguniform": [1e-5, 1e-2]}}
SWEEP_SCRIPT = """
import pickle, sys
from pipeline.sweep import sweep
sweep(pickle.load(open(sys.argv[1], "rb")))
"""


def _held_groups() -> list[str]:
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


def _living_actors() -> int:
    return len(list_actors(filters=[("state", "=", "ALIVE")], limit=1000))


def _await_release() -> None:
    """Placement groups and processes go some time after the trial that they belonged to."""
    deadline = time.monotonic() + 60
    while _held_groups() or _living_actors():
        assert time.monotonic() < deadline, (_held_groups(), list_actors(filters=[("state", "=", "ALIVE")]))
        time.sleep(1)


@pytest.fixture(scope="module")
def scenes(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: ARG001
    """12 + 4 street scenes, and beside them `train.yaml`."""
    folder = tmp_path_factory.mktemp("scenes")
    write_street_scenes(folder, train=12, val=4, photos=0, size=(96, 128))
    ingest(IngestConfig(str(folder / "labelled"), str(folder / "dataset")))
    (folder / "train.yaml").write_text(yaml.safe_dump(BASE))
    return str(folder / "dataset")


def config_of(scenes: str, run: Path | str, **changes: Any) -> SweepConfig:
    base = str(Path(scenes).parent / "train.yaml")
    options: dict[str, Any] = {"space": LR, "trials": 3, "grace_iterations": 2, **changes}
    return SweepConfig(dataset=scenes, run=str(run), base=base, **options)


class _StopsAllButTheFirst(Asha):
    """Which trials a real scheduler stops hangs on scores, and those of a few iterations on the machine."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        said = super().on_trial_result(tune_controller, trial, result)
        return said if trial is tune_controller.get_trials()[0] else TrialScheduler.STOP


@pytest.mark.slow
def test_a_sweep_leaves_its_trials_its_best_and_nothing_that_runs(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ASHA with Optuna; a stopped trial is called so."""
    monkeypatch.setattr("pipeline.schedulers.Asha", _StopsAllButTheFirst)
    switch = "model.separation.enabled"
    space = {**LR, switch: {"choice": [True, False]}}
    space["model.separation.kernel_size"] = {"choice": [3, 5], "when": {switch: [True]}}
    point = {"optimizer.lr": 1e-4, switch: False}
    config = config_of(scenes, tmp_path / "sweep", space=space, points=[point], objective=["miou", "gflops"])
    record = sweep(config)
    assert record.counts == {"trials": 3, "failed": 0}
    trials = read_trials(config.run)
    assert [(trial.state, trial.iterations) for trial in trials] == [("finished", 6), *[("stopped", 2)] * 2]
    assert trials[0].parameters == {"optimizer.lr": 1e-3, switch: True, "model.separation.kernel_size": 3}
    assert trials[1].parameters == point
    assert [one["iteration"] for one in trials[0].curve] == [2, 4, 6]
    assert 0 < trials[1].metrics["gflops"] < trials[0].metrics["gflops"]
    assert all(trial.device_seconds > 0 and trial.metrics["images_per_second"] > 0 for trial in trials)
    table = pq.read_table(tmp_path / "sweep" / "trials.parquet")
    assert any(table["on_front"].to_pylist())
    best = load(TrainConfig, read_yaml(f"{config.run}/best.yaml"), {"run": "elsewhere"})
    assert best.optimizer.lr == pytest.approx(trials[record.results["best_trial"]].parameters["optimizer.lr"])
    assert "<h2>Pareto front</h2>" in (tmp_path / "sweep" / "report.html").read_text()
    _await_release()
    assert sweep(config).run_id == record.run_id, "a finished sweep is not run again"


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(scenes: str, tmp_path: Path) -> None:
    """One raises, one has no finite gradient, one has too little memory: trial 0 is none of them."""
    space = {
        "optimizer.lr": {"choice": [1e-3, 1e30]},
        "model.separation.groups": {"choice": [1, 5]},
        "model.decoder_width": {"choice": [None, 10_000_000]},
    }
    points = [
        {"optimizer.lr": 1e30, "model.separation.groups": 1, "model.decoder_width": None},
        {"optimizer.lr": 1e-3, "model.separation.groups": 5, "model.decoder_width": None},
        {"optimizer.lr": 1e-3, "model.separation.groups": 1, "model.decoder_width": 10_000_000},
    ]
    fixed = {"nonfinite_limit": 1, "iterations": 4}
    config = config_of(scenes, tmp_path, space=space, points=points, fixed=fixed, trials=4, scheduler="none")
    record = sweep(config)
    trials = read_trials(config.run)
    assert record.counts == {"trials": 4, "failed": 3}
    assert [trial.state for trial in trials] == ["finished", "failed", "failed", "out_of_memory"]
    for trial, said in zip(trials[1:], ("gradient that is not finite", "groups", "memory"), strict=True):
        assert said in str(trial.error)
    assert record.results["best_trial"] == 0


@pytest.mark.slow
def test_weights_move_between_trials_of_a_population(scenes: str, tmp_path: Path) -> None:
    """Trial 1 learns nothing, so that it takes over what trial 0 has learnt, and goes on from there."""
    fixed = {"iterations": 8, "optimizer.warmup_iterations": 1, "optimizer.clip_grad_norm": 1.0}
    config = config_of(
        scenes,
        tmp_path,
        space={"optimizer.lr": {"loguniform": [1e-12, 1e-2]}},
        points=[{"optimizer.lr": 1e-12}],
        fixed=fixed,
        trials=2,
        searcher="random",
        scheduler="pbt",
    )
    sweep(config)
    first, second = read_trials(config.run)
    assert second.parents or first.parents, "nobody has taken over anything"
    taker, giver = (second, first) if second.parents else (first, second)
    assert taker.run.rpartition("/")[2].startswith(f"{taker.trial_id}-")
    history = storage.read_json(storage.join(taker.run, "history.json"))
    begun = history["starts"][-1]["iteration"]
    assert begun > 0
    theirs = storage.read_json(storage.join(giver.run, "history.json"))
    common = [point for point in theirs["validation"] if point["iteration"] <= begun]
    assert history["validation"][: len(common)] == common, "it goes on with the other's own history"
    assert taker.iterations == 8
    _await_release()
