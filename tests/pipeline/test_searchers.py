"""Searchers: what they try first, what they are told, and what they still know after a kill."""

import math
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipeline.command_line import WrongCall
from pipeline.objectives import Objectives
from pipeline.search_space import SearchSpace
from pipeline.searchers import FAILURE, PLANNED, Evaluated, SearcherName, StudySearcher

SWITCH, KERNEL = "model.separation.enabled", "model.separation.kernel_size"
SPACE = SearchSpace(
    {},
    {},
    {
        "optimizer.lr": {"loguniform": [1e-5, 1e-3]},
        "augmentation.scale": {"choice": [[0.5, 2.0], [0.75, 1.5]]},
        SWITCH: {"choice": [True, False]},
        KERNEL: {"choice": [3, 5], "when": {SWITCH: [True]}},
    },
)
MIOU = Objectives(("miou",))


def searcher(name: SearcherName = "optuna", seed: int = 0, **options: Any) -> StudySearcher:
    options = {"first": [SPACE.default()], **options}
    return StudySearcher(options.pop("space", SPACE), name, options.pop("objectives", MIOU), seed, **options)


def result(miou: float, iteration: int = 100) -> dict[str, Any]:
    return {"miou": miou, "iteration": iteration, PLANNED: 100}


def tried(found: StudySearcher, count: int, score: Any = lambda _: 0.5) -> list[dict[str, Any]]:
    points = []
    for number in range(count):
        point = found.suggest(str(number))
        assert point is not None
        points.append(point)
        found.on_trial_complete(str(number), result(score(point)))
    return points


def test_the_recipe_is_tried_first_then_the_known_points() -> None:
    point = {"optimizer.lr": 4e-4, "augmentation.scale": [0.75, 1.5], SWITCH: False}
    for name in ("random", "optuna"):
        points = tried(searcher(name, first=[SPACE.default(), point]), 3)
        assert points[0] == {**SPACE.default(), "augmentation.scale": [0.5, 2.0]}
        assert points[1] == point
        assert points[2] not in points[:2]


def test_the_same_seed_tries_the_same_points_and_another_others() -> None:
    for name in ("random", "optuna"):
        assert tried(searcher(name, seed=3), 14) == tried(searcher(name, seed=3), 14)
        assert tried(searcher(name, seed=3), 14) != tried(searcher(name, seed=4), 14)


def closeness(point: dict[str, Any]) -> float:
    return 1 - abs(math.log10(point["optimizer.lr"]) + 3.5) - 0.5 * point[SWITCH]


def test_the_estimator_learns_where_to_look() -> None:
    learnt, blind = tried(searcher("optuna"), 60, closeness)[40:], tried(searcher("random"), 60, closeness)[40:]
    assert sum(map(closeness, learnt)) > sum(map(closeness, blind)) + 5


def test_what_earlier_sweeps_have_found_is_learnt_from() -> None:
    points = tried(searcher("random"), 40)
    evaluated = [Evaluated(point, [closeness(point)]) for point in points]
    learnt, blind = tried(searcher(evaluated=evaluated), 10), tried(searcher(), 10)
    assert sum(map(closeness, learnt[1:])) > sum(map(closeness, blind[1:])) + 2


def test_a_grid_tries_every_point_once_the_recipe_first_and_ends() -> None:
    space = SearchSpace({}, {}, {name: SPACE.ranges[name] for name in (SWITCH, KERNEL)})
    found = searcher("grid", space=space, first=[space.default()])
    points = tried(found, 3)
    assert points == [{SWITCH: True, KERNEL: 3}, {SWITCH: True, KERNEL: 5}, {SWITCH: False}]
    assert found.suggest("more") == Searcher.FINISHED


def test_no_more_trials_run_than_there_is_room_for() -> None:
    room = False
    found = searcher(has_room=lambda: room)
    assert found.suggest("0") is None
    room = True
    assert found.suggest("0") is not None


@pytest.mark.parametrize(
    ("ending", "error", "state"),
    [
        (result(0.4), False, TrialState.COMPLETE),
        (result(0.4, iteration=50), False, TrialState.PRUNED),
        (result(math.nan), False, TrialState.FAIL),
        (result(0.4) | {FAILURE: "out_of_memory"}, False, TrialState.FAIL),
        (result(0.4), True, TrialState.FAIL),
        (None, True, TrialState.FAIL),
    ],
)
def test_the_study_is_told_how_a_trial_has_ended(ending: dict[str, Any] | None, error: bool, state: TrialState) -> None:
    found = searcher()
    found.suggest("0")
    found.on_trial_result("0", result(0.2, iteration=25))
    found.on_trial_complete("0", ending, error)
    found.on_trial_complete("0", ending, error)  # Ray Tune may say it again after a restart
    (trial,) = found.trials
    assert trial.state == state
    assert trial.intermediate_values[25] == 0.2
    if state == TrialState.COMPLETE:
        assert trial.value == 0.4


def test_two_objectives_are_weighed_against_each_other() -> None:
    found = searcher(objectives=Objectives(("miou", "gflops")))
    found.suggest("0")
    found.on_trial_complete("0", {**result(0.4, iteration=50), "gflops": 3.0})
    (trial,) = found.trials
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.4, 3.0])
    assert [direction.name for direction in trial_directions(found)] == ["MAXIMIZE", "MINIMIZE"]


def trial_directions(found: StudySearcher) -> list[Any]:
    return found._memory.study.directions


def test_a_searcher_goes_on_after_a_kill_as_if_nothing_had_happened(tmp_path: Path) -> None:
    undisturbed, killed = searcher(), searcher()
    for found in (undisturbed, killed):
        tried(found, 12, closeness)
        found.suggest("running")
    killed.save(str(tmp_path / "state"))
    after = searcher(seed=99)
    after.restore(str(tmp_path / "state"))
    after.on_trial_complete("running", result(0.9))
    undisturbed.on_trial_complete("running", result(0.9))
    assert after.suggest("next") == undisturbed.suggest("next")


def test_objectives_know_which_way_is_better() -> None:
    both = Objectives(("miou", "gflops"))
    found = [{"miou": 0.3, "gflops": 2.0}, {"miou": 0.4, "gflops": 3.0}, {"miou": 0.35, "gflops": 4.0}, {"miou": 0.9}]
    found += [{"miou": math.nan, "gflops": 1.0}]
    assert both.front(found) == [0, 1]
    assert both.best(found) == 1
    assert Objectives(("gflops",)).best(found) == 4
    assert Objectives(("miou",)).best([{}, {"miou": math.inf}]) is None


@pytest.mark.parametrize("names", [("speed",), (), ("miou", "miou"), ("miou", "aacc", "macc"), ("loss",)])
def test_what_is_no_objective_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(WrongCall, match="objective"):
        Objectives(names)
