"""Batch segmentation: every new or changed image below a URL becomes a row of masks, exactly once.

What makes a row stand once, whatever is killed:

- Only listed (image, version) pairs without a row of this model are segmented, so a run goes on where one was killed.
- A file of rows appears whole or not at all, and is named after its rows: a task that Ray repeats replaces its file.
- A run takes the turn at its output before it looks which rows are there. Tasks of a killed run, or of one that another
  has overtaken, write nothing any more; what one of them was just writing when it lost the turn, it deletes again.

No store has a write that depends on another object, so a gap is left. If a task loses the turn while it writes a file,
readers may see its rows beside those of the new run for the moment from the write to the deletion, milliseconds; should
its process be killed just then, both stay. If the new run has looked in that moment, or writes a file of the very same
rows, the deletion takes rows that it counts on: it looks again at its end, fails, and the next run makes what is
missing.

An image that cannot be used is a row that says why, and stays. One that storage did not give, that was overwritten or
deleted between listing and reading, or that the model failed on, is a row too, but the next run takes it away and tries
again: whether memory is enough depends on the machine and on settings that leave the model's id as it is.
"""

import dataclasses
import fnmatch
import hashlib
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from pipeline import masks, storage
from pipeline.cluster import IO_TASK_CPUS, connected
from pipeline.errors import PipelineError
from pipeline.parquet_sink import file_name, write_table
from pipeline.prediction import (
    InferenceConfig,
    model_classes,
    model_id,
    predictor_pool,
)
from pipeline.prediction_rows import (
    INFERENCE_ERROR,
    LISTED,
    STORAGE_ERROR,
    TRIED_AGAIN,
    TURN_FILE,
    MaskEncoder,
    MaskSink,
    Summary,
    read_images,
)
from pipeline.progress import Progress, announce
from pipeline.run_record import RunRecord, finished_record, record_run
from pipeline.segmenter import Segmenter
from pipeline.storage import StoredObject

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
WORKFLOW = "segment"


@dataclass(frozen=True)
class SegmentConfig:
    """Segment every image below a URL that this model has not segmented yet.

    Args:
        model: URL of a saved model.
        images: URL of the images; everything below it is looked at.
        out: URL that masks are added to; the same one may be used again for more images or another model.
        include: patterns such as `*/front/*`, matched against the place below `images`; one of them must fit.
        exclude: patterns of which none may fit.
        inference: how the model is applied.
        workers: processes that hold a model each.
        use_gpu: give each of them a GPU.
        cpus_per_worker: CPUs, and threads, for each of them.
        batch_size: images that a worker gets at a time.
        new: start afresh: delete every mask at the output, of any model, and segment all images.
    """

    model: str
    images: str
    out: str
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    workers: int = field(default=1, metadata={"identity": False})
    use_gpu: bool = field(default=False, metadata={"identity": False})
    cpus_per_worker: float = field(default=1, metadata={"identity": False})
    batch_size: int = field(default=4, metadata={"identity": False})
    new: bool = field(default=False, metadata={"identity": False})

    def wants(self, url: str) -> bool:
        """Whether an object below `images` is asked for: an image by its suffix, and by the patterns."""
        place = url[len(self.images) :].lstrip("/") or url.rpartition("/")[2]
        return (
            url.lower().endswith(SUFFIXES)
            and any(fnmatch.fnmatchcase(place, pattern) for pattern in self.include)
            and not any(fnmatch.fnmatchcase(place, pattern) for pattern in self.exclude)
        )


def segment(config: SegmentConfig) -> RunRecord:
    """Segment what is new or changed since the last run, and add it to the masks at `config.out`.

    A changed input is no other work here, unlike in the other stages: rows are only added. Rows of images that are
    gone, of older versions and of other models stay.

    Raises:
        PipelineError: if the model, the images or the output cannot serve, if another run has begun at the same output,
            or if storage gave no image or the model failed on all that it was given, now as before.
    """
    config = dataclasses.replace(
        config,
        model=storage.absolute(config.model),
        images=storage.absolute(config.images),
        out=storage.absolute(config.out),
    )
    listing = _Listing.of(config)
    model = model_id(config.model, config.inference)
    inputs = {"model": model, "images": listing.digest()}
    if not config.new:
        finished = finished_record(config.out, WORKFLOW, config, inputs)
        if finished and not _pending(listing, _Rows.of(config.out, model)).num_rows:
            announce(
                f"nothing new: all {len(listing.images)} images of {config.images} have their rows in {config.out}"
            )
            return finished
    with record_run(config.out, WORKFLOW, config, inputs, [masks.FOLDER], keep=not config.new) as record:
        storage.write_json(storage.join(config.out, TURN_FILE), {"run_id": record.run_id})
        rows = _Rows.of(config.out, model)  # only now: what another run wrote until it lost the turn is in it
        pending = _pending(listing, rows)
        record.counts = {
            "listed": len(listing.images),
            "other_files": listing.others,
            "done_before": len(listing.images) - pending.num_rows,
        }
        announce(
            f"  {pending.num_rows} of {len(listing.images)} images are new to model {model}, "
            f"{listing.others} other files are passed over"
        )
        rows.retire_tried_again(config)
        summary = Summary.total([])
        if pending.num_rows:
            with connected():
                summary = _segment_pending(config, model, pending, record.run_id)
        _finish(record, model, summary, rows)
        _require_all_rows(config, listing, model, summary)
    announce(f"segmented {config.images} into {config.out} ({_counts_text(record.counts)})")
    return record


@dataclass(frozen=True)
class _Listing:
    """The images below a URL as they are now, and how many other objects there are."""

    images: list[StoredObject]
    others: int

    @classmethod
    def of(cls, config: SegmentConfig) -> "_Listing":
        images, others = [], 0
        for item in storage.list_objects(config.images):
            if config.wants(item.url):
                images.append(item)
            else:
                others += 1
        if not images and not others and not storage.exists(config.images):
            raise PipelineError(f"There is nothing at {config.images}: correct the URL of the images.")
        return cls(images, others)

    def digest(self) -> str:
        """Fingerprint of the images and their versions."""
        digest = hashlib.sha256()
        for item in self.images:
            digest.update(f"{item.url}\0{item.version}\n".encode())
        return digest.hexdigest()

    def table(self) -> pa.Table:
        """The images as rows of `LISTED`."""
        columns = [[item.url for item in self.images], [item.version for item in self.images]]
        return pa.table([pa.array(column, pa.string()) for column in columns], schema=LISTED)


@dataclass(frozen=True)
class _Rows:
    """What a model has at an output: the keys of the rows that stand, and the files of those to be tried again."""

    url: str
    done: pa.Table
    any_mask: bool
    replaced_files: list[str]

    @classmethod
    def of(cls, url: str, model: str) -> "_Rows":
        columns = [*LISTED.names, "status", "__filename"]
        found = masks.open_masks(url).to_table(columns=columns, filter=pc.field("model_id") == model)
        replaced = pc.field("status").isin(TRIED_AGAIN)
        files = {path.rpartition("/")[2] for path in found.filter(replaced)["__filename"].to_pylist()}
        any_mask = masks.OK in found["status"].unique().to_pylist()
        return cls(url, found.filter(~replaced).select(LISTED.names), any_mask, sorted(files))

    def retire_tried_again(self, config: SegmentConfig) -> None:
        """Take away the rows that this run tries again, or whose objects it no longer finds.

        They stand in files without other rows. What is taken away here and not written again, because the run is
        killed, has no row, which is how the next run knows that it is pending.
        """
        for name in self.replaced_files:
            place = storage.join(self.url, masks.FOLDER, name)
            filesystem, path = storage.arrow_filesystem(place)
            table = pq.read_table(path, filesystem=filesystem, schema=masks.PREDICTION_SCHEMA)
            elsewhere = [
                not _below(config.images, uri) or not config.wants(uri) for uri in table["image_uri"].to_pylist()
            ]
            if not all(elsewhere):
                storage.delete(place)
                kept = table.filter(pa.array(elsewhere))
                if kept.num_rows:
                    write_table(storage.join(self.url, masks.FOLDER, file_name(kept, masks.KEY)), kept)


def _below(prefix: str, url: str) -> bool:
    return url == prefix or url.startswith(f"{prefix.rstrip('/')}/")


def _pending(listing: _Listing, rows: _Rows) -> pa.Table:
    """The listed images that have no row which stands, in the order of their keys."""
    keys = list(LISTED.names)
    return listing.table().join(rows.done, keys=keys, join_type="left anti").sort_by("image_uri")


def _segment_pending(config: SegmentConfig, model: str, pending: pa.Table, run_id: str) -> Summary:
    """Read, segment, encode and write."""
    palette = model_classes(config.model).palette
    pool = predictor_pool(config.workers, config.cpus_per_worker, config.use_gpu, config.batch_size)
    blocks = [pending.slice(start, config.batch_size) for start in range(0, pending.num_rows, config.batch_size)]
    with Progress("segment", pending.num_rows, "images") as progress:
        sink = MaskSink(config.out, run_id, progress.reporter)
        (
            ray.data.from_arrow(blocks)
            .map_batches(read_images, batch_format="pyarrow", num_cpus=IO_TASK_CPUS)
            .map_batches(
                Segmenter,
                fn_constructor_args=(config.model, config.inference),
                batch_format="pyarrow",
                **pool,
            )
            .map_batches(MaskEncoder(model, palette), batch_format="pyarrow", num_cpus=IO_TASK_CPUS)
            # Another number of CPUs keeps Ray from fusing writing with encoding, which would gather a file's worth of
            # class maps, many times larger than their PNGs.
            .write_datasink(sink, ray_remote_args={"num_cpus": IO_TASK_CPUS / 2})
        )
    summary = Summary.total(sink.written.summaries)
    if summary.statuses.total() != pending.num_rows:
        raise AssertionError(
            f"{pending.num_rows} images became {summary.statuses.total()} results: some are lost or doubled"
        )
    return summary


def _finish(record: RunRecord, model: str, summary: Summary, before: _Rows) -> None:
    """Put what happened into the record, and refuse to call a run done in which nothing works at all.

    A result from before shows that storage works, and a mask that the model does: then what failed this time is
    announced, and must not make every later run fail.
    """
    statuses, failures = summary.statuses, summary.failures
    record.counts |= {"ok": statuses[masks.OK], "failed": statuses.total() - statuses[masks.OK]}
    record.results = {"model_id": model, "statuses": dict(sorted(statuses.items())), "first_failures": failures}
    if statuses[STORAGE_ERROR] and statuses[STORAGE_ERROR] == statuses.total() and not record.counts["done_before"]:
        raise PipelineError(
            f"None of the {statuses.total()} pending images could be read; the first: {failures[0]['error']}"
        )
    if statuses[INFERENCE_ERROR] and not statuses[masks.OK] and not before.any_mask:
        error = next((row["error"] for row in failures if row["status"] == INFERENCE_ERROR), "see the rows")
        raise PipelineError(
            f"The model failed on every image that it was given, {statuses[INFERENCE_ERROR]} in all: {error}"
        )
    if failures:
        announce(
            f"  {record.counts['failed']} images could not be segmented, "
            f"the first: {failures[0]['image_uri']}: {failures[0]['error']}"
        )


def _require_all_rows(config: SegmentConfig, listing: _Listing, model: str, summary: Summary) -> None:
    """Refuse to call a run done if a task of an overtaken run has deleted rows that this one counts on."""
    to_be_tried_again = sum(summary.statuses[status] for status in TRIED_AGAIN)
    missing = _pending(listing, _Rows.of(config.out, model)).num_rows - to_be_tried_again
    if missing > 0:
        raise PipelineError(
            f"{missing} images have lost their rows in {config.out} to a run that this one has overtaken: run again."
        )


def _counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in ("listed", "done_before", "ok", "failed"))
