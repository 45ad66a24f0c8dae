"""Ingestion: a bucket in a published layout becomes a canonical dataset, or a list of what is wrong with its files.

The source is listed and divided into chunks by a task on the cluster, and each chunk is read, checked and written by a
task. A killed ingest goes on with the chunks that are not there yet, and ends with the same dataset.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.util.annotations import RayDeprecationWarning

from pipeline import dataset, storage
from pipeline.cluster import connected
from pipeline.conversion import CONTENT_SCHEMA, ChunkConverter, Tally
from pipeline.errors import PipelineError, mendable_cause
from pipeline.inventory import SHOWN, Cut, Inventory, Selection, delete_chunks, has_chunks, take_inventory, write_chunks
from pipeline.layouts import Reject
from pipeline.parquet_files import write_table
from pipeline.progress import Progress, announce
from pipeline.redaction import redacted
from pipeline.run_record import (
    FILE_NAME,
    RunRecord,
    differences,
    finished_record,
    read_record,
    record_run,
    refuse_other_work,
)

CUT = Cut()
CHUNK_RETRIES = 5
NOTES_FOLDER = "_ingest"  # while the ingest is unfinished
UNPAIRED_FILE = f"{dataset.REJECTS_FOLDER}/part-unpaired.parquet"  # what the listing alone rejects

_DUPLICATES_SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "split", "first_id", "first_split")])


@dataclass(frozen=True)
class IngestConfig:
    """Turn a bucket of labelled images into a canonical dataset.

    Args:
        source: URL of the images and labels, as published.
        dataset: URL that the canonical dataset is written to; outside the source.
        layout: camvid, ade20k, cityscapes, pascal_context (59 classes), pascal_context_60, coco_stuff10k,
            coco_stuff164k, voc, folders, webdataset, parquet, unlabelled, or auto to recognise the tree.
        max_reject_fraction: share of bad inputs, 0 to 1, above which the ingest fails.
        splits: only these splits of the source, separated by commas; all when not given.
        val_fraction: share of the split `train`, 0 to 1, that becomes the split `val`, by a stable hash of the
            image's id; for sources without one.
        limit: at most so many images of each split, chosen by a stable hash of the id; not for shards.
        dry_run: only say what is there, from the listing and a sample of the images; nothing is written.
        preview: as dry_run, and draw images beside their labels into a PNG at this URL.
        new: start afresh, replacing the dataset that an earlier ingest left there.
    """

    source: str
    dataset: str | None = None
    layout: str = "auto"
    max_reject_fraction: float = field(default=0.01, metadata={"identity": False})
    splits: str | None = None
    val_fraction: float = 0.0
    limit: int | None = None
    dry_run: bool = field(default=False, metadata={"identity": False})
    preview: str | None = field(default=None, metadata={"identity": False})
    new: bool = field(default=False, metadata={"identity": False})

    @property
    def selection(self) -> Selection:
        """Which inputs are wanted."""
        names = None if self.splits is None else tuple(name.strip() for name in self.splits.split(","))
        return Selection(names, self.val_fraction, self.limit)


def ingest(config: IngestConfig) -> RunRecord:
    """Read, check and convert every input of the source; write the dataset, its rejects and the run record.

    Raises:
        PipelineError: if the source or the target cannot serve, or too many inputs are bad.
    """
    config = checked_config(config)
    if config.dataset is None:
        raise PipelineError("No dataset is given: pass --dataset, the URL to write it to, or --dry_run true.")
    config = dataclasses.replace(config, dataset=storage.absolute(config.dataset))
    url = str(config.dataset)
    _require_apart(config.source, url)
    if not storage.exists(config.source):
        storage.require_bucket(config.source)
        raise PipelineError(f"{config.source} has no objects: correct the URL.")
    with connected():
        inventory, chunks, rejects = _inventory(config)
        inputs = {"source": inventory.inputs}
        notes = storage.join(url, NOTES_FOLDER, inventory.plan)
        resumes = False
        if not config.new:
            finished = finished_record(url, "ingest", config, inputs)
            if finished:
                _require_few_rejects(config, finished.counts)
                announce(f"already ingested: {url} ({_counts_text(finished.counts)})")
                return finished
            refuse_other_work(url, "ingest", config, inputs)
            earlier = read_record(url)
            resumes = earlier is not None and not differences(earlier, config, inputs) and has_chunks(notes)
        _require_free(url)
        _announce(inventory)
        # Also what may not come to be: rows that an earlier run left under any of these names must not stay beside
        # the new. The notes go first: nothing is to be taken for done while what it made is being deleted.
        outputs = [NOTES_FOLDER, dataset.INFO_FILE, dataset.REJECTS_FOLDER, dataset.DUPLICATES_FOLDER]
        outputs += inventory.splits
        with record_run(url, "ingest", config, inputs, outputs, keep=resumes) as record:
            if resumes:
                announce("  going on where an earlier run was stopped")
            else:
                _store_inventory(url, notes, chunks, rejects)
            del chunks, rejects
            tally = _convert(config, inventory, notes)
            _finish(config, inventory, notes, tally, record)
        delete_chunks(notes)
        storage.delete(storage.join(url, NOTES_FOLDER))
    announce(f"ingested {url} ({_counts_text(record.counts)})")
    return record


def checked_config(config: IngestConfig) -> IngestConfig:
    """The configuration with an absolute source, if its numbers can be right; else PipelineError."""
    for name in ("max_reject_fraction", "val_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise PipelineError(f"{name} is {getattr(config, name)}: give a share from 0 to 1.")
    if config.limit is not None and config.limit < 1:
        raise PipelineError(f"limit is {config.limit}: give 1 or more, or leave it out.")
    return dataclasses.replace(config, source=storage.absolute(config.source))


def _inventory(config: IngestConfig) -> tuple[Inventory, Any, Any]:
    """The source's inventory, and references to the tables of its chunks and rejects, which stay on the cluster."""
    task: Any = ray.remote(num_cpus=1, num_returns=3)(take_inventory)
    inventory, chunks, rejects = task.remote(config.source, config.layout, config.selection, CUT)
    found: Inventory = _got(inventory)
    return found, chunks, rejects


def _got(reference: Any) -> Any:
    """What a task has returned; if it failed by what its reader can mend, that."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise mendable_cause(error) or error from error


def _announce(found: Inventory) -> None:
    what = f"{found.images} images" if found.images else f"{found.shards} shards"
    announce(f"  {found.layout}: {what} in {', '.join(found.splits)}; {found.size / 2**20:.1f} MB")
    if found.passed_over:
        announce(f"  other files, which are passed over: {found.passed_over}, such as {found.passed_over_example}")


def _store_inventory(url: str, notes: str, chunks: Any, rejects: Any) -> None:
    def store(chunk_table: pa.Table, reject_table: pa.Table) -> None:
        if reject_table.num_rows:
            write_table(storage.join(url, UNPAIRED_FILE), reject_table)
        write_chunks(notes, chunk_table)  # last: with it, there is something to go on with

    _got(ray.remote(num_cpus=1)(store).remote(chunks, rejects))


def _convert(config: IngestConfig, inventory: Inventory, notes: str) -> Tally:
    """Convert all chunks that are not there yet; what is told of all of them."""
    tally = Tally()
    numbers = pa.table({"chunk": pa.array(range(inventory.chunks), pa.int32())})
    total, unit = (inventory.images, "images") if inventory.images else (inventory.shards, "shards")
    with Progress("ingest", total=total, unit=unit) as progress:
        converter = ChunkConverter(
            dataset=str(config.dataset),
            notes=notes,
            codings=inventory.codings,
            num_classes=len(inventory.classes) if inventory.classes else 0,
            selection=config.selection,
            reporter=progress.reporter,
        )
        chunks = ray.data.from_arrow(numbers).repartition(target_num_rows_per_block=1)
        with warnings.catch_warnings():
            # A chunk that its worker does not survive would otherwise be tried for ever, and Ray 2.60 has no other
            # parameter for that than the one it warns of.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            retries: dict[str, Any] = {"max_retries": CHUNK_RETRIES}
            converted = chunks.map_batches(converter, batch_size=1, batch_format="pyarrow", num_cpus=1, **retries)
        try:
            for row in converted.iter_rows():
                tally.add(Tally.from_json(row["tally"]))
        except (WorkerCrashedError, OutOfMemoryError) as error:
            raise PipelineError(
                f"A worker has died {CHUNK_RETRIES + 1} times while it converted some images of {config.source}, as it "
                "does where memory runs out: give it a machine with more for each CPU, and run again to go on."
            ) from error
    return tally


def _finish(config: IngestConfig, inventory: Inventory, notes: str, tally: Tally, record: RunRecord) -> None:
    """Judge what the conversion has come to and write the dataset's description, which makes a dataset of it."""
    url = str(config.dataset)
    record.counts = _counts(inventory, tally)
    _judge(config, inventory, tally, record.counts)
    duplicates: dict[str, int] = _got(ray.remote(num_cpus=1)(_write_duplicates).remote(url, notes, tally.rows.total()))
    if duplicates["images"]:
        announce(
            f"  {duplicates['images']} images are byte for byte those of another row, {duplicates['across_splits']} of "
            f"them in another split, listed in {url}/{dataset.DUPLICATES_FOLDER}/"
        )
    _require_own(url, record)
    _delete_strangers(url, {*inventory.splits, dataset.REJECTS_FOLDER}, {*tally.files, UNPAIRED_FILE})
    info = _info(config, inventory, tally, duplicates["images"])
    record.outputs = [dataset.INFO_FILE, *info.splits]
    record.outputs += [dataset.REJECTS_FOLDER] if info.rejected else []
    record.outputs += [dataset.DUPLICATES_FOLDER] if info.duplicates else []
    record.results = {
        "fingerprint": info.fingerprint,
        "splits": {name: split.rows for name, split in info.splits.items()},
    }
    dataset.write_info(url, info)


def _counts(inventory: Inventory, tally: Tally) -> dict[str, int]:
    """How many inputs there were and what became of them; AssertionError if the sums differ."""
    rows_out, rejected = tally.rows.total(), tally.rejected + inventory.rejected
    rows_in = rows_out + rejected if inventory.shards else inventory.images + inventory.rejected
    if rows_in != rows_out + rejected:
        raise AssertionError(
            f"{rows_in} inputs became {rows_out} rows and {rejected} rejects: some are lost or doubled"
        )
    return {"in": rows_in, "out": rows_out, "rejected": rejected}


def _judge(config: IngestConfig, inventory: Inventory, tally: Tally, counts: Mapping[str, int]) -> None:
    """Refuse too many rejects, or tell of the few."""
    listed = f"listed in {config.dataset}/{dataset.REJECTS_FOLDER}/"
    examples = "; ".join(reject_text(item) for item in (inventory.examples + tally.examples)[:SHOWN])
    _require_few_rejects(config, counts, f" The first: {examples}.")
    if tally.broken_shards > config.max_reject_fraction * inventory.shards:
        raise PipelineError(
            f"{tally.broken_shards} of {inventory.shards} shards cannot be read to their end, {listed}, a larger share "
            f"than --max_reject_fraction {config.max_reject_fraction} allows. The first: {examples}. "
            "Mend or remove them and run again."
        )
    if counts["rejected"]:
        announce(f"  {counts['rejected']} of {counts['in']} inputs were rejected, {listed}; the first: {examples}")


def _info(config: IngestConfig, inventory: Inventory, tally: Tally, duplicates: int) -> dataset.DatasetInfo:
    classes = inventory.classes
    return dataset.DatasetInfo(
        names=list(classes.names) if classes else [],
        palette=[list(colour) for colour in classes.palette] if classes else [],
        splits={
            split: dataset.SplitInfo(
                rows=rows,
                labelled=tally.labelled[split],
                pixels=tally.pixels[split],
                files={path: count for path, count in sorted(tally.files.items()) if path.startswith(f"{split}/")},
            )
            for split, rows in sorted(tally.rows.items())
        },
        rejected=tally.rejected + inventory.rejected,
        source=redacted(config.source),
        layout=inventory.layout,
        fingerprint=_fingerprint(tally.digest, inventory),
        duplicates=duplicates,
        sizes={"height": dataset.quantiles(tally.heights), "width": dataset.quantiles(tally.widths)},
    )


def _require_few_rejects(config: IngestConfig, counts: Mapping[str, int], examples: str = "") -> None:
    """Refuse a dataset without rows, or of which too many inputs are bad."""
    rejected, rows_in = counts["rejected"], counts["in"]
    if rejected > config.max_reject_fraction * rows_in or not counts["out"]:
        raise PipelineError(
            f"{rejected} of {rows_in} inputs were rejected, listed in {config.dataset}/{dataset.REJECTS_FOLDER}/, more "
            f"than --max_reject_fraction {config.max_reject_fraction} allows.{examples} "
            "Mend or remove them and run again."
        )


def _require_own(url: str, record: RunRecord) -> None:
    """Refuse to finish what another run has begun anew in the meantime."""
    now = read_record(url)
    if now is None or now.run_id != record.run_id:
        raise PipelineError(f"Another ingest has begun at {url} since: let it end, then run again.")


def _delete_strangers(url: str, folders: Set[str], files: Set[str]) -> None:
    """Delete what lies in folders of the dataset beside its files: what a killed attempt made of inputs now gone."""
    for folder in folders:
        for item in storage.list_objects(storage.join(url, folder)):
            if item.url.removeprefix(f"{url}/") not in files:
                storage.delete(item.url)


def _write_duplicates(url: str, notes: str, rows: int) -> dict[str, int]:
    """Writes down which of so many rows' images are there more than once.

    Runs on a worker, which holds an id and a digest of every image: about 1 GB for ten million.

    Raises:
        PipelineError: if an image_id is there more than once.
    """
    filesystem, path = storage.arrow_filesystem(notes)
    places = [f"{path}/{item.url.rpartition('/')[2]}" for item in storage.list_objects(notes)]
    places = [place for place in places if place.endswith(".content.parquet")]
    contents = [pq.read_table(place, filesystem=filesystem, schema=CONTENT_SCHEMA) for place in places]
    table = pa.concat_tables(contents).sort_by([("split", "ascending"), ("image_id", "ascending")])
    if table.num_rows != rows:
        raise AssertionError(f"the notes tell of {table.num_rows} rows, not of {rows}")
    _require_unique_ids(table)
    firsts = table.group_by("content", use_threads=False).aggregate([("image_id", "first"), ("split", "first")])
    joined = table.join(firsts, "content").filter(pc.field("image_id") != pc.field("image_id_first"))
    joined = joined.select(["image_id", "split", "image_id_first", "split_first"]).rename_columns(
        _DUPLICATES_SCHEMA.names
    )
    if joined.num_rows:
        ordered = joined.sort_by("image_id").cast(_DUPLICATES_SCHEMA)
        write_table(storage.join(url, dataset.DUPLICATES_FOLDER, "part-000000.parquet"), ordered)
    across = joined.filter(pc.field("split") != pc.field("first_split"))
    return {"images": joined.num_rows, "across_splits": across.num_rows}


def _require_unique_ids(table: pa.Table) -> None:
    """Refuse ids that are there more than once; shards from elsewhere may bring any."""
    ids = table.group_by("image_id").aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)
    if ids.num_rows:
        raise PipelineError(
            f"{ids.num_rows} values of image_id are there more than once, such as {ids['image_id'][0].as_py()!r}: "
            "make them unique in the source, or leave the column out."
        )


def _fingerprint(digest: int, inventory: Inventory) -> str:
    """Of the rows and of what their values mean: a model trained under other names or colours is another model."""
    classes = inventory.classes
    meaning = json.dumps([classes.names, classes.palette] if classes else None)
    return hashlib.sha256(f"{digest:064x}{meaning}".encode()).hexdigest()


def reject_text(reject: Reject) -> str:
    """A reject in a sentence."""
    return f"{reject.source_uri}: {reject.reason}, {reject.detail}"


def _counts_text(counts: Mapping[str, int]) -> str:
    return f"{counts['in']} inputs: {counts['out']} rows, {counts['rejected']} rejected"


def _require_apart(source: str, target: str) -> None:
    inner, outer = f"{target.rstrip('/')}/", f"{source.rstrip('/')}/"
    if inner.startswith(outer) or outer.startswith(inner):
        raise PipelineError(f"The dataset {target} and the source {source} lie in each other: choose another place.")


def _require_free(url: str) -> None:
    """Refuse to write among objects that no ingest has left there."""
    if storage.exists(storage.join(url, FILE_NAME)):
        return
    stranger = next(iter(storage.list_objects(url)), None)
    if stranger:
        raise PipelineError(f"{url} already holds {stranger.url}, which no ingest wrote: choose an empty place.")
