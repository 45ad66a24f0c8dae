"""What a bucket of labelled images becomes: rows, rejects, counts that add up, a fingerprint of the content."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import dataset, storage
from pipeline import ingest as stage
from pipeline.dataset import SCHEMA
from pipeline.images import decode_label, decode_photograph, encode_png
from pipeline.ingest import IngestConfig, ingest
from pipeline.inventory import Cut
from pipeline.run_record import RunRecord, read_record
from tests.pipeline.image_files import encoded
from tests.pipeline.labelled_source import (
    CLASSES,
    HEIGHT,
    WIDTH,
    label_values,
    photograph,
    portrait,
    refused,
    reject_rows,
    run_script,
    write_bad_inputs,
    write_pair,
    write_source,
)


@dataclasses.dataclass(frozen=True)
class _Ingested:
    source: Path
    url: str
    record: RunRecord
    reasons: dict[str, str]

    def row(self, image_id: str) -> dict:
        split = image_id.partition("/")[0]
        (row,) = [row for row in dataset.open(self.url).rows(split) if row["image_id"] == image_id]
        return row


@pytest.fixture(scope="module")
def ingested(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> _Ingested:  # noqa: ARG001
    """A source with good pairs in two splits, a photograph to be turned, and every kind of bad input."""
    folder = tmp_path_factory.mktemp("ingested")
    source, url = folder / "source", str(folder / "dataset")
    write_source(str(source))
    write_pair(str(source), "portrait.jpg", portrait(), encode_png(np.full((WIDTH, HEIGHT), 1, np.uint8)))
    reasons = write_bad_inputs(str(source))
    record = ingest(IngestConfig(str(source), url, max_reject_fraction=0.6))
    return _Ingested(source, url, record, reasons)


def test_each_good_pair_is_a_row_of_the_contract(ingested: _Ingested) -> None:
    opened = dataset.open(ingested.url)
    ids = {split: [row["image_id"] for row in opened.rows(split)] for split in opened.info.splits}
    numbers = [f"{number:02}" for number in range(4)]
    assert sorted(ids["train"]) == [*(f"train/{number}" for number in numbers), "train/portrait"]
    assert sorted(ids["val"]) == [f"val/{number}" for number in numbers]
    for split, info in opened.info.splits.items():
        assert sum(info.files.values()) == info.rows == info.labelled == len(ids[split])
        for path in info.files:
            assert pq.read_schema(f"{ingested.url}/{path}").equals(SCHEMA)
    row = ingested.row("val/02")
    assert (row["height"], row["width"]) == (HEIGHT, WIDTH)
    assert row["source_uri"] == str(ingested.source / "images/val/02.png")


def test_the_bytes_of_an_image_are_untouched(ingested: _Ingested) -> None:
    for split in ("train", "val"):
        for row in dataset.open(ingested.url).rows(split):
            assert row["image"] == Path(row["source_uri"]).read_bytes()


def test_a_label_is_an_eight_bit_png_of_training_ids(ingested: _Ingested) -> None:
    row = ingested.row("val/02")
    with Image.open(io.BytesIO(row["label"])) as label:
        assert (label.format, label.mode) == ("PNG", "L")
    np.testing.assert_array_equal(decode_label(row["label"]), label_values(12))


def test_a_photograph_counts_as_it_is_shown(ingested: _Ingested) -> None:
    row = ingested.row("train/portrait")
    assert (row["height"], row["width"]) == (WIDTH, HEIGHT)
    assert decode_label(row["label"]).shape == (WIDTH, HEIGHT)


def test_the_split_is_a_plain_pytorch_dataset_of_pixels_and_training_ids(ingested: _Ingested) -> None:
    data = dataset.open(ingested.url)
    items = data.torch("train")
    rows = list(data.rows("train"))
    assert len(items) == len(rows) > 1
    for item, row in zip((items[index] for index in range(len(items))), rows, strict=True):
        assert item["image_id"] == row["image_id"]
        assert item["image"].shape == (3, row["height"], row["width"])
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), decode_photograph(row["image"]))
        np.testing.assert_array_equal(item["label"].numpy(), decode_label(row["label"]))
    with pytest.raises(IndexError, match=f"no image {len(rows)} of {len(rows)}"):
        items[len(rows)]


def test_counts_add_up(ingested: _Ingested) -> None:
    counts = ingested.record.counts
    assert counts == {"in": 19, "out": 9, "rejected": 10}
    opened = dataset.open(ingested.url)
    assert opened.info.rejected == len(reject_rows(ingested.url)) == 10
    assert sum(split.rows for split in opened.info.splits.values()) == 9


def test_pixels_are_counted_by_class_without_the_ignored(ingested: _Ingested) -> None:
    opened = dataset.open(ingested.url)
    labels = [label_values(10 + number) for number in range(4)]
    expected = [sum(int((label == value).sum()) for label in labels) for value in range(3)]
    assert opened.info.splits["val"].pixels == expected
    assert sum(expected) == 4 * (HEIGHT * WIDTH - 15)


def test_each_reject_is_listed_with_its_reason(ingested: _Ingested) -> None:
    rows = reject_rows(ingested.url)
    assert {Path(row["source_uri"]).name: row["reason"] for row in rows} == ingested.reasons
    assert {row["split"] for row in rows} == {"train"}
    details = {Path(row["source_uri"]).stem: row["detail"] for row in rows}
    assert all(detail and "\n" not in detail for detail in details.values())
    labels = ingested.source / "labels/train"
    assert details["label_above"] == (
        f"{labels}/label_above.png: it has the value 3 at 1 pixels, "
        "which is none of the classes (0 to 2) nor an ignore value"
    )
    assert "which is none of the classes (3 colours) nor an ignore value" in details["label_colours"]
    assert details["label_smaller"] == f"{labels}/label_smaller.png is 16 x 11, its image 16 x 12 pixels"
    assert details["label_truncated"].startswith(f"{labels}/label_truncated.png: damaged or truncated")


def test_the_description_and_the_record_say_what_was_done(ingested: _Ingested) -> None:
    info = dataset.open(ingested.url).info
    assert (info.names, info.palette) == (CLASSES["names"], CLASSES["palette"])
    assert (info.source, info.layout) == (str(ingested.source), "folders")
    assert len(info.fingerprint) == 64
    record = read_record(ingested.url)
    assert record == ingested.record
    assert record is not None
    assert record.outcome == "done"
    assert record.results == {"fingerprint": info.fingerprint, "splits": {"train": 5, "val": 4}}


def test_a_second_run_is_skipped_and_says_so(ingested: _Ingested, capsys: pytest.CaptureFixture[str]) -> None:
    before = {item.url: item.version for item in storage.list_objects(ingested.url)}
    config = IngestConfig(str(ingested.source), ingested.url, max_reject_fraction=0.6)
    assert ingest(config) == ingested.record
    assert capsys.readouterr().out == f"already ingested: {ingested.url} (19 inputs: 9 rows, 10 rejected)\n"
    assert {item.url: item.version for item in storage.list_objects(ingested.url)} == before


def test_another_configuration_is_refused_with_the_difference(ingested: _Ingested) -> None:
    message = refused(IngestConfig(str(ingested.source), ingested.url, layout="folders"))
    assert "layout: auto -> folders" in message
    assert "source: " not in message
    assert message.endswith("choose another place, or pass --new true to replace what is there.")
    assert dataset.open(ingested.url).info.rejected == 10


def fingerprint_of(source: Path, url: Path) -> str:
    ingest(IngestConfig(str(source), str(url)))
    return dataset.open(str(url)).info.fingerprint


@pytest.fixture(scope="module")
def original(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:  # noqa: ARG001
    """A good source and its fingerprint."""
    folder = tmp_path_factory.mktemp("original")
    write_source(str(folder / "source"))
    return folder / "source", fingerprint_of(folder / "source", folder / "dataset")


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies_and_however_it_is_cut(
    original: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CUT", Cut(most_images=1))
    source = tmp_path / "copy"
    shutil.copytree(original[0], source)
    label = Image.fromarray(label_values(1), "P")  # the same values in other bytes
    label.putpalette([0, 0, 0] * 256)
    (source / "labels/train/01.png").write_bytes(encoded(label, compress_level=0))
    assert fingerprint_of(source, tmp_path / "dataset") == original[1]
    assert len(dataset.open(str(tmp_path / "dataset")).info.splits["train"].files) > 1


@pytest.mark.parametrize("change", ["image", "label", "id", "classes", "missing"])
def test_another_content_has_another_fingerprint(original: tuple[Path, str], tmp_path: Path, change: str) -> None:
    source = tmp_path / "copy"
    shutil.copytree(original[0], source)
    image, label = source / "images/train/01.png", source / "labels/train/01.png"
    if change == "image":
        image.write_bytes(photograph(77))
    elif change == "label":
        values = label_values(1)
        values[-1, -1] = (values[-1, -1] + 1) % 3
        label.write_bytes(encode_png(values))
    elif change == "id":
        image.rename(image.with_name("renamed.png"))
        label.rename(label.with_name("renamed.png"))
    elif change == "classes":
        (source / "classes.json").write_text(json.dumps({**CLASSES, "names": ["road", "bus", "sky"]}))
    else:
        image.unlink()
        label.unlink()
    assert fingerprint_of(source, tmp_path / "dataset") != original[1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_split_that_was_rejected_whole_does_not_make_the_work_begin_again(tmp_path: Path, capsys) -> None:
    source, url = tmp_path / "source", str(tmp_path / "dataset")
    write_source(str(source), pairs=2)
    storage.write_bytes(str(source / "images/test/unlabelled.png"), photograph(1))
    config = IngestConfig(str(source), url, max_reject_fraction=0.5)
    first = ingest(config)
    assert first.counts == {"in": 5, "out": 4, "rejected": 1}
    assert "no_label" in capsys.readouterr().out
    assert ingest(config) == first
    assert capsys.readouterr().out.startswith("already ingested")


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_is_listed_but_cannot_be_found_is_a_reject(tmp_path: Path) -> None:
    source, url = tmp_path / "source", str(tmp_path / "dataset")
    write_source(str(source), pairs=2)
    gone = source / "images/val/01.png"
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere.png")
    record = ingest(IngestConfig(str(source), url, max_reject_fraction=0.5))
    assert record.counts == {"in": 4, "out": 3, "rejected": 1}
    assert [(row["source_uri"], row["reason"]) for row in reject_rows(url)] == [(str(gone), "missing")]


@pytest.mark.usefixtures("ray_cluster")
def test_camvid_becomes_training_ids_pixel_by_pixel(camvid: Path, tmp_path: Path) -> None:
    source, url = tmp_path / "source", str(tmp_path / "dataset")
    for split, count in (("train", 6), ("val", 3)):
        for image in sorted((camvid / split).iterdir())[:count]:
            for place in (f"{split}/{image.name}", f"{split}annot/{image.stem}.png"):
                (source / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(camvid / place, source / place)
    record = ingest(IngestConfig(str(source), url))
    opened = dataset.open(url)
    assert record.counts == {"in": 9, "out": 9, "rejected": 0}
    assert {name: split.rows for name, split in opened.info.splits.items()} == {"train": 6, "val": 3}
    assert opened.info.layout == "camvid"
    ignored = 0
    for split in opened.info.splits:
        for row in opened.rows(split):
            published = np.asarray(Image.open(source / f"{split}annot" / f"{Path(row['source_uri']).stem}.png"))
            expected = np.where(published == 11, 255, published)
            np.testing.assert_array_equal(decode_label(row["label"]), expected)
            ignored += int((expected == 255).sum())
    assert ignored > 0


@pytest.mark.usefixtures("ray_cluster")
def test_the_script_ingests_from_bucket_to_bucket(bucket: str) -> None:
    write_source(storage.join(bucket, "raw"))
    arguments = ("--source", f"{bucket}/raw", "--dataset", f"{bucket}/set", "--layout", "folders")
    first = run_script(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines()[-1] == f"ingested {bucket}/set (8 inputs: 8 rows, 0 rejected)"
    opened = dataset.open(f"{bucket}/set")
    row = next(row for row in opened.rows("val") if row["image_id"] == "val/02")
    assert row["source_uri"] == f"{bucket}/raw/images/val/02.png"
    assert row["image"] == photograph(12)
    second = run_script(*arguments)
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout == f"already ingested: {bucket}/set (8 inputs: 8 rows, 0 rejected)\n"
