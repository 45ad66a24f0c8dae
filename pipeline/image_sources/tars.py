"""Images as members of tar files."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_sources.listing import (
    CHANGED,
    DAMAGED_ARCHIVE,
    ROWS_TOGETHER,
    SUFFIXES,
    ImageSource,
    Row,
    named,
)
from pipeline.storage_errors import explanation
from pipeline.tar_members import members

MOST_PARTS = 256
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")

_READ_AHEAD = 4 * 2**20  # for headers: photographs are smaller, so that seeking from one to the next would save little
_MEMBERS = pa.schema([("name", pa.binary()), ("offset", pa.int64()), ("length", pa.int64())])


@dataclass(frozen=True)
class TarPart:
    """The images in some tar files.

    Args:
        source: of which this is a part.
        archives: URLs of the files.
        others: objects beside them that are no tar files.
    """

    source: ImageSource
    archives: tuple[str, ...]
    others: int

    def rows(self) -> Iterator[Row | None]:
        """One for each image, of members of one name for the last, which is the one that tar would leave behind.

        The names of one archive are in memory at a time, about 100 bytes each. Where an archive is damaged, what is
        listed before stays, and a last row says that the rest is lost.
        """
        yield from (None for _ in range(self.others))
        for archive in self.archives:
            yield from self._rows_of(archive)

    def _rows_of(self, url: str) -> Iterator[Row | None]:
        try:
            version = storage.stat(url).version
        except FileNotFoundError:
            yield Row(url, "", status=CHANGED, error=f"{url} was listed, but is not there")
            return
        names = _Names()
        others = 0
        fault = None
        try:
            for member in _images(url):
                if member is not None and self.source.wants(member[0]):
                    names.add(*member)
                else:
                    others += 1
        except (tarfile.TarError, EOFError, ValueError, OSError) as error:
            if not _is_still(url, version):
                detail = f"{url} was overwritten or deleted while it was listed"
                fault = Row(url, version, status=CHANGED, error=detail)
            elif isinstance(error, OSError):
                raise explanation(url, error) from error
            else:
                detail = f"{url} is damaged after {names.added + others} members: {_short(error)}"
                fault = Row(url, version, status=DAMAGED_ARCHIVE, error=detail)
        for name, offset, length in names:
            yield named(Row(f"{url}#{name}", version, url, offset, length))
        yield from (None for _ in range(others + names.replaced))
        if fault:
            yield fault


class _Names:
    """Members of an archive by name, of equal names the last; about 100 bytes for each."""

    def __init__(self) -> None:
        self.added = 0
        self.replaced = 0
        self._tables: list[pa.Table] = []
        self._waiting: list[tuple[bytes, int, int]] = []

    def add(self, name: str, offset: int, length: int) -> None:
        self.added += 1
        self._waiting.append((name.encode("utf-8", "surrogateescape"), offset, length))
        if len(self._waiting) == ROWS_TOGETHER:
            self._gather()

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        self._gather()
        table = pa.concat_tables(self._tables)
        last = table.group_by("name").aggregate([("offset", "max")])["offset_max"].combine_chunks()
        kept = table.filter(pc.field("offset").isin(last))
        self.replaced = len(table) - len(kept)
        for batch in kept.to_batches(ROWS_TOGETHER):
            for name, offset, length in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield name.decode("utf-8", "surrogateescape"), offset, length

    def _gather(self) -> None:
        columns = zip(*self._waiting, strict=True) if self._waiting else ([], [], [])
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _MEMBERS, strict=True)]
        self._tables.append(pa.table(arrays, _MEMBERS))
        self._waiting = []


def is_one(url: str) -> bool:
    """Whether a name is that of a tar file; of a compressed one, too, so that it is refused and not passed over."""
    return url.lower().endswith((".tar", *COMPRESSED))


def parts(source: ImageSource) -> list[TarPart]:
    """Some tar files each; below a prefix all objects are listed here, but only tar files kept.

    Raises:
        PipelineError: if there is no tar file, or only compressed ones.
    """
    if source.images.lower().endswith(COMPRESSED):
        raise PipelineError(
            f"{source.images} is compressed, so that no image in it can be read alone: unpack it to a plain .tar."
        )
    archives: list[str] = []
    others = 0
    for item in storage.list_objects(source.images):
        if item.url.lower().endswith(".tar") and storage.usable_name(item.url):
            archives.append(item.url)
        else:
            others += 1
    if not archives:
        storage.require_bucket(source.images)
        raise PipelineError(f"There is no .tar file at {source.images}: correct the URL of the images.")
    size = -(-len(archives) // MOST_PARTS)
    together = [tuple(archives[start : start + size]) for start in range(0, len(archives), size)]
    return [TarPart(source, some, 0 if number else others) for number, some in enumerate(together)]


def _images(url: str) -> Iterator[tuple[str, int, int] | None]:
    """Name, first byte and length of each image in an archive; None in place of any other member."""
    with storage.open_input(url, _READ_AHEAD) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in members(archive, stream):
            path = PurePosixPath(member.name)
            hidden = any(part.startswith(".") for part in path.parts)
            regular = member.isreg() and not member.issparse()
            if regular and not hidden and path.name.lower().endswith(SUFFIXES):
                yield str(path), member.offset_data, member.size
            else:
                yield None


def _is_still(url: str, version: str) -> bool:
    try:
        return storage.stat(url).version == version
    except FileNotFoundError:
        return False


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
