"""Batch segmentation: every new or changed image of a source becomes a row of masks, exactly once.

What makes a row stand once, whatever is killed:

- One run at a time has the lease of an output; a second one says who has it, and leaves.
- Only images whose (URI, version) has no row of this model are segmented, so a run goes on where one was killed.
- Tasks stage files; the driver commits them in transactions, each image of the run once (`pipeline.mask_store`,
  `pipeline.mask_stager`). A run that has lost its lease cannot commit any more.

An image that cannot be used is a row that says why, and stays. One that storage did not give, that was overwritten or
deleted between listing and reading, that the model failed on, or processes died on (`pipeline.attempts`), is a row too,
but the next run tries it again, and replaces the row at its end: whether memory is enough depends on the machine and on
settings that leave the model's id as it is.

The driver holds a byte for each image that is to be segmented, the names of the output's files and of the files of
pending images: some 100 MB for 100 million images. What the cluster compares is divided (`pipeline.census`).
"""

import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import ray.data

from pipeline import image_sources, mask_store, masks, storage
from pipeline.attempts import attempts_of_run
from pipeline.census import Census, Pending, PendingFile
from pipeline.cluster import IO_TASK_CPUS, connected
from pipeline.errors import PipelineError
from pipeline.image_sources import STORAGE_ERROR, ImageSource, Part
from pipeline.lease import Held, Lease
from pipeline.mask_changes import compact, remove_rows
from pipeline.mask_stager import ROWS_PER_FILE, Ledger, MaskStager, in_rounds
from pipeline.mask_store import MaskStore
from pipeline.mask_summary import PLOT_FILE, TABLE_FILE, keep_classes, summarize
from pipeline.prediction import model_classes, model_id, model_versions, predictor_pool
from pipeline.prediction_rows import INFERENCE_ERROR, NUMBER, SLICES, ImageReader, MaskEncoder, Summary
from pipeline.progress import Progress, announce
from pipeline.run_record import RunRecord, finished_record, read_record, record_run, refuse_other_workflow
from pipeline.segment_config import SegmentConfig
from pipeline.segmenter import Segmenter

WORKFLOW = "segment"
MAINTENANCE, MAINTENANCE_FOLDER = "maintain", "maintenance"  # of the record of a run that only compacts or sums up
ROUND_IMAGES = 1_000_000  # in one execution of Ray Data, whose bookkeeping grows with what it has done
MOST_TOGETHER = 32  # images that a task reads
TASKS_AT_LEAST = 64  # small jobs are still cut into about this many tasks
BLOCK_BYTES = 16 * 2**20  # a task emits a block once its decoded images exceed this
# Of a task that stages. Not that of encoding: Ray would fuse the two, and gather a file's worth of class maps, many
# times as large as their PNGs.
STAGING_CPUS = IO_TASK_CPUS / 2
CPUS_BESIDE = 2 * IO_TASK_CPUS + STAGING_CPUS  # of one task each that reads, encodes and stages


def segment(config: SegmentConfig) -> RunRecord:
    """Segment what is new or changed since the last run, and add it to the masks at `config.out`.

    A changed input is no other work here, unlike in the other stages: rows are only added, unless the configuration
    says what is to be taken away.

    Raises:
        Held: if another run has the output, and lives.
        PipelineError: if the model, the images or the output cannot serve, or if storage gave no image or the model
            failed on all that it was given, now as before.
    """
    places = {
        name: storage.absolute(getattr(config, name)) for name in ("model", "images", "out") if getattr(config, name)
    }
    config = dataclasses.replace(config, **places)
    if config.products.overlays is not None:
        overlays = storage.absolute(config.products.overlays)
        config = dataclasses.replace(config, products=dataclasses.replace(config.products, overlays=overlays))
    run_id = uuid.uuid4().hex
    refuse_other_workflow(config.out, WORKFLOW)
    if not config.model:
        return _maintained(config, run_id)
    versions = model_versions(config.model)  # before the id is made: of what was overwritten since, no worker takes it
    model = model_id(config.model, config.inference, config.products)
    config.products.require(model_classes(config.model).names)
    if config.products.overlays is not None:
        storage.require_bucket(config.products.overlays)
    source = image_sources.resolved(ImageSource(config.images, config.source, config.include, config.exclude))
    image_sources.parts(source)  # what has no images is refused before anything is written
    if config.prune and source.kind not in ("prefix", "tar"):
        raise PipelineError(
            f"prune is true, but {source.images} is a {source.kind}, and what it does not name need not be deleted: "
            "leave prune out, or give the prefix of the images."
        )
    # The lease comes first: who finds the output taken is not to wait for a cluster.
    with Lease(config.out, run_id) as lease, connected():
        pool = model_pool(config)
        with MaskStore(config.out, run_id) as store:
            # Listed only now: what the run before this one has found there is to be found, too.
            return _Run(config, model, versions, source, image_sources.parts(source), pool, store, lease).run()


def model_pool(config: SegmentConfig) -> dict[str, Any]:
    """The arguments of `Dataset.map_batches` for the workers that hold a model each.

    Raises:
        PipelineError: if a number is out of range, or there is no room for them.
    """
    return predictor_pool(
        config.workers,
        config.cpus_per_worker,
        config.use_gpu,
        config.batch_size,
        min_workers=config.min_workers,
        gpus_per_worker=config.gpus_per_worker,
        cpus_beside=CPUS_BESIDE,
    )


def segment_in_turn(config: SegmentConfig) -> None:
    """As `segment`, but that another run has the output is no failure: what is new will be its, or the next one's."""
    try:
        segment(config)
    except Held as held:
        announce(str(held))


def _maintained(config: SegmentConfig, run_id: str) -> RunRecord:
    """Merge and sum up what is there, without a model. Has a record of its own, for that of the masks stays true."""
    if read_record(config.out) is None and not mask_store.files(config.out):
        raise PipelineError(f"There are no masks at {config.out}: correct the URL, or give model and images, too.")
    place = storage.join(config.out, MAINTENANCE_FOLDER)
    with (
        Lease(config.out, run_id),
        connected(),
        MaskStore(config.out, run_id) as store,
        record_run(place, MAINTENANCE, config, {}, [], run_id=run_id) as record,
    ):
        if config.compact:
            record.counts |= _compacted(store)
        if config.summary:
            _summarized(config)
    return record


def _compacted(store: MaskStore) -> dict[str, int]:
    before, after = compact(store)
    announce(f"merged {before} files of {store.url} into {after}" if before else f"no small files in {store.url}")
    return {"files_merged": before, "files_made": after}


def _summarized(config: SegmentConfig, model: str | None = None) -> None:
    if model is not None:
        keep_classes(config.out, model, model_classes(config.model))
    summarize(config.out, model, config.summary_depth)
    announce(f"summed up classes in {storage.join(config.out, TABLE_FILE)} and {storage.join(config.out, PLOT_FILE)}")


@dataclass(frozen=True)
class _Run:
    """One run that has the lease of its output."""

    config: SegmentConfig
    model: str
    versions: tuple[str, ...]
    source: ImageSource
    parts: list[Part]
    pool: dict[str, Any]
    store: MaskStore
    lease: Lease

    def run(self) -> RunRecord:
        config, store = self.config, self.store
        pending = Census(self.parts, None if config.new else config.out, self.model).pending(store.work)
        inputs = {"model": self.model, "images": pending.fingerprint}
        finished = finished_record(config.out, WORKFLOW, config, inputs)
        if finished and not pending.images and not config.new:
            without = (
                f", {pending.unusable} of them without a mask (status and error say why)" if pending.unusable else ""
            )
            announce(
                f"nothing new: all {pending.listed} images of {config.images} have their rows in {config.out}{without}"
            )
            return finished
        outputs = [mask_store.FOLDER, *([TABLE_FILE, PLOT_FILE] if config.summary else [])]
        with record_run(config.out, WORKFLOW, config, inputs, outputs, run_id=store.run_id) as record:
            self._work(record, pending)
        announce(f"segmented {config.images} into {config.out} ({_counts_text(record.counts)})")
        return record

    def _work(self, record: RunRecord, pending: Pending) -> None:
        config = self.config
        done_before = pending.listed - pending.images
        record.counts = {"listed": pending.listed, "other_files": pending.others, "done_before": done_before}
        if pending.listed_twice:
            record.counts["listed_twice"] = pending.listed_twice
        without = f"{pending.unusable} have rows that say why they have no mask, " if pending.unusable else ""
        announce(
            f"  {pending.images} of {pending.listed} images are new to model {self.model}, {without}"
            f"other files, which are passed over: {pending.others}"
        )
        if config.new:
            self.store.commit(remove=[mask_store.name_of(config.out, file) for file in mask_store.files(config.out)])
        _conclude(record, self.model, self._segmented(pending), pending)
        if config.replace_model or config.prune:
            census = Census(self.parts, config.out, None)
            replaced = census.superseded(self.model) if config.replace_model else None
            gone = census.gone(self.source) if config.prune else None
            remove_rows(self.store, *([replaced] if replaced else []), record=gone)
            counts = {"replaced": replaced, "pruned": gone}
            record.counts |= {name: rows.count for name, rows in counts.items() if rows is not None}
        if config.compact:
            record.counts |= _compacted(self.store)
        if config.summary:
            _summarized(config, self.model)

    def _segmented(self, pending: Pending) -> Summary:
        """Read, segment, encode, stage and commit.

        Images with rows that are to be replaced come last, and are committed at the end together with the removal of
        these, so that readers see one or the other.
        """
        ledger = Ledger(self.store, pending.images)
        if not pending.images:
            remove_rows(self.store, pending.outdated)
            return ledger.summary
        together = max(1, min(MOST_TOGETHER, max(self.config.batch_size, pending.images // TASKS_AT_LEAST)))
        with (
            Progress("segment", pending.images, "images") as progress,
            _data_settings(self.config),
            attempts_of_run() as attempts,
        ):
            for again in (False, True):
                numbered = _numbered(pending.files, again)
                for files in in_rounds(numbered, ROUND_IMAGES):
                    for staged in self._staged(_slices(files, together), attempts):
                        self.lease.require()
                        progress.reporter.advance(ledger.take(staged))
                        if not again:
                            ledger.commit_if_due()
                if not again:
                    ledger.commit()
        remove_rows(self.store, pending.outdated, add=ledger.staged)
        if ledger.missing:
            raise AssertionError(f"{ledger.missing} of {pending.images} images have no row: some are lost")
        return ledger.summary

    def _staged(self, slices: list[dict[str, Any]], attempts: Any) -> Iterator[dict[str, Any]]:
        """Rows of `STAGED`, as they come to be."""
        config = self.config
        classes = model_classes(config.model)
        found = (
            ray.data.from_arrow([pa.Table.from_pylist([slice], SLICES) for slice in slices])
            .map_batches(ImageReader(attempts), batch_size=1, batch_format="pyarrow", num_cpus=IO_TASK_CPUS)
            .map_batches(
                Segmenter,
                fn_constructor_args=(config.model, config.inference, config.products, self.versions, attempts),
                batch_format="pyarrow",
                **self.pool,
            )
            .map_batches(
                MaskEncoder(self.model, classes.palette, classes.names, config.products, attempts),
                batch_format="pyarrow",
                num_cpus=IO_TASK_CPUS,
            )
            .map_batches(
                MaskStager(config.out, self.store.run_id),
                batch_size=ROWS_PER_FILE,
                batch_format="pyarrow",
                num_cpus=STAGING_CPUS,
            )
        )
        for batch in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from cast(pa.Table, batch).to_pylist()


def _numbered(files: Sequence[PendingFile], again: bool) -> list[tuple[int, PendingFile]]:
    """The files of pending images of one of the two kinds, each with the number of its first image."""
    starts = itertools.accumulate((file.rows for file in files), initial=0)
    return [(start, file) for start, file in zip(starts, files, strict=False) if file.again == again]


def _slices(files: Sequence[tuple[int, PendingFile]], together: int) -> list[dict[str, Any]]:
    """Rows of `SLICES`, of `together` images at most, each of which a task reads."""
    return [
        {"file": file.url, "start": start, "stop": min(start + together, file.rows), NUMBER: number + start}
        for number, file in files
        for start in range(0, file.rows, together)
    ]


@contextlib.contextmanager
def _data_settings(config: SegmentConfig) -> Iterator[None]:
    """Let Ray Data hand decoded images over in small blocks, and keep CPUs back for every stage.

    So memory does not hang on the number of tasks; and the last stages work while the models do. Ray Data keeps a ratio
    of all CPUs, half by itself, back for its stages, which take their equal shares or a task's CPUs in turn, so that
    nothing is left for the last ones if the models take most. It is no smaller than that needs, for a small one slows
    the other stages down.
    """
    context = ray.data.DataContext.get_current()
    names = ("target_max_block_size", "op_resource_reservation_ratio")
    before = {name: getattr(context, name) for name in names}
    context.target_max_block_size = BLOCK_BYTES
    models = config.workers * config.cpus_per_worker
    cpus = max(ray.cluster_resources().get("CPU", 0.0), models + CPUS_BESIDE)
    share = (cpus - models) / 3 if cpus - models >= 3 * IO_TASK_CPUS else STAGING_CPUS
    context.op_resource_reservation_ratio = min(context.op_resource_reservation_ratio, 4 * share / cpus)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _conclude(record: RunRecord, model: str, summary: Summary, pending: Pending) -> None:
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
    if statuses[INFERENCE_ERROR] and not statuses[masks.OK] and not pending.masked:
        error = next((row["error"] for row in failures if row["status"] == INFERENCE_ERROR), "see the rows")
        raise PipelineError(
            f"The model failed on every image that it was given, {statuses[INFERENCE_ERROR]} in all: {error}"
        )
    if failures:
        announce(
            f"  {record.counts['failed']} images could not be segmented, "
            f"the first: {failures[0]['image_uri']}: {failures[0]['error']}"
        )


def _counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
