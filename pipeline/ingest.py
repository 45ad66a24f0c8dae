"""Ingestion: a bucket in a published layout becomes a canonical dataset, or a list of what is wrong with its files."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipeline import dataset, images, storage
from pipeline.cluster import connected
from pipeline.errors import PipelineError
from pipeline.layouts import Layout, Reject, read_layout
from pipeline.parquet_sink import ParquetSink, write_table
from pipeline.progress import Progress, announce
from pipeline.run_record import FILE_NAME, RunRecord, finished_record, record_run, refuse_other_work

TARGET_FILE_BYTES = 128 * 2**20
ROWS_PER_TASK = 32
SHOWN_REJECTS = 3

_CHECKED_SCHEMA = pa.schema(
    [
        *dataset.SCHEMA,
        ("split", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("pixels", pa.list_(pa.int64())),
        ("digest", pa.binary(32)),
    ]
)


@dataclass(frozen=True)
class IngestConfig:
    """Turn a bucket of labelled images into a canonical dataset.

    Args:
        source: URL of the images and labels, as published.
        dataset: URL that the canonical dataset is written to; outside the source.
        layout: camvid, folders, or auto to recognise the tree.
        max_reject_fraction: share of bad inputs, 0 to 1, above which the ingest fails.
        new: start afresh, replacing the dataset that an earlier ingest left there.
    """

    source: str
    dataset: str
    layout: str = "auto"
    max_reject_fraction: float = 0.01
    new: bool = field(default=False, metadata={"identity": False})


@dataclass(frozen=True)
class _Summary:
    """What a write task tells the driver about its rows; its size does not depend on their number."""

    rows: collections.Counter[str]
    pixels: Mapping[str, np.ndarray]
    digest: int
    rejected: int
    examples: list[str]


def ingest(config: IngestConfig) -> RunRecord:
    """Read, check and convert every pair of the source; write the dataset, its rejects and the run record.

    Raises:
        PipelineError: if the source or the target cannot serve, or too many inputs are bad.
    """
    config = dataclasses.replace(
        config, source=storage.absolute(config.source), dataset=storage.absolute(config.dataset)
    )
    if not 0 <= config.max_reject_fraction <= 1:
        raise PipelineError(f"max_reject_fraction is {config.max_reject_fraction}: give a share from 0 to 1.")
    _require_apart(config.source, config.dataset)
    objects = list(storage.list_objects(config.source))
    if not objects:
        storage.require_bucket(config.source)
        raise PipelineError(f"{config.source} has no objects: correct the URL.")
    inputs = {"source": _listing_digest(objects)}
    if not config.new:
        finished = finished_record(config.dataset, "ingest", config, inputs)
        if finished:
            announce(f"already ingested: {config.dataset} ({_counts_text(finished.counts)})")
            return finished
        refuse_other_work(config.dataset, "ingest", config, inputs)
    layout = read_layout(config.layout, config.source, objects)
    others = layout.passed_over(objects)
    if others:
        announce(f"  {len(others)} other files are passed over, such as {storage.redacted(others[0])}")
    splits = sorted({pair.split for pair in layout.pairs} | {reject.split for reject in layout.rejects})
    # Also what may not come to be: rows that an earlier run left under any of these names must not stay beside the new.
    outputs = [dataset.INFO_FILE, dataset.REJECTS_FOLDER, *splits]
    _require_free(config.dataset)
    with connected(), record_run(config.dataset, "ingest", config, inputs, outputs, keep=False) as record:
        _convert(config, layout, record)
    announce(f"ingested {config.dataset} ({_counts_text(record.counts)})")
    return record


def _convert(config: IngestConfig, layout: Layout, record: RunRecord) -> None:
    pairs, rejects = layout.pairs, layout.rejects
    table = pa.Table.from_pylist([dataclasses.asdict(pair) for pair in pairs])
    mean_bytes = sum(pair.size for pair in pairs) / len(pairs)
    rows_per_file = max(1, int(TARGET_FILE_BYTES / max(mean_bytes, 1)))
    checker = _PairChecker(dict(layout.label_values), len(layout.classes))
    with Progress("ingest", total=len(pairs), unit="images") as progress:
        sink = ParquetSink(
            config.dataset, _route, key="source_uri", summarize=_summarize, reporter=progress.reporter,
            rows_per_file=rows_per_file,
        )  # fmt: skip
        listed = ray.data.from_arrow(table).repartition(target_num_rows_per_block=ROWS_PER_TASK)
        listed.map_batches(checker, batch_size=ROWS_PER_TASK, batch_format="pyarrow", num_cpus=0.5).write_datasink(sink)
    if rejects:
        rejected = pa.Table.from_pylist([dataclasses.asdict(item) for item in rejects], schema=dataset.REJECT_SCHEMA)
        write_table(storage.join(config.dataset, dataset.REJECTS_FOLDER, "part-unpaired.parquet"), rejected)
    summary = _total(sink.written.summaries)
    _finish(config, layout, record, sink, summary)


def _finish(config: IngestConfig, layout: Layout, record: RunRecord, sink: ParquetSink, summary: _Summary) -> None:
    rows_in = len(layout.pairs) + len(layout.rejects)
    rows_out, rejected = sum(summary.rows.values()), summary.rejected + len(layout.rejects)
    record.counts = {"in": rows_in, "out": rows_out, "rejected": rejected}
    if rows_in != rows_out + rejected:
        raise AssertionError(
            f"{rows_in} inputs became {rows_out} rows and {rejected} rejects: some are lost or doubled"
        )
    if rejected:
        examples = [_reject_text(item) for item in layout.rejects[:SHOWN_REJECTS]] + summary.examples
        listed = f"{rejected} of {rows_in} inputs were rejected, listed in {config.dataset}/{dataset.REJECTS_FOLDER}/"
        if rejected > config.max_reject_fraction * rows_in or not rows_out:
            raise PipelineError(
                f"{listed}, more than --max_reject_fraction {config.max_reject_fraction} allows. "
                f"The first: {'; '.join(examples[:SHOWN_REJECTS])}. Mend or remove them and run again."
            )
        announce(f"  {listed}; the first: {'; '.join(examples[:SHOWN_REJECTS])}")
    splits = {
        split: dataset.SplitInfo(
            rows=rows,
            labelled=rows,
            pixels=[int(count) for count in summary.pixels[split]],
            files={file.path: file.rows for file in sink.written.files if file.path.startswith(f"{split}/")},
        )
        for split, rows in sorted(summary.rows.items())
    }
    info = dataset.DatasetInfo(
        names=list(layout.classes.names),
        palette=[list(colour) for colour in layout.classes.palette],
        splits=splits,
        rejected=rejected,
        source=storage.redacted(config.source),
        layout=layout.name,
        fingerprint=_fingerprint(summary.digest, layout),
    )
    record.outputs = [dataset.INFO_FILE, *([dataset.REJECTS_FOLDER] if rejected else []), *splits]
    record.results = {"fingerprint": info.fingerprint, "splits": {name: split.rows for name, split in splits.items()}}
    dataset.write_info(config.dataset, info)


class _PairChecker:
    """Reads, checks and converts pairs: a function from a batch of pairs to as many rows or rejects."""

    def __init__(self, label_values: dict[int, int], num_classes: int) -> None:
        self.label_values, self.num_classes = label_values, num_classes

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self._row(pair) for pair in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=_CHECKED_SCHEMA)

    def _row(self, pair: dict[str, str]) -> dict[str, object]:
        row: dict[str, object] = {"image_id": pair["image_id"], "split": pair["split"], "source_uri": pair["image_url"]}
        try:
            row |= self._checked(**pair)
        except images.BadImage as error:
            row |= {"reason": error.reason, "detail": error.detail}
        return row

    def _checked(self, image_id: str, image_url: str, label_url: str, **_: object) -> dict[str, object]:
        image_bytes, label_bytes = _fetched(image_url), _fetched(label_url)
        height, width = images.decode_photograph(image_bytes).shape[:2]
        try:
            published = images.decode_label(label_bytes)
        except images.BadImage as error:
            raise images.BadImage(
                f"label_{error.reason.removeprefix('label_')}", f"{label_url}: {error.detail}"
            ) from error
        if published.shape != (height, width):
            raise images.BadImage(
                "size_mismatch",
                f"{label_url} is {published.shape[1]} x {published.shape[0]}, its image {width} x {height} pixels",
            )
        label = self._training_ids(published, label_url)
        encoded = images.encode_png(label)
        content = b"".join(hashlib.sha256(part).digest() for part in (image_id.encode(), image_bytes, label.tobytes()))
        return {
            "image": image_bytes,
            "label": encoded,
            "height": height,
            "width": width,
            "pixels": np.bincount(label.ravel(), minlength=256)[: self.num_classes].tolist(),
            "digest": hashlib.sha256(content).digest(),
        }

    def _training_ids(self, published: np.ndarray, label_url: str) -> np.ndarray:
        label = np.empty(published.shape, np.uint8)
        for value in np.unique(published):
            training_id = self.label_values.get(int(value))
            if training_id is None:
                raise images.BadImage(
                    "unknown_label_value",
                    f"{label_url} has the value {value}, which is none of the {self.num_classes} classes "
                    f"(0 to {self.num_classes - 1}) nor an ignore value",
                )
            label[published == value] = training_id
        return label


def _fetched(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        raise images.BadImage("missing", f"{url} was listed but is gone") from None


def _route(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Rows to their split's folder, rejects to theirs, each with the columns of its schema."""
    good = pc.field("reason").is_null()
    for split in sorted(set(table["split"].to_pylist())):
        part = table.filter(good & (pc.field("split") == split))
        if part.num_rows:
            yield split, part.select(dataset.SCHEMA.names).cast(dataset.SCHEMA)
    bad = table.filter(~good)
    if bad.num_rows:
        yield dataset.REJECTS_FOLDER, bad.select(dataset.REJECT_SCHEMA.names)


def _summarize(table: pa.Table) -> _Summary:
    rows: collections.Counter[str] = collections.Counter()
    pixels: dict[str, np.ndarray] = {}
    digest, rejected, examples = 0, 0, []
    columns = ["split", "source_uri", "reason", "detail", "pixels", "digest"]
    for row in table.select(columns).to_pylist():
        if row["reason"] is not None:
            rejected += 1
            if len(examples) < SHOWN_REJECTS:
                examples.append(_reject_text(Reject(row["source_uri"], row["split"], row["reason"], row["detail"])))
            continue
        rows[row["split"]] += 1
        pixels[row["split"]] = pixels.get(row["split"], 0) + np.asarray(row["pixels"], np.int64)
        digest += int.from_bytes(row["digest"], "big")
    return _Summary(rows, pixels, digest % 2**256, rejected, examples)


def _total(summaries: list[_Summary]) -> _Summary:
    """The sum of summaries. The digest is a sum too, so it does not depend on the order of rows or tasks."""
    rows: collections.Counter[str] = collections.Counter()
    pixels: dict[str, np.ndarray] = {}
    for summary in summaries:
        rows.update(summary.rows)
        for split, counts in summary.pixels.items():
            pixels[split] = pixels.get(split, 0) + counts
    return _Summary(
        rows,
        pixels,
        sum(summary.digest for summary in summaries) % 2**256,
        sum(summary.rejected for summary in summaries),
        [example for summary in summaries for example in summary.examples][:SHOWN_REJECTS],
    )


def _fingerprint(digest: int, layout: Layout) -> str:
    """Of the rows and of what their values mean: a model trained under other names or colours is another model."""
    meaning = json.dumps([layout.classes.names, layout.classes.palette])
    return hashlib.sha256(f"{digest:064x}{meaning}".encode()).hexdigest()


def _reject_text(reject: Reject) -> str:
    return f"{reject.source_uri}: {reject.reason}, {reject.detail}"


def _counts_text(counts: Mapping[str, int]) -> str:
    return f"{counts['in']} inputs: {counts['out']} rows, {counts['rejected']} rejected"


def _listing_digest(objects: list[storage.StoredObject]) -> str:
    digest = hashlib.sha256()
    for item in objects:
        digest.update(f"{item.url}\0{item.size}\0{item.version}\n".encode())
    return digest.hexdigest()


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
