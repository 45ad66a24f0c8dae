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
from pipeline.errors import PipelineError
from pipeline.progress import announce
from pipeline.storage_errors import StorageError

FILE_NAME = "lease.json"
LEASE_SECONDS = 45.0  # without a renewal, after which another run may take it
RENEWALS = 4  # in that time
CLOCKS_APART_SECONDS = 3600.0  # a lease that is older than this by any clock is not watched any more

_WATCH_SECONDS = 0.5

_log = logging.getLogger(__name__)


class Held(PipelineError):
    """Another run has the lease, and lives."""


class LostLease(PipelineError):
    """This run had the lease, and has it no more."""


@dataclass(frozen=True)
class _State:
    """What the document says.

    Args:
        holder: id of a run, or empty where it was given back.
        place: host and process of the holder, for people.
        process: of the holder, for those on the same machine; empty where processes cannot be told apart.
        since: when it was taken.
        renewed: when it was written.
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
        """Whether somebody has it, who may be alive: was so not long ago by any clock, and is no process that ended."""
        if not self.holder or _has_ended(self.process):
            return False
        try:
            renewed = datetime.datetime.fromisoformat(self.renewed)
        except ValueError:
            return True
        return (datetime.datetime.now(datetime.UTC) - renewed).total_seconds() < CLOCKS_APART_SECONDS


class Lease(AbstractContextManager["Lease"]):
    """The lease of a place for the time of a `with` block; a thread renews it.

    Args:
        url: the place.
        holder: id of the run that wants it.
        seconds: how long it lasts without a renewal.

    Raises:
        Held: on entering, if another run has it and is alive; known after a quarter of `seconds`.
        StorageError: if the store fails.
    """

    def __init__(self, url: str, holder: str, seconds: float | None = None) -> None:
        self.url = storage.join(url, FILE_NAME)
        self.holder, self.seconds = holder, LEASE_SECONDS if seconds is None else seconds
        self._since = _now()
        self._document: Document | None = None
        self._renewed_at = 0.0
        self._lost = ""  # why, once it is
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        found = self._free(documents.read_document(self.url))
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
        """Raise `LostLease` if the lease is another's by now, or could not be renewed in time."""
        if not self._lost and time.monotonic() - self._renewed_at > self.seconds:
            self._lost = f"it could not be renewed for {self.seconds:.0f} seconds"
        if self._lost:
            raise LostLease(
                f"This run has lost {self.url} ({self._lost}), so it stops: run the same command again, and it goes on "
                "with what is missing."
            )

    def _free(self, found: Document | None) -> Document | None:
        """The document as it is when nobody has the lease; raises `Held` if somebody has it and lives."""
        if found is None or not _State.of(found).is_held():
            return found
        announce(f"  {_who(found)} has {self.url}: looking for up to {self.seconds:.0f} seconds whether it lives")
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
        """Whether the store refuses to write over what is there, as it is asked to."""
        written = self._document
        try:
            self._write(self.holder, None)
        except Conflict:
            self._document = written
            return True
        return False

    def _write(self, holder: str, expected: Document | None) -> None:
        begun = time.monotonic()
        place = f"process {os.getpid()} on {socket.gethostname()}"
        state = _State(holder, place, _process(os.getpid()), self._since, _now(), uuid.uuid4().hex)
        self._document = documents.compare_and_swap(self.url, state.encoded(), expected)
        self._renewed_at = begun

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self.seconds / RENEWALS):
            try:
                self._write(self.holder, self._document)
            except Conflict:
                found = documents.read_document(self.url)
                if found is None or _State.of(found).holder != self.holder:
                    self._lost = f"{_who(found)} has taken it"
                    return
                self._document = found  # a renewal has had no answer, but effect
            except StorageError as error:  # tried again; `require` counts how long ago the last one was
                _log.warning("the lease could not be renewed: %s", error)


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
    return Held(f"{url} is held by {_who(found)}: there is nothing to do here until it ends.")


def _who(found: Document | None) -> str:
    if found is None or not _State.of(found).holder:
        return "another run"
    state = _State.of(found)
    return f"run {state.holder} ({state.place}, since {state.since})"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
