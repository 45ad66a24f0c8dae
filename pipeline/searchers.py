"""Searchers of a sweep: which point of the search space is tried next. Everything but PBT's population uses these."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from pipeline.objectives import Objectives
from pipeline.search_space import SearchSpace, duplicates_left_out

SearcherName = Literal["random", "grid", "optuna"]
# Among a trial's reported metrics: how it has failed, and how many iterations it does if nobody stops it.
FAILURE, PLANNED = "failure", "planned_iterations"


@dataclass(frozen=True)
class Evaluated:
    """A point that an earlier sweep has tried, and its objectives."""

    point: Mapping[str, Any]
    values: Sequence[float]


@dataclass
class _Study:
    """All that a searcher remembers; it is pickled as a whole."""

    study: optuna.Study
    queue: list[dict[str, Any]]
    asked: dict[str, optuna.Trial] = field(default_factory=dict)


class StudySearcher(Searcher):
    """Asks an Optuna study for points, and tells it how they went.

    Ray's own `OptunaSearch` takes a failed trial's last score for its result, and neither earlier results nor failures
    together with parameters that depend on others.

    Args:
        space: what is searched.
        name: `random`; `grid` for every point, until none is left; `optuna` for a tree-structured Parzen estimator.
        objectives: what the study looks for.
        seed: of the draws.
        first: points that are tried before all others, the recipe's own first of all.
        evaluated: points that the study is told of in advance.
        has_room: whether one more trial can run now; asked before each point.
    """

    def __init__(
        self,
        space: SearchSpace,
        name: SearcherName,
        objectives: Objectives,
        seed: int,
        first: Sequence[Mapping[str, Any]],
        evaluated: Sequence[Evaluated] = (),
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(metric=objectives.first, mode=objectives.modes[0])
        self.space, self.objectives, self.has_room = space, objectives, has_room
        self.ends = name == "grid"
        points = [dict(point) for point in first]
        queue = duplicates_left_out([*points, *(space.grid() if self.ends else [])])
        study = new_study(objectives.modes, TPESampler(seed=seed) if name == "optuna" else RandomSampler(seed=seed))
        for earlier in evaluated:
            study.add_trial(told_trial(space, earlier.point, list(earlier.values)))
        self._memory = _Study(study, queue)

    @property
    def points_left(self) -> int:
        """Points that are to be tried whatever the study draws; of a grid, all that are left."""
        return len(self._memory.queue)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next point; None while there is no room, `FINISHED` when a grid has no more."""
        memory = self._memory
        if not self.has_room():
            return None
        if memory.queue:
            point = memory.queue.pop(0)
            told = {name: self.space.parameters[name].told(value) for name, value in point.items()}
            memory.study.enqueue_trial(told)
        elif self.ends:
            return Searcher.FINISHED  # pyright: ignore[reportReturnType] as Ray Tune has it
        trial = memory.asked[trial_id] = memory.study.ask()
        return self.space.suggest(trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the study of a score on the way."""
        values = self.objectives.values(result)
        trial = self._memory.asked.get(trial_id)
        if values is not None and trial is not None and len(values) == 1:  # optuna takes no two on the way
            trial.report(values[0], step=int(result["iteration"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how the trial has ended: a failure, stopped early, or with its scores."""
        trial = self._memory.asked.pop(trial_id, None)
        if trial is None:  # a failed one that was tried again after the sweep had been killed
            return
        values = None if result is None or error or FAILURE in result else self.objectives.values(result)
        if values is None or result is None:
            self._memory.study.tell(trial, state=TrialState.FAIL)
        elif int(result["iteration"]) < int(result[PLANNED]) and len(values) == 1:
            # Ranked by how far it got: its score is not that of a whole training. Optuna knows that of one objective.
            trial.report(values[0], step=int(result["iteration"]))
            self._memory.study.tell(trial, state=TrialState.PRUNED)
        else:
            self._memory.study.tell(trial, values)

    def save(self, checkpoint_path: str) -> None:
        """Write down what is remembered, for `restore`."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self._memory))

    def restore(self, checkpoint_path: str) -> None:
        """Remember what a searcher that was killed has written down."""
        self._memory = pickle.loads(Path(checkpoint_path).read_bytes())

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """What the study knows."""
        return self._memory.study.get_trials(deepcopy=False)


def told_trial(space: SearchSpace, point: Mapping[str, Any], values: list[float]) -> optuna.trial.FrozenTrial:
    """A point of the space with its results, as Optuna holds one."""
    parameters = {name: space.parameters[name] for name in point}
    return create_trial(
        values=values,
        params={name: parameters[name].told(value) for name, value in point.items()},
        distributions={name: parameter.distribution for name, parameter in parameters.items()},
    )


def new_study(modes: Sequence[str], sampler: BaseSampler | None = None) -> optuna.Study:
    """An empty study in memory, that says nothing of its own; each of `modes` is `max` or `min`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: list[Any] = ["maximize" if mode == "max" else "minimize" for mode in modes]
    return optuna.create_study(sampler=sampler, directions=directions)
