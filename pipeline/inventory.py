"""The inventory of a source: what is to be ingested, divided into chunks, each of which becomes a file or two.

Made on the cluster: the driver gets a summary, however many objects there are. The chunks are stored with the dataset,
where the tasks that convert them read their own. The worker that makes the inventory holds the listing, about 1 GB for
a million objects; tens of millions need a source divided by prefix.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset import REJECT_SCHEMA
from pipeline.errors import PipelineError
from pipeline.labels import LabelCoding
from pipeline.layouts import IMAGE_SUFFIXES, Layout, Pair, Reject, Shard, read_layout
from pipeline.redaction import redacted
from rssnet.classes import Classes

SHOWN = 3  # examples of rejects in a message

_CHUNKS_PER_FILE = 64  # of which a task reads the footer to find its own

_READY = "ready"  # written last and deleted first

_SCHEMA = pa.schema(
    [
        ("chunk", pa.int32()),
        ("image_id", pa.string()),  # of a shard, its name
        ("split", pa.string()),
        ("image_url", pa.string()),  # of a shard, its own
        ("label_url", pa.string()),
        ("coding", pa.string()),
        ("size", pa.int64()),
        ("is_shard", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Cut:
    """How inputs are divided into chunks.

    Args:
        most_bytes: of the images of a chunk; what a file of a large dataset comes to.
        least_bytes: of the images of a chunk, where there are enough.
        chunks: how many a smaller dataset is divided into, so that many workers share it.
        most_images: in a chunk.
    """

    most_bytes: int = 128 * 2**20
    least_bytes: int = 4 * 2**20
    chunks: int = 64
    most_images: int = 4096


@dataclass(frozen=True)
class Selection:
    """Which inputs of a layout are wanted, and in which split.

    Args:
        splits: only these; all if None.
        val_fraction: share of the split `train` that goes to `val`, by a hash of the image's id.
        limit: at most so many images of each split, chosen by a hash of their ids; what has no partner is left out.
    """

    splits: tuple[str, ...] | None = None
    val_fraction: float = 0.0
    limit: int | None = None

    def split_of(self, split: str, image_id: str) -> str:
        """The split that an image of `split` comes to."""
        moved = split == "train" and self.val_fraction > 0 and stable_fraction(f"val:{image_id}") < self.val_fraction
        return "val" if moved else split


@dataclass(frozen=True)
class Inventory:
    """What the driver needs to know of a source; its size does not depend on the number of objects.

    Args:
        inputs: digest of the listing; of another, the source has changed.
        plan: digest of the chunks and of what their labels mean.
        images: pairs and unlabelled images; 0 where shards hold them.
        shards: files that hold images.
        size: bytes of images and shards.
        rejected: inputs that are no pair.
        examples: a few of these.
        passed_over: how many other files there are, and `passed_over_example` one of them.
    """

    layout: str
    classes: Classes | None
    codings: dict[str, LabelCoding]
    splits: list[str]
    inputs: str
    plan: str
    chunks: int
    images: int
    shards: int
    size: int
    rejected: int
    examples: list[Reject]
    passed_over: int
    passed_over_example: str


def selected_layout(
    source: str, name: str, selection: Selection
) -> tuple[Layout, list[storage.StoredObject], list[str]]:
    """Lists a source and finds in it what is wanted.

    Returns:
        The layout; the listing without names that cannot be used, images and labels of such being rejects; and the
        URLs of what the layout has no use for.

    Raises:
        PipelineError: if there is nothing, no layout fits, or the selection asks for what is not there.
    """
    objects = list(storage.list_objects(source))
    if not objects:
        storage.require_bucket(source)
        raise PipelineError(f"{source} has no objects: correct the URL.")
    usable = [item for item in objects if storage.usable_name(item.url)]
    layout = read_layout(name, source, usable)
    if len(usable) < len(objects):
        layout.rejects.extend(_misnamed(objects))
    others = layout.passed_over(usable)
    _select(layout, source, selection)
    return layout, usable, others


def take_inventory(source: str, name: str, selection: Selection, cut: Cut) -> tuple[Inventory, pa.Table, pa.Table]:
    """Lists a source and divides what is wanted of it into chunks.

    Returns:
        The inventory, the table of its chunks and that of its rejects.

    Raises:
        PipelineError: as `selected_layout`.
    """
    layout, objects, others = selected_layout(source, name, selection)
    chunks = _chunks(layout, cut)
    rejects = pa.Table.from_pylist([dataclasses.asdict(item) for item in layout.rejects], schema=REJECT_SCHEMA)
    listing = hashlib.sha256()
    for item in sorted(objects, key=lambda item: item.url):
        listing.update(f"{item.url}\0{item.size}\0{item.version}\n".encode())
    splits = {pair.split for pair in layout.pairs} | {shard.split for shard in layout.shards}
    splits |= {reject.split for reject in layout.rejects if reject.split}
    inventory = Inventory(
        layout=layout.name,
        classes=layout.classes,
        codings=dict(layout.codings),
        splits=sorted(splits | ({"val"} if selection.val_fraction else set())),
        inputs=listing.hexdigest(),
        plan=_plan_digest(layout, chunks, listing.hexdigest(), selection),
        chunks=chunks["chunk"][-1].as_py() + 1 if chunks.num_rows else 0,
        images=len(layout.pairs),
        shards=len(layout.shards),
        size=sum(pair.size for pair in layout.pairs) + sum(shard.size for shard in layout.shards),
        rejected=len(layout.rejects),
        examples=layout.rejects[:SHOWN],
        passed_over=len(others),
        passed_over_example=redacted(others[0]) if others else "",
    )
    return inventory, chunks, rejects


def write_chunks(folder: str, chunks: pa.Table) -> None:
    """Store the table of chunks below a URL, one row group each, some together in a file."""
    numbers = chunks["chunk"].to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    bounds = list(zip(starts, [*starts[1:], len(numbers)], strict=True))
    for first in range(0, len(bounds), _CHUNKS_PER_FILE):
        buffer = pa.BufferOutputStream()
        with pq.ParquetWriter(buffer, _SCHEMA, compression="zstd") as writer:
            for start, end in bounds[first : first + _CHUNKS_PER_FILE]:
                writer.write_table(chunks.slice(start, end - start), row_group_size=end - start)
        storage.write_bytes(_chunk_file(folder, first), buffer.getvalue().to_pybytes())
    storage.write_bytes(storage.join(folder, _READY), b"")


def has_chunks(folder: str) -> bool:
    """Whether all chunks are stored below a URL, and nothing of it has been deleted again."""
    return storage.exists(storage.join(folder, _READY))


def delete_chunks(folder: str) -> None:
    """Delete what is below a URL; cut short, it leaves nothing that looks whole."""
    storage.delete(storage.join(folder, _READY))
    storage.delete(folder)


def read_chunk(folder: str, number: int) -> list[Pair] | Shard:
    """What a stored chunk holds: pairs, or one shard."""
    filesystem, path = storage.arrow_filesystem(_chunk_file(folder, number))
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        rows = file.read_row_group(number % _CHUNKS_PER_FILE).to_pylist()
    if rows[0]["is_shard"]:
        (row,) = rows
        return Shard(row["image_id"], row["split"], row["image_url"], row["coding"], row["size"])
    names = [item.name for item in dataclasses.fields(Pair)]
    return [Pair(**{name: row[name] for name in names}) for row in rows]


def _chunk_file(folder: str, number: int) -> str:
    return storage.join(folder, f"chunks-{number // _CHUNKS_PER_FILE:05}.parquet")


def _misnamed(objects: Iterable[storage.StoredObject]) -> Iterator[Reject]:
    """Rejects for images and labels whose names no store or record could hold."""
    for item in objects:
        if not storage.usable_name(item.url) and item.url.lower().endswith((*IMAGE_SUFFIXES, ".mat")):
            detail = "its name has characters that cannot be read back or written down: rename it"
            yield Reject(storage.printable(item.url), "", "bad_name", detail)


def _select(layout: Layout, source: str, selection: Selection) -> None:
    """Keeps of a layout what is wanted."""
    found = sorted({item.split for item in (*layout.pairs, *layout.shards)})
    if selection.splits is not None:
        missing = sorted(set(selection.splits) - set(found))
        if missing:
            raise PipelineError(
                f"{source} has no split {', '.join(missing)}: choose of {', '.join(found)}, or leave out --splits."
            )
        layout.pairs[:] = [pair for pair in layout.pairs if pair.split in selection.splits]
        layout.shards[:] = [shard for shard in layout.shards if shard.split in selection.splits]
        layout.rejects[:] = [reject for reject in layout.rejects if reject.split in ("", *selection.splits)]
    if selection.val_fraction:
        if "val" in found or "train" not in found:
            raise PipelineError(
                f"val_fraction divides a split `train` where there is none `val`, but {source} has "
                f"{', '.join(found)}: leave it out."
            )
        layout.pairs[:] = [
            dataclasses.replace(pair, split=selection.split_of(pair.split, pair.image_id)) for pair in layout.pairs
        ]
    if selection.limit is not None:
        if layout.shards:
            raise PipelineError(f"limit chooses among single files, but {source} has shards: ingest a few of them.")
        kept: list[Pair] = []
        for split in sorted({pair.split for pair in layout.pairs}):
            pairs = [pair for pair in layout.pairs if pair.split == split]
            kept += sorted(pairs, key=lambda pair: stable_fraction(pair.image_id))[: selection.limit]
        layout.pairs[:] = kept
        layout.rejects.clear()


def _chunks(layout: Layout, cut: Cut) -> pa.Table:
    """Pairs by split and id, and shards, with the number of the chunk that each belongs to."""
    total = sum(pair.size for pair in layout.pairs)
    target = min(cut.most_bytes, max(cut.least_bytes, total // cut.chunks))
    rows = []
    number = 0
    for number, chunk in enumerate(_divided(layout.pairs, target, cut.most_images), start=1):
        rows += [{"chunk": number - 1, **dataclasses.asdict(pair), "is_shard": False} for pair in chunk]
    for place, shard in enumerate(sorted(layout.shards, key=lambda shard: shard.url)):
        row = {"image_id": shard.name, "split": shard.split, "image_url": shard.url, "coding": shard.coding}
        rows.append({"chunk": number + place, **row, "size": shard.size, "is_shard": True})
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _divided(pairs: Iterable[Pair], target: int, most: int) -> Iterator[list[Pair]]:
    chunk: list[Pair] = []
    size = 0
    for pair in sorted(pairs, key=lambda pair: (pair.split, pair.image_id)):
        if chunk and (pair.split != chunk[0].split or size + pair.size > target or len(chunk) >= most):
            yield chunk
            chunk, size = [], 0
        chunk.append(pair)
        size += pair.size
    if chunk:
        yield chunk


def _plan_digest(layout: Layout, chunks: pa.Table, listing: str, selection: Selection) -> str:
    digest = hashlib.sha256(listing.encode())
    classes = [layout.classes.names, layout.classes.palette] if layout.classes else None
    codings = {name: [sorted(c.values.items()), c.variable] for name, c in layout.codings.items()}
    colours = {name: sorted(c.colours.items()) for name, c in layout.codings.items() if c.colours}
    digest.update(json.dumps([layout.name, classes, codings, colours, dataclasses.asdict(selection)]).encode())
    for row in zip(*(chunks[name].to_pylist() for name in ("chunk", "image_id", "split")), strict=True):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


def stable_fraction(text: str) -> float:
    """A number from 0 to 1 that hangs on a text alone, the same everywhere and always."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
