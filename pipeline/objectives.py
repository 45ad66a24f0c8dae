"""What a sweep looks for: one of the numbers that trials report, or two that are weighed against each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.command_line import WrongCall

# What a trial reports.
METRICS = ("miou", "macc", "aacc", "loss", "images_per_second", "gflops")
# Of these, what can be looked for, and whether more of it is better. The loss is none: where its weights are searched,
# the least is that of a training without supervisions.
OBJECTIVES: dict[str, Literal["max", "min"]] = {
    "miou": "max",
    "macc": "max",
    "aacc": "max",
    "images_per_second": "max",
    "gflops": "min",
}


@dataclass(frozen=True)
class Objectives:
    """One or two of `OBJECTIVES`; of two the first one decides which trials are stopped early, and which one is `best`.

    Raises:
        WrongCall: naming what is no objective.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in OBJECTIVES:
                raise WrongCall(f"The objective {name!r} is none that can be looked for: give {', '.join(OBJECTIVES)}.")
        if not 1 <= len(self.names) <= 2 or len(set(self.names)) != len(self.names):
            raise WrongCall(f"The objective is {list(self.names)}: give one metric, or two different ones.")

    @property
    def first(self) -> str:
        """The metric that decides where one has to."""
        return self.names[0]

    @property
    def modes(self) -> list[Literal["max", "min"]]:
        """Of each objective, `max` or `min`."""
        return [OBJECTIVES[name] for name in self.names]

    def values(self, metrics: Mapping[str, Any]) -> list[float] | None:
        """The objectives among metrics; None if one is missing or not finite."""
        found = [metrics.get(name) for name in self.names]
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in found):
            return [float(value) for value in found if value is not None]
        return None

    def best(self, candidates: Sequence[Mapping[str, Any]]) -> int | None:
        """The position of the candidate that is best by the first objective, the earliest of equals; None without."""
        sign = _sign(self.modes[0])
        scored = [
            (sign * values[0], -position)
            for position, metrics in enumerate(candidates)
            if (values := self.values(metrics)) is not None
        ]
        return -max(scored)[1] if scored else None

    def front(self, candidates: Sequence[Mapping[str, Any]]) -> list[int]:
        """The positions of the candidates that no other one beats in one objective without losing in another."""
        signs = [_sign(mode) for mode in self.modes]
        scored = {
            position: [sign * value for sign, value in zip(signs, values, strict=True)]
            for position, metrics in enumerate(candidates)
            if (values := self.values(metrics)) is not None
        }
        return [
            position
            for position, values in scored.items()
            if not any(_dominates(other, values) for other in scored.values())
        ]


def _sign(mode: str) -> int:
    return 1 if mode == "max" else -1


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)
