"""The trials of a sweep on Ray Tune: begun, or gone on with where a driver that was killed has left them."""

import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune import ResumeConfig
from ray.tune.search import BasicVariantGenerator

from pipeline import storage
from pipeline.budget import Budget
from pipeline.cluster import interruptible
from pipeline.errors import PipelineError
from pipeline.progress import announce
from pipeline.run_folder import CHECKPOINTS_FOLDER
from pipeline.schedulers import POPULATIONS, domain, make_scheduler
from pipeline.search_space import SearchSpace
from pipeline.searchers import Evaluated, StudySearcher
from pipeline.storage_errors import patiently
from pipeline.sweep_config import SweepConfig
from pipeline.train_config import TrainConfig
from pipeline.train_resources import ResourcesConfig, needed_cpus
from pipeline.trial import TrialJob, run_trial
from pipeline.trial_book import ENDED, NotRestored, TrialBook, TrialRecord
from pipeline.trial_table import TrialTable
from pipeline.uploads import Uploads

TRIALS_FOLDER = "trials"
TUNE_FOLDER = "tune"
DRIVER_CPUS = 0.1  # what a trial's own process takes; its workers ask for theirs
_PENDING = "200"  # trials whose process is about to start; the searcher itself keeps to what there is room for
# Trials that the cluster has failed are tried again, beside those that have not ended.
_RESUME = ResumeConfig(errored=ResumeConfig.ResumeType.RESUME)  # pyright: ignore[reportArgumentType] as Ray says str
# The files of a state that Ray Tune can go on from, by how their names begin: trials, callbacks, and a searcher.
_STATE = (("experiment_state",), ("callback-states",), ("search_gen_state", "basic-variant-state"))


def require_places(config: SweepConfig, resources: ResourcesConfig) -> None:
    """Raise PipelineError if a population does not have room side by side; a cluster that was joined may grow."""
    places = places_now(config, resources)
    if config.scheduler in POPULATIONS and places < config.trials and not os.environ.get("RAY_ADDRESS"):
        raise PipelineError(
            f"The scheduler {config.scheduler} trains its {config.trials} trials side by side, but {places} have room: "
            "lower trials or resources.cpus_per_worker, or raise concurrent_trials."
        )


def run_trials(
    config: SweepConfig, space: SearchSpace, default: TrainConfig, earlier: Sequence[Evaluated] = ()
) -> list[TrialRecord]:
    """Run the trials, or those that an earlier driver has not ended, and return what is known of all.

    Args:
        config: of the sweep.
        space: of the sweep.
        default: what trial 0 trains with.
        earlier: trials of other sweeps, for the searcher to learn from.

    Raises:
        PipelineError: if what an earlier driver has written down cannot be read, or trials have not ended.
    """
    resumes = has_begun(config.run)
    try:
        return _tried(config, space, default, earlier, resumes)
    except NotRestored:
        announce(f"  the trials in {config.run}/{TUNE_FOLDER} could not be restored: trying once more")
        patiently(partial(_read_state, config.run))
        return _tried(config, space, default, earlier, resumes)


def has_begun(run: str) -> bool:
    """Whether Ray Tune has written down a whole state to go on from; of its first one, a kill may leave a part."""
    names = [place.rpartition("/")[2] for place in _state_files(run)]
    return all(any(name.startswith(kinds) for name in names) for kinds in _STATE)


def _state_files(run: str) -> list[str]:
    return [found.url for found in storage.list_objects(f"{storage.join(run, TUNE_FOLDER)}/", recursive=False)]


def _read_state(run: str) -> None:
    """Raise StorageError, in one sentence, for what keeps the state from being read: Ray Tune keeps that to itself."""
    for place in _state_files(run):
        storage.read_bytes(place)


def _tried(
    config: SweepConfig, space: SearchSpace, default: TrainConfig, earlier: Sequence[Evaluated], resumes: bool
) -> list[TrialRecord]:
    resources = default.resources
    places = partial(places_now, config, resources)
    grace, every = config.grace_iterations, default.evaluate_every
    scheduler = make_scheduler(config.scheduler, space, default.iterations, every, grace, places)
    devices = resources.workers * resources.gpus_per_worker if resources.use_gpu else needed_cpus(resources)
    deletions = Uploads()

    def delete_checkpoints(trial: TrialRecord) -> None:
        deletions.add(partial(storage.delete, storage.join(trial.run, CHECKPOINTS_FOLDER)))

    # Of a population, another trial may go on with them.
    over = None if config.scheduler in POPULATIONS else delete_checkpoints
    book = TrialBook(default.iterations, devices, scheduler, resumes, over)
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
            earlier,
            lambda: book.busy() < places(),
        )
        if config.searcher == "grid":
            count = min(count, search.points_left)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output of ray 2.60 prints trials' tracebacks even when silent
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = _PENDING  # by itself Ray Tune starts one process after the other
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
        _run_tune(config, job, search, default, count, book, budget)
    deletions.finish()
    require_ended(config, book.trials, count)
    return book.trials


def require_ended(config: SweepConfig, trials: list[TrialRecord], count: int) -> None:
    """Raise PipelineError unless all of `count` trials have ended, or those that a budget has allowed.

    Ray Tune has a copy of the budget, and in a sweep that goes on an older one: it alone knows whether it is spent.
    """
    missing = 0 if config.hours or config.device_hours else count - len(trials)
    missing += sum(trial.state not in ENDED for trial in trials)
    if missing:
        raise PipelineError(f"{missing} of {count} trials of {config.run} have not ended: run it again.")


def _run_tune(
    config: SweepConfig,
    job: TrialJob,
    search: Any,
    default: TrainConfig,
    count: int,
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
            search_alg=search,
            scheduler=book.scheduler,
            stop=budget,
            max_failures=default.resources.max_failures,
            raise_on_failed_trial=False,
            reuse_actors=False,  # a trial's process ends with it, and all that it has held
            # `Tuner.restore` would bring back the callbacks and the scheduler that were pickled when the sweep began,
            # with handles of a cluster that is gone. This is what it calls, and takes those of this process.
            resume_config=_RESUME if book.resumes else None,
            callbacks=[book],
            verbose=0,
        )


def places_now(config: SweepConfig, resources: ResourcesConfig) -> int:
    """How many trials may run at a time: as it was asked for, or as many as the cluster's CPUs and GPUs now hold."""
    if config.concurrent_trials:
        return config.concurrent_trials
    have = ray.cluster_resources()
    held = (have.get("CPU", 0) + 1e-6) // (needed_cpus(resources) + DRIVER_CPUS)
    if resources.use_gpu:
        held = min(held, (have.get("GPU", 0) + 1e-6) // (resources.workers * resources.gpus_per_worker))
    return max(1, int(held))


def delete_unneeded(config: SweepConfig, trials: list[TrialRecord]) -> None:
    """Delete what has served its purpose: checkpoints of trials that have ended, and trials of before a restart."""
    folder = storage.join(config.run, TRIALS_FOLDER)
    by_id = {trial.trial_id: trial for trial in trials}
    for name in storage.folder_names(folder):
        place = storage.join(folder, name)
        trial = by_id.get(name.partition("-")[0])
        if trial is None or (trial.run and trial.run != place):
            storage.delete(place)
        else:
            storage.delete(storage.join(place, CHECKPOINTS_FOLDER))
