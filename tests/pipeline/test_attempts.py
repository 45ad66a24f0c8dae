"""Which images are worked on again after processes have died on them."""

import pytest

from pipeline.attempts import HOPELESS, TRIES, Attempts, Watch
from pipeline.errors import PipelineError


def test_images_are_worked_on_together_as_long_as_their_work_ends():
    attempts = Attempts()
    for _ in range(2 * TRIES):
        assert attempts.begin_together("read", [1, 2, 3])
        attempts.end("read", [1, 2, 3])


def test_images_that_a_process_died_on_are_worked_on_one_by_one_and_only_the_culprit_is_given_up():
    attempts, innocent, culprit = Attempts(), [1, 3], 2
    assert attempts.begin_together("read", [1, 2, 3])
    for _ in range(TRIES - 1):
        assert not attempts.begin_together("read", [1, 2, 3])
        assert attempts.begin("read", 1)
        attempts.end("read", [1])
        assert attempts.begin("read", culprit)  # and dies
    assert not attempts.begin_together("read", [1, 2, 3])
    for number in innocent:
        assert attempts.begin("read", number)
        attempts.end("read", [number])
    assert not attempts.begin("read", culprit)
    assert attempts.begin_together("read", innocent)
    assert attempts.begin_together("segment", [1, 2, 3]), "another stage has not tried it yet"


def _given_up(attempts: Attempts, number: int) -> None:
    for _ in range(TRIES):
        assert attempts.begin("segment", number)
    assert not attempts.begin("segment", number)


def test_a_stage_that_dies_on_all_that_it_is_given_is_not_the_fault_of_images():
    attempts = Attempts()
    for number in range(HOPELESS - 1):
        _given_up(attempts, number)
    with pytest.raises(PipelineError, match=r"segment images died on each of the first 8, 3 times each.*batch_size"):
        _given_up(attempts, HOPELESS)


def test_a_stage_that_has_done_some_goes_on_however_many_it_gives_up():
    attempts = Attempts()
    attempts.end("segment", [100])
    for number in range(2 * HOPELESS):
        _given_up(attempts, number)


def test_without_an_actor_all_images_are_worked_on_together():
    assert list(Watch("read").groups([7, 8])) == [([0, 1], True)]
    assert list(Watch("read").groups([])) == []
