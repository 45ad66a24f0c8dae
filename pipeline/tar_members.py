"""The members of a tar file in one pass, in bounded memory, damage always noticed."""

import tarfile
from collections.abc import Iterator
from typing import IO

_BLOCK = 512
_READ_TOGETHER = 2**20


class BadEnd(tarfile.ReadError):
    """After the last member there is something else than the end of an archive."""


def members(archive: tarfile.TarFile, stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """What an archive holds, in its order; the content of each can be read until the next is asked for.

    Args:
        archive: opened for reading from `stream`.

    Raises:
        BadEnd: after the last member, if the archive does not end there.
        tarfile.TarError: for other damage, after all that is before it.
    """
    while (member := archive.next()) is not None:
        yield member
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - tarfile remembers them all
    _require_end(stream, archive.offset)


def _require_end(stream: IO[bytes], offset: int) -> None:
    """tarfile takes damage between two members for the end; a whole archive ends with zeros."""
    stream.seek(offset)
    rest = stream.read(_BLOCK)
    if len(rest) < _BLOCK:
        raise BadEnd("the archive breaks off before its end")
    while rest:
        if any(rest):
            raise BadEnd("the archive is damaged, or another follows its end")
        rest = stream.read(_READ_TOGETHER)
