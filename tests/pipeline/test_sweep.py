"""A sweep on real Ray Tune: what it leaves behind, and what it must not leave."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray.tune.schedulers import TrialScheduler

from pipeline import storage
from pipeline.command_line import WrongCall, load, read_yaml
from pipeline.errors import PipelineError
from pipeline.ingest import IngestConfig, ingest
from pipeline.lease import Held, Lease
from pipeline.run_record import read_record
from pipeline.schedulers import Asha, Pbt
from pipeline.street_scenes import write_street_scenes
from pipeline.sweep import SweepConfig, search_space, sweep
from pipeline.train_config import TrainConfig
from pipeline.warm_start import read_trials
from tests.pipeline.leftovers import await_release
from tests.workflows.conftest import TRAIN

REPOSITORY = Path(__file__).parents[2]
BASE = {**TRAIN, "iterations": 6, "evaluate_every": 2, "checkpoint_every": 2, "resources": {"cpus_per_worker": 0.3}}
LR = {"optimizer.lr": {"loguniform": [1e-5, 1e-2]}}
SWEEP_SCRIPT = """
import pickle, sys
from pipeline.sweep import sweep
sweep(pickle.load(open(sys.argv[1], "rb")))
"""


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


def stop_all_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """At their first validation."""
    monkeypatch.setattr("pipeline.schedulers.Asha", _StopsAllButTheFirst)


@pytest.mark.slow
def test_a_sweep_leaves_its_trials_its_best_and_nothing_that_runs(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ASHA with Optuna; a stopped trial is called so."""
    stop_all_but_the_first(monkeypatch)
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
    assert not list((tmp_path / "sweep").rglob("state.pt")), "checkpoints of trials that have ended"
    assert (tmp_path / "sweep" / "trials" / trials[0].trial_id / "model" / "config.json").exists()
    best = load(TrainConfig, read_yaml(f"{config.run}/best.yaml"), {"run": "elsewhere"})
    assert best.optimizer.lr == pytest.approx(trials[record.results["best_trial"]].parameters["optimizer.lr"])
    assert "<h2>Pareto front</h2>" in (tmp_path / "sweep" / "report.html").read_text()
    await_release()
    assert sweep(config).run_id == record.run_id, "a finished sweep is not run again"


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(scenes: str, tmp_path: Path) -> None:
    """One raises, the weights of one become NaN, one has too little memory: trial 0 is none of them."""
    space = {
        "optimizer.lr": {"choice": [1e-3, 1e30]},
        "model.separation.groups": {"choice": [1, 5]},
        "model.cross_attention.mlp_ratio": {"choice": [4.0, 1e11]},  # more bytes than there are addresses
    }
    points = [
        {"optimizer.lr": 1e30, "model.separation.groups": 1, "model.cross_attention.mlp_ratio": 4.0},
        {"optimizer.lr": 1e-3, "model.separation.groups": 5, "model.cross_attention.mlp_ratio": 4.0},
        {"optimizer.lr": 1e-3, "model.separation.groups": 1, "model.cross_attention.mlp_ratio": 1e11},
    ]
    fixed = {"nonfinite_limit": 1, "iterations": 4, "optimizer.warmup_iterations": 1}
    config = config_of(scenes, tmp_path, space=space, points=points, fixed=fixed, trials=4, scheduler="none")
    record = sweep(config)
    trials = read_trials(config.run)
    assert record.counts == {"trials": 4, "failed": 3}
    assert [trial.state for trial in trials] == ["finished", "failed", "failed", "out_of_memory"]
    for trial, said in zip(trials[1:], ("values that are no numbers", "groups", "memory"), strict=True):
        assert said in str(trial.error)
    assert record.results["best_trial"] == 0


def _second_is_worse(scheduler: Pbt) -> tuple[list[Any], list[Any]]:
    """Once: which trial is better hangs, after a few iterations, on chance; which one is ahead, on the machine."""
    if scheduler._num_perturbations:
        return [], []
    trials = sorted(scheduler._trial_state, key=lambda trial: trial.trial_id)
    scored = [trial for trial in trials if scheduler._trial_state[trial].last_score is not None]
    return ([trial for trial in scored if trial is not trials[0]], trials[:1]) if trials[0] in scored else ([], [])


@pytest.mark.slow
def test_weights_move_between_trials_of_a_population(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 1 learns nothing, takes over what trial 0 has learnt, and goes on from there."""
    monkeypatch.setattr(Pbt, "_quantiles", _second_is_worse)
    fixed = {"iterations": 16, "optimizer.warmup_iterations": 1, "optimizer.clip_grad_norm": 1.0}
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
    assert second.parents == [0], "it has not taken over anything"
    assert first.parents == []
    assert first.parameters == {"optimizer.lr": 1e-3}
    assert second.run.rpartition("/")[2].startswith(f"{second.trial_id}-")
    assert 1e-12 < second.parameters["optimizer.lr"] <= 1e-2
    history = storage.read_json(storage.join(second.run, "history.json"))
    begun = history["starts"][-1]["iteration"]
    assert begun > 0
    theirs = storage.read_json(storage.join(first.run, "history.json"))
    common = [point for point in theirs["validation"] if point["iteration"] <= begun]
    assert history["validation"][: len(common)] == common, "it goes on with the other's own scores"
    assert (first.iterations, second.iterations) == (16, 16)
    assert not list(tmp_path.rglob("state.pt")), "what was kept to be exchanged is deleted"
    await_release()


def _book(run: str) -> list[dict[str, Any]]:
    """The records that a running sweep has written down last."""
    folder = storage.join(run, "tune")
    found = [item.url for item in storage.list_objects(folder) if "callback-states" in item.url]
    return pickle.loads(storage.read_bytes(found[-1]))[0]["records"] if found else []


@pytest.mark.slow
def test_after_a_killed_driver_the_same_sweep_goes_on_and_runs_no_finished_trial_again(
    scenes: str, bucket: str, tmp_path: Path
) -> None:
    config = config_of(scenes, bucket, scheduler="asha", grace_iterations=6)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", SWEEP_SCRIPT, str(tmp_path / "config.pickle")]
    driver = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 400
        while not any(record["state"] == "finished" for record in _book(bucket)):
            assert driver.poll() is None, "the sweep ended before it could be killed"
            assert time.monotonic() < deadline, "no trial was written down as finished"
            time.sleep(0.5)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = _book(bucket)
    assert len(before) < 3 or any(record["state"] != "finished" for record in before), "nothing is left to go on with"
    finished = [record for record in before if record["state"] == "finished"]
    assert read_record(bucket).outcome == "running"  # pyright: ignore[reportOptionalMemberAccess]
    await_release()
    record = sweep(config)
    trials = read_trials(bucket)
    assert record.counts == {"trials": 3, "failed": 0}
    assert [trial.trial_id for trial in trials[: len(before)]] == [record["trial_id"] for record in before]
    for earlier in finished:
        trial = trials[earlier["trial"]]
        assert trial.curve == earlier["curve"]
        history = storage.read_json(storage.join(trial.run, "history.json"))
        assert len(history["starts"]) == 1, "a finished trial is not trained again"
    assert all(trial.state == "finished" for trial in trials)
    await_release()


def test_a_sweep_whose_state_is_damaged_keeps_the_trials_that_it_has(scenes: str, tmp_path: Path) -> None:
    """Ray Tune itself says nothing of it, and begins anew."""
    config = config_of(scenes, tmp_path)
    for name in ("experiment_state-2026.json", "callback-states-2026.pkl", "search_gen_state-2026.json"):
        storage.write_bytes(storage.join(config.run, "tune", name), b"damaged")
    storage.write_bytes(storage.join(config.run, "trials", "a", "history.json"), b"{}")
    before = {found.url for found in storage.list_objects(config.run)}
    with pytest.raises(PipelineError, match="Ray Tune's state of the trials is damaged"):
        sweep(config)
    after = {found.url.removeprefix(f"{config.run}/") for found in storage.list_objects(config.run)}
    assert after - {"run.json", "lease.json"} == {url.removeprefix(f"{config.run}/") for url in before}
    await_release()


def test_of_two_drivers_the_second_leaves_the_trials_alone(scenes: str, tmp_path: Path) -> None:
    config = config_of(scenes, tmp_path)
    with Lease(config.run, "sweep of another driver"), pytest.raises(Held, match="run sweep of another driver"):
        sweep(config)
    assert read_record(config.run) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"warm_start": ["/nowhere"]}, "There is no finished sweep at /nowhere"),
        ({"scheduler": "pbt", "searcher": "random", "trials": 100}, "trains its 100 trials side by side"),
    ],
)
def test_a_sweep_that_is_to_replace_another_is_refused_before_that_is_deleted(
    scenes: str, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    config = config_of(scenes, tmp_path, new=True, **changes)
    names = ("trials.parquet", "tune/experiment_state-1.json", "trials/a/history.json", "retrained.json")
    for name in names:
        storage.write_bytes(storage.join(config.run, name), b"earlier")
    with pytest.raises(PipelineError, match=says):
        sweep(config)
    assert all(storage.exists(storage.join(config.run, name)) for name in names)


def test_a_sweep_that_replaces_another_deletes_what_was_trained_again_too(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(scenes, tmp_path, new=True)
    for name in ("retrained.json", "retrained/seed-0/model/config.json"):
        storage.write_bytes(storage.join(config.run, name), b"earlier")

    def stops(*_: Any) -> None:
        raise PipelineError("far enough")

    monkeypatch.setattr("pipeline.sweep.run_trials", stops)
    with pytest.raises(PipelineError, match="far enough"):
        sweep(config)
    assert not storage.exists(storage.join(config.run, "retrained"))
    assert not storage.exists(storage.join(config.run, "retrained.json"))


@pytest.mark.heavy
@pytest.mark.slow
def test_the_best_is_trained_again_with_the_full_schedule(scenes: str, tmp_path: Path) -> None:
    config = config_of(scenes, tmp_path, trials=1, fixed={"iterations": 2}, scheduler="none", retrain=2)
    record = sweep(config)
    again = storage.read_json(storage.join(config.run, "retrained.json"))
    assert again["seeds"] == [0, 1]
    for seed, miou in zip(again["seeds"], again["mious"], strict=True):
        found = read_record(storage.join(config.run, "retrained", f"seed-{seed}"))
        assert found is not None
        assert (found.config["iterations"], found.config["seed"], found.results["miou"]) == (6, seed, miou)
    assert again["mean"] == pytest.approx(sum(again["mious"]) / 2)
    assert "mIoU over 2 seeds" in (tmp_path / "report.html").read_text()
    assert sweep(config).run_id == record.run_id


@pytest.mark.heavy
@pytest.mark.slow
def test_a_budget_ends_a_sweep_with_what_it_has(scenes: str, tmp_path: Path) -> None:
    config = config_of(scenes, tmp_path, trials=50, scheduler="none", device_hours=1e-3, concurrent_trials=1)
    record = sweep(config)
    trials = read_trials(config.run)
    assert record.counts["trials"] < 10
    assert trials[-1].state == "out_of_budget"
    await_release()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trials": 0}, "trials is 0: give 1 or more"),
        ({"hours": 0.0}, "hours is 0.0: give more than 0"),
        ({"retrain": -1}, "retrain is -1: give 0 or more"),
        ({"objective": "speed"}, "The objective 'speed' is none that can be looked for"),
        ({"objective": ["miou", "loss"]}, "The objective 'loss' is none that can be looked for"),
        (
            {"points": [{"optimizer.lr": 1.0}]},
            "points[0] is no point of the search space: optimizer.lr is 1.0",
        ),
        ({"searcher": "grid"}, "The range of optimizer.lr is an interval"),
        ({"scheduler": "pbt"}, "so that the searcher cannot be optuna: give --searcher random"),
        ({"searcher": "random", "warm_start": ["s3://runs/1"]}, "warm_start is for the searcher optuna"),
        ({"scheduler": "hyperband", "objective": ["miou", "gflops"]}, "hyperband compares trials by one objective"),
        ({"space": {"iterations": {"choice": [80_000, 40_000]}}}, "iterations is searched, but the scheduler asha"),
        ({"space": {"evaluate_every": {"choice": [4000, 2000]}}}, "evaluate_every is searched, but the scheduler asha"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(changes: dict[str, Any], says: str) -> None:
    config = SweepConfig(**{"dataset": "d", "run": "r", "space": LR, **changes})
    with pytest.raises(WrongCall) as refusal:
        search_space(config)
    assert says in str(refusal.value)
