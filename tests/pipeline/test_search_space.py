"""A search space says what is wrong with it before a trial is run, and trial 0 is the recipe itself."""

import copy
from typing import Any

import pytest

from pipeline.command_line import WrongCall
from pipeline.search_space import SearchSpace

LR = {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}}
BASE = {"optimizer": {"lr": 1e-4}, "model": {"backbone_options": {"depth": 6}}}


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ({"optimizer.rate": {"choice": [1]}}, "There is no field optimizer.rate ('rate' is unknown)"),
        ({"optimiser.lr": {"choice": [1]}}, "There is no field optimiser.lr ('optimiser' is unknown)"),
        ({"optimizer.lr.x": {"choice": [1]}}, "There is no field optimizer.lr.x"),
        ({"optimizer": {"choice": [{"lr": 1e-3}]}}, "optimizer is a group of fields: search one of them"),
        ({"run": {"choice": ["a", "b"]}}, "run cannot be searched: the sweep itself sets it"),
        ({"optimizer.lr": 1e-3}, "The range of optimizer.lr is 0.001: write one of choice, uniform, logun"),
        ({"optimizer.lr": {"normal": [0, 1]}}, "The range of optimizer.lr is {'normal': [0, 1]}: write one of choice"),
        ({"optimizer.lr": {"choice": [1], "uniform": [0, 1]}}, "The range of optimizer.lr is"),
        ({"optimizer.lr": {}}, "The range of optimizer.lr is {}"),
        ({"optimizer.lr": {"choice": []}}, "The range of optimizer.lr is empty: list at least one value under choice"),
        ({"optimizer.lr": {"choice": 1e-3}}, "The range of optimizer.lr is empty"),
        ({"optimizer.lr": {"uniform": [1e-3]}}, "The range of optimizer.lr is [0.001]: uniform takes [low, high]"),
        ({"optimizer.lr": {"uniform": [1, 2, 3]}}, "uniform takes [low, high], two numbers"),
        ({"optimizer.lr": {"uniform": ["1e-5", 1]}}, "The range of optimizer.lr is ['1e-5', 1]: uniform takes"),
        ({"optimizer.lr": {"uniform": [False, 1]}}, "The range of optimizer.lr is [False, 1]: uniform takes"),
        ({"optimizer.lr": {"uniform": [0, float("inf")]}}, "uniform takes [low, high], two numbers"),
        ({"optimizer.lr": {"uniform": [1e-3, 1e-5]}}, "The range of optimizer.lr has low 0.001 not below high 1e-05"),
        ({"optimizer.lr": {"uniform": [1e-3, 1e-3]}}, "low 0.001 not below high 0.001: exchange them"),
        ({"optimizer.lr": {"loguniform": [0, 1]}}, "The range of optimizer.lr begins at 0: loguniform needs num"),
        ({"batch_size": {"choice": [16, "many"]}}, "The range of batch_size has 'many', which that field cannot be"),
        ({"batch_size": {"uniform": [1, 32]}}, "The range of batch_size has 1.0, which that field cannot be"),
        ({"batch_size": {"randint": [1.5, 32]}}, "The range of batch_size has 1.5, which that field cannot be"),
        ({"augmentation.flip": {"uniform": [0, 2]}}, "The range of augmentation.flip has 2.0, which that field"),
        ({"model.local_pathway.kernel_size": {"choice": [3, 4]}}, "The range of model.local_pathway.kernel_size has 4"),
        ({"optimizer.lr": {"uniform": [0.1, 1]}}, "The range of optimizer.lr leaves out the recipe's own value 3e-05"),
        ({"batch_size": {"choice": [8, 32]}}, "The range of batch_size leaves out the recipe's own value 16"),
        ({"batch_size": {"randint": [8, 16]}}, "The range of batch_size leaves out the recipe's own value 16"),
        ({"model.backbone_options.depth": {"choice": [4]}}, "model.backbone_options.depth has no value in the recipe"),
    ],
)  # fmt: skip
def test_a_range_that_cannot_be_searched_is_refused_by_name(ranges: dict[str, Any], says: str) -> None:
    with pytest.raises(WrongCall) as refusal:
        SearchSpace({}, {}, ranges)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(WrongCall, match="The search space is empty: name at least one field under `space`"):
        SearchSpace({}, {}, {})


def test_a_field_cannot_be_fixed_and_searched() -> None:
    with pytest.raises(WrongCall, match=r"The field optimizer\.lr is both fixed and searched: remove it from one"):
        SearchSpace({}, {"optimizer.lr": 1e-4}, LR)


@pytest.mark.parametrize(
    ("base", "fixed", "says"),
    [
        ({"optimiser": {"lr": 1}}, {}, "optimiser"),
        ({"optimizer": {"lr": "fast"}}, {}, "optimizer.lr"),
        ({"optimizer": None}, {}, "optimizer is None"),
        ({"batch_size": None}, {}, "batch_size has no value"),
        ({}, {"optimizer.rate": 1}, "rate"),
        ({}, {"iterations": "many"}, "iterations"),
        ({}, {"iterations.x": 1}, "iterations"),
        ({"iterations": 5}, {"iterations.x": 1}, "iterations is 5, so iterations.x cannot be set"),
    ],
)
def test_a_base_or_a_fixed_value_that_cannot_be_is_refused_by_name(base: dict, fixed: dict, says: str) -> None:
    with pytest.raises(WrongCall) as refusal:
        SearchSpace(base, fixed, LR)
    assert says in str(refusal.value)


def test_each_kind_of_range_yields_its_values() -> None:
    space = SearchSpace(
        {},
        {},
        {
            "batch_size": {"choice": [8, 16]},
            "optimizer.weight_decay": {"uniform": [0.01, 0.1]},
            **LR,
            "model.local_pathway.depth": {"randint": [2, 5]},
        },
    )
    samples = [{name: domain.sample() for name, domain in space.domains().items()} for _ in range(200)]
    assert {sample["batch_size"] for sample in samples} == {8, 16}
    assert all(0.01 <= sample["optimizer.weight_decay"] <= 0.1 for sample in samples)
    assert {sample["model.local_pathway.depth"] for sample in samples} == {2, 3, 4}
    rates = sorted(sample["optimizer.lr"] for sample in samples)
    assert 1e-5 <= rates[0] < rates[-1] <= 1e-3
    assert 3e-5 < rates[100] < 3e-4  # the middle of the logarithms, far below the middle of the range


def test_the_recipes_own_values_are_the_first_point() -> None:
    ranges = {**LR, "batch_size": {"choice": [4, 8]}, "model.backbone_options.depth": {"choice": [6, 12]}}
    space = SearchSpace(BASE, {"batch_size": 8}, {name: ranges[name] for name in ranges if name != "batch_size"})
    assert space.default() == {"optimizer.lr": 1e-4, "model.backbone_options.depth": 6}
    assert SearchSpace({**BASE, "batch_size": 4}, {}, ranges).default()["batch_size"] == 4
    assert SearchSpace({}, {}, LR).default() == {"optimizer.lr": 3e-5}


def test_a_choice_of_lists_holds_a_tuple() -> None:
    space = SearchSpace({}, {}, {"augmentation.scale": {"choice": [[0.5, 2.0], [0.75, 1.5]]}})
    assert space.default() == {"augmentation.scale": (0.5, 2.0)}
    assert space.config("d", "r", {"augmentation.scale": [0.75, 1.5]}).augmentation.scale == (0.75, 1.5)


def test_a_trials_values_stand_above_the_fixed_ones_and_those_above_the_base() -> None:
    space = SearchSpace(BASE, {"iterations": 40, "optimizer": {"power": 0.9}}, LR)
    config = space.config("s3://data/set", "s3://runs/1", {"optimizer.lr": 5e-4, "model.backbone_options.depth": 3})
    assert (config.dataset, config.run) == ("s3://data/set", "s3://runs/1")
    assert (config.optimizer.lr, config.optimizer.power, config.iterations) == (5e-4, 0.9, 40)
    assert config.model.backbone_options == {"depth": 3}
    assert config.batch_size == 16


def test_making_configurations_changes_nothing_of_the_space() -> None:
    base, fixed, ranges = copy.deepcopy(BASE), {"optimizer": {"lr": 2e-4}}, copy.deepcopy(LR)
    space = SearchSpace(base, fixed, ranges)
    space.config("d", "r", {"optimizer.lr": 1e-3, "model.backbone_options.depth": 3})
    assert (base, fixed, ranges) == (BASE, {"optimizer": {"lr": 2e-4}}, LR)
    assert space.default() == {"optimizer.lr": 2e-4}
