"""Schedulers: whom they stop, what they leave alone, what they refuse, and what survives a killed driver."""

import importlib.util
import math
import pickle
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.pbt import _PBTTrialState

from pipeline.command_line import WrongCall
from pipeline.schedulers import (
    REDUCTION,
    Asha,
    HyperBand,
    Pb2,
    Pbt,
    SchedulerName,
    SweepScheduler,
    make_scheduler,
)
from pipeline.search_space import SearchSpace
from pipeline.searchers import FAILURE
from tests.simulated_sweep import SimulatedSweep, SimulatedTrial

LR = {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}}


def curves(count: int, validations: int, seed: int = 0) -> list[list[float]]:
    """Curves that rise towards another end each, and cross on the way."""
    random = np.random.default_rng(seed)
    steps = np.arange(1, validations + 1)
    return [
        (random.uniform(0.1, 0.6) * (1 - np.exp(-steps / random.uniform(1, 4)))).tolist() for _ in range(count)
    ]  # fmt: skip


def scheduler(name: SchedulerName, validations: int = 9, places: int = 4, ranges: Any = None) -> SweepScheduler:
    return make_scheduler(name, SearchSpace({}, {}, ranges or LR), validations * 10, 10, 10, places)


def test_asha_saves_most_of_the_steps_and_finds_the_best_or_nearly() -> None:
    for seed in range(5):
        known = curves(60, 27, seed)
        swept = SimulatedSweep(scheduler("asha", 27), known, places=4, every=10)
        trials = swept.run()
        assert swept.steps < 0.35 * 60 * 27
        found = max(trial.curve[-1] for trial in trials if trial.steps == 27)
        assert found > max(curve[-1] for curve in known) - 0.06


def test_asha_compares_trials_at_validations_alone_whatever_the_grace() -> None:
    """Ray's own, with rungs at 1, 3, 9 and 27 iterations and a validation every ten, would halve at 10, 20 and 30."""
    for grace, first in ((1, 1), (10, 1), (11, 2), (25, 3), (10_000, 9), (None, 2)):
        found = make_scheduler("asha", SearchSpace({}, {}, LR), 90, 10, grace, 1)
        swept = SimulatedSweep(found, curves(60, 9), places=1, every=10)
        ended = {trial.steps for trial in swept.run()}
        assert ended <= {first * REDUCTION**rung for rung in range(3)} | {9}
        assert min(ended) == first


def test_asha_never_stops_the_recipe_itself() -> None:
    known = curves(30, 9)
    known[0] = [0.0] * 9
    trials = SimulatedSweep(scheduler("asha"), known, places=2, every=10).run()
    assert trials[0].steps == 9
    assert min(trial.steps for trial in trials[1:]) == 1


def test_asha_compares_the_best_that_trials_have_had_so_far() -> None:
    """Also after a restart, and where the smaller is the better."""
    for mode, sign in (("max", 1), ("min", -1)):
        found = make_scheduler("asha", SearchSpace({}, {}, LR), 90, 10, 30, 1)
        assert isinstance(found, Asha)
        found.set_search_properties("loss", mode)
        told = []
        for number, curve in enumerate([[1, 1, 1], [5, 5, 5], [6, 2, 2], [2, 6, 4], [1, 3, 4]], start=1):
            trial: Any = SimulatedTrial(number, [])
            said = ""
            found.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
            for step, score in enumerate(curve, start=1):
                said = found.on_trial_result(None, trial, {"iteration": 10 * step, "loss": sign * score})  # pyright: ignore[reportArgumentType]
                fresh = make_scheduler("asha", SearchSpace({}, {}, LR), 90, 10, 30, 1)
                fresh.set_search_properties("loss", mode)
                fresh.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
                fresh.recall(pickle.loads(pickle.dumps(found.known())))
                found = fresh
            told.append(said)
        assert told == [TrialScheduler.CONTINUE] * 4 + [TrialScheduler.STOP]


def test_what_asha_knows_survives_a_killed_driver() -> None:
    known = curves(40, 9)
    first = SimulatedSweep(scheduler("asha"), known[:30], places=1, every=10)
    first.run()
    assert isinstance(first.scheduler, Asha)
    after = scheduler("asha")
    assert isinstance(after, Asha)
    after.recall(pickle.loads(pickle.dumps(first.scheduler.known())))
    weak = SimulatedTrial(31, [0.0] * 9)
    after.set_search_properties("miou", "max")
    for restored, expected in ((after, TrialScheduler.STOP), (scheduler("asha"), TrialScheduler.CONTINUE)):
        restored.set_search_properties("miou", "max")
        restored.on_trial_add(None, weak)  # pyright: ignore[reportArgumentType]
        said = restored.on_trial_result(None, weak, {"iteration": 10, "miou": 0.0})  # pyright: ignore[reportArgumentType]
        assert said == expected


@pytest.mark.parametrize("places", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_hyperband_ends_with_any_number_of_trials_and_places(count: int, places: int) -> None:
    known = curves(count, 9)
    swept = SimulatedSweep(scheduler("hyperband", places=places), known, places, every=10)
    trials = swept.run()
    assert len(trials) == count
    if count == 40:
        assert swept.steps < 0.75 * 9 * count
        assert max(trial.steps for trial in trials) == 9


def test_hyperband_halves_a_bracket_only_when_it_is_full() -> None:
    """With one place, the first two trials would else be compared with nobody but each other."""
    swept = SimulatedSweep(scheduler("hyperband", places=1), curves(40, 9), places=1, every=10)
    swept.run()
    # Brackets of 3 trials with the whole budget, 5 with 3 validations at first, and 9 with one; then again.
    ended = [[trial.steps for trial in swept.trials[start:stop]] for start, stop in ((0, 3), (3, 8), (8, 17))]
    assert ended[0] == [9, 9, 9]
    assert sorted(ended[1]) == [3, 3, 3, 9, 9]
    assert sorted(ended[2]) == [1, 1, 1, 1, 1, 1, 3, 3, 9]


def test_hyperband_uses_places_that_a_cluster_has_only_got() -> None:
    places, running = 1, []

    class Growing(SimulatedSweep):
        def _report(self, trial: SimulatedTrial) -> None:
            nonlocal places
            running.append(sum(trial.status == Trial.RUNNING for trial in self.trials))
            places = 1 if len(running) < 10 else 4
            self.places = places
            super()._report(trial)

    found = make_scheduler("hyperband", SearchSpace({}, {}, LR), 90, 10, 10, lambda: places)
    Growing(found, curves(40, 9), places=1, every=10).run()
    assert set(running[:10]) == {1}
    assert max(running) == 4


def test_hyperband_takes_up_restored_trials_where_they_were() -> None:
    after = scheduler("hyperband", places=2)
    after.set_search_properties("miou", "max")
    over, waiting, new = SimulatedTrial(0, []), SimulatedTrial(1, []), SimulatedTrial(2, [])
    over.status = Trial.TERMINATED
    waiting.last_result = {"validations": 3, "miou": 0.3}
    controller: Any = type("Controller", (), {"search_alg": None, "get_trials": lambda _: [over, waiting, new]})()
    for trial in (over, waiting, new):
        after.on_trial_add(controller, trial)  # pyright: ignore[reportArgumentType]
    assert (waiting.status, new.status) == (Trial.PAUSED, Trial.PENDING)
    assert isinstance(after, HyperBand)
    assert over not in after._trial_info


@pytest.mark.parametrize("name", ["none", "asha", "hyperband", "pbt"])
def test_a_trial_that_reports_its_failure_is_over_and_its_score_counts_nowhere(name: SchedulerName) -> None:
    found = scheduler(name)
    found.set_search_properties("miou", "max")
    controller: Any = SimulatedSweep.__new__(SimulatedSweep)
    controller.trials, controller._left = [], 1
    trial: Any = SimulatedTrial(1, [])
    if name == "pbt":
        trial.config = {"optimizer.lr": 1e-4}
        found._trial_state = {trial: None}  # pyright: ignore[reportAttributeAccessIssue]
    else:
        found.on_trial_add(controller, trial)
    result = {"iteration": 10, "validations": 1, "miou": math.nan, FAILURE: "failed"}
    assert found.on_trial_result(controller, trial, result) == TrialScheduler.STOP
    found.on_trial_complete(controller, trial, result)
    if isinstance(found, Asha):
        assert all(not recorded for rungs in found.known()["rungs"] for _, recorded in rungs)


@pytest.mark.parametrize(
    ("name", "ranges", "says"),
    [
        ("pbt", {"model.separation.groups": {"choice": [1, 2]}}, "model.separation.groups is fixed by its start"),
        ("pbt", {"iterations": {"choice": [80_000]}}, "iterations is fixed by its start"),
        ("pb2", {"loss.label_smoothing": {"choice": [0.0, 0.1]}}, "loss.label_smoothing is no interval"),
    ],
)
def test_what_a_running_training_cannot_change_is_refused(name: SchedulerName, ranges: Any, says: str) -> None:
    with pytest.raises(WrongCall) as refusal:
        scheduler(name, ranges=ranges)
    assert says in str(refusal.value)


def test_a_condition_is_refused_by_population_based_training() -> None:
    ranges = {
        "loss.detach_prototypes": {"choice": [False, True]},
        "loss.temperature": {"uniform": [0.05, 0.5], "when": {"loss.detach_prototypes": [False]}},
    }
    with pytest.raises(WrongCall, match=r"loss\.temperature has a condition, which the scheduler pbt knows nothing"):
        scheduler("pbt", ranges=ranges)


def test_pb2_says_what_it_lacks_or_is_made() -> None:
    if importlib.util.find_spec("sklearn") is None:
        with pytest.raises(WrongCall, match="pb2 needs scikit-learn: pip install scikit-learn"):
            scheduler("pb2")
    else:
        assert type(scheduler("pb2")).__name__ == "Pb2"


def test_what_pb2_knows_survives_a_killed_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.tune.schedulers.pb2.import_pb2_dependencies", lambda: True)  # it fits no model here
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    before, after = scheduler("pb2"), scheduler("pb2")
    assert isinstance(before, Pb2)
    assert isinstance(after, Pb2)
    before.set_search_properties("miou", "max")
    for iteration in (10, 20):
        trial: Any = SimulatedTrial(iteration, [])
        trial.config = {"optimizer.lr": 1e-4 * iteration}
        before._save_trial_state(_PBTTrialState(trial), iteration, {"iteration": iteration, "miou": 0.3}, trial)
    before.last_exploration_time = 20
    assert len(before.data) == 2
    after.recall(pickle.loads(pickle.dumps(before.known())))
    assert after.data.equals(before.data)
    assert after.last_exploration_time == 20


def test_pbt_lets_every_trial_but_the_recipe_take_over_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Any]] = []
    monkeypatch.setattr(
        "ray.tune.schedulers.PopulationBasedTraining._checkpoint_or_exploit", lambda *given: asked.append(given[4])
    )
    population: list[Any] = [
        type("Trial", (), {"trial_id": f"3c0de_{number:05}", "experiment_tag": f"{number}_lr=1"})()
        for number in range(3)
    ]
    found = scheduler("pbt")
    assert isinstance(found, Pbt)
    found._checkpoint_or_exploit(population[1], None, [], population)
    assert asked == [population[1:]]


def test_pbt_keeps_what_it_changes_within_its_range() -> None:
    ranges = {**LR, "model.drop_path": {"uniform": [0.0, 0.3]}, "augmentation.flip": {"choice": [0.0, 0.5]}}
    found = scheduler("pbt", ranges=ranges)
    assert isinstance(found, Pbt)
    space = SearchSpace({}, {}, ranges)
    population: Any = type(
        "T", (), {"config": {"optimizer.lr": 1e-3, "model.drop_path": 0.3, "augmentation.flip": 0.5}}
    )
    for _ in range(50):
        point, _ = found._get_new_config(population, population)
        assert space.lacks(point) is None
