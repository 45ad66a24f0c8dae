"""Inputs of an ingest as records, before anything is checked: pairs of files, or what shards hold.

A record that could not be read says why instead of having bytes; nothing is passed over.
"""

import collections
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.images import BadImage
from pipeline.layouts import CANONICAL, IMAGE_SUFFIXES, Pair, Shard
from pipeline.read_ahead import ahead
from pipeline.storage_errors import explanation
from pipeline.tar_members import BadEnd, members

MOST_BYTES = 2**30  # of a file in a tar shard
FETCHED_AHEAD = 16  # pairs being read while others are decoded
ROWS_TOGETHER = 32

# Names, after the first dot, of a sample's files in a tar shard. A PNG beside a photograph is its label.
LABEL_ENDINGS = ("label.png", "seg.png", "mask.png", "segmentation.png", "annotation.png")

_READ_TOGETHER = 2**20


@dataclass(frozen=True)
class Record:
    """One input.

    Args:
        image_id: as in the dataset.
        source_uri: the image's URL; of what lies in a shard, the shard's with `#` and the name or number inside.
        image, label: encoded bytes; no label where there is none to be.
        label_uri: where the label came from, for messages.
        coding: which of the layout's codings the label has.
        fault: why the record cannot become a row.
        is_shard: whether the fault is of a shard, of which more than this record may be lost.
    """

    image_id: str
    split: str
    source_uri: str
    image: bytes = b""
    label: bytes | None = None
    label_uri: str = ""
    coding: str = ""
    fault: BadImage | None = None
    is_shard: bool = False


def read_pairs(pairs: Iterable[Pair]) -> Iterator[Record]:
    """The records of pairs, in order, some being fetched while earlier ones are worked on.

    Raises:
        StorageError: if the store cannot be read; a file that is not there is a fault of its record.
    """
    with ThreadPoolExecutor(FETCHED_AHEAD) as pool:
        yield from ahead(pool, _read_pair, pairs, FETCHED_AHEAD)


def read_shard(shard: Shard) -> Iterator[Record]:
    """The records of a tar or Parquet file, a few in memory at a time; damage to the file is a last, faulty record.

    Raises:
        StorageError: if the store cannot be read.
    """
    read = _read_tar if shard.url.lower().endswith(".tar") else _read_parquet
    seen: set[str] = set()
    try:
        for record in read(shard):
            if record.image_id in seen:
                fault = BadImage("duplicate_stem", f"{record.image_id} is in {shard.url} more than once: rename one")
                yield replace(record, fault=fault)
            else:
                seen.add(record.image_id)
                yield record
    except FileNotFoundError:
        yield _faulty(shard, "missing", f"{shard.url} was listed but is gone")
    except (tarfile.TarError, pa.ArrowInvalid, EOFError, OSError) as error:
        if isinstance(error, OSError) and not _is_damaged_parquet(shard.url):
            raise explanation(shard.url, error) from error
        yield _faulty(shard, "damaged", f"after {len(seen)} samples: {type(error).__name__}: {str(error)[:200]}")


def _faulty(shard: Shard, reason: str, detail: str) -> Record:
    return Record(shard.name, shard.split, shard.url, fault=BadImage(reason, detail), is_shard=True)


def _is_damaged_parquet(url: str) -> bool:
    """Whether a Parquet file is bad as it lies there; pyarrow's error is the same where the store has failed."""
    if not url.lower().endswith(".parquet"):
        return False
    try:
        with pq.ParquetFile(pa.BufferReader(storage.read_bytes(url))) as file:
            collections.deque(file.iter_batches(ROWS_TOGETHER), maxlen=0)
    except (OSError, pa.ArrowInvalid):
        return True
    return False


def _read_pair(pair: Pair) -> Record:
    record = Record(pair.image_id, pair.split, pair.image_url, label_uri=pair.label_url or "", coding=pair.coding)
    try:
        image = _fetched(pair.image_url)
        label = None if pair.label_url is None else _fetched(pair.label_url)
    except BadImage as fault:
        return replace(record, fault=fault)
    return replace(record, image=image, label=label)


def _fetched(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        raise BadImage("missing", f"{url} was listed but is gone") from None


def _read_tar(shard: Shard) -> Iterator[Record]:
    with storage.open_input(shard.url) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        key, files = "", list[tuple[str, bytes | BadImage]]()
        try:
            for member in members(archive, stream):
                path = PurePosixPath(member.name.encode("utf-8", "backslashreplace").decode())  # names may be no UTF-8
                if member.isdir() or path.name.startswith("."):
                    continue
                name, _, ending = path.name.partition(".")
                current = str(path.with_name(name))
                if current != key and files:
                    yield _sample(shard, key, files)
                    files = []
                key = current
                files.append((ending.lower(), _content(archive, member)))
        except BadEnd:
            if files:  # the last sample stands before it, whole
                yield _sample(shard, key, files)
            raise
        if files:
            yield _sample(shard, key, files)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | BadImage:
    """A file's bytes, none of one that can be neither image nor label, or why they are not read."""
    if not member.isreg() or member.issparse():
        return BadImage("no_file", f"{member.name} is a link or the like: store the file itself")
    if f".{member.name.lower().rpartition('.')[2]}" not in IMAGE_SUFFIXES:
        return b""
    if member.size > MOST_BYTES:
        return BadImage("too_large", f"{member.name} has {member.size} bytes, more than the {MOST_BYTES} accepted")
    content = archive.extractfile(member)
    assert content is not None
    return content.read()


def _sample(shard: Shard, key: str, members: Sequence[tuple[str, bytes | BadImage]]) -> Record:
    record = Record(f"{shard.name}/{key}", shard.split, f"{shard.url}#{key}", coding=shard.coding)
    files: dict[str, bytes] = {}
    for ending, content in members:
        if isinstance(content, BadImage):
            return replace(record, fault=content)
        if ending in files:
            return replace(
                record, fault=BadImage("ambiguous", f"{key} has two files that end in .{ending}: remove one")
            )
        files[ending] = content
    labels = [ending for ending in files if ending in LABEL_ENDINGS]
    images = [ending for ending in files if f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES and ending not in labels]
    if not labels and len(images) > 1 and "png" in images:
        images.remove("png")
        labels = ["png"]
    if len(images) != 1 or len(labels) > 1:
        said = ", ".join(sorted(files))
        fault = BadImage("no_image" if not images else "ambiguous", f"{key} has the files {said}: one image, one label")
        return replace(record, fault=fault)
    if not labels:
        return replace(record, fault=BadImage("no_label", f"{key} has no label, such as {key}.{LABEL_ENDINGS[0]}"))
    return replace(record, image=files[images[0]], label=files[labels[0]], label_uri=f"{shard.url}#{key}.{labels[0]}")


def _read_parquet(shard: Shard) -> Iterator[Record]:
    filesystem, path = storage.arrow_filesystem(shard.url)
    with pq.ParquetFile(path, filesystem=filesystem, buffer_size=_READ_TOGETHER) as file:
        names = file.schema_arrow.names
        if "image" not in names:
            said = ", ".join(names)
            yield _faulty(shard, "no_image", f"it has the columns {said}: name that of the encoded images `image`")
            return
        if "label" not in names and shard.coding != CANONICAL:
            said = ", ".join(names)
            yield _faulty(shard, "no_label", f"it has the columns {said}: name that of the encoded labels `label`")
            return
        columns = [name for name in ("image", "label", "image_id", "source_uri") if name in names]
        number = 0
        for batch in file.iter_batches(ROWS_TOGETHER, columns=columns):
            for row in batch.to_pylist():
                yield _row(shard, number, row)
                number += 1


def _row(shard: Shard, number: int, row: Mapping[str, Any]) -> Record:
    place = f"{shard.url}#{number}"
    image_id = str(row.get("image_id") or f"{shard.name}/{number}")
    uri = str(row.get("source_uri") or place)
    record = Record(image_id, shard.split, uri, label_uri=place, coding=shard.coding)
    image, label = _encoded(row["image"]), _encoded(row.get("label"))
    if image is None:
        return replace(record, fault=BadImage("no_image", f"row {number} of {shard.url} has no bytes of an image"))
    if label is None and shard.coding != CANONICAL:
        return replace(record, fault=BadImage("no_label", f"row {number} of {shard.url} has no bytes of a label"))
    return replace(record, image=image, label=label)


def _encoded(value: Any) -> bytes | None:
    """Encoded bytes, also where they lie in a field `bytes`, as the datasets library writes them."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None
