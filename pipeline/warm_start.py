"""What earlier sweeps have found out, for a searcher to begin with: their `trials.parquet`."""

from collections.abc import Sequence

import pyarrow.parquet as pq
import yaml

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.objectives import METRICS, Objectives
from pipeline.progress import announce
from pipeline.search_space import SearchSpace
from pipeline.searchers import Evaluated
from pipeline.trial_book import TRIALS_SCHEMA, TrialRecord

TRIALS_FILE = "trials.parquet"


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


def earlier_trials(runs: Sequence[str], space: SearchSpace, objectives: Objectives) -> list[Evaluated]:
    """The trials of earlier sweeps that ran to their end, have these objectives and lie in this space.

    Trials that were stopped are left out: their scores are those of a part of a training.

    Raises:
        PipelineError: what `read_trials` raises.
    """
    found = []
    for run in runs:
        trials = read_trials(run)
        fitting = [
            Evaluated(trial.parameters, values)
            for trial in trials
            if trial.state == "finished"
            and (values := objectives.values(trial.metrics)) is not None
            and space.lacks(trial.parameters) is None
        ]
        announce(f"  warm start: {len(fitting)} of {len(trials)} trials of {run} ran to their end within this space")
        found += fitting
    return found
