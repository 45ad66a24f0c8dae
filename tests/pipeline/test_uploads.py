"""Writing beside something else: in order, through outages, and never silently in vain."""

import time

import pytest

from pipeline.storage_errors import StorageError, StorageOutage, patiently
from pipeline.uploads import Uploads


class Flaky:
    """Fails as often as it is told, then writes."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "written"


def test_an_outage_is_waited_out() -> None:
    work = Flaky([StorageOutage("away"), StorageOutage("still away")])
    assert patiently(work) == "written"
    assert work.calls == 3


def test_what_waiting_cannot_mend_is_raised_at_once() -> None:
    work = Flaky([StorageError("no such bucket")])
    with pytest.raises(StorageError, match="no such bucket"):
        patiently(work)
    assert work.calls == 1


def test_patience_ends() -> None:
    with pytest.raises(StorageOutage, match="away"):
        patiently(Flaky([StorageOutage("away")] * 1000), seconds=0.1)


def test_calls_are_made_in_order_beside_the_caller() -> None:
    written: list[int] = []
    uploads = Uploads()

    def slow(number: int) -> None:
        time.sleep(0.02 * (3 - number))
        written.append(number)

    for number in range(3):
        uploads.add(lambda number=number: slow(number))
    assert written != [0, 1, 2]
    uploads.finish()
    assert written == [0, 1, 2]


def test_a_failure_is_raised_at_the_next_call_or_at_the_end() -> None:
    uploads = Uploads()
    uploads.add(Flaky([StorageError("denied")]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(StorageError, match="denied"):
        uploads.finish()
