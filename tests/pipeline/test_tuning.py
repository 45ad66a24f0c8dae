"""The trials of a sweep around Ray Tune: what it goes on with, what it deletes, and how many run at a time."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import storage, tuning
from pipeline.errors import PipelineError
from pipeline.storage_errors import StorageOutage
from pipeline.sweep_config import SweepConfig
from pipeline.train_resources import FEEDING_CPUS, ResourcesConfig
from pipeline.trial_book import NotRestored, TrialRecord

LR = {"optimizer.lr": {"loguniform": [1e-5, 1e-2]}}
STATE = ("experiment_state-1.json", "callback-states-1.pkl", "search_gen_state-1.json")


def write_state(run: str, names: tuple[str, ...] = STATE) -> None:
    for name in names:
        storage.write_bytes(storage.join(run, "tune", name), b"damaged")


def test_a_sweep_has_begun_once_its_first_state_is_there_whole(bucket: str) -> None:
    assert not tuning.has_begun(bucket)
    for count in (1, 2):
        write_state(f"{bucket}/{count}", STATE[:count])
        assert not tuning.has_begun(f"{bucket}/{count}")
    write_state(f"{bucket}/whole")
    assert tuning.has_begun(f"{bucket}/whole")
    write_state(f"{bucket}/population", (*STATE[:2], "basic-variant-state-1.json"))
    assert tuning.has_begun(f"{bucket}/population")
    write_state(f"{bucket}/trials", ("trial_1/experiment_state", "trial_1/callback-states", "trial_1/search_gen_state"))
    assert not tuning.has_begun(f"{bucket}/trials")


def test_a_state_that_cannot_be_restored_is_waited_for_and_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config: Any = SweepConfig("d", str(tmp_path), space=LR)
    write_state(config.run)
    tried, read, outages = [], storage.read_bytes, [StorageOutage("the store is overloaded")]

    def fails_once(*given: Any) -> list[Any]:
        tried.append(given[-1])
        if len(tried) == 1:
            raise NotRestored("damaged")
        return []

    def read_bytes(url: str) -> bytes:
        if outages:
            raise outages.pop()
        return read(url)

    monkeypatch.setattr(tuning, "_tried", fails_once)
    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    assert tuning.run_trials(config, None, None) == []  # pyright: ignore[reportArgumentType]
    assert tried == [True, True]
    assert not outages


def test_of_two_failures_to_restore_the_second_is_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any) -> list[Any]:
        raise NotRestored("damaged")

    monkeypatch.setattr(tuning, "_tried", fails)
    with pytest.raises(PipelineError, match="damaged"):
        tuning.run_trials(SweepConfig("d", str(tmp_path), space=LR), None, None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("states", "limits", "missing"),
    [
        (["finished", "stopped", "failed"], {}, 0),
        (["finished", "out_of_budget"], {"hours": 1.0}, 0),
        (["finished", "out_of_memory"], {"device_hours": 1.0}, 0),
        (["finished", "stopped"], {}, 1),
        (["finished", "waiting"], {}, 2),
        (["finished", "paused", "stopped"], {"hours": 1.0}, 1),
    ],
)
def test_a_sweep_is_over_when_its_trials_are_as_many_as_its_budget_allows(
    states: list[str], limits: dict[str, float], missing: int
) -> None:
    config: Any = SweepConfig("d", "r", space=LR, trials=3, **limits)  # pyright: ignore[reportArgumentType]
    trials = [TrialRecord(number, str(number), {}, 9, 1.0, state) for number, state in enumerate(states)]
    if missing:
        with pytest.raises(PipelineError, match=f"{missing} of 3 trials of r have not ended: run it again"):
            tuning.require_ended(config, trials, 3)
    else:
        tuning.require_ended(config, trials, 3)


def test_as_many_trials_run_as_the_cluster_now_holds_or_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, float] = {}
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    config, fixed = SweepConfig("d", "r", space=LR), SweepConfig("d", "r", space=LR, concurrent_trials=3)
    on_gpus = ResourcesConfig(workers=2, use_gpu=True, gpus_per_worker=0.5)
    found = []
    for cpus, gpus in ((0, 0), (64, 0), (64, 3)):
        there.update(CPU=cpus, GPU=gpus)
        found.append([tuning.places_now(one, on_gpus) for one in (config, fixed)])
    assert found == [[1, 3], [1, 3], [3, 3]]
    there.update(CPU=9.0)
    assert tuning.places_now(config, ResourcesConfig(cpus_per_worker=0.5)) == 9 // (0.5 + FEEDING_CPUS + 0.1)


def test_of_trials_that_have_ended_the_models_stay_and_the_checkpoints_go(bucket: str) -> None:
    """And all that belongs to no trial, as of before a restart, or that a population has left behind."""
    names = ("a", "b-1", "b-2", "c")
    for name in names:
        for file in ("model/config.json", "checkpoints/c1/state.pt"):
            storage.write_bytes(storage.join(bucket, "trials", name, file), b"x")
    trials = [TrialRecord(0, "a", {}, 9, 1.0, "finished", run=f"{bucket}/trials/a")]
    trials += [TrialRecord(1, "b", {}, 9, 1.0, "finished", run=f"{bucket}/trials/b-2")]
    tuning.delete_unneeded(SweepConfig("d", bucket, space=LR), trials)
    left = [found.url.removeprefix(f"{bucket}/trials/") for found in storage.list_objects(bucket)]
    assert left == ["a/model/config.json", "b-2/model/config.json"]
