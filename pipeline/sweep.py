"""Hyperparameter search with Ray Tune: each trial is a full Ray Train run, the best becomes `best.yaml`."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import yaml
from ray import tune
from ray.tune import ResumeConfig
from ray.tune.search import BasicVariantGenerator

from pipeline import dataset, storage
from pipeline.budget import Budget
from pipeline.checkpoints import CHECKPOINTS_FOLDER
from pipeline.cluster import connected, interruptible
from pipeline.command_line import WrongCall, read_yaml
from pipeline.errors import PipelineError
from pipeline.objectives import Objectives
from pipeline.parquet_files import write_table
from pipeline.progress import announce
from pipeline.retraining import Retrained, retrained
from pipeline.run_record import RunRecord, finished_record, identity, record_run, refuse_other_work
from pipeline.schedulers import SchedulerName, domain, make_scheduler
from pipeline.search_space import SearchSpace
from pipeline.searchers import SearcherName, StudySearcher
from pipeline.sweep_report import REPORT_FILE, write_sweep_report
from pipeline.training import ResourcesConfig, TrainConfig, completed, needed_cpus, require_resources
from pipeline.trial import TrialJob, run_trial
from pipeline.trial_book import FAILED, TRIALS_SCHEMA, TrialBook, TrialRecord, plain
from pipeline.trial_table import TrialTable
from pipeline.warm_start import TRIALS_FILE, earlier_trials, read_trials

BEST_FILE = "best.yaml"
TRIALS_FOLDER = "trials"
TUNE_FOLDER = "tune"
DRIVER_CPUS = 0.1  # what a trial's own process takes; its workers ask for theirs
POPULATIONS = ("pbt", "pb2")
# Trials that the cluster has failed are tried again, beside those that have not ended.
_RESUME = ResumeConfig(errored=ResumeConfig.ResumeType.RESUME)  # pyright: ignore[reportArgumentType] as Ray says str


@dataclass(frozen=True)
class SweepConfig:
    """Search for the training configuration with the best validation score.

    Args:
        dataset: URL of a canonical dataset.
        run: URL for the trials, their table, the report and `best.yaml`. It is the sweep's identity: the same URL goes
            on where a killed one was.
        base: YAML file or URL of the training configuration that is varied; empty for the defaults.
        fixed: fields of that configuration that all trials set alike, by dotted name, e.g. {"iterations": 100}.
        space: what to search, by dotted name of the field, e.g. {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}}; also
            choice, uniform, randint and quniform. With {"when": {"other.field": [values]}} beside that, only while
            another field that is searched has one of these values. Trial 0 tries the base configuration as it is.
        points: configurations known to be good, by dotted names, that are tried right after trial 0.
        warm_start: URLs of earlier sweeps whose trials the searcher optuna learns from.
        trials: how many configurations to try.
        hours: of wall time, after which the sweep ends with what it has.
        device_hours: of GPUs, or without any of CPUs, that all trials may take; looked at with each validation.
        objective: metric that is looked for: miou, macc, aacc, loss, images_per_second (of training) or gflops (of one
            image). Of two, the report has the Pareto front, and the first one decides what is stopped and what is best.
        searcher: random, grid for every combination, or optuna for a tree-structured Parzen estimator.
        scheduler: none; asha to stop weak trials early; hyperband, which compares them in groups; pbt or pb2 to go on
            with the weights of better trials and changed parameters, with all trials side by side.
        grace_iterations: iterations that every trial may run before asha can stop it, and from one exchange of pbt and
            pb2 to the next.
        concurrent_trials: trials at the same time; 0 for as many as the cluster holds.
        retrain: train the best configuration with so many seeds and the full schedule: iterations, validations and
            checkpoints as the base configuration has them.
        seed: of the search.
        new: start afresh, replacing what an earlier sweep left there.
    """

    dataset: str
    run: str
    base: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    space: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    warm_start: list[str] = field(default_factory=list)
    trials: int = 16
    hours: float | None = None
    device_hours: float | None = None
    objective: str | list[str] = "miou"
    searcher: SearcherName = "optuna"
    scheduler: SchedulerName = "asha"
    grace_iterations: int = 1000
    concurrent_trials: int = field(default=0, metadata={"identity": False})
    retrain: int = field(default=0, metadata={"identity": False})
    seed: int = 0
    new: bool = field(default=False, metadata={"identity": False})

    @property
    def objectives(self) -> Objectives:
        """What is looked for; raises `WrongCall` for what trials do not report."""
        return Objectives((self.objective,) if isinstance(self.objective, str) else tuple(self.objective))


def sweep(config: SweepConfig) -> RunRecord:
    """Run the trials; leave `trials.parquet`, `report.html` and `best.yaml`, which `workflows/train.py --config` takes.

    Raises:
        PipelineError: if the search space, the dataset or the cluster cannot serve, or every trial fails.
    """
    config = dataclasses.replace(config, dataset=storage.absolute(config.dataset), run=storage.absolute(config.run))
    space = search_space(config)
    data = dataset.open(config.dataset)
    default = completed(space.config(config.dataset, config.run, {}), data)
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
    with connected():
        if record is None:
            record = _swept(config, space, default, inputs)
            announce(f"swept {config.run}/{BEST_FILE} ({_best_text(record.results)})")
        if config.retrain:
            again = _retrain(config, space, record)
            announce(f"trained the best of {config.run} again: {again.text}")
    return record


def _swept(config: SweepConfig, space: SearchSpace, default: TrainConfig, inputs: dict[str, str]) -> RunRecord:
    """Run the trials under a record, and write down what they have found."""
    require_resources(default.resources, beside=DRIVER_CPUS)
    outputs = [BEST_FILE, TRIALS_FILE, REPORT_FILE, TRIALS_FOLDER, TUNE_FOLDER]
    with record_run(config.run, "sweep", config, inputs, outputs, keep=not config.new) as record:
        trials = _tried(config, space, default)
        _delete_unneeded(config, trials)
        front = config.objectives.front([trial.metrics for trial in trials])
        rows = [trial.row(position in front) for position, trial in enumerate(trials)]
        write_table(storage.join(config.run, TRIALS_FILE), pa.Table.from_pylist(rows, schema=TRIALS_SCHEMA))
        write_sweep_report(config.run, space, config.objectives, trials)
        record.counts = {"trials": len(trials), "failed": sum(trial.state in FAILED for trial in trials)}
        record.results = _write_best(config, space, trials)
    return record


def search_space(config: SweepConfig) -> SearchSpace:
    """The sweep's search space over its base configuration, which is read here.

    Raises:
        WrongCall: what `SearchSpace` raises, and for parts of the configuration that do not go together.
    """
    space = SearchSpace(read_yaml(config.base) if config.base else {}, config.fixed, config.space)
    for name in ("trials", "grace_iterations"):
        if getattr(config, name) < 1:
            raise WrongCall(f"{name} is {getattr(config, name)}: give 1 or more.")
    for name in ("concurrent_trials", "retrain"):
        if getattr(config, name) < 0:
            raise WrongCall(f"{name} is {getattr(config, name)}: give 0 or more.")
    for name in ("hours", "device_hours"):
        limit = getattr(config, name)
        if limit is not None and limit <= 0:
            raise WrongCall(f"{name} is {limit}: give more than 0, or leave it out for no limit.")
    for position, point in enumerate(config.points):
        lacks = space.lacks(point)
        if lacks:
            raise WrongCall(f"points[{position}] is no point of the search space: {lacks}.")
    if config.searcher == "grid":
        next(space.grid())
    if config.warm_start and config.searcher != "optuna":
        raise WrongCall(f"warm_start is for the searcher optuna, and {config.searcher} does not learn: leave it out.")
    if "iterations" in config.space and config.scheduler != "none":
        raise WrongCall(
            f"iterations is searched, but the scheduler {config.scheduler} compares trials that are to do as many: fix "
            "it, or take the scheduler none."
        )
    objectives = config.objectives
    if config.scheduler in POPULATIONS and config.searcher != "random":
        raise WrongCall(
            f"The scheduler {config.scheduler} begins with points drawn at random and moves them itself, so that the "
            f"searcher cannot be {config.searcher}: give --searcher random."
        )
    make_scheduler(config.scheduler, space, 1, 1, 1, 1)  # refuses what it cannot search
    if len(objectives.names) > 1 and config.scheduler == "hyperband":
        raise WrongCall("The scheduler hyperband compares trials by one objective: give one, or take asha or none.")
    return space


def _tried(config: SweepConfig, space: SearchSpace, default: TrainConfig) -> list[TrialRecord]:
    """Run the trials, or those that an earlier driver has not ended, and return what is known of all."""
    resources = default.resources
    places = config.concurrent_trials or _places(resources)
    if config.scheduler in POPULATIONS and places < config.trials and not os.environ.get("RAY_ADDRESS"):
        raise PipelineError(
            f"The scheduler {config.scheduler} trains its {config.trials} trials side by side, but {places} have room: "
            "lower trials or resources.cpus_per_worker, or raise concurrent_trials."
        )
    grace, every = config.grace_iterations, default.evaluate_every
    scheduler = make_scheduler(config.scheduler, space, default.iterations, every, grace, places)
    devices = resources.workers * resources.gpus_per_worker if resources.use_gpu else needed_cpus(resources)
    book = TrialBook(default.iterations, devices, scheduler)
    first = [space.default(), *config.points]
    count = config.trials
    search: Any
    if config.scheduler in POPULATIONS:
        search = BasicVariantGenerator(points_to_evaluate=first[:count], random_state=config.seed)
    else:
        search = StudySearcher(
            space,
            config.searcher,
            config.objectives,
            config.seed,
            first,
            earlier_trials(config.warm_start, space, config.objectives),
            book.busy,
        )
        if config.searcher == "grid":
            count = min(count, search.points_left)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output of ray 2.60 prints trials' tracebacks even when silent
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the book has it all, in one file
    table = TrialTable(count * default.iterations, count, config.objectives, lambda: book.trials)
    budget = Budget(config.hours, config.device_hours, devices)
    with table, interruptible():
        job = TrialJob(
            config.dataset,
            storage.join(config.run, TRIALS_FOLDER),
            space,
            config.objectives,
            pauses=config.scheduler in (*POPULATIONS, "hyperband"),
            exchanges=config.scheduler in POPULATIONS,
            reporter=table.reporter,
        )
        _run_tune(config, job, search, default, count, places, book, budget)
    trials = book.trials
    ended = budget.stop_all()
    open_ones = [trial for trial in trials if trial.state in ("waiting", "running", "paused")]
    if open_ones or (len(trials) < count and not ended):
        raise PipelineError(f"{len(open_ones)} of {count} trials of {config.run} have not ended: run it again.")
    return trials


def _run_tune(
    config: SweepConfig,
    job: TrialJob,
    search: Any,
    default: TrainConfig,
    count: int,
    places: int,
    book: TrialBook,
    budget: Budget,
) -> None:
    """Let Ray Tune run the trials; below the same URL it goes on where a driver that was killed has left it."""
    filesystem, path = storage.arrow_filesystem(config.run)
    populations = config.scheduler in POPULATIONS
    parameters = job.space.parameters.items()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consider boosting PBT")  # by processes that outlive their trial
        tune.run(
            tune.with_resources(tune.with_parameters(run_trial, job=job), {"CPU": DRIVER_CPUS}),
            name=TUNE_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            config={name: domain(parameter) for name, parameter in parameters} if populations else {},
            metric=config.objectives.first,
            mode=config.objectives.modes[0],
            num_samples=count,
            max_concurrent_trials=None if populations else places,
            search_alg=search,
            scheduler=book.scheduler,
            stop=budget,
            max_failures=default.resources.max_failures,
            raise_on_failed_trial=False,
            reuse_actors=False,  # a trial's process ends with it, and all that it has held
            # `Tuner.restore` would bring back the callbacks and the scheduler that were pickled when the sweep began,
            # with handles of a cluster that is gone. This is what it calls, and takes those of this process.
            resume_config=_RESUME if _has_begun(config.run) else None,
            callbacks=[book],
            verbose=0,
        )


def _delete_unneeded(config: SweepConfig, trials: list[TrialRecord]) -> None:
    """Delete what has served its purpose: what a population kept to exchange, and trials of before a restart."""
    folder = storage.join(config.run, TRIALS_FOLDER)
    by_id = {trial.trial_id: trial for trial in trials}
    for name in {found.url[len(folder) :].strip("/").partition("/")[0] for found in storage.list_objects(folder)}:
        place = storage.join(folder, name)
        trial = by_id.get(name.partition("-")[0])
        if trial is None or (trial.run and trial.run != place):
            storage.delete(place)
        elif config.scheduler in POPULATIONS:
            storage.delete(storage.join(place, CHECKPOINTS_FOLDER))


def _has_begun(run: str) -> bool:
    """Whether Ray Tune has written down a state to go on from."""
    found = storage.list_objects(storage.join(run, TUNE_FOLDER))
    return any(item.url.rpartition("/")[2].startswith("experiment_state") for item in found)


def _places(resources: ResourcesConfig) -> int:
    """How many trials the cluster's CPUs and GPUs hold at a time."""
    have = ray.cluster_resources()
    held = (have.get("CPU", 0) + 1e-6) // (needed_cpus(resources) + DRIVER_CPUS)
    if resources.use_gpu:
        held = min(held, (have.get("GPU", 0) + 1e-6) // (resources.workers * resources.gpus_per_worker))
    return max(1, int(held))


def _write_best(config: SweepConfig, space: SearchSpace, trials: list[TrialRecord]) -> dict[str, Any]:
    objectives = config.objectives
    position = objectives.best([trial.metrics for trial in trials])
    if position is None:
        reason = next((trial.error for trial in trials if trial.error), "no trial has reported a score")
        raise PipelineError(
            f"None of the {len(trials)} trials of {config.run} has ended with a score: {reason.rstrip('.')}. "
            "Mend that, and run it again with --new true."
        )
    best = trials[position]
    document = identity(space.config(config.dataset, config.run, best.parameters))
    del document["run"]
    scores = ", ".join(f"{name} {best.metrics[name]:.4f}" for name in objectives.names)
    text = f"# The best of {len(trials)} trials: {scores} after {best.iterations} iterations.\n"
    text += yaml.safe_dump(document, sort_keys=False)
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
