"""What a sweep learns from earlier ones, and what would mislead it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import PipelineError
from pipeline.objectives import Objectives
from pipeline.run_record import record_run
from pipeline.search_space import SearchSpace
from pipeline.sweep_config import SweepConfig
from pipeline.trial_book import TRIALS_SCHEMA, TrialRecord
from pipeline.warm_start import TRIALS_FILE, earlier_trials

MIOU = Objectives(("miou",))
LR, DECAY, SCALE = "optimizer.lr", "optimizer.weight_decay", "augmentation.scale"
RANGES: dict[str, Any] = {LR: {"loguniform": [1e-6, 1e-3]}, SCALE: {"choice": [[0.5, 2.0], [0.75, 1.5]]}}


def trial(number: int, state: str = "finished", miou: float = 0.4, **parameters: Any) -> TrialRecord:
    curve = [{"iteration": 100, "miou": miou}]
    return TrialRecord(number, f"id{number}", parameters, 100, 1.0, state, curve, 10.0)


def write_sweep(
    folder: Path, ranges: dict[str, Any], trials: list[TrialRecord], base: Any = None, fixed: Any = None
) -> str:
    """As a sweep leaves it that has searched `ranges`."""
    config = SweepConfig("s3://b/d", str(folder), space=ranges, fixed=fixed or {})
    with record_run(str(folder), "sweep", config, {"dataset": "same", "base": json.dumps(base or {})}, []):
        rows = [one.row(on_front=False) for one in trials]
        pq.write_table(pa.Table.from_pylist(rows, schema=TRIALS_SCHEMA), folder / TRIALS_FILE)
    return str(folder)


def learnt(run: str, ranges: dict[str, Any], fingerprint: str = "same", **base: Any) -> list[tuple[Any, Any]]:
    found = earlier_trials([run], SearchSpace(base, {}, ranges), MIOU, fingerprint)
    return [(dict(one.point), list(one.values)) for one in found]


def test_trials_that_ran_to_their_end_within_the_space_are_learnt_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[dict[str, Any]] = [{LR: 1e-4, SCALE: [0.5, 2.0]}, {LR: 2e-4, SCALE: [0.75, 1.5]}]
    taken_over = trial(5, **given[0])
    taken_over.parents = [0]
    trials = [trial(0, **given[0]), trial(1, "failed", **given[0]), trial(2, "stopped", **given[0])]
    trials += [trial(3, **given[1], miou=0.3), trial(4, **{LR: 9e-4, SCALE: [0.5, 2.0]}), taken_over]
    run = write_sweep(tmp_path, RANGES, trials)
    narrower = {**RANGES, LR: {"loguniform": [1e-6, 5e-4]}}
    assert [values for _, values in learnt(run, narrower)] == [[0.4], [0.3]]
    assert [point[LR] for point, _ in learnt(run, narrower)] == [1e-4, 2e-4]
    said = capsys.readouterr().out
    assert "warm start: 2 of 6 trials" in said
    assert "without 3 that did not run to their end with a score and by themselves" in said
    assert "and 1 of other trainings (optimizer.lr is 0.0009, outside its range)" in said


def test_a_sweep_over_other_fields_is_learnt_from_where_the_others_are_as_they_are_here(tmp_path: Path) -> None:
    earlier = {LR: RANGES[LR], DECAY: {"choice": [0.05, 0.1]}}
    given: list[dict[str, Any]] = [{LR: 1e-4, DECAY: 0.05}, {LR: 2e-4, DECAY: 0.1}]
    run = write_sweep(tmp_path, earlier, [trial(number, **point) for number, point in enumerate(given)])
    assert learnt(run, RANGES) == [({LR: 1e-4, SCALE: (0.5, 2.0)}, [0.4])], "what it lacks is what it was trained with"
    assert learnt(run, RANGES, optimizer={"weight_decay": 0.1}) == [({LR: 2e-4, SCALE: (0.5, 2.0)}, [0.4])]
    assert learnt(run, {LR: RANGES[LR]}, optimizer={"weight_decay": 0.2}) == []


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"iterations": 200}, "2 of other trainings (iterations was 100, and is 200 here)"),
        ({"iterations": 100, "batch_size": 8}, "2 of other trainings (batch_size was 16, and is 8 here)"),
        ({"iterations": 100, "evaluate_every": 10}, None),
    ],
)
def test_trials_of_another_length_or_batch_are_left_out_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], now: dict[str, Any], says: str | None
) -> None:
    trials = [trial(number, **{LR: 1e-4 + number, SCALE: [0.5, 2.0]}) for number in (0, 0)]
    run = write_sweep(tmp_path, RANGES, trials, fixed={"iterations": 100})
    assert len(learnt(run, RANGES, **now)) == (0 if says else 2)
    assert (says or "warm start: 2 of 2 trials") in capsys.readouterr().out


def test_trials_on_another_dataset_are_left_out_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_sweep(tmp_path, RANGES, [trial(0, **{LR: 1e-4, SCALE: [0.5, 2.0]})])
    assert learnt(run, RANGES, fingerprint="other") == []
    assert "none of 1 trials" in capsys.readouterr().out


def test_a_place_without_a_finished_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="There is no finished sweep at"):
        learnt(str(tmp_path / "none"), RANGES)
