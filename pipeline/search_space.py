"""The search space of a sweep: from YAML over the fields of a training configuration to points that can be tried."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.call_errors import meant
from pipeline.command_line import WrongCall, load
from pipeline.train_config import TrainConfig

KINDS = ("choice", "uniform", "loguniform", "randint", "quniform")
WHEN = "when"
PER_TRIAL = ("dataset", "run")
SCHEDULE = ("iterations", "evaluate_every", "checkpoint_every", "optimizer.warmup_iterations")


class Suggester(Protocol):
    """What draws a value for each parameter that it is asked for, such as an `optuna.Trial`."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int: ...


@dataclass(frozen=True)
class Parameter:
    """One field that is searched.

    Args:
        name: of the field, dotted.
        kind: one of `KINDS`.
        values: all of a choice, or [low, high] of an interval, or [low, high, step] of a quniform.
        when: by other parameters' names, the values with which this one plays a part; without them it is left out.
    """

    name: str
    kind: str
    values: list[Any]
    when: Mapping[str, list[Any]]

    def contains(self, value: Any) -> bool:
        """Whether the value can be drawn."""
        if self.kind == "choice":
            return self._position(value) is not None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        if self.kind == "randint":
            return isinstance(value, int) and self.values[0] <= value < self.values[1]
        within = self.values[0] <= value <= self.values[1]
        if self.kind != "quniform":
            return within
        steps = (value - self.values[0]) / self.values[2]
        return within and math.isclose(steps, round(steps), abs_tol=1e-9)

    @property
    def distribution(self) -> BaseDistribution:
        """Optuna's name for the same; a choice that Optuna cannot hold, such as a list, is told as its JSON text."""
        if self.kind == "choice":
            return CategoricalDistribution([_plain(value) for value in self.values])
        low, high = self.values[:2]
        if self.kind == "randint":
            return IntDistribution(low, high - 1)
        if self.kind == "quniform":
            whole = all(isinstance(value, int) for value in self.values)
            return (IntDistribution if whole else FloatDistribution)(low, high, step=self.values[2])
        return FloatDistribution(float(low), float(high), log=self.kind == "loguniform")

    def suggested(self, suggester: Suggester) -> Any:
        """A value that the suggester draws."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            drawn = suggester.suggest_categorical(self.name, list(distribution.choices))
            return self.values[list(distribution.choices).index(drawn)]
        if isinstance(distribution, IntDistribution):
            return suggester.suggest_int(self.name, distribution.low, distribution.high, step=distribution.step)
        assert isinstance(distribution, FloatDistribution)
        options: dict[str, Any] = {"log": True} if distribution.log else {"step": distribution.step}
        return suggester.suggest_float(self.name, distribution.low, distribution.high, **options)

    def told(self, value: Any) -> Any:
        """A value as Optuna has to be told of it."""
        if self.kind != "choice":
            return value
        position = self._position(value)
        assert position is not None
        return _plain(self.values[position])

    def finite(self) -> list[Any] | None:
        """All values that can be drawn; None for an interval."""
        if self.kind == "choice":
            return self.values
        distribution = self.distribution
        if isinstance(distribution, IntDistribution):
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        assert isinstance(distribution, FloatDistribution)
        if distribution.step is None:
            return None
        steps = round((distribution.high - distribution.low) / distribution.step)
        return [round(distribution.low + step * distribution.step, 12) for step in range(steps + 1)]

    def nearest(self, value: Any) -> Any:
        """The nearest value that can be drawn to one that lies outside an interval."""
        if self.kind == "choice":
            return value
        low, high = self.values[:2]
        if self.kind == "quniform":
            step = self.values[2]
            value = low + step * round((value - low) / step)
        if self.kind == "randint":
            value, high = round(value), high - 1
        return type(value)(min(max(value, low), high))

    def _position(self, value: Any) -> int | None:
        for position, item in enumerate(self.values):
            same = list(value) == item if isinstance(value, tuple) else value == item
            if same and isinstance(value, bool) == isinstance(item, bool):  # True == 1
                return position
        return None


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space over a base configuration.

    Args:
        base: a training configuration as its YAML document says it; empty for the defaults.
        fixed: values that all trials share, by dotted field name.
        ranges: what is searched, by dotted field name: `{choice: [...]}`, `{uniform: [low, high]}`,
            `{loguniform: [low, high]}`, `{randint: [low, high]}` without its upper end, or `{quniform: [low, high,
            step]}` with it. Beside that, `when: {other.field: [values]}` lets the field play a part only while another
            one that is searched has one of these values, e.g. the kernel of a module only where the module is there.

    Raises:
        WrongCall: naming the field that is unknown, or whose range is empty, reversed or of the wrong type, or whose
            condition can never hold.
    """

    base: Mapping[str, Any]
    fixed: Mapping[str, Any]
    ranges: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise WrongCall("The search space is empty: name at least one field under `space`.")
        for name, described in self.ranges.items():
            if name in self.fixed:
                raise WrongCall(f"The field {name} is both fixed and searched: remove it from one of the two.")
            if name in PER_TRIAL:
                raise WrongCall(f"The field {name} cannot be searched: the sweep itself sets it.")
            _check_range(name, described)
        recipe = self.config("unused", "unused", {})
        values = {name: _value(recipe, name) for name in self.ranges}
        for name in self.ranges:
            for value in _tried(self.parameters[name]):
                self._check_value(name, value)
        for parameter in self.parameters.values():
            _check_condition(parameter, self.parameters)
        active = self.default()  # raises for conditions that go round in a circle
        for name, parameter in self.parameters.items():
            if name in active and not parameter.contains(values[name]):
                raise WrongCall(
                    f"The range of {name} leaves out the recipe's own value {values[name]!r}, which trial 0 tries: "
                    "widen it, or set another value in the base configuration."
                )

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """What is searched, by name."""
        found = {}
        for name, described in self.ranges.items():
            (kind,) = described.keys() - {WHEN}
            found[name] = Parameter(name, kind, described[kind], described.get(WHEN, {}))
        return found

    def config(self, dataset: str, run: str, values: Mapping[str, Any]) -> TrainConfig:
        """The training configuration of one trial; raises `WrongCall` for values that its fields refuse together."""
        return load(TrainConfig, self.base, {"dataset": dataset, "run": run, **self.fixed, **values})

    def full(self, dataset: str, run: str, values: Mapping[str, Any]) -> TrainConfig:
        """A trial's configuration with the base's own schedule, where `fixed` has shortened it for the search."""
        fixed = {name: value for name, value in self.fixed.items() if name not in SCHEDULE}
        return load(TrainConfig, self.base, {"dataset": dataset, "run": run, **fixed, **values})

    def default(self) -> dict[str, Any]:
        """The recipe's own value of each parameter that plays a part in it."""
        return self.point_of(self.config("unused", "unused", {}))

    def point_of(self, config: TrainConfig) -> dict[str, Any]:
        """What a configuration says of each parameter that plays a part in it; it may lie outside the ranges."""
        point: dict[str, Any] = {}
        for parameter in self.ordered:
            if _holds(parameter, point):
                point[parameter.name] = _value(config, parameter.name)
        return point

    def suggest(self, suggester: Suggester) -> dict[str, Any]:
        """A point, each of whose values the suggester draws; parameters that play no part are left out."""
        point: dict[str, Any] = {}
        for parameter in self.ordered:
            if _holds(parameter, point):
                point[parameter.name] = parameter.suggested(suggester)
        return point

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point, once.

        Raises:
            WrongCall: naming an interval, which has no end of them.
        """
        for name, parameter in self.parameters.items():
            if parameter.finite() is None:
                raise WrongCall(
                    f"The range of {name} is an interval, which the searcher grid cannot go through: "
                    "write choice, randint or quniform, or take the searcher random or optuna."
                )
        yield from self._grid(self.ordered, {})

    def _grid(self, left: list[Parameter], point: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not left:
            yield dict(point)
        elif not _holds(left[0], point):
            yield from self._grid(left[1:], point)
        else:
            for value in left[0].finite() or []:
                yield from self._grid(left[1:], {**point, left[0].name: value})

    def lacks(self, point: Mapping[str, Any]) -> str | None:
        """Why a point is none of this space, for a person to read; None if it is one."""
        for name in point:
            if name not in self.ranges:
                return f"{name} is not searched"
        passed: dict[str, Any] = {}
        for parameter in self.ordered:
            name = parameter.name
            if not _holds(parameter, passed):
                if name in point:
                    return f"{name} plays no part with the other values"
                continue
            if name not in point:
                return f"{name} is missing"
            if not parameter.contains(point[name]):
                return f"{name} is {point[name]!r}, outside its range"
            passed[name] = point[name]
        return None

    @cached_property
    def ordered(self) -> list[Parameter]:
        """The parameters, each behind those that its condition names."""
        left, ordered = list(self.parameters.values()), list[Parameter]()
        while left:
            known = {parameter.name for parameter in ordered}
            free = [parameter for parameter in left if parameter.when.keys() <= known]
            if not free:
                circle = ", ".join(parameter.name for parameter in left)
                raise WrongCall(f"The conditions of {circle} go round in a circle: leave out one `{WHEN}`.")
            ordered += free
            left = [parameter for parameter in left if parameter not in free]
        return ordered

    def _check_value(self, name: str, value: Any) -> None:
        try:
            self.config("unused", "unused", {name: value})
        except WrongCall as error:
            raise WrongCall(f"The range of {name} has {value!r}, which that field cannot be: {error}") from error


def _holds(parameter: Parameter, point: Mapping[str, Any]) -> bool:
    return all(
        name in point and Parameter(name, "choice", values, {}).contains(point[name])
        for name, values in parameter.when.items()
    )


def _check_range(name: str, described: Any) -> None:
    kinds = described.keys() - {WHEN} if isinstance(described, Mapping) else set()
    if len(kinds) != 1 or not kinds <= set(KINDS):
        raise WrongCall(
            f"The range of {name} is {described!r}: write one of {', '.join(KINDS)}, as {{choice: [1, 2]}}."
        )
    (kind,) = kinds
    values = described[kind]
    if not isinstance(values, list) or not values:
        raise WrongCall(f"The range of {name} is empty: list at least one value under {kind}.")
    if kind == "choice":
        return
    count, form = (3, "[low, high, step], three") if kind == "quniform" else (2, "[low, high], two")
    numbers = [value for value in values if type(value) in (int, float) and math.isfinite(value)]
    if len(numbers) != count or len(values) != count:
        raise WrongCall(f"The range of {name} is {values}: {kind} takes {form} numbers.")
    low, high = numbers[:2]
    if low >= high:
        raise WrongCall(f"The range of {name} has low {low} not below high {high}: exchange them.")
    if kind == "loguniform" and low <= 0:
        raise WrongCall(f"The range of {name} begins at {low}: loguniform needs numbers above 0.")
    if kind == "randint" and not all(isinstance(value, int) for value in numbers):
        raise WrongCall(f"The range of {name} is {values}: randint takes whole numbers.")
    if kind == "quniform":
        steps = (high - low) / numbers[2] if numbers[2] > 0 else 0.5
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise WrongCall(f"The range of {name} is {values}: its step must divide high minus low.")


def _check_condition(parameter: Parameter, parameters: Mapping[str, Parameter]) -> None:
    name, when = parameter.name, parameter.when
    if not isinstance(when, Mapping) or not all(isinstance(values, list) and values for values in when.values()):
        raise WrongCall(
            f"The condition of {name} is {when!r}: write {{other.field: [values]}}, at least one value for each."
        )
    for other, values in when.items():
        if other not in parameters:
            raise WrongCall(f"The condition of {name} names {other}, which is not searched: search it, too.")
        for value in values:
            if not parameters[other].contains(value):
                raise WrongCall(f"The condition of {name} wants {other} to be {value!r}, which is not in its range.")


def _tried(parameter: Parameter) -> list[Any]:
    """Values that stand for a range: all of a choice, the ends of an interval, of the type that it yields."""
    if parameter.kind == "choice":
        return parameter.values
    low, high = parameter.values[:2]
    if parameter.kind == "randint":
        return [low, high - 1]
    return [low, high] if isinstance(parameter.distribution, IntDistribution) else [float(low), float(high)]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _value(config: Any, dotted: str) -> Any:
    """The value of a dotted field in a configuration, or in a dict within it such as `model.backbone_options`."""
    value = config
    for part in dotted.split("."):
        if isinstance(value, Mapping) and part not in value:
            raise WrongCall(
                f"The field {dotted} has no value in the recipe for trial 0 to try: set it in the base configuration."
            )
        if not isinstance(value, Mapping) and not (dataclasses.is_dataclass(value) and hasattr(value, part)):
            close = meant(dotted, type(config)) or ": see train.py --help for their names."
            raise WrongCall(f"There is no field {dotted} ({part!r} is unknown){close}")
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    if dataclasses.is_dataclass(value):
        raise WrongCall(f"{dotted} is a group of fields: search one of them, as {dotted}.{_first_field(value)}.")
    return value


def _first_field(group: Any) -> str:
    return dataclasses.fields(group)[0].name


def duplicates_left_out(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points in order, each once."""
    seen: set[str] = set()
    kept = []
    for point in points:
        key = json.dumps(point, sort_keys=True, default=list)
        if key not in seen:
            seen.add(key)
            kept.append(point)
    return kept
