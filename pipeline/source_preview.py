"""A look at a source before it is ingested: what is there, what would be rejected, and how labels lie on images.

Runs in the calling process, which starts no Ray, on the listing and a sample of the images.
"""

import collections
from collections.abc import Iterable, Iterator

import numpy as np

from pipeline import images, storage
from pipeline.contact_sheet import Panel, contact_sheet
from pipeline.conversion import Row, Tally, checked
from pipeline.dataset import quantiles
from pipeline.errors import PipelineError
from pipeline.images import BadImage
from pipeline.ingest import IngestConfig, checked_config, reject_text
from pipeline.inventory import SHOWN, selected_layout, stable_fraction
from pipeline.layouts import Layout, Reject
from pipeline.progress import announce
from pipeline.records import Record, read_pairs, read_shard
from pipeline.redaction import redacted

SAMPLE = 64  # images that are read
DRAWN = 6  # of them drawn
SHOWN_CLASSES = 12


def preview_source(config: IngestConfig) -> None:
    """Say what an ingest would find; with `config.preview`, draw images beside their labels.

    Raises:
        PipelineError: as `ingest`, and if none of the sample can be drawn.
    """
    config = checked_config(config)
    layout, _, others = selected_layout(config.source, config.layout, config.selection)
    tally, drawn = Tally(), list[Row]()
    num_classes = len(layout.classes) if layout.classes else 0
    for record in _sample(layout):
        try:
            row = checked(record, layout.codings, num_classes)
        except BadImage as error:
            tally.add_reject(Reject(record.source_uri, record.split, error.reason, error.detail))
            continue
        tally.add_row(row)
        if len(drawn) < DRAWN:
            drawn.append(row)
    for line in _findings(layout, tally, config.max_reject_fraction):
        announce(line)
    if config.preview and not drawn:
        raise PipelineError(f"None of the images read of {redacted(config.source)} can be drawn: mend them.")
    if others:
        announce(f"  other files, which are passed over: {len(others)}, such as {redacted(others[0])}")
    if config.preview:
        columns = 2 if any(row.values["label"] is not None for row in drawn) else 1
        storage.write_bytes(config.preview, contact_sheet([_panels(row)[:columns] for row in drawn], layout.classes))
        announce(f"  {len(drawn)} images are drawn in {config.preview}")


def _sample(layout: Layout) -> Iterator[Record]:
    """Records from all over the source: pairs by the hash of their ids, or the beginnings of some shards."""
    pairs = sorted(layout.pairs, key=lambda pair: stable_fraction(pair.image_id))[:SAMPLE]
    yield from read_pairs(pairs)
    shards = layout.shards[:: max(1, len(layout.shards) // 4)][:4]
    for shard in shards:
        for number, record in enumerate(read_shard(shard)):
            if number == SAMPLE // len(shards):
                break
            yield record


def _findings(layout: Layout, tally: Tally, most: float) -> Iterator[str]:
    read = tally.rows.total() + tally.rejected
    size = sum(pair.size for pair in layout.pairs) + sum(shard.size for shard in layout.shards)
    splits = collections.Counter(item.split for item in (*layout.pairs, *layout.shards))
    unit = "images" if layout.pairs else "shards"
    by_split = ", ".join(f"{split} {count}" for split, count in sorted(splits.items()))
    yield f"{layout.name}: {by_split} {unit}, {size / 2**20:.1f} MB"
    yield f"  of {read} that were read:"
    if tally.heights:
        yield f"  sizes: {_range(tally.widths)} wide, {_range(tally.heights)} high"
    if layout.classes:
        counts = np.sum(list(tally.pixels.values()) or [[0] * len(layout.classes)], axis=0)
        present = [int(index) for index in np.argsort(-counts) if counts[index]]
        shares = [f"{layout.classes.names[i]} {100 * counts[i] / counts.sum():.1f} %" for i in present[:SHOWN_CLASSES]]
        more = f", and {len(present) - SHOWN_CLASSES} more" if len(present) > SHOWN_CLASSES else ""
        yield f"  {len(present)} of {len(layout.classes)} classes: {', '.join(shares)}{more}"
    yield f"  {tally.rejected} would be rejected"
    yield from _examples(tally.examples)
    if layout.rejects:
        reasons = collections.Counter(reject.reason for reject in layout.rejects)
        said = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        yield f"  {len(layout.rejects)} more are rejected by the listing alone ({said})"
        yield from _examples(layout.rejects)
    if tally.rejected > most * read or len(layout.rejects) > most * (len(layout.pairs) + len(layout.rejects)):
        yield f"  that is more than --max_reject_fraction {most} allows: an ingest would fail"


def _examples(rejects: Iterable[Reject]) -> Iterator[str]:
    yield from (f"    {reject_text(reject)}" for reject in list(rejects)[:SHOWN])


def _range(counts: collections.Counter[int]) -> str:
    found = quantiles(counts)
    if found["min"] == found["max"]:
        return f"{found['min']}"
    return f"{found['min']} to {found['max']} (median {found['median']})"


def _panels(row: Row) -> tuple[Panel, Panel]:
    photograph, label = images.decode_photograph(row.values["image"]), row.values["label"]
    said = "no label" if label is None else f"{row.values['width']} x {row.values['height']}"
    return Panel(row.values["image_id"], photograph), Panel(said, None if label is None else images.decode_label(label))
