"""Small documents that several processes may change: read whole, and written only over what was read."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline import storage
from pipeline.storage_errors import StorageError

_LOCK_SECONDS = 30.0  # that another process may take for a look and a write


@dataclass(frozen=True)
class Document:
    """A document as it was read or written.

    Args:
        data: its bytes.
        version: by which the store tells it from its other states.
    """

    data: bytes
    version: str


class Conflict(StorageError):
    """Another process has changed a document in the meantime."""


def read_document(url: str) -> Document | None:
    """The document at `url`; None where there is none.

    Raises:
        StorageError: if the store fails.
    """
    try:
        return Document(*storage.read_versioned(url))
    except FileNotFoundError:
        return None


def compare_and_swap(url: str, data: bytes, expected: Document | None) -> Document:
    """Write a document if it is still as it was read, in one step.

    On `s3://` that step is a conditional write; on a local disk a lock beside the file makes it one. `gs://` has none
    here: what another process writes in the moment between looking and writing is lost.

    Args:
        data: what is written; must be unlike every earlier state, so that no two states are taken for each other.
        expected: what `read_document` or the last `compare_and_swap` returned; None if there is to be none yet.

    Returns:
        The document as it is now.

    Raises:
        Conflict: if it is not as expected any more.
        StorageError: if the store fails.
    """
    scheme, path = storage.split(url)
    if scheme == "s3":
        version = storage.put_if(url, data, None if expected is None else expected.version)
        if version is not None:
            return Document(data, version)
        found = read_document(url)
        if found is not None and found.data == data:  # an attempt of the client's own has had no answer, but effect
            return found
        raise Conflict(f"{url} has been changed by another process.")
    with _lock(path) if scheme == "file" else contextlib.nullcontext():
        if read_document(url) != expected:
            raise Conflict(f"{url} has been changed by another process.")
        storage.write_bytes(url, data)
        return Document(*storage.read_versioned(url))


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Keep other processes of this disk from changing a document; the system frees it when the process ends."""
    place = Path(path)
    with storage.explained(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_name(f".{place.name}.lock").open("wb")
    with lock:
        until = time.monotonic() + _LOCK_SECONDS
        while not _locked(lock, path):
            if time.monotonic() > until:
                raise StorageError(f"{lock.name} is locked by a process that does not go on: end that process.")
            time.sleep(0.01)
        yield


def _locked(lock: IO[bytes], path: str) -> bool:
    with storage.explained(path):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
