"""A lease: the right to write to a place, which one run has at a time, and loses when it stops saying that it lives.

It is a small document beside the output, changed by compare-and-swap. A run that finds it held watches it instead of
trusting clocks: if it changes, its holder is alive; if it stays the same for as long as a lease lasts, its holder is
gone, and the watcher takes it. A holder that was a process of the same machine, and is no more, is known to be gone at
once. A lease alone cannot stop a run that was asleep when it lost it: what is written under
it must be fenced too, see `pipeline.mask_store`.
"""

import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pipeline import documents, storage
from pipeline.documents import Conflict, Document
from pipeline.errors import Overtaken, PipelineError
from pipeline.progress import announce
from pipeline.storage_errors import StorageError

FILE_NAME = "lease.json"
LEASE_SECONDS = 45.0  # without a renewal, after which another run may take it
RENEWALS = 4  # in that time

_WATCH_SECONDS = 0.5

_log = logging.getLogger(__name__)


class Held(PipelineError):
    """Another run has the lease, and lives."""


class LostLease(Overtaken):
    """This run had the lease, and another one has it now."""


@dataclass(frozen=True)
class _State:
    """What the document says.

    Args:
        holder: id of a run, or empty where it was given back.
        place: host and process of the holder, for people.
        process: of the holder, for those on the same machine; empty where processes cannot be told apart.
        since: when it was taken.
        renewed: when it was written, for people.
        nonce: makes each state unlike all others.
    """

    holder: str
    place: str
    process: str
    since: str
    renewed: str
    nonce: str

    @classmethod
    def of(cls, document: Document) -> "_State":
        """As it was written; what cannot be understood counts as given back, for no run writes such."""
        try:
            return cls(**json.loads(document.data))
        except (ValueError, TypeError):
            return cls("", "", "", "", "", "")

    def encoded(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def is_held(self) -> bool:
        """Whether somebody has it who is not known to have ended."""
        return bool(self.holder) and not _has_ended(self.process)


class Lease(AbstractContextManager["Lease"]):
    """The lease of a place for the time of a `with` block; a thread renews it.

    Args:
        url: the place.
        holder: id of the run that wants it.
        seconds: how long it lasts without a renewal.

    Raises:
        Held: on entering, if another run has it and is alive, which shows at its next renewal, after `seconds` / 4 at
            most; a holder that is gone is waited for as long as `seconds`.
        StorageError: if the store fails.
    """

    def __init__(self, url: str, holder: str, seconds: float | None = None) -> None:
        self.url = storage.join(url, FILE_NAME)
        self.holder, self.seconds = holder, LEASE_SECONDS if seconds is None else seconds
        self._since = _now()
        self._document: Document | None = None
        self._lost = ""  # why, once it is
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        found = self._when_free(documents.read_document(self.url))
        try:
            self._write(self.holder, found)
            if not self._is_exclusive():
                announce(
                    f"  the store of {self.url} has no conditional writes: of two runs that begin in the same moment "
                    "both may go on for a while, so begin them apart"
                )
        except Conflict:
            raise _held(self.url, documents.read_document(self.url)) from None
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            with suppress(StorageError):  # it expires then; what ended the block matters more
                self._write("", self._document)

    def require(self) -> None:
        """Raise `LostLease` if another run has the lease by now.

        That it could not be renewed for a while is no loss as long as nobody has taken it.
        """
        if self._lost:
            raise LostLease(
                f"This run has lost {self.url} ({self._lost}), so it stops: run the same command again, and it goes on "
                "with what is missing."
            )

    def _when_free(self, found: Document | None) -> Document | None:
        """The document as it is when nobody has the lease; raises `Held` if somebody has it and lives."""
        if found is None or not _State.of(found).is_held():
            return found
        announce(f"  {_described(found)} has {self.url}: looking for up to {self.seconds:.0f} seconds whether it lives")
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            time.sleep(min(_WATCH_SECONDS, self.seconds / 10))
            now = documents.read_document(self.url)
            if now != found:
                if now is not None and _State.of(now).holder:
                    raise _held(self.url, now)
                return now
        return found

    def _is_exclusive(self) -> bool:
        """Whether the store refuses to write over what is there, as it is asked to, in one step."""
        if storage.split(self.url)[0] == "gs":
            return False
        written = self._document
        try:
            self._write(self.holder, None)
        except Conflict:
            self._document = written
            return True
        return False

    def _write(self, holder: str, expected: Document | None) -> None:
        place = f"process {os.getpid()} on {socket.gethostname()}"
        state = _State(holder, place, _process(os.getpid()), self._since, _now(), uuid.uuid4().hex)
        self._document = documents.compare_and_swap(self.url, state.encoded(), expected)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self.seconds / RENEWALS) and not self._lost:
            try:
                self._renew()
            except StorageError as error:  # tried again at the next turn
                _log.warning("the lease could not be renewed: %s", error)

    def _renew(self) -> None:
        try:
            self._write(self.holder, self._document)
        except Conflict:
            found = documents.read_document(self.url)
            if found is not None and _State.of(found).holder == self.holder:
                self._document = found  # a renewal has had no answer, but effect
            else:
                self._lost = f"{_described(found)} has taken it"


def _process(number: int) -> str:
    """What tells a running process from all others of all machines, on Linux; empty elsewhere, or if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino  # of containers, each has processes of its own
        started = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{boot} {namespace} {number} {started}"


def _has_ended(process: str) -> bool:
    """Whether a process of this very machine and container is no more."""
    here = _process(os.getpid()).split()
    there = process.split()
    return len(there) == len(here) == 4 and there[:2] == here[:2] and _process(int(there[2])) != process


def _held(url: str, found: Document | None) -> Held:
    return Held(f"{url} is held by {_described(found)}: there is nothing to do here until it ends.")


def _described(found: Document | None) -> str:
    if found is None or not _State.of(found).holder:
        return "another run"
    state = _State.of(found)
    return f"run {state.holder} ({state.place}, since {state.since})"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
