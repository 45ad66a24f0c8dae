"""Schedulers of a sweep: which trials are stopped early, paused, or go on with the weights of a better one.

Ray's own, as far as they go. What is added: a trial that has failed is stopped before its score reaches them, ASHA
never stops the recipe itself, and what they know survives a killed driver, for Ray Tune restores trials, searcher and
callbacks, but no scheduler (ray 2.60).
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pandas as pd
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2

from pipeline.command_line import WrongCall
from pipeline.search_space import Parameter, SearchSpace
from pipeline.searchers import FAILURE

SchedulerName = Literal["none", "asha", "hyperband", "pbt", "pb2"]
POPULATIONS = ("pbt", "pb2")
REDUCTION = 3  # of the trials at a rung one in so many goes on
# Of a training, before any trial is stopped. Ranks of less than that say little of the last ones: see the simulation in
# tests/benchmarks/results/sweep-cpu.md.
GRACE = 1 / 7
# Whose change leaves every weight its place; all else that belongs to the model does not.
_KEEP_WEIGHTS = ("model.drop_path", "model.separation.max_gate")
_NOT_FOR_POPULATIONS = ("model.", "resources.", "iterations", "evaluate_every", "checkpoint_every")


class SweepScheduler(TrialScheduler):
    """What all schedulers here have in common: a trial that reports its own failure is over, and knowledge is kept."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What becomes of a trial that has reported."""
        return TrialScheduler.STOP if FAILURE in result else super().on_trial_result(tune_controller, trial, result)

    def known(self) -> Any:
        """What a driver that takes over has to be told with `recall`, if anything: it can be pickled."""
        return None

    def recall(self, known: Any) -> None:
        """Take up what a driver that was killed had known."""


class Plain(SweepScheduler, FIFOScheduler):
    """Every trial runs to its end, except for one that has failed."""


class Asha(SweepScheduler, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020) that lets the first trial, the recipe itself, run to its end.

    So whatever is best is known to beat the recipe, and not only a part of its training. Trials are compared by the
    best score that each has had so far (ours): single validations jump, most of all while the learning rate is high.
    The price is that one which was good once, and is no longer, goes on for longer.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._best: dict[str, float] = {}  # by trial, larger being better

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What becomes of a trial that has reported."""
        action = super().on_trial_result(tune_controller, trial, self._at_best(trial, result))
        # Ray Tune counts a searcher's trials at the head of their tags, from 1.
        spared = str(trial.experiment_tag).partition("_")[0] == "1" and FAILURE not in result
        return TrialScheduler.CONTINUE if spared else action

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Note the last score of a trial that has ended, unless it has failed."""
        if FAILURE in result:
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, self._at_best(trial, result))

    def _at_best(self, trial: Trial, result: dict[str, Any]) -> dict[str, Any]:
        """A result with the best score that its trial has had so far."""
        metric = str(self._metric)
        score = result.get(metric)
        if FAILURE in result or score is None:
            return result
        best = max(self._metric_op * score, self._best.get(trial.trial_id, -math.inf))
        self._best[trial.trial_id] = best
        return {**result, metric: self._metric_op * best}

    def known(self) -> dict[str, Any]:
        """The scores at each rung, and the best ones, for `recall`."""
        return {"rungs": [bracket._rungs for bracket in self._brackets], "best": self._best}

    def recall(self, known: dict[str, Any]) -> None:
        """Take up the scores of a driver that was killed."""
        self._best = known["best"]
        for bracket, rungs in zip(self._brackets, known["rungs"], strict=True):
            bracket._rungs = rungs


class HyperBand(SweepScheduler, HyperBandScheduler):
    """Ray's HyperBand (Li et al. 2018), with fewer places to run than a bracket has trials, and after a restart.

    Ray's own supposes that all trials are there from the beginning.

    Args:
        places: how many trials the cluster holds at a time, asked anew whenever one could run.
        **options: of `HyperBandScheduler`.
    """

    def __init__(self, places: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self.places = places

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Put a trial into a bracket: one that was restored with what it had reached, and waiting for its turn."""
        if trial.is_finished():
            return
        bracket = self._state["bracket"]
        if bracket is not None and len(bracket._all_trials) >= bracket._n0:
            self._state["bracket"] = None  # Ray counts live trials alone: those that end early would never fill one
        super().on_trial_add(tune_controller, trial)
        if trial.last_result.get(self._time_attr) and trial.status == Trial.PENDING:
            self._trial_info[trial][0].update_trial_stats(trial, trial.last_result)
            trial.set_status(Trial.PAUSED)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next trial, where there is a place for it."""
        brackets = [bracket for band in self._hyperbands for bracket in band if bracket is not None]
        for bracket in brackets:
            waiting = bracket.current_trials()
            if waiting and all(trial.status == Trial.PAUSED for trial in waiting) and bracket.cur_iter_done():
                self._process_bracket(tune_controller, bracket)  # the searcher has ended since they were paused
        running = [trial for trial in tune_controller.get_trials() if trial.status in (Trial.RUNNING, Trial.PENDING)]
        if len(running) >= self.places():
            return None
        for bracket in sorted(brackets, key=lambda bracket: bracket.completion_percentage()):
            for trial in bracket.current_trials():
                goes_on = trial in bracket.trials_to_unpause or bracket.continue_trial(trial)
                if trial.status == Trial.PAUSED and goes_on:
                    return trial
        return None

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        """Halve a bracket only once all of its trials are there, and not those that happened to run first."""
        if len(bracket._all_trials) < bracket._n0 and not tune_controller.search_alg.is_finished():
            return TrialScheduler.PAUSE
        return super()._process_bracket(tune_controller, bracket)


class _SparesRecipe(PopulationBasedTraining):
    """The first trial, the recipe itself, may be taken from, but keeps its own weights and settings to the end."""

    def _checkpoint_or_exploit(
        self, trial: Trial, tune_controller: Any, upper_quantile: list[Trial], lower_quantile: list[Trial]
    ) -> None:
        # The trials of a population are counted at the end of their ids, from 0.
        lower_quantile = [weak for weak in lower_quantile if not weak.trial_id.endswith("_00000")]
        super()._checkpoint_or_exploit(trial, tune_controller, upper_quantile, lower_quantile)


class Pbt(SweepScheduler, _SparesRecipe):
    """Population based training (Jaderberg et al. 2017); the trial itself carries the weights over, see `trial.py`."""


class Pb2(SweepScheduler, _SparesRecipe, PB2):
    """Population based bandits (Parker-Holder et al. 2020)."""

    def known(self) -> dict[str, Any]:
        """The scores that its model is fitted to, for `recall`."""
        return {"data": self.data.to_dict("list"), "explored": self.last_exploration_time}

    def recall(self, known: dict[str, Any]) -> None:
        """Take up the scores of a driver that was killed."""
        self.data, self.last_exploration_time = pd.DataFrame(known["data"]), known["explored"]


def make_scheduler(
    name: SchedulerName,
    space: SearchSpace,
    iterations: int,
    evaluate_every: int,
    grace: int | None,
    places: int | Callable[[], int],
) -> SweepScheduler:
    """The scheduler of a sweep.

    Args:
        name: which one.
        space: what PBT and PB2 vary.
        iterations, evaluate_every: of a trial.
        grace: iterations before ASHA stops a trial, and from one exchange of a population to the next; by itself
            `GRACE` of the training. Rounded up to the next validation, for off its rungs ASHA would compare trials at
            each validation.
        places: trials that the cluster holds at a time; what says so anew where that changes.

    Raises:
        WrongCall: if the search space is none for this scheduler, or a package is missing.
    """
    grace = grace or math.ceil(GRACE * iterations)
    grace = min(-(-grace // evaluate_every) * evaluate_every, iterations)
    # Limits lie above the last iteration, so that a trial that gets there ends by itself instead of being killed.
    if name == "asha":
        return Asha(time_attr="iteration", max_t=iterations + 1, grace_period=grace, reduction_factor=REDUCTION)
    if name == "hyperband":
        most = -(-iterations // evaluate_every) + 1
        now = places if callable(places) else lambda: places
        return HyperBand(now, time_attr="validations", max_t=most, reduction_factor=REDUCTION)
    if name == "none":
        return Plain()
    check_population(name, space)
    parameters = space.parameters
    clamp = _Clamp(parameters)
    options: dict[str, Any] = {"time_attr": "iteration", "perturbation_interval": grace}
    options |= {"log_config": False, "custom_explore_fn": clamp}
    if name == "pbt":
        mutations = {name: _mutation(parameter) for name, parameter in parameters.items()}
        return Pbt(hyperparam_mutations=mutations, **options)
    return Pb2(hyperparam_bounds={name: parameter.values[:2] for name, parameter in parameters.items()}, **options)


def check_population(name: str, space: SearchSpace) -> None:
    """Refuse what a running training cannot change, or a missing package.

    Raises:
        WrongCall: naming the field.
    """
    for field, parameter in space.parameters.items():
        if field.startswith(_NOT_FOR_POPULATIONS) and field not in _KEEP_WEIGHTS:
            raise WrongCall(
                f"The scheduler {name} changes a training while it runs, but {field} is fixed by its start: search "
                "fields of the optimizer, losses and augmentation, or take another scheduler."
            )
        if parameter.when:
            raise WrongCall(f"The range of {field} has a condition, which the scheduler {name} knows nothing of.")
        if name == "pb2" and parameter.kind not in ("uniform", "loguniform"):
            raise WrongCall(
                f"The range of {field} is no interval, and the scheduler pb2 models intervals only: write uniform or "
                "loguniform, or take the scheduler pbt."
            )
    if name == "pb2" and importlib.util.find_spec("sklearn") is None:
        raise WrongCall("The scheduler pb2 needs scikit-learn: pip install scikit-learn, or take the scheduler pbt.")


class _Clamp:
    """Keeps what PBT makes of a value, a fifth more or less, within its range."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = dict(parameters)

    def __call__(self, point: dict[str, Any]) -> dict[str, Any]:
        return {name: self._kept(name, value) for name, value in point.items()}

    def _kept(self, name: str, value: Any) -> Any:
        parameter = self.parameters[name]
        if parameter.kind in ("uniform", "loguniform"):
            value = float(value)
        return parameter.nearest(value)


def domain(parameter: Parameter) -> Any:
    """Ray Tune's name for a range."""
    if parameter.kind == "choice":
        return tune.choice(parameter.values)
    if parameter.kind == "quniform":
        return tune.choice(parameter.finite() or [])
    return getattr(tune, parameter.kind)(*parameter.values)


def _mutation(parameter: Parameter) -> Any:
    # Of a list, PBT takes a neighbour; of a domain, a fifth more or less.
    return parameter.finite() if parameter.kind in ("choice", "quniform") else domain(parameter)
