"""Hyperparameter search with Ray Tune: each trial is a full Ray Train run, the best becomes `best.yaml`."""

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import yaml

from pipeline import dataset, storage
from pipeline.cluster import connected
from pipeline.errors import PipelineError
from pipeline.lease import Lease
from pipeline.parquet_files import write_table
from pipeline.progress import announce
from pipeline.retraining import RETRAINED_FILE, RETRAINED_FOLDER, Retrained, retrained
from pipeline.run_record import RunRecord, finished_record, record_run, refuse_other_work
from pipeline.schedulers import POPULATIONS
from pipeline.search_space import SearchSpace
from pipeline.sweep_config import SweepConfig as SweepConfig
from pipeline.sweep_config import search_space as search_space
from pipeline.sweep_report import REPORT_FILE, write_sweep_report
from pipeline.train_config import TrainConfig, completed
from pipeline.train_parts import require_buildable
from pipeline.train_resources import require_resources
from pipeline.trial_book import FAILED, TRIALS_SCHEMA, TrialRecord, plain
from pipeline.tuning import (
    DRIVER_CPUS,
    TRIALS_FOLDER,
    TUNE_FOLDER,
    delete_unneeded,
    has_begun,
    require_places,
    run_trials,
)
from pipeline.warm_start import TRIALS_FILE, earlier_trials, read_trials

BEST_FILE = "best.yaml"
GIVEN = ("run", "new")  # fields of a training that `best.yaml` leaves to the command line


def sweep(config: SweepConfig) -> RunRecord:
    """Run the trials; leave `trials.parquet`, `report.html` and `best.yaml`, which `workflows/train.py --config` takes.

    Raises:
        Held: if another process is at this sweep.
        PipelineError: if the search space, the dataset or the cluster cannot serve, or every trial fails.
    """
    config = dataclasses.replace(config, dataset=storage.absolute(config.dataset), run=storage.absolute(config.run))
    space = search_space(config)
    data = dataset.open(config.dataset)
    default = completed(space.config(config.dataset, config.run, {}), data)
    require_buildable(default, data.classes)
    inputs = {"dataset": data.info.fingerprint, "base": json.dumps(space.base, sort_keys=True)}
    record = None
    if not config.new:
        record = finished_record(config.run, "sweep", config, inputs)
        if record is None:
            refuse_other_work(config.run, "sweep", config, inputs, resumes=True)
        else:
            announce(f"already swept: {config.run} ({_best_text(record.results)})")
            if not config.retrain:
                return record
    with Lease(config.run, f"sweep {uuid.uuid4().hex}"), connected():
        if record is None:
            record = _swept(config, space, default, inputs)
            announce(f"swept {config.run}/{BEST_FILE} ({_best_text(record.results)})")
        if config.retrain:
            again = _retrain(config, space, record)
            announce(f"trained the best of {config.run} again: {again.text}")
    return record


def _swept(config: SweepConfig, space: SearchSpace, default: TrainConfig, inputs: dict[str, str]) -> RunRecord:
    """Run the trials under a record, and write down what they have found."""
    # What can be refused is refused before anything of an earlier sweep is deleted.
    require_resources(default.resources, beside=DRIVER_CPUS)
    require_places(config, default.resources)
    earlier = earlier_trials(config.warm_start, space, config.objectives, inputs["dataset"])
    outputs = [BEST_FILE, TRIALS_FILE, REPORT_FILE, TRIALS_FOLDER, TUNE_FOLDER]
    with record_run(config.run, "sweep", config, inputs, outputs, keep=not config.new) as record:
        if not has_begun(config.run):
            for retraining in (RETRAINED_FOLDER, RETRAINED_FILE):  # of the sweep that this one replaces
                storage.delete(storage.join(config.run, retraining))
        trials = run_trials(config, space, default, earlier)
        delete_unneeded(config, trials)
        front = config.objectives.front([trial.metrics for trial in trials])
        rows = [trial.row(position in front) for position, trial in enumerate(trials)]
        write_table(storage.join(config.run, TRIALS_FILE), pa.Table.from_pylist(rows, schema=TRIALS_SCHEMA))
        write_sweep_report(config.run, space, config.objectives, trials)
        record.counts = {"trials": len(trials), "failed": sum(trial.state in FAILED for trial in trials)}
        record.results = write_best(config, space, trials)
    return record


def write_best(config: SweepConfig, space: SearchSpace, trials: list[TrialRecord]) -> dict[str, Any]:
    objectives = config.objectives
    position = objectives.best([trial.metrics for trial in trials])
    if position is None:
        reason = next((trial.error for trial in trials if trial.error), "no trial has reported a score")
        raise PipelineError(
            f"None of the {len(trials)} trials of {config.run} has ended with a score: {reason.rstrip('.')}. "
            "Mend that, and run it again with --new true."
        )
    best = trials[position]
    document = dataclasses.asdict(space.config(config.dataset, config.run, best.parameters))
    for name in GIVEN:
        del document[name]
    text = best_head(config, trials, best) + yaml.safe_dump(document, sort_keys=False)
    storage.write_bytes(storage.join(config.run, BEST_FILE), text.encode())
    first = objectives.first
    return {
        "best_trial": best.trial,
        "objective": list(objectives.names),
        **{name: best.metrics[name] for name in dict.fromkeys([*objectives.names, "miou"]) if name in best.metrics},
        f"default_{first}": trials[0].metrics.get(first),
        "parameters": plain(best.parameters),
        "device_seconds": round(sum(trial.device_seconds for trial in trials), 1),
        "saved_device_seconds": round(sum(trial.saved for trial in trials), 1),
    }


def best_head(config: SweepConfig, trials: list[TrialRecord], best: TrialRecord) -> str:
    """The comment above the best configuration: how it was found."""
    scores = ", ".join(f"{name} {best.metrics[name]:.4f}" for name in config.objectives.names)
    text = f"# The best of {len(trials)} trials: {scores} after {best.iterations} iterations.\n"
    if config.scheduler in POPULATIONS:
        parents = ", ".join(str(number) for number in best.parents)
        whose = f", and it took over the weights of trials {parents}" if parents else ""
        text += f"# It is no single configuration: {config.scheduler} changed the searched fields on the way{whose}.\n"
        text += (
            "# What stands here is how it ended; a training with these values from its start may score differently.\n"
        )
    return text


def _retrain(config: SweepConfig, space: SearchSpace, record: RunRecord) -> Retrained:
    """Train the best configuration again, and put that into the report."""
    parameters = record.results["parameters"]
    again = retrained(config.run, space.full(config.dataset, config.run, parameters), config.retrain)
    trials = read_trials(config.run)
    write_sweep_report(config.run, space, config.objectives, trials, again)
    return again


def _best_text(results: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{name} {results[name]:.4g}" for name in results["objective"])
    return f"trial {results['best_trial']} is best, {scores}"
