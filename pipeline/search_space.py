"""The search space of a sweep: from YAML over the fields of a training configuration to Ray Tune's domains."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from pipeline.command_line import WrongCall, load
from pipeline.training import TrainConfig

KINDS = ("choice", "uniform", "loguniform", "randint")
PER_TRIAL = ("dataset", "run")


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
            if name in PER_TRIAL:
                raise WrongCall(f"The field {name} cannot be searched: the sweep itself sets it.")
            _check_range(name, described)
        for name, default in self.default().items():
            described = self.ranges[name]
            for value in _tried(described):
                self._check_value(name, value)
            if not _contains(described, default):
                raise WrongCall(
                    f"The range of {name} leaves out the recipe's own value {default!r}, which trial 0 tries: "
                    "widen it, or set another value in the base configuration."
                )

    def _check_value(self, name: str, value: Any) -> None:
        try:
            self.config("unused", "unused", {name: value})
        except WrongCall as error:
            raise WrongCall(f"The range of {name} has {value!r}, which that field cannot be: {error}") from error

    def config(self, dataset: str, run: str, values: Mapping[str, Any]) -> TrainConfig:
        """The training configuration of one trial."""
        return load(TrainConfig, self.base, {"dataset": dataset, "run": run, **self.fixed, **values})

    def default(self) -> dict[str, Any]:
        """The recipe's own value of each searched field."""
        config = self.config("unused", "unused", {})
        return {name: _value(config, name) for name in self.ranges}

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
    numbers = [value for value in values if type(value) in (int, float) and math.isfinite(value)]
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
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return values[0] <= value < values[1] if kind == "randint" else values[0] <= value <= values[1]


def _tried(described: Mapping[str, list[Any]]) -> list[Any]:
    """Values that stand for a range: all of a choice, the ends of an interval, of the type that it yields."""
    ((kind, values),) = described.items()
    if kind == "choice":
        return values
    return [values[0], values[1] - 1] if kind == "randint" else [float(value) for value in values]


def _value(config: Any, dotted: str) -> Any:
    """The value of a dotted field in a configuration, or in a dict within it such as `model.backbone_options`."""
    value = config
    for part in dotted.split("."):
        if isinstance(value, Mapping) and part not in value:
            raise WrongCall(
                f"The field {dotted} has no value in the recipe for trial 0 to try: set it in the base configuration."
            )
        if not isinstance(value, Mapping) and not (dataclasses.is_dataclass(value) and hasattr(value, part)):
            raise WrongCall(f"There is no field {dotted} ({part!r} is unknown): see train.py --help for their names.")
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    if dataclasses.is_dataclass(value):
        raise WrongCall(f"{dotted} is a group of fields: search one of them, as {dotted}.{_first_field(value)}.")
    return value


def _first_field(group: Any) -> str:
    return dataclasses.fields(group)[0].name
