"""A sweep in simulated time: the real schedulers, over learning curves that are known in advance, without Ray.

What Ray Tune's controller does with a scheduler's answers is done here with trials that train no model.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler


@dataclass(eq=False)
class SimulatedTrial:
    """What a scheduler looks at of a trial.

    Args:
        number: from 0.
        curve: its score after each validation.
    """

    number: int
    curve: Sequence[float]
    status: str = Trial.PENDING
    last_result: dict[str, Any] = field(default_factory=dict)
    is_saving: bool = False

    @property
    def trial_id(self) -> str:
        return str(self.number)

    @property
    def experiment_tag(self) -> str:
        return f"{self.number + 1}_"

    @property
    def steps(self) -> int:
        """Validations that it has reported."""
        return int(self.last_result.get("validations", 0))

    def set_status(self, status: str) -> None:
        self.status = status

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)


class SimulatedSweep:
    """Runs curves under a scheduler, a few at a time, each validation taking the same time.

    Args:
        scheduler: with its metric `miou` not yet set.
        curves: one per trial; all as long as each other.
        places: trials at the same time.
        every: iterations from one validation to the next.
        most: validations of all trials together, after which no new one begins.
    """

    def __init__(
        self,
        scheduler: TrialScheduler,
        curves: Sequence[Sequence[float]],
        places: int,
        every: int = 1,
        most: float = float("inf"),
    ) -> None:
        assert scheduler.set_search_properties("miou", "max")
        self.scheduler, self.places, self.every, self.most = scheduler, places, every, most
        self.trials: list[SimulatedTrial] = []
        self._waiting: Iterator[SimulatedTrial] = (SimulatedTrial(*pair) for pair in enumerate(curves))
        self._left = len(curves)
        self._events: list[tuple[int, int, SimulatedTrial]] = []
        self.now = 0

    @property
    def search_alg(self) -> "SimulatedSweep":
        """As of Ray Tune's controller: here for `is_finished`."""
        return self

    def is_finished(self) -> bool:
        """Whether there are no new trials any more."""
        return self._left == 0

    def get_trials(self) -> list[SimulatedTrial]:
        return self.trials

    def stop_trial(self, trial: SimulatedTrial) -> None:
        """As the controller stops a trial that is paused."""
        self.scheduler.on_trial_remove(self, trial)  # pyright: ignore[reportArgumentType]
        trial.status = Trial.TERMINATED

    def run(self) -> list[SimulatedTrial]:
        """The trials, when all have ended."""
        while True:
            self._fill()
            if not self._events:
                assert all(trial.is_finished() for trial in self.trials), "a trial waits, and nothing runs"
                return self.trials
            self.now, _, trial = heapq.heappop(self._events)
            self._report(trial)

    @property
    def steps(self) -> int:
        """Validations that all trials together have reported."""
        return sum(trial.steps for trial in self.trials)

    def _fill(self) -> None:
        if self.steps >= self.most:
            self._left = 0
        while sum(trial.status == Trial.RUNNING for trial in self.trials) < self.places:
            chosen: Any = self.scheduler.choose_trial_to_run(self)  # pyright: ignore[reportArgumentType]
            if chosen is None and self._left:
                chosen = next(self._waiting)
                self._left -= 1
                self.trials.append(chosen)
                self.scheduler.on_trial_add(self, chosen)  # pyright: ignore[reportArgumentType]
            if chosen is None:
                return
            self._start(chosen)

    def _start(self, trial: SimulatedTrial) -> None:
        trial.status = Trial.RUNNING
        heapq.heappush(self._events, (self.now + 1, trial.number, trial))

    def _report(self, trial: SimulatedTrial) -> None:
        steps = trial.steps + 1
        result = {"validations": steps, "iteration": steps * self.every, "miou": trial.curve[steps - 1]}
        given: Any = trial
        action = self.scheduler.on_trial_result(self, given, result)  # pyright: ignore[reportArgumentType]
        trial.last_result = result
        if action == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
        elif action == TrialScheduler.STOP or steps == len(trial.curve):
            self.scheduler.on_trial_complete(self, given, result)  # pyright: ignore[reportArgumentType]
            trial.status = Trial.TERMINATED
        else:
            self._start(trial)
