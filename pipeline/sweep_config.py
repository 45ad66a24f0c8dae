"""What a sweep is asked to do, and what of it is refused before anything starts."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.command_line import WrongCall, read_yaml
from pipeline.objectives import Objectives
from pipeline.schedulers import POPULATIONS, SchedulerName, make_scheduler
from pipeline.search_space import SearchSpace
from pipeline.searchers import SearcherName


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
        warm_start: URLs of earlier sweeps. Of their trials the searcher optuna learns from those that ran to their end
            and that this sweep could have tried itself, on the same dataset; how many these are is said.
        trials: how many configurations to try.
        hours: of wall time, after which the sweep ends with what it has.
        device_hours: of GPUs, or without any of CPUs, that all trials may take; looked at with each validation.
        objective: metric that is looked for: miou, macc, aacc, images_per_second (of training) or gflops (of one
            image). Of two, the report has the Pareto front, and the first one decides what is stopped and what is best.
        searcher: random, grid for every combination, or optuna for a tree-structured Parzen estimator.
        scheduler: none; asha to stop weak trials early; hyperband, which compares them in groups; pbt or pb2 to go on
            with the weights of better trials and changed parameters, with all trials side by side.
        grace_iterations: iterations that every trial may run before asha can stop it, and from one exchange of pbt and
            pb2 to the next; rounded up to a validation. Without it a seventh of the training.
        concurrent_trials: trials at the same time; 0 for as many as the cluster holds, looked at again and again. For a
            trial that has no room none is asked for, but for the first one. So give a number on a cluster that grows on
            demand, for instance from zero: it grows until so many have room.
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
    grace_iterations: int | None = None
    concurrent_trials: int = field(default=0, metadata={"identity": False})
    retrain: int = field(default=0, metadata={"identity": False})
    seed: int = 0
    new: bool = field(default=False, metadata={"identity": False})

    @property
    def objectives(self) -> Objectives:
        """What is looked for; raises `WrongCall` for what cannot be looked for."""
        return Objectives((self.objective,) if isinstance(self.objective, str) else tuple(self.objective))


def search_space(config: SweepConfig) -> SearchSpace:
    """The sweep's search space over its base configuration, which is read here.

    Raises:
        WrongCall: what `SearchSpace` raises, and for parts of the configuration that do not go together.
    """
    space = SearchSpace(read_yaml(config.base) if config.base else {}, config.fixed, config.space)
    if config.trials < 1:
        raise WrongCall(f"trials is {config.trials}: give 1 or more.")
    if config.grace_iterations is not None and config.grace_iterations < 1:
        raise WrongCall(f"grace_iterations is {config.grace_iterations}: give 1 or more, or leave it out.")
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
    for name in ("iterations", "evaluate_every"):
        if name in config.space and config.scheduler != "none":
            raise WrongCall(
                f"{name} is searched, but the scheduler {config.scheduler} compares trials that have it in common: "
                "fix it, or take the scheduler none."
            )
    objectives = config.objectives
    if config.scheduler in POPULATIONS and config.searcher != "random":
        raise WrongCall(
            f"The scheduler {config.scheduler} begins with points drawn at random and moves them itself, so that the "
            f"searcher cannot be {config.searcher}: give --searcher random."
        )
    make_scheduler(config.scheduler, space, 1, 1, 1, places=1)  # refuses what it cannot search
    if len(objectives.names) > 1 and config.scheduler == "hyperband":
        raise WrongCall("The scheduler hyperband compares trials by one objective: give one, or take asha or none.")
    return space
