"""Published trees ingested through Ray: the rows that come out are the images and training ids that were drawn."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import dataset
from pipeline.images import decode_label
from pipeline.ingest import IngestConfig, ingest
from tests.pipeline.published_trees import FILES, NAMED, SHARDS

# One of each way in which labels lie and are coded; tests/pipeline/test_labels.py reads the others without Ray.
CHOSEN = ("cityscapes_both", "coco_stuff10k", "pascal_context_raw_png", "voc", "unlabelled")
TREES = {**{name: FILES[name] for name in CHOSEN}, **NAMED, **SHARDS}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", TREES)
def test_a_published_tree_becomes_the_dataset_that_it_is(name: str, tmp_path: Path) -> None:
    written = TREES[name](str(tmp_path / "source"))
    url = str(tmp_path / "set")
    record = ingest(IngestConfig(str(tmp_path / "source"), url, layout=written.layout))
    assert record.counts == {"in": len(written.samples), "out": len(written.samples), "rejected": 0}
    data = dataset.open(url)
    assert len(data.info.names) == written.num_classes
    rows = {row["image_id"]: row for split in data.info.splits for row in data.rows(split)}
    assert rows.keys() == written.samples.keys()
    pixels = np.zeros(written.num_classes, np.int64)
    for image_id, sample in written.samples.items():
        assert rows[image_id]["image"] == sample.image
        if sample.label is None:
            assert rows[image_id]["label"] is None
        else:
            np.testing.assert_array_equal(decode_label(rows[image_id]["label"]), sample.label)
            pixels += np.bincount(sample.label.ravel(), minlength=256)[: written.num_classes]
    assert np.array_equal(np.sum([split.pixels for split in data.info.splits.values()], axis=0), pixels)
