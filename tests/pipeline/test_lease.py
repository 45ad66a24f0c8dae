"""Of several runs that want a place one has it at a time, whatever is killed; and documents that many change."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import documents, storage
from pipeline.documents import Conflict, Document
from pipeline.lease import FILE_NAME, Held, Lease, LostLease

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, and a prefix of a bucket."""
    return request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path)


def test_a_document_is_written_only_over_what_was_read(place):
    url = storage.join(place, "document")
    assert documents.read_document(url) is None
    first = documents.compare_and_swap(url, b"1", None)
    assert documents.read_document(url) == first
    with pytest.raises(Conflict, match="changed by another process"):
        documents.compare_and_swap(url, b"2", None)
    second = documents.compare_and_swap(url, b"2", first)
    with pytest.raises(Conflict):
        documents.compare_and_swap(url, b"3", first)
    assert storage.read_bytes(url) == b"2"
    storage.delete(url)
    with pytest.raises(Conflict):
        documents.compare_and_swap(url, b"3", second)
    assert documents.read_document(url) is None


def test_of_many_that_write_at_once_each_counts(place):
    url = storage.join(place, "counter")

    def count(name: int) -> None:
        while True:
            found = documents.read_document(url)
            number = 0 if found is None else int(found.data.split()[0])
            try:
                documents.compare_and_swap(url, f"{number + 1} by {name}".encode(), found)
                return
            except Conflict:
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(20)))
    assert storage.read_bytes(url).startswith(b"20 ")


def test_a_write_without_answer_that_had_effect_is_no_conflict(bucket):
    url = storage.join(bucket, "document")
    first = documents.compare_and_swap(url, b"1", None)
    second = documents.compare_and_swap(url, b"2", first)
    assert documents.compare_and_swap(url, b"2", first) == second  # as the client's own second attempt does


def test_an_object_moves_whole(place):
    source, target = storage.join(place, "a b#c"), storage.join(place, "below", "d?e")
    storage.write_bytes(source, b"bytes")
    storage.move(source, target)
    assert storage.read_bytes(target) == b"bytes"
    assert not storage.exists(source)
    with pytest.raises(FileNotFoundError):
        storage.move(source, target)
    assert storage.read_bytes(target) == b"bytes"


def test_who_comes_second_learns_who_is_there_and_may_come_when_it_has_ended(place, capsys):
    with Lease(place, "first", seconds=2) as lease:
        begun = time.monotonic()
        with pytest.raises(Held, match=rf"{FILE_NAME} is held by run first \(process {os.getpid()} on .*, since 20"):
            Lease(place, "second", seconds=2).__enter__()
        assert time.monotonic() - begun < 2
        assert "looking for up to 2 seconds whether it lives" in capsys.readouterr().out
        lease.require()
    begun = time.monotonic()
    with Lease(place, "second", seconds=2) as lease:
        lease.require()
    assert time.monotonic() - begun < 1


def test_of_several_that_come_at_once_one_gets_in(place):
    begins = threading.Barrier(4)  # without which a thread that is quickly done would try twice

    def tries(name: int) -> bool:
        begins.wait()
        try:
            lease = Lease(place, f"run{name}", seconds=60)
            lease.__enter__()
        except Held:
            return False
        holders.append(lease)
        return True

    holders: list[Lease] = []
    place = storage.join(place, "output")
    # Those who look after the first has written would watch it for a quarter of a minute: all must look before.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.documents.read_document", _first_answer(documents.read_document, None))
        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(tries, range(4))) == [False, False, False, True]
    (holder,) = holders
    holder.require()
    holder.__exit__(None, None, None)


def _first_answer(read, answer):
    """`read`, but for the first call of each thread, which gets `answer`."""
    asked = set()

    def wrapped(url: str) -> Document | None:
        if threading.get_ident() not in asked:
            asked.add(threading.get_ident())
            return answer
        return read(url)

    return wrapped


_HOLDER = """
import sys, time
from pipeline.lease import Lease
with Lease(sys.argv[1], "killed", seconds=2):
    print("held", flush=True)
    time.sleep(60)
"""


def _killed_holder(place: str) -> None:
    """Let a process take the lease, and kill it."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, place], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()


def test_the_lease_of_a_killed_run_is_taken_when_it_has_been_silent_for_long_enough(place):
    _killed_holder(place)
    url = storage.join(place, FILE_NAME)
    found = documents.read_document(url)
    assert found is not None
    state = json.loads(found.data)
    elsewhere = {**state, "process": state["process"].replace(state["process"].split()[0], "another-machine")}
    documents.compare_and_swap(url, json.dumps(elsewhere).encode(), found)
    begun = time.monotonic()
    with Lease(place, "next", seconds=2):
        assert 1.5 < time.monotonic() - begun < 10


def test_a_run_that_was_killed_on_this_machine_is_known_to_be_gone(place):
    _killed_holder(place)
    begun = time.monotonic()
    with Lease(place, "next", seconds=60):
        assert time.monotonic() - begun < 10


def test_a_run_that_has_lost_its_lease_is_told(place):
    with Lease(place, "slow", seconds=0.4) as lease:
        url, taken = storage.join(place, FILE_NAME), None
        while taken is None:
            found = documents.read_document(url)
            assert found is not None
            with contextlib.suppress(Conflict):  # a renewal came in between
                taken = documents.compare_and_swap(url, found.data.replace(b"slow", b"fast"), found)
        time.sleep(0.4)
        with pytest.raises(LostLease, match=r"run fast .* has taken it\), so it stops: run the same command again"):
            lease.require()
    assert documents.read_document(url) == taken  # it is the other's: not given back


def test_an_outage_ends_no_renewals_and_loses_no_lease(tmp_path, monkeypatch):
    def away(*_: object) -> None:
        raise storage.StorageError("away")

    with Lease(str(tmp_path), "this", seconds=0.4) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(documents, "compare_and_swap", away)
            time.sleep(0.6)
        with monkeypatch.context() as patch:  # a renewal had effect without an answer, and now the store is away
            found = documents.read_document(storage.join(str(tmp_path), FILE_NAME))
            assert found is not None
            with contextlib.suppress(Conflict):
                documents.compare_and_swap(storage.join(str(tmp_path), FILE_NAME), found.data + b" ", found)
            patch.setattr(documents, "read_document", away)
            time.sleep(0.3)
        time.sleep(0.3)
        lease.require()
        before = storage.read_bytes(storage.join(str(tmp_path), FILE_NAME))
        time.sleep(0.3)
        assert storage.read_bytes(storage.join(str(tmp_path), FILE_NAME)) != before


def test_a_store_that_cannot_exclude_is_named(tmp_path, monkeypatch, capsys):
    """As one that takes no notice of conditions."""
    swap = documents.compare_and_swap

    def overwrite(url: str, data: bytes, expected: Document | None) -> Document:  # noqa: ARG001
        return swap(url, data, documents.read_document(url))

    monkeypatch.setattr(documents, "compare_and_swap", overwrite)
    with Lease(str(tmp_path), "this", seconds=30):
        assert "has no conditional writes" in capsys.readouterr().out
