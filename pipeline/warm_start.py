"""What earlier sweeps have found out, for a searcher to begin with: their `trials.parquet`."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
import yaml

from pipeline import storage
from pipeline.command_line import WrongCall
from pipeline.errors import PipelineError
from pipeline.objectives import METRICS, Objectives
from pipeline.progress import announce
from pipeline.run_record import FILE_NAME, RunRecord, flat, identity, read_record
from pipeline.search_space import SearchSpace
from pipeline.searchers import Evaluated
from pipeline.train_config import TrainConfig
from pipeline.trial_book import TRIALS_SCHEMA, TrialRecord

TRIALS_FILE = "trials.parquet"
_NOT_THE_SCORE = ("evaluate_every", "checkpoint_every")  # of a training that nobody stops


def read_trials(run: str) -> list[TrialRecord]:
    """The trials of a finished sweep.

    Raises:
        PipelineError: if there are none below that URL, or they are those of another version.
    """
    place = storage.join(run, TRIALS_FILE)
    if not storage.exists(place):
        raise PipelineError(f"There is no finished sweep at {run}: it has no {TRIALS_FILE}.")
    filesystem, path = storage.arrow_filesystem(place)
    with storage.explained(place):
        table = pq.read_table(path, filesystem=filesystem)
    missing = [name for name in TRIALS_SCHEMA.names if name not in table.column_names]
    if missing:
        raise PipelineError(f"{place} lacks the column {missing[0]}: it was made by another version.")
    names = ("iteration", *METRICS)
    return [
        TrialRecord(
            trial=row["trial"],
            trial_id=row["trial_id"],
            parameters=yaml.safe_load(row["parameters"]),
            planned_iterations=row["planned_iterations"],
            devices=row["device_seconds"] / row["seconds"] if row["seconds"] else 0.0,
            state=row["state"],
            curve=[{name: point[name] for name in names if point[name] is not None} for point in row["curve"]],
            seconds=row["seconds"],
            started=row["started"],
            error=row["error"],
            parents=row["parents"],
            run=row["run"],
        )
        for row in table.to_pylist()
    ]


def earlier_trials(
    runs: Sequence[str], space: SearchSpace, objectives: Objectives, fingerprint: str
) -> list[Evaluated]:
    """The trials of earlier sweeps that this one could have tried itself, and that ran to their end.

    What a trial was trained with is known whole, so that an earlier sweep may have searched other fields: what this one
    does not search has to be as it is here. Scores of a part of a training, of another length or of another dataset
    would mislead the searcher; how many are left out for what is announced.

    Args:
        runs: URLs of the earlier sweeps.
        space, objectives: of this sweep.
        fingerprint: of its dataset.

    Raises:
        PipelineError: what `read_trials` raises, or if the sweep has no record that can be understood.
    """
    found = []
    for run in runs:
        trials, record = read_trials(run), _record(run)
        if record.inputs["dataset"] != fingerprint:
            announce(f"  warm start: none of {len(trials)} trials of {run}, for they were trained on another dataset")
            continue
        ended = [trial for trial in trials if trial.state == "finished" and not trial.parents]
        ended = [trial for trial in ended if objectives.values(trial.metrics) is not None]
        fitting, first = [], ""
        theirs = _space(run, record)
        for trial in ended:
            config = theirs.config("unused", "unused", trial.parameters)
            point, differs = _fitted(space, config)
            if differs:
                first = first or differs
            else:
                fitting.append(Evaluated(point, objectives.values(trial.metrics) or []))
        said = f"  warm start: {len(fitting)} of {len(trials)} trials of {run}"
        left = [f"{len(trials) - len(ended)} that did not run to their end with a score and by themselves"]
        left += [f"{len(ended) - len(fitting)} of other trainings ({first})"] if first else []
        announce(said if len(fitting) == len(trials) else f"{said}, without {' and '.join(left)}")
        found += fitting
    return found


def _record(run: str) -> RunRecord:
    record = read_record(run)
    if record is None or record.workflow != "sweep":
        raise PipelineError(f"There is no finished sweep at {run}: it has no {FILE_NAME} of one.")
    return record


def _space(run: str, record: RunRecord) -> SearchSpace:
    """What an earlier sweep has searched."""
    try:
        return SearchSpace(json.loads(record.inputs["base"]), record.config["fixed"], record.config["space"])
    except WrongCall as error:
        raise PipelineError(
            f"The sweep at {run} was made by another version, and cannot be learnt from ({error})."
        ) from error


def _fitted(space: SearchSpace, config: TrainConfig) -> tuple[dict[str, Any], str | None]:
    """The point of a space that stands for an earlier training, and why it is not the same training, if it is not."""
    try:
        point = space.point_of(config)
    except WrongCall as error:
        return {}, str(error)
    lacks = space.lacks(point)
    if lacks:
        return point, lacks
    then, now = (flat(identity(one)) for one in (config, space.config("unused", "unused", point)))
    for name in sorted(then.keys() | now.keys()):
        if name not in _NOT_THE_SCORE and then.get(name) != now.get(name):
            return point, f"{name} was {then.get(name)}, and is {now.get(name)} here"
    return point, None
