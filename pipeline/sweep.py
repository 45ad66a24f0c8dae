"""Hyperparameter search with Ray Tune: each trial is a full Ray Train run, the best becomes `best.yaml`."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
import pyarrow as pa
import ray
import yaml
from ray import PlacementGroupID, tune
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline import dataset, storage
from pipeline.cluster import connected, interruptible
from pipeline.command_line import read_yaml
from pipeline.errors import PipelineError, mendable_cause
from pipeline.parquet_sink import write_table
from pipeline.progress import Progress, Reporter, announce
from pipeline.run_record import RunRecord, finished_record, identity, record_run, refuse_other_work
from pipeline.search_space import SearchSpace
from pipeline.train_loop import PLACEMENT_GROUP
from pipeline.training import TrainConfig, completed, fit, needed_cpus, require_resources

BEST_FILE = "best.yaml"
TRIALS_FILE = "trials.parquet"
TRIALS_FOLDER = "trials"
TUNE_FOLDER = "tune"
DRIVER_CPUS = 0.1  # what a trial's own process takes; its workers ask for theirs

TRIALS_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("trial_id", pa.string()),
        ("parameters", pa.string()),
        ("miou", pa.float64()),
        ("aacc", pa.float64()),
        ("loss", pa.float64()),
        ("iterations", pa.int32()),
        ("seconds", pa.float64()),
        ("state", pa.string()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class SweepConfig:
    """Search for the training configuration with the best validation score.

    Args:
        dataset: URL of a canonical dataset.
        run: URL for the trials, their table and `best.yaml`.
        base: YAML file or URL of the training configuration that is varied; empty for the defaults.
        fixed: fields of that configuration that all trials set alike, by dotted name, e.g. {"iterations": 100}.
        space: what to search, by dotted name of the field, e.g. {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}}; also
            choice, uniform and randint. Trial 0 tries the base configuration as it is.
        trials: how many configurations to try.
        searcher: random, or optuna for a tree-structured Parzen estimator.
        scheduler: asha to stop weak trials early, or none.
        grace_iterations: iterations that every trial may run before it can be stopped.
        concurrent_trials: trials at the same time; 0 for as many as the cluster holds.
        seed: of the search.
        new: start afresh, replacing what an earlier sweep left there.
    """

    dataset: str
    run: str
    base: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    space: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    trials: int = 16
    searcher: Literal["random", "optuna"] = "optuna"
    scheduler: Literal["asha", "none"] = "asha"
    grace_iterations: int = 1000
    concurrent_trials: int = 0
    seed: int = 0
    new: bool = field(default=False, metadata={"identity": False})


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried, with the last scores that it reported; a row of `trials.parquet`.

    `state` is `finished`, `stopped` if the scheduler ended it early, or `failed`.
    """

    trial: int
    trial_id: str
    parameters: str
    miou: float | None
    aacc: float | None
    loss: float | None
    iterations: int
    seconds: float
    state: str
    error: str | None


def sweep(config: SweepConfig) -> RunRecord:
    """Run the trials; leave `trials.parquet` and `best.yaml`, which `workflows/train.py --config` takes.

    Raises:
        PipelineError: if the search space, the dataset or the cluster cannot serve, or every trial fails.
    """
    config = dataclasses.replace(config, dataset=storage.absolute(config.dataset), run=storage.absolute(config.run))
    if config.trials < 1:
        raise PipelineError(f"trials is {config.trials}: give 1 or more.")
    space = search_space(config)
    data = dataset.open(config.dataset)
    default = completed(space.config(config.dataset, config.run, {}), data)
    inputs = {"dataset": data.info.fingerprint, "base": json.dumps(space.base, sort_keys=True)}
    if not config.new:
        finished = finished_record(config.run, "sweep", config, inputs)
        if finished:
            announce(f"already swept: {config.run} ({_best_text(finished.results)})")
            return finished
        refuse_other_work(config.run, "sweep", config, inputs)
    outputs = [BEST_FILE, TRIALS_FILE, TRIALS_FOLDER, TUNE_FOLDER]
    with connected():
        require_resources(default.resources, beside=DRIVER_CPUS)
        with record_run(config.run, "sweep", config, inputs, outputs, keep=False) as record:
            total = config.trials * default.iterations
            with Progress("sweep", total=total, unit="iterations") as progress, interruptible():
                grid = _tuner(config, space, default, progress.reporter).fit()
            if len(grid) != config.trials:
                raise PipelineError(f"{len(grid)} of {config.trials} trials of {config.run} were run: run it again.")
            trials = _trials(grid, config, space)
            table = pa.Table.from_pylist([dataclasses.asdict(trial) for trial in trials], schema=TRIALS_SCHEMA)
            write_table(storage.join(config.run, TRIALS_FILE), table)
            record.counts = {"trials": len(trials), "failed": sum(trial.state == "failed" for trial in trials)}
            record.results = _write_best(config, space, trials, grid)
    announce(f"swept {config.run}/{BEST_FILE} ({_best_text(record.results)})")
    return record


def search_space(config: SweepConfig) -> SearchSpace:
    """The sweep's search space over its base configuration, which is read here; raises what `SearchSpace` raises."""
    return SearchSpace(read_yaml(config.base) if config.base else {}, config.fixed, config.space)


def _tuner(config: SweepConfig, space: SearchSpace, default: TrainConfig, reporter: Reporter) -> tune.Tuner:
    filesystem, path = storage.arrow_filesystem(config.run)
    first = [space.default()]
    search: Any
    if config.searcher == "optuna":
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        search = OptunaSearch(seed=config.seed, points_to_evaluate=first)
    else:
        search = BasicVariantGenerator(random_state=config.seed, points_to_evaluate=first)
    scheduler: TrialScheduler | None = None
    if config.scheduler == "asha":
        grace = min(config.grace_iterations, default.iterations)
        # Above the last iteration, so that a trial that gets there ends by itself instead of being killed.
        scheduler = ASHAScheduler(
            time_attr="iteration", max_t=default.iterations + 1, grace_period=grace, reduction_factor=3
        )
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output of ray 2.60 prints trials' tracebacks even when silent
    trial = tune.with_parameters(_run_trial, job=(config, space, reporter))
    return tune.Tuner(
        tune.with_resources(trial, {"CPU": DRIVER_CPUS}),
        param_space=space.domains(),
        tune_config=tune.TuneConfig(
            metric="miou",
            mode="max",
            num_samples=config.trials,
            max_concurrent_trials=config.concurrent_trials or _concurrency(config, space),
            search_alg=search,
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=default.resources.max_failures),
            verbose=0,
            callbacks=[_FreeStopped()],
        ),
    )


def _concurrency(config: SweepConfig, space: SearchSpace) -> int:
    """How many trials the cluster's CPUs and GPUs hold at a time."""
    resources = space.config(config.dataset, config.run, {}).resources
    have = ray.cluster_resources()
    held = (have.get("CPU", 0) + 1e-6) // (needed_cpus(resources) + DRIVER_CPUS)
    if resources.use_gpu:
        held = min(held, have.get("GPU", 0) // resources.workers)
    return max(1, int(held))


def _run_trial(parameters: dict[str, Any], job: tuple[SweepConfig, SearchSpace, Reporter]) -> None:
    """The trial's own process: runs one training, whose evaluations Ray Tune is told."""
    sweep_config, space, reporter = job
    trial_id = tune.get_context().get_trial_id()
    run = storage.join(sweep_config.run, TRIALS_FOLDER, str(trial_id))
    config = space.config(sweep_config.dataset, run, parameters)
    config = completed(config, dataset.open(config.dataset))
    # Ray Tune tries a failed trial again, not Ray Train: that would take a stopped trial's lost workers for a failure,
    # and start them anew in a placement group that nobody removes.
    config = dataclasses.replace(config, resources=dataclasses.replace(config.resources, max_failures=0))
    part = reporter.part(str(trial_id))
    fit(config, reporter=part, callbacks=[_ReportEvaluations()])
    part.update(config.iterations)


class _FreeStopped(tune.Callback):
    """Removes the placement group of a trial's workers when the trial is over.

    A trial that the scheduler stops is killed, and with it what would have removed the group. Ray Train's own cleaner
    gives up where several Ray instances run on a host (ray 2.60); the next trial would then wait for ever.
    """

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        _free_placement_group(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        _free_placement_group(trial)


def _free_placement_group(trial: Any) -> None:
    group = (trial.last_result or {}).get(PLACEMENT_GROUP)
    if group:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


class _ReportEvaluations(TuneReportCallback):
    """Tells Ray Tune of the reports that carry a fresh validation; a checkpoint alone is none."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if metrics[0]["evaluated"]:
            super().after_report(run_context, metrics, checkpoint)


def _trials(grid: tune.ResultGrid, config: SweepConfig, space: SearchSpace) -> list[Trial]:
    trials = []
    for number in range(len(grid)):
        result = grid[number]
        metrics: Mapping[str, Any] = result.metrics or {}
        parameters = yaml.safe_dump(dict(result.config or {}), default_flow_style=True, width=10_000).strip()
        iterations, error = int(metrics.get("iteration", 0)), None
        if result.error:
            state = "failed"
            error = str(mendable_cause(result.error) or result.error).strip().splitlines()[-1][:500]
        else:
            planned = space.config(config.dataset, config.run, dict(result.config or {})).iterations
            state = "finished" if iterations >= planned else "stopped"
        trials.append(
            Trial(
                trial=number,
                trial_id=str(metrics.get("trial_id", "")),
                parameters=parameters,
                miou=metrics.get("miou"),
                aacc=metrics.get("aacc"),
                loss=metrics.get("loss"),
                iterations=iterations,
                seconds=float(metrics.get("time_total_s", 0.0)),
                state=state,
                error=error,
            )
        )
    return trials


def _write_best(config: SweepConfig, space: SearchSpace, trials: list[Trial], grid: tune.ResultGrid) -> dict[str, Any]:
    scored = [
        trial for trial in trials if trial.miou is not None and math.isfinite(trial.miou) and trial.state != "failed"
    ]
    if not scored:
        reason = next((trial.error for trial in trials if trial.error), "no trial has reported a score")
        raise PipelineError(f"None of the {len(trials)} trials of {config.run} has ended with a score: {reason}")
    best = max(scored, key=lambda trial: trial.miou or 0.0)  # NaN is no score: see `scored`
    parameters = dict(grid[best.trial].config or {})
    document = identity(space.config(config.dataset, config.run, parameters))
    del document["run"]
    text = f"# The best of {len(trials)} trials: mIoU {best.miou:.4f} after {best.iterations} iterations.\n"
    text += yaml.safe_dump(document, sort_keys=False)
    storage.write_bytes(storage.join(config.run, BEST_FILE), text.encode())
    return {"best_trial": best.trial, "miou": best.miou, "default_miou": trials[0].miou, "parameters": parameters}


def _best_text(results: Mapping[str, Any]) -> str:
    return f"trial {results['best_trial']} is best, mIoU {results['miou']:.3f}"
