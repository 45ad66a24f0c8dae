"""What a trial makes of its failures, where it trains, and what the sweep's book keeps of it."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.exceptions
import torch
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.tune.experiment import Trial

from pipeline import storage
from pipeline.budget import Budget
from pipeline.errors import PipelineError
from pipeline.objectives import Objectives
from pipeline.progress import Progress
from pipeline.schedulers import make_scheduler
from pipeline.search_space import SearchSpace
from pipeline.searchers import FAILURE, PLANNED
from pipeline.storage_errors import StorageError, StorageOutage
from pipeline.train_config import TrainConfig
from pipeline.train_parts import gflops
from pipeline.trial import ERROR, PARENT, RUN, Pointer, TrialJob, _place, _validations, failure_of
from pipeline.trial_book import TRIALS_SCHEMA, NotRestored, TrialBook, TrialRecord
from pipeline.trial_table import sweep_line, trial_line, trial_table
from pipeline.warm_start import TRIALS_FILE, read_trials
from rssnet import CrossAttentionConfig, RSSNetConfig

SPACE = SearchSpace({}, {}, {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}})
MIOU = Objectives(("miou",))
LOST = "The actor died unexpectedly. (1) The process is killed by SIGKILL by OOM killer due to high memory usage."


def group_error(failure: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", {0: failure})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "out_of_memory"),
        (group_error(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")), "out_of_memory"),
        (group_error(MemoryError()), "out_of_memory"),
        (group_error(ray.exceptions.OutOfMemoryError("the node was running low on memory")), "out_of_memory"),
        (group_error(PipelineError("10 steps in a row had no finite gradient")), "failed"),
        (PipelineError("The configuration cannot be used: groups"), "failed"),
        (StorageError("s3://x cannot be written"), "failed"),
        (group_error(KeyError("no such thing")), "failed"),
        (group_error(ray.exceptions.RayActorError(error_msg=LOST)), None),
        (group_error(StorageOutage("s3://x is out of reach")), None),
        (RuntimeError("the controller is gone"), None),
    ],
)  # fmt: skip
def test_what_trying_again_cannot_mend_is_told_from_what_it_can(error: Exception, kind: str | None) -> None:
    assert failure_of(error) == kind


def test_a_trial_trains_in_a_place_of_its_own_for_each_set_of_weights() -> None:
    own, theirs = Pointer("s3://b/t/a-1", "s3://b/t/a-1/c", "a"), Pointer("s3://b/t/b", "s3://b/t/b/c", "b")
    assert _place("s3://b/t/a", "a", None, {"lr": 1}) == ("s3://b/t/a", None)
    assert _place("s3://b/t/a", "a", own, {"lr": 1}) == ("s3://b/t/a-1", None)
    place, start = _place("s3://b/t/a", "a", theirs, {"lr": 1})
    assert start == "s3://b/t/b/c"
    assert place.startswith("s3://b/t/a-")
    assert _place("s3://b/t/a", "a", theirs, {"lr": 1})[0] == place, "a lost trial goes on where it was"
    assert _place("s3://b/t/a", "a", theirs, {"lr": 2})[0] != place


def test_neither_a_trials_process_nor_a_trainings_controller_loads_timm() -> None:
    """For seconds of each trial, and of the cores that other trials train on."""
    code = """
import sys
from pipeline.trial import SearchSpace, fit
SearchSpace({}, {}, {"optimizer.lr": {"uniform": [0, 1]}}).config("dataset", "run", {"optimizer.lr": 0.1})
print("timm" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_work_of_a_model_is_counted() -> None:
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    model = RSSNetConfig("vit_tiny_patch16_224", num_classes=4, image_size=64, backbone_options=options)
    counts = [gflops(TrainConfig("d", "r", model=model))]
    model = RSSNetConfig("vit_tiny_patch16_224", num_classes=4, image_size=128, backbone_options=options)
    counts += [gflops(TrainConfig("d", "r", model=model))]
    off = CrossAttentionConfig(enabled=False)
    counts += [gflops(TrainConfig("d", "r", model=RSSNetConfig(**{**vars(model), "cross_attention": off})))]
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.1), "four times the tokens, and attention is a small part"
    assert 0 < counts[2] < counts[1]


class RayTrial:
    """What the book looks at of one of Ray Tune's trials."""

    def __init__(self, trial_id: str, **config: Any) -> None:
        self.trial_id, self.config, self.status = trial_id, config, Trial.PENDING
        self.error: Exception | None = None
        self.last_result: dict[str, Any] = {}

    def get_pickled_error(self) -> Exception | None:
        return self.error

    def get_error(self) -> Exception | None:
        return self.error


def book(**options: Any) -> TrialBook:
    return TrialBook(100, 2.0, make_scheduler("asha", SPACE, 100, 10, 10, 2), **options)


def said(iteration: int, miou: float, **others: Any) -> dict[str, Any]:
    return {RUN: "s3://run", "iteration": iteration, "miou": miou, PLANNED: 100, "gflops": 1.5, **others}


def test_the_book_follows_a_trial_from_its_start_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pipeline.trial_book.time.monotonic", lambda: now)
    kept, trial, other = book(), RayTrial("a", lr=1), RayTrial("b", lr=2)
    trials: Any = [trial, other]
    kept.on_step_begin(0, trials)
    assert [record.state for record in kept.trials] == ["waiting", "waiting"]
    assert kept.busy() == 2
    trial.status = Trial.RUNNING
    kept.on_step_begin(1, trials)
    for iteration, miou in ((10, 0.2), (20, 0.3), (20, 0.35)):  # a restart says the last one again
        now += 4
        kept.on_trial_result(1, trials, trials[0], said(iteration, miou))
        kept.on_step_begin(2, trials)
    kept.on_trial_complete(3, trials, trials[0])
    trial.status = Trial.TERMINATED
    kept.on_step_begin(4, trials)
    record = kept.trials[0]
    assert (record.state, record.iterations, record.metrics["miou"], record.run) == ("stopped", 20, 0.35, "s3://run")
    assert [point["miou"] for point in record.curve] == [0.2, 0.35]
    assert (record.seconds, record.device_seconds, record.saved) == (12, 24, 96)
    other.status = Trial.TERMINATED
    kept.on_experiment_end(trials)
    assert [record.state for record in kept.trials] == ["stopped", "out_of_budget"]


def test_the_book_keeps_failures_and_whose_weights_were_taken() -> None:
    kept, trials = book(), [RayTrial(name) for name in "abcd"]
    given: Any = trials
    kept.on_step_begin(0, given)
    kept.on_trial_result(1, given, given[0], said(10, math.nan, **{FAILURE: "out_of_memory", ERROR: "no memory"}))
    kept.on_trial_complete(1, given, given[0])
    trials[1].error = PipelineError("mend me")
    kept.on_trial_error(1, given, given[1])
    kept.on_trial_result(1, given, given[2], said(100, 0.4, **{PARENT: "d"}))
    kept.on_trial_complete(1, given, given[2])
    records = kept.trials
    assert [record.state for record in records] == ["out_of_memory", "failed", "finished", "waiting"]
    assert [record.error for record in records[:2]] == ["no memory", "mend me"]
    assert records[2].parents == [3]
    assert MIOU.best([record.metrics for record in records]) == 2


def test_a_driver_that_takes_over_goes_on_with_the_book() -> None:
    before, trial = book(), RayTrial("a", lr=1)
    given: Any = [trial]
    before.on_step_begin(0, given)
    before.scheduler.set_search_properties("miou", "max")
    before.scheduler.on_trial_add(None, given[0])  # pyright: ignore[reportArgumentType]
    result = said(10, 0.2)
    given[0].experiment_tag = "1"
    before.scheduler.on_trial_result(None, given[0], result)  # pyright: ignore[reportArgumentType]
    before.on_trial_result(0, given, given[0], result)
    after = book()
    after.set_state(before.get_state())
    assert after.trials == before.trials
    assert after.get_state()["scheduler"] == before.get_state()["scheduler"] != book().get_state()["scheduler"]


def test_a_trial_is_over_once_that_is_written_down_and_not_before() -> None:
    told: list[str] = []
    kept, trials = book(over=lambda record: told.append(record.trial_id)), [RayTrial(name) for name in "abc"]
    given: Any = trials
    kept.on_step_begin(0, given)
    for trial in given[:2]:
        kept.on_trial_result(1, given, trial, said(10, 0.2))
    kept.on_trial_complete(1, given, given[0])
    kept.get_state()
    kept.on_trial_complete(1, given, given[1])
    assert not told
    kept.on_trial_complete(1, given, given[2])  # it has not reported anything, so there is nothing of it
    kept.get_state()
    assert told == ["a"]
    kept.get_state()
    kept.get_state()
    assert told == ["a", "b"]


@pytest.mark.parametrize("counted", [{"gflops": 3.0}, {}])
@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_had_ended_before_its_driver_was_killed_is_not_trained_again(
    tmp_path: Path, counted: dict[str, float]
) -> None:
    """Nor does it need checkpoints any more."""
    config = TrainConfig("d", str(tmp_path), iterations=100)
    scores = {"iteration": 100, "miou": 0.4}
    history = {"training": [{"loss": 2.0}, {"loss": None}], "validation": [{"iteration": 50, "miou": 0.1}, scores]}
    storage.write_json(storage.join(config.run, "history.json"), history | counted)
    storage.write_json(storage.join(config.run, "model/config.json"), {})
    with Progress("sweep", total=100, unit="iterations") as progress:
        job = TrialJob("d", "r", SPACE, MIOU, pauses=False, exchanges=False, reporter=progress.reporter)
        found = list(_validations(config, job, "a", None))
    assert found == [({**scores, "loss": 2.0, "gflops": counted.get("gflops")}, "")]


def test_a_book_that_is_to_go_on_refuses_to_begin_anew() -> None:
    before, trial = book(), RayTrial("a", lr=1)
    given: Any = [trial]
    before.on_step_begin(0, given)
    for state, trials in ((None, []), (None, given), (before.get_state(), [])):
        after = book(resumes=True)
        if state is not None:
            after.set_state(state)
        with pytest.raises(NotRestored, match="none of them was touched"):
            after.on_step_begin(0, trials)
    restored = book(resumes=True)
    restored.set_state(before.get_state())
    restored.on_step_begin(0, given)
    assert restored.trials == before.trials


def record(number: int, state: str = "finished", miou: float = 0.4, lr: float = 1e-4) -> TrialRecord:
    parameters = {"optimizer.lr": lr}
    curve = [{"iteration": 50, "miou": miou / 2, "loss": 2.0}, {"iteration": 100, "miou": miou, "loss": 1.0}]
    error = None if state == "finished" else "why"
    return TrialRecord(number, f"id{number}", parameters, 100, 2.0, state, curve, 10.0, 5.0, error, [], "s3://run")


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [record(0), record(1, "failed"), record(2, "stopped"), record(3, miou=0.5, lr=1.0)]
    table = pa.Table.from_pylist([one.row(on_front=False) for one in written], schema=TRIALS_SCHEMA)
    pq.write_table(table, tmp_path / TRIALS_FILE)
    assert read_trials(str(tmp_path)) == written
    assert table["miou"].to_pylist() == [0.4, None, 0.4, 0.5]
    with pytest.raises(PipelineError, match="There is no finished sweep at"):
        read_trials(str(tmp_path / "none"))


def test_the_trials_that_matter_are_shown() -> None:
    records = [record(number, miou=number / 100) for number in range(40)]
    records[3].state = "running"
    table = trial_table(records, MIOU)
    shown = list(table.columns[0].cells)
    assert len(shown) == 16
    assert "3" in shown
    assert "39" in shown
    assert "5" not in shown
    assert trial_line(records[7], MIOU) == "trial 7 finished, miou 0.07 at 100 (lr 0.0001)"
    assert trial_line(record(1, "out_of_memory"), MIOU) == "trial 1 out of memory: why (lr 0.0001)"


def test_a_sweep_has_time_left_only_while_trials_are_to_end() -> None:
    def trial(number: int, state: str) -> TrialRecord:
        return TrialRecord(number, str(number), {}, 100, 1, state, [{"iteration": 50, "miou": number / 10}])

    begun = sweep_line([trial(0, "finished"), trial(1, "running")], MIOU, 2, 50, 2.0)
    assert begun == "1 of 2 trials done, 1 running, trial 1 leads with miou 0.1, 2.0 iterations/s, at most 0:00:25 left"
    ended = sweep_line([trial(0, "finished"), trial(1, "stopped")], MIOU, 2, 50, 2.0)
    assert ended == "2 of 2 trials done, 0 running, trial 1 leads with miou 0.1, 2.0 iterations/s"


def test_a_budget_ends_a_sweep_when_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pipeline.budget.time.time", lambda: now)
    wall, devices, none = Budget(0.01, None, 2.0), Budget(None, 0.02, 2.0), Budget(None, None, 2.0)
    assert not any(budget.stop_all() for budget in (wall, devices, none))
    now += 35
    assert not wall.stop_all()
    assert not devices("a", {"time_this_iter_s": 15, "time_total_s": 15})
    devices("b", {"time_this_iter_s": 10, "time_total_s": 10})
    devices("a", {"time_this_iter_s": 10, "time_total_s": 10})  # it has failed, and was started again
    assert not devices.stop_all()
    devices("b", {"time_this_iter_s": 1, "time_total_s": 11})
    now += 1
    assert wall.stop_all()
    assert devices.stop_all()
    assert not none.stop_all()


def test_a_budget_does_not_count_the_time_between_two_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pipeline.budget.time.time", lambda: now)
    budget = Budget(1.0, None, 1.0)
    budget.stop_all()
    now += 24 * 3600
    assert not budget.stop_all()
