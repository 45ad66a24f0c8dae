"""A search space says what is wrong with it before a trial is run, and trial 0 is the recipe itself."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from pipeline.command_line import WrongCall, load, read_yaml
from pipeline.search_space import Parameter, SearchSpace
from pipeline.sweep import SweepConfig, search_space
from pipeline.train_parts import build_optimizer
from rssnet import RSSNet, RSSNetLoss

WEIGHTS = ("auxiliary", "attention_bce", "attention_dice", "region_classification", "region_separation")
WEIGHTS += ("separation_supervision",)

LR = {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}}
SWITCH = "model.separation.enabled"
KERNEL = {
    SWITCH: {"choice": [True, False]},
    "model.separation.kernel_size": {"choice": [3, 5], "when": {SWITCH: [True]}},
}
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
        ({"batch_size": {"randint": [1.5, 32]}}, "The range of batch_size is [1.5, 32]: randint takes whole numbers"),
        ({"optimizer.lr": {"quniform": [0.0, 1.0]}}, "quniform takes [low, high, step], three numbers"),
        ({"batch_size": {"quniform": [8, 32, 5]}}, "The range of batch_size is [8, 32, 5]: its step must divide high"),
        ({"batch_size": {"quniform": [8, 32, 0]}}, "its step must divide high minus low"),
        ({"batch_size": {"quniform": [6, 30, 4]}}, "The range of batch_size leaves out the recipe's own value 16"),
        ({**KERNEL, "model.separation.kernel_size": {"when": {SWITCH: [True]}}}, "write one of choice, uniform"),
        ({"model.separation.kernel_size": {"choice": [3], "when": {SWITCH: [True]}}}, f"names {SWITCH}, which is not"),
        ({**KERNEL, SWITCH: {"choice": [True, False], "when": {"model.separation.kernel_size": [3]}}}, "in a circle"),
        ({**KERNEL, "model.separation.groups": {"choice": [1], "when": {SWITCH: ["on"]}}}, "to be 'on', which is not"),
        ({**KERNEL, "model.separation.groups": {"choice": [1], "when": {SWITCH: [1]}}}, "to be 1, which is not in its"),
        ({**KERNEL, "model.separation.groups": {"choice": [1], "when": {SWITCH: []}}}, "The condition of model.separ"),
        ({**KERNEL, "model.separation.groups": {"choice": [1], "when": SWITCH}}, "The condition of model.separ"),
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


def drawn(space: SearchSpace, count: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(count)]


def test_each_kind_of_range_yields_its_values() -> None:
    space = SearchSpace(
        {},
        {},
        {
            "batch_size": {"choice": [8, 16]},
            "optimizer.weight_decay": {"uniform": [0.01, 0.1]},
            **LR,
            "model.local_pathway.depth": {"randint": [2, 5]},
            "model.image_size": {"quniform": [384, 640, 128]},
            "augmentation.flip": {"quniform": [0.0, 1.0, 0.25]},
            "augmentation.scale": {"choice": [[0.5, 2.0], [0.75, 1.5]]},
        },
    )
    samples = drawn(space, 200)
    assert {sample["batch_size"] for sample in samples} == {8, 16}
    assert all(0.01 <= sample["optimizer.weight_decay"] <= 0.1 for sample in samples)
    assert {sample["model.local_pathway.depth"] for sample in samples} == {2, 3, 4}
    assert {sample["model.image_size"] for sample in samples} == {384, 512, 640}
    assert {sample["augmentation.flip"] for sample in samples} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert [0.75, 1.5] in [sample["augmentation.scale"] for sample in samples]
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


def test_a_parameter_with_a_condition_is_drawn_only_where_it_holds() -> None:
    space = SearchSpace({}, {}, KERNEL)
    samples = drawn(space, 60)
    assert {sample[SWITCH] for sample in samples} == {True, False}
    assert all(("model.separation.kernel_size" in sample) == sample[SWITCH] for sample in samples)
    assert space.default() == {SWITCH: True, "model.separation.kernel_size": 3}
    off = SearchSpace({"model": {"separation": {"enabled": False, "kernel_size": 7}}}, {}, KERNEL)
    assert off.default() == {SWITCH: False}, "the recipe's own kernel plays no part, and may lie outside the range"


def test_conditions_may_follow_each_other() -> None:
    groups = {"model.separation.groups": {"choice": [1, 2], "when": {"model.separation.kernel_size": [5]}}}
    space = SearchSpace({}, {}, {**groups, **KERNEL})
    assert space.lacks({SWITCH: True, "model.separation.kernel_size": 5, "model.separation.groups": 2}) is None
    assert all(("model.separation.groups" in sample) == (sample.get("model.separation.kernel_size") == 5)
               for sample in drawn(space, 60))  # fmt: skip
    assert len(list(space.grid())) == 4, "off, 3, 5 with 1 and 5 with 2"


@pytest.mark.parametrize(
    ("point", "says"),
    [
        (
            {SWITCH: False, "model.separation.kernel_size": 3},
            "model.separation.kernel_size plays no part with the other",
        ),
        ({SWITCH: True}, "model.separation.kernel_size is missing"),
        ({SWITCH: True, "model.separation.kernel_size": 7}, "model.separation.kernel_size is 7, outside its range"),
        ({SWITCH: False, "batch_size": 3}, "batch_size is not searched"),
    ],
)
def test_what_is_no_point_of_the_space_is_told_from_one(point: dict[str, Any], says: str) -> None:
    space = SearchSpace({}, {}, KERNEL)
    assert says in str(space.lacks(point))
    assert space.lacks({SWITCH: False}) is None


def test_a_grid_has_each_point_once_and_no_intervals() -> None:
    ranges = {"batch_size": {"randint": [15, 18]}, "augmentation.flip": {"quniform": [0.0, 1.0, 0.5]}}
    points = list(SearchSpace({}, {}, ranges).grid())
    assert len(points) == len({(point["batch_size"], point["augmentation.flip"]) for point in points}) == 9
    with pytest.raises(WrongCall, match=r"The range of optimizer\.lr is an interval, which the searcher grid cannot"):
        next(SearchSpace({}, {}, {**ranges, **LR}).grid())


@pytest.mark.parametrize(
    ("described", "value", "nearest"),
    [
        ({"uniform": [0.0, 1.0]}, 1.2, 1.0),
        ({"loguniform": [0.1, 1.0]}, 0.08, 0.1),
        ({"randint": [2, 5]}, 6, 4),
        ({"quniform": [0.0, 1.0, 0.25]}, 0.6, 0.5),
        ({"choice": [1, 2]}, 2, 2),
    ],
)
def test_a_value_is_brought_back_into_its_range(described: dict[str, Any], value: float, nearest: float) -> None:
    ((kind, values),) = described.items()
    parameter = Parameter("any", kind, values, {})
    assert parameter.nearest(value) == nearest
    assert parameter.contains(parameter.nearest(value))


def test_the_full_schedule_is_the_bases_own() -> None:
    base = {"iterations": 800, "evaluate_every": 100, "optimizer": {"warmup_iterations": 50}}
    fixed = {"iterations": 40, "evaluate_every": 20, "optimizer.warmup_iterations": 2, "batch_size": 4}
    full = SearchSpace(base, fixed, LR).full("d", "r", {"optimizer.lr": 2e-4})
    assert (full.iterations, full.evaluate_every, full.optimizer.warmup_iterations) == (800, 100, 50)
    assert (full.batch_size, full.optimizer.lr) == (4, 2e-4)


PRESETS = sorted((Path(__file__).parents[2] / "workflows" / "presets").glob("sweep_*.yaml"))
COVERED = {
    "sweep_modules": [
        *("model.separation.kernel_size", "model.separation.groups", "model.separation.max_gate"),
        *("model.local_pathway.depth", "model.local_pathway.width", "model.local_pathway.tap"),
        *("model.cross_attention.layers", SWITCH, "model.local_pathway.enabled", "model.cross_attention.enabled"),
    ],
    "sweep_losses": ["loss.temperature", *(f"loss.{name}" for name in WEIGHTS)],
    "sweep_optimizer": [
        *("optimizer.lr", "optimizer.decoder_lr_scale", "optimizer.layer_decay"),
        *("model.drop_path", "model.image_size"),
    ],
    "sweep_everything": ["model.separation.kernel_size", "loss.temperature", "optimizer.lr", "model.image_size"],
    "sweep_smoke": [],
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_a_preset_is_a_space_whose_points_make_models(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(preset.parents[2])
    config = load(SweepConfig, read_yaml(str(preset)), {"dataset": "d", "run": "r"})
    space = search_space(config)
    assert set(COVERED[preset.stem]) <= space.ranges.keys()
    for point in [space.default(), *drawn(space, 3)]:
        assert space.lacks(point) is None
        train = space.config("d", "r", point)
        with torch.device("meta"):
            model = RSSNet(dataclasses.replace(train.model, num_classes=11, pretrained=False))
        build_optimizer(model, train)
        RSSNetLoss(train.loss, 11)
