"""The files below a local folder, listed as an object store lists its keys: in their order, and without links."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG

NOTHING_THERE = (errno.ENOENT, errno.ELOOP)  # the latter of links that lead to each other


@dataclass(frozen=True)
class LocalFile:
    """A file, or what a link leads to, with its size in bytes and its modification time in seconds."""

    path: str
    size: int
    mtime: float


def local_files(path: str, *, recursive: bool = True) -> Iterator[LocalFile]:
    """Every file at or below an absolute path, sorted by path; hidden ones and their folders are left out.

    Links are followed, as an object store knows none; a link to a folder above it ends there. A link to nothing is
    listed, so that whoever reads it learns of it; what is deleted meanwhile is not. The names of one folder, and of
    those above it, are in memory at a time.

    Args:
        recursive: also of the folders below.
    """
    status = _status(path)
    if status is not None and S_ISDIR(status.st_mode):
        yield from _below(path, status, recursive, frozenset())
    else:
        yield from _file(path, status)


def folders_in(path: str) -> list[str]:
    """Paths of the folders directly in a folder, sorted, hidden ones left out; links to folders are among them."""
    try:
        return sorted(entry.path for entry in os.scandir(path) if not entry.name.startswith(".") and _is_folder(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _below(
    folder: str, status: os.stat_result, recursive: bool, within: frozenset[tuple[int, int]]
) -> Iterator[LocalFile]:
    identity = (status.st_dev, status.st_ino)
    if identity in within:
        return
    with os.scandir(folder) as entries:
        # A folder's name ends with a slash in all that is below it, which decides the order.
        names = sorted(
            f"{entry.name}/" if _is_folder(entry) else entry.name for entry in entries if not entry.name.startswith(".")
        )
    for name in names:
        path = os.path.join(folder, name.rstrip("/"))  # noqa: PTH118 - many of them
        status_below = _status(path)
        if status_below is None or not S_ISDIR(status_below.st_mode):
            yield from _file(path, status_below)
        elif recursive:
            yield from _below(path, status_below, recursive, within | {identity})


def _file(path: str, status: os.stat_result | None) -> Iterator[LocalFile]:
    if status is None:
        place = Path(path)
        if place.is_symlink():
            yield LocalFile(path, 0, place.lstat().st_mtime)
    elif S_ISREG(status.st_mode):  # to read a pipe, say, would take for ever
        yield LocalFile(path, status.st_size, status.st_mtime)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it leads to a folder; links that lead to each other lead to none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno not in NOTHING_THERE:
            raise
        return False


def _status(path: str) -> os.stat_result | None:
    """What a path leads to; None if that is nothing."""
    try:
        return os.stat(path)  # noqa: PTH116
    except OSError as error:
        if error.errno not in NOTHING_THERE:
            raise
        return None
