"""The one exception that means: the caller can mend this, and the message says how."""

from collections.abc import Iterator


class PipelineError(Exception):
    """A failure that its reader can mend. The message is one sentence or two: the offending value, then the remedy.

    Workflows print it as a single line and end with exit code 1. It takes the message alone, so that it survives
    pickling on its way back from a Ray worker.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)


class Overtaken(PipelineError):
    """Another run has taken this one's place: what is there, its record too, is the other's."""


def _nested(error: BaseException) -> Iterator[BaseException]:
    """What an exception carries: its explicit and implicit causes, and what Ray wraps."""
    for inner in (error.__cause__, error.__context__, getattr(error, "cause", None)):
        if isinstance(inner, BaseException):
            yield inner
    failures = getattr(error, "worker_failures", None)  # ray.train: rank -> exception
    if isinstance(failures, dict):
        yield from (failure for failure in failures.values() if isinstance(failure, BaseException))


def mendable_cause(error: BaseException) -> PipelineError | None:
    """The `PipelineError` inside `error`, however deeply Ray has wrapped it; None if there is none."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        # What Ray raises in place of an error inherits from its class, but its text is a traceback; it keeps the cause.
        if isinstance(current, PipelineError) and not isinstance(getattr(current, "cause", None), BaseException):
            return current
        if id(current) not in seen:
            seen.add(id(current))
            waiting.extend(_nested(current))
    return None
