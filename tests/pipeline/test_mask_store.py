"""Changes of an output happen wholly or not at all, for readers, after kills, and against runs that were overtaken."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import documents, mask_store, masks, storage
from pipeline.mask_store import MaskStore, Move, Overtaken, staged
from pipeline.parquet_files import write_table
from pipeline.storage_errors import StorageError


class _Killed(BaseException):
    """In place of SIGKILL, after which nothing of a run happens any more."""


def _table(*names: str) -> pa.Table:
    rows = [{**dict.fromkeys(masks.PREDICTION_SCHEMA.names), "image_uri": name, "status": "ok"} for name in names]
    return pa.Table.from_pylist(rows, masks.PREDICTION_SCHEMA)


def _staged(store: MaskStore, *names: str, file: str = "") -> Move:
    place = staged(store.run_id, "part").staged
    write_table(storage.join(store.url, place), _table(*names))
    return Move(place, f"{mask_store.FOLDER}/{file or '-'.join(names)}.parquet")


def _rows(url: str) -> list[str]:
    return sorted(masks.read_masks(url, columns=["image_uri"])["image_uri"].to_pylist())


def _rows_of_the_folder(url: str) -> list[str]:
    """As DuckDB or Spark read them, who know no transactions."""
    return sorted(
        name for file in Path(url, "masks").glob("*.parquet") for name in pq.read_table(file)["image_uri"].to_pylist()
    )


def _begun(url: str, run_id: str) -> MaskStore:
    return MaskStore(url, run_id).__enter__()


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path)


def test_what_is_staged_is_seen_once_it_is_committed(place):
    store = _begun(place, "run")
    change = _staged(store, "a", "b")
    assert _rows(place) == []
    store.commit(add=[change])
    assert _rows(place) == ["a", "b"]
    store.commit(add=[_staged(store, "c")], remove=[change.name])
    assert _rows(place) == ["c"]
    store.commit()
    _staged(store, "d")
    store.__exit__(None, None, None)
    assert _rows(place) == ["c"]
    assert not list(storage.list_objects(storage.join(place, mask_store.WORK_FOLDER)))


@pytest.mark.parametrize("tidies_up", [False, True], ids=["killed", "interrupted"])
def test_readers_see_all_of_a_change_or_nothing_wherever_its_run_ends(tmp_path, monkeypatch, tidies_up):
    """Compaction is such a change: many files go, one comes. A run that is interrupted, as by Ctrl-C, still exits."""
    before, after, step = ["a", "b", "c"], ["a", "b", "c"], 0
    seen: list[tuple[list[str], list[str]]] = []
    while True:
        url = str(tmp_path / str(step))
        store = _begun(url, "run")
        store.commit(add=[_staged(store, name) for name in before])
        merged = _staged(store, *after, file="merged")
        with monkeypatch.context() as patch:
            killed = _kill_at(patch, step)
            with contextlib.suppress(_Killed):
                store.commit(add=[merged], remove=[f"masks/{name}.parquet" for name in before])
            patch.undo()
        if tidies_up:
            store.__exit__(_Killed if killed else None, _Killed() if killed else None, None)
        assert _rows(url) == before
        of_folder = _rows_of_the_folder(url)
        assert set(of_folder) <= set(before)
        assert len(of_folder) == len(set(of_folder))
        _begun(url, "next")
        assert _rows(url) == _rows_of_the_folder(url) == before
        seen.append((of_folder, sorted(file.name for file in Path(url, "masks").glob("*.parquet"))))
        if not killed:
            break
        step += 1
    assert step >= 6  # the decision, three deletions, a move, and its end
    assert ["a.parquet", "b.parquet", "c.parquet"] in [files for _, files in seen]
    assert seen[-1][1] == ["merged.parquet"]
    assert any(len(of_folder) < 3 for of_folder, _ in seen)  # the kills have met the middle of a change


def _kill_at(patch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Let the first `step` changes of the store happen, and no other; what was killed is in the list that returns."""
    patch.setattr(mask_store, "_TOGETHER", 1)
    killed: list[str] = []
    left = [step]

    def limited(module: Any, name: str) -> Any:
        real = getattr(module, name)

        def call(*arguments: Any) -> Any:
            if left[0] == 0:
                killed.append(name)
                raise _Killed
            left[0] -= 1
            return real(*arguments)

        return call

    for module, name in ((documents, "compare_and_swap"), (storage, "move"), (storage, "delete")):
        patch.setattr(module, name, limited(module, name))
    return killed


def test_a_run_that_was_overtaken_changes_nothing_any_more(place):
    slow = _begun(place, "slow")
    slow.commit(add=[_staged(slow, "a")])
    late = _staged(slow, "b")
    fast = _begun(place, "fast")
    with pytest.raises(Overtaken, match=r"Another run has changed .* run the same command again"):
        slow.commit(add=[late])
    fast.commit(add=[_staged(fast, "c")])
    assert _rows(place) == ["a", "c"]


def test_a_run_that_slept_while_it_carried_out_a_change_brings_nothing_back(tmp_path, monkeypatch):
    url = str(tmp_path)
    slow = _begun(url, "slow")
    change = _staged(slow, "a")
    awake, asleep = threading.Event(), threading.Event()
    move = storage.move

    def sleepy(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            asleep.set()
            awake.wait(10)
        move(*arguments)

    errors: list[BaseException] = []

    def commit() -> None:
        try:
            slow.commit(add=[change])
        except BaseException as error:
            errors.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "move", sleepy)
        thread = threading.Thread(target=commit)
        thread.start()
        assert asleep.wait(10)
    assert _rows(url) == ["a"]  # decided, and so it is
    fast = _begun(url, "fast")
    fast.commit(add=[_staged(fast, "a", file="merged")], remove=[change.name])
    awake.set()
    thread.join(10)
    assert _rows(url) == _rows_of_the_folder(url) == ["a"]
    assert len(errors) == 1
    assert isinstance(errors[0], StorageError)


@pytest.mark.parametrize("footers_are_read", [False, True])
def test_a_reader_that_meets_a_change_reads_again(place, monkeypatch, footers_are_read):
    """Of an object that is gone after its footer was read, pyarrow says so in an error of its own."""
    store = _begun(place, "run")
    store.commit(add=[_staged(store, "a"), _staged(store, "b")])
    open_masks, opened = masks.open_masks, []

    def opened_just_before_a_change(url: str) -> Any:
        dataset = open_masks(url)
        if not opened:
            opened.append([fragment.metadata for fragment in dataset.get_fragments()] if footers_are_read else url)
            store.commit(add=[_staged(store, "a", "b", file="merged")], remove=["masks/a.parquet", "masks/b.parquet"])
        return dataset

    monkeypatch.setattr(masks, "open_masks", opened_just_before_a_change)
    assert _rows(place) == ["a", "b"]
    assert opened


def test_a_listing_succeeds_while_a_run_only_adds(tmp_path, monkeypatch):
    url = str(tmp_path)
    store = _begun(url, "run")
    list_objects, listed = storage.list_objects, []

    def listed_while_files_come(place: str) -> Any:
        listed.append(place)
        store.commit(add=[_staged(store, f"{len(listed)}")])
        return list_objects(place)

    monkeypatch.setattr(storage, "list_objects", listed_while_files_come)
    assert [Path(file).name for file in mask_store.files(url)] == ["1.parquet"]


def test_a_listing_that_a_change_ran_through_is_made_again(tmp_path, monkeypatch):
    url = str(tmp_path)
    store = _begun(url, "run")
    store.commit(add=[_staged(store, "a"), _staged(store, "b")])
    list_objects, listed = storage.list_objects, []

    def listed_across_a_change(place: str) -> Any:
        found = list(list_objects(place))
        if not listed:
            listed.append(place)
            store.commit(add=[_staged(store, "a", "b", file="merged")], remove=["masks/a.parquet", "masks/b.parquet"])
        return iter(found)

    monkeypatch.setattr(storage, "list_objects", listed_across_a_change)
    assert [Path(file).name for file in mask_store.files(url)] == ["merged.parquet"]


def test_a_staged_file_that_is_gone_is_no_silent_loss(tmp_path):
    store = _begun(str(tmp_path), "run")
    with pytest.raises(StorageError, match="is gone, which was to become"):
        store.commit(add=[staged("run", "part")])


def test_a_document_that_nobody_can_read_is_named(tmp_path):
    (tmp_path / mask_store.TRANSACTION_FILE).write_text("{")
    with pytest.raises(StorageError, match=r"transaction.json cannot be understood .*: restore it"):
        MaskStore(str(tmp_path), "run").__enter__()
