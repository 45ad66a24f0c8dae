"""The search space of a sweep: from YAML over the fields of a training configuration to Ray Tune's domains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from pipeline.command_line import WrongCall, load
from pipeline.training import TrainConfig

KINDS = ("choice", "uniform", "loguniform", "randint")


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space over a base configuration.

    Args:
        base: a training configuration as its YAML document says it; empty for the defaults.
        fixed: values that all trials share, by dotted field name.
        ranges: what is searched, by dotted field name: `{choice: [...]}`, `{uniform: [low, high]}`,
            `{loguniform: [low, high]}` or `{randint: [low, high]}`, the last without its upper end.

    Raises:
        WrongCall: naming the field that is unknown, or whose range is empty, reversed or of the wrong type.
    """

    base: Mapping[str, Any]
    fixed: Mapping[str, Any]
    ranges: Mapping[str, Mapping[str, list[Any]]]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise WrongCall("The search space is empty: name at least one field under `space`.")
        for name, described in self.ranges.items():
            if name in self.fixed:
                raise WrongCall(f"The field {name} is both fixed and searched: remove it from one of the two.")
            _check_range(name, described)
            ((kind, values),) = described.items()
            for value in values if kind == "choice" else values[:1]:
                self.config("unused", "unused", {name: value})
        default = self.default()
        for name, described in self.ranges.items():
            if not _contains(described, default[name]):
                raise WrongCall(
                    f"The range of {name} leaves out the recipe's own value {default[name]!r}, which trial 0 tries: "
                    "widen it, or set another value in the base configuration."
                )

    def config(self, dataset: str, run: str, values: Mapping[str, Any]) -> TrainConfig:
        """The training configuration of one trial."""
        return load(TrainConfig, self.base, {"dataset": dataset, "run": run, **self.fixed, **values})

    def default(self) -> dict[str, Any]:
        """The recipe's own value of each searched field."""
        config = self.config("unused", "unused", {})
        return {name: _attribute(config, name) for name in self.ranges}

    def domains(self) -> dict[str, Any]:
        """Ray Tune's search space."""
        domains = {}
        for name, described in self.ranges.items():
            ((kind, values),) = described.items()
            domains[name] = tune.choice(values) if kind == "choice" else getattr(tune, kind)(*values)
        return domains


def _check_range(name: str, described: Any) -> None:
    if not isinstance(described, Mapping) or len(described) != 1 or next(iter(described)) not in KINDS:
        raise WrongCall(
            f"The range of {name} is {described!r}: write one of {', '.join(KINDS)}, as {{choice: [1, 2]}}."
        )
    ((kind, values),) = described.items()
    if not isinstance(values, list) or not values:
        raise WrongCall(f"The range of {name} is empty: list at least one value under {kind}.")
    if kind == "choice":
        return
    numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if len(numbers) != 2 or len(values) != 2:
        raise WrongCall(f"The range of {name} is {values}: {kind} takes [low, high], two numbers.")
    low, high = numbers
    if low >= high:
        raise WrongCall(f"The range of {name} has low {low} not below high {high}: exchange them.")
    if kind == "loguniform" and low <= 0:
        raise WrongCall(f"The range of {name} begins at {low}: loguniform needs numbers above 0.")


def _contains(described: Mapping[str, list[Any]], value: Any) -> bool:
    ((kind, values),) = described.items()
    if kind == "choice":
        return any(value == item or (isinstance(value, tuple) and list(value) == item) for item in values)
    return isinstance(value, (int, float)) and values[0] <= value <= values[1]


def _attribute(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config
