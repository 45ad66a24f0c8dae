"""The files of rows at an output, and how they change: in transactions, each decided by one conditional write.

What is new is staged below `_work/`, where no reader looks. A transaction says which files of `masks/` go and which
staged ones come; writing it down in `transaction.json` is the moment at which all of it happens, for those who read
with `pipeline.masks`. Then it is carried out: files are deleted, and staged ones moved to their names. Whoever reads
the folder alone, as DuckDB or Spark do, may for that short time miss rows, but never sees one twice. A run that is
killed in between leaves a transaction that the next one carries out before it does anything else.

A run that has lost its lease without noticing cannot write another transaction, for the next run has changed the
document. One that was asleep while it carried out its own finds nothing left to move, and the names that it deletes are
never used again. The gap that remains: a copy that a store was asked for, and makes only after another run has carried
out the same transaction and has taken the file away again.

Knows no Ray and no model.
"""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType

from pipeline import documents, storage
from pipeline.documents import Conflict, Document
from pipeline.errors import Overtaken
from pipeline.storage_errors import StorageError, patiently

FOLDER = "masks"
WORK_FOLDER = "_work"  # what runs stage; nothing of a run that has ended
TRANSACTION_FILE = "transaction.json"
STANDING, TRIED_AGAIN = "part", "again"  # names of files: of rows that stand, and of those that a run replaces
SNAPSHOT_ATTEMPTS = 20
_LONGEST_PAUSE = 5.0  # seconds between two of them
_TOGETHER = 16  # files that are moved or deleted at a time


@dataclass(frozen=True)
class Move:
    """A staged file and its name, both below the output."""

    staged: str
    name: str


@dataclass(frozen=True)
class Transaction:
    """A change of an output.

    Args:
        remove: files that go, by their names below the output.
        add: files that come.
        number: of changes so far.
        removals: of changes so far that took files away; between two of them a listing only misses what is new.
        nonce: makes each state of the document unlike all others.
        is_done: whether it has been carried out.
    """

    remove: list[str] = field(default_factory=list)
    add: list[Move] = field(default_factory=list)
    number: int = 0
    removals: int = 0
    nonce: str = ""
    is_done: bool = True

    @classmethod
    def of(cls, url: str, document: Document | None) -> "Transaction":
        """The last one at an output; of an output without any, one that has nothing to do.

        Raises:
            StorageError: if the document cannot be understood.
        """
        if document is None:
            return cls()
        try:
            content = json.loads(document.data)
            return cls(**{**content, "add": [Move(**move) for move in content["add"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{_place(url)} cannot be understood ({error}): restore it, or delete it if no run was killed here."
            ) from error

    def encoded(self) -> bytes:
        """As it is stored."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


def staged(run_id: str, name: str) -> Move:
    """The place where a run stages a file of rows, and the name that it gets: new ones each time.

    Args:
        name: of a kind of files, which the file's name begins with.
    """
    unique = uuid.uuid4().hex
    return Move(f"{WORK_FOLDER}/{run_id}/{unique}.parquet", f"{FOLDER}/{name}-{unique}.parquet")


def name_of(url: str, file: str) -> str:
    """The name below an output of a file whose full URL is given."""
    return file.removeprefix(url.rstrip("/")).lstrip("/")


def files(url: str) -> list[str]:
    """The full URLs of the files of rows at an output, as they are between two transactions.

    Raises:
        StorageError: if the store fails, or transactions follow each other faster than the output can be listed.
    """
    url = storage.absolute(url)
    for attempt in range(SNAPSHOT_ATTEMPTS):
        time.sleep(min(attempt, _LONGEST_PAUSE))
        before = Transaction.of(url, documents.read_document(_place(url)))
        names = [item.url for item in storage.list_objects(storage.join(url, FOLDER)) if item.url.endswith(".parquet")]
        after = Transaction.of(url, documents.read_document(_place(url)))
        only_additions = before.removals == after.removals and (before.is_done or not before.remove)
        if after == before or (only_additions and not after.remove):
            return _with_change(url, names, after)
    raise StorageError(
        f"{url} changes faster than it can be listed: read it again when the run there has ended, and let segment "
        "--compact true make fewer files."
    )


def _with_change(url: str, names: list[str], change: Transaction) -> list[str]:
    """The listed files, and of a transaction that is still being carried out what it makes of them."""
    if change.is_done:
        return names
    listed = set(names) - {storage.join(url, name) for name in change.remove}
    for move in change.add:
        if move.name.startswith(f"{FOLDER}/") and storage.join(url, move.name) not in listed:
            listed.add(storage.join(url, move.staged))
    return sorted(listed)


class MaskStore(AbstractContextManager["MaskStore"]):
    """The one writer of an output, for the time of a `with` block. Entering the lease of the output comes first.

    At the beginning what a killed run has decided is carried out, and what killed runs have staged is deleted; from
    then on no earlier run can change the output any more. At the end what was staged and not committed is deleted.

    Args:
        url: the output.
        run_id: of the run that writes.
    """

    def __init__(self, url: str, run_id: str) -> None:
        self.url, self.run_id = url, run_id
        self.work = storage.join(url, WORK_FOLDER, run_id)  # where this run stages

    def __enter__(self) -> "MaskStore":
        self._document = documents.read_document(_place(self.url))
        last = Transaction.of(self.url, self._document)
        if last.is_done:
            self._write(_done(last))
        else:
            self._carry_out(last)
        with suppress(StorageError):  # tasks of a killed run may still be writing there: the next run deletes that
            storage.delete(storage.join(self.url, WORK_FOLDER))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error a decided transaction may still need it; and whatever stays is deleted by the next run.
        if error is None:
            with suppress(StorageError):
                storage.delete(self.work)

    def commit(self, add: Iterable[Move] = (), remove: Sequence[str] = ()) -> None:
        """Change the output.

        Args:
            add: what is staged, and the new names, which have never been used.
            remove: files below the output.

        Raises:
            Overtaken: if another run has changed it since; then nothing has happened.
        """
        last = Transaction.of(self.url, self._document)
        removals = last.removals + bool(remove)
        change = Transaction(list(remove), list(add), last.number + 1, removals, uuid.uuid4().hex, is_done=False)
        if change.add or change.remove:
            self._write(change)
            self._carry_out(change)

    def _carry_out(self, change: Transaction) -> None:
        with ThreadPoolExecutor(_TOGETHER) as pool:
            # First what goes: a reader of the folder alone is to miss a row rather than to see it twice.
            list(pool.map(self._remove, change.remove))
            list(pool.map(self._move, change.add))
        self._write(_done(change))

    def _remove(self, name: str) -> None:
        patiently(lambda: storage.delete(storage.join(self.url, name)))

    def _move(self, move: Move) -> None:
        staged, target = storage.join(self.url, move.staged), storage.join(self.url, move.name)

        def moved() -> None:
            try:
                storage.move(staged, target)
            except FileNotFoundError as error:
                if not storage.exists(target):  # else an attempt before this one has moved it
                    raise StorageError(
                        f"{staged} is gone, which was to become {target}: restore it; or delete {_place(self.url)}, "
                        "and the next run makes the rows anew that are lost."
                    ) from error

        patiently(moved)

    def _write(self, change: Transaction) -> None:
        def written() -> Document:
            try:
                return documents.compare_and_swap(_place(self.url), change.encoded(), self._document)
            except Conflict as error:
                found = documents.read_document(_place(self.url))
                if found is not None and found.data == change.encoded():
                    return found  # an attempt before this one has had no answer, but effect
                raise Overtaken(
                    f"Another run has changed {self.url} since this one began, so this one stops: run the same "
                    "command again, and it goes on with what is missing."
                ) from error

        self._document = patiently(written)


def _done(change: Transaction) -> Transaction:
    """What is written down when a change has been carried out."""
    return Transaction(number=change.number, removals=change.removals, nonce=uuid.uuid4().hex)


def _place(url: str) -> str:
    return storage.join(url, TRANSACTION_FILE)
