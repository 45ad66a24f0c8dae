"""Which images processes die on, so that Ray, which begins their work again for ever, comes to an end.

Memory that is not enough, or a decoder that crashes, ends a process without an exception that could be caught; Ray Data
starts another and gives it the same images (a finite number of repetitions would count lost nodes, too, and end the
run). So what is begun and what is ended is told to an actor. Images whose work was begun before, and not ended, are
worked on one by one; one that was begun `TRIES` times is given up.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import PipelineError

TRIES = 3  # of an image, before it is given up
HOPELESS = 8  # images that were given up, when none has ended: then it is not theirs


class Attempts:
    """What is begun and not ended, by stage; holds what is worked on and what was given up, and no more."""

    def __init__(self) -> None:
        self._begun: Counter[tuple[str, int]] = Counter()
        self._ended: Counter[str] = Counter()
        self._given_up: dict[str, set[int]] = defaultdict(set)

    def begin_together(self, stage: str, numbers: Sequence[int]) -> bool:
        """Note that the work on some images begins; or False, if some were begun before: then one by one."""
        keys = [(stage, number) for number in numbers]
        if any(self._begun[key] for key in keys):
            return False
        self._begun.update(keys)
        return True

    def begin(self, stage: str, number: int) -> bool:
        """Note that the work on one image begins; or False, if it was begun often enough.

        Raises:
            PipelineError: if none has ended yet, and many were begun in vain.
        """
        if self._begun[stage, number] < TRIES:
            self._begun[stage, number] += 1
            return True
        self._given_up[stage].add(number)
        if len(self._given_up[stage]) >= HOPELESS and not self._ended[stage]:
            raise PipelineError(
                f"The processes that {stage} images died on each of the first {HOPELESS}, {TRIES} times each, as for "
                "want of memory: lower batch_size, inference.window_batch or workers, or take larger machines."
            )
        return False

    def end(self, stage: str, numbers: Sequence[int]) -> None:
        """Note that the work on some images has ended, whatever came of it."""
        for number in numbers:
            self._begun.pop((stage, number), None)
        self._ended[stage] += len(numbers)


@dataclass(frozen=True)
class Watch:
    """One stage's way to the `Attempts` of a run.

    Args:
        stage: what the stage does to images, as a verb.
        attempts: handle of the actor; None where nobody would begin the work again.
    """

    stage: str
    attempts: Any = None

    def groups(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        """Positions in `numbers` whose images are to be worked on together, and whether they are to be at all.

        Each group's work ends when the next one is asked for.
        """
        if not numbers:
            return
        if self.attempts is None:
            yield list(range(len(numbers))), True
            return
        if self._ask("begin_together", list(numbers)):
            yield list(range(len(numbers))), True
            self.attempts.end.remote(self.stage, list(numbers))
            return
        for position, number in enumerate(numbers):
            wanted = self._ask("begin", number)
            yield [position], wanted
            if wanted:
                self.attempts.end.remote(self.stage, [number])

    def _ask(self, method: str, about: Any) -> bool:
        return ray.get(getattr(self.attempts, method).remote(self.stage, about))

    @property
    def reason(self) -> str:
        """Why an image was given up."""
        return f"the process that was to {self.stage} it died {TRIES} times, as for want of memory"


@contextlib.contextmanager
def attempts_of_run() -> Iterator[Any]:
    """Handle of the actor of a run, on the node of its driver; it ends with the block.

    Handles in the plans of Ray Data would keep it alive for as long as the driver lives.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts)
    handle = actor.options(scheduling_strategy=here).remote()
    try:
        yield handle
    finally:
        ray.kill(handle)
