"""The one sentence that its reader can act on is found again, however many layers have wrapped it on the way."""

import pickle

import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from pipeline.errors import PipelineError, mendable_cause
from pipeline.storage_errors import StorageError

MENDABLE = PipelineError("lr is -1: give a number above 0.")


def raised_from(outer: Exception, inner: BaseException) -> Exception:
    try:
        raise outer from inner
    except type(outer) as error:
        return error


def raised_while_handling(outer: Exception, inner: BaseException) -> Exception:
    try:
        try:
            raise inner
        except type(inner):
            raise outer  # noqa: B904 - the implicit context is what is tested
    except type(outer) as error:
        return error


def from_a_worker(error: Exception) -> Exception:
    """What `ray.get` raises when a task has raised `error`."""
    return RayTaskError("task", "Traceback (most recent call last):\n  ...", error).as_instanceof_cause()


def test_the_error_itself() -> None:
    assert mendable_cause(MENDABLE) is MENDABLE


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), from_a_worker(ValueError("x"))])
def test_an_error_without_one_has_none(error: BaseException) -> None:
    assert mendable_cause(error) is None


@pytest.mark.parametrize("wrapped", [raised_from, raised_while_handling])
def test_below_its_python_wrappers(wrapped) -> None:
    error = wrapped(RuntimeError("trial failed"), wrapped(KeyError("epoch"), MENDABLE))
    assert mendable_cause(error) is MENDABLE


def test_what_ray_raises_in_its_place_is_not_taken_for_it() -> None:
    """Ray's error is an instance of the same class, but its text is a traceback."""
    error = from_a_worker(MENDABLE)
    assert isinstance(error, PipelineError)
    assert str(error) != str(MENDABLE)
    assert str(mendable_cause(error)) == str(MENDABLE)


def test_below_two_tasks_and_their_python_wrappers() -> None:
    inner = raised_from(RuntimeError("block failed"), from_a_worker(MENDABLE))
    assert str(mendable_cause(from_a_worker(inner))) == str(MENDABLE)


def test_among_the_failures_of_a_group_of_workers() -> None:
    failures = {0: ConnectionError("peer is gone"), 1: from_a_worker(MENDABLE)}
    error = raised_from(RuntimeError("training failed"), WorkerGroupError("2 workers failed", failures))
    assert str(mendable_cause(error)) == str(MENDABLE)


def test_errors_that_cause_each_other_end_the_search() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    assert mendable_cause(first) is None
    second.__context__ = MENDABLE
    assert mendable_cause(first) is MENDABLE


def test_the_nearest_one_is_taken() -> None:
    near = PipelineError("near")
    assert mendable_cause(raised_from(near, MENDABLE)) is near


@pytest.mark.parametrize("kind", [PipelineError, StorageError])
def test_it_survives_the_way_back_from_a_worker(kind: type[PipelineError]) -> None:
    restored = pickle.loads(pickle.dumps(kind("s3://absent: there is no such bucket.")))
    assert type(restored) is kind
    assert str(restored) == "s3://absent: there is no such bucket."
