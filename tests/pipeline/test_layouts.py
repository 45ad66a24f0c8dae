"""Which tree is taken for which layout, which images and labels belong together, and what is said of everything else.

The benchmarks' own ways are the matter of `test_benchmark_layouts.py`, what label values mean that of `test_labels.py`.
"""

from pathlib import Path

import pytest

from pipeline import dataset, storage
from pipeline.dataset import IGNORE_LABEL, DatasetInfo, SplitInfo
from pipeline.errors import PipelineError
from pipeline.layouts import LAYOUTS, read_layout
from tests.pipeline.labelled_source import CLASSES
from tests.pipeline.listed_trees import (
    PAIR,
    SOURCE,
    TREES,
    camvid_tree,
    folders,
    listed,
    listing,
    pairs,
    passed_over,
    rejects,
    splits,
)
from tests.pipeline.published_trees import FILES, SHARDS

__all__ = ["folders"]  # a fixture


@pytest.mark.parametrize("name", FILES)
def test_a_published_tree_is_recognised_and_every_image_has_its_label(name: str, tmp_path: Path) -> None:
    written = FILES[name](str(tmp_path))
    layout = read_layout("auto", str(tmp_path), listed(tmp_path))
    assert layout.name == written.layout
    assert len(layout.classes.names if layout.classes else ()) == written.num_classes
    assert {
        pair.image_id: (pair.split, storage.read_bytes(pair.image_url), pair.label_url is not None)
        for pair in layout.pairs
    } == {
        image_id: (image_id.partition("/")[0], sample.image, sample.label is not None)
        for image_id, sample in written.samples.items()
    }
    for pair in layout.pairs:
        assert pair.size == Path(pair.image_url).stat().st_size
        assert pair.label_url is None or Path(pair.image_url).stem.split("_left")[0] in Path(pair.label_url).stem
    assert layout.rejects == []


@pytest.mark.parametrize("name", FILES)
def test_of_a_published_tree_only_what_has_no_use_is_passed_over(name: str, tmp_path: Path) -> None:
    written = FILES[name](str(tmp_path))
    objects = listed(tmp_path)
    layout = read_layout("auto", str(tmp_path), objects)
    assert passed_over(layout, objects, tmp_path) == written.others


@pytest.mark.parametrize("name", SHARDS)
def test_a_tree_of_shards_is_recognised_and_their_names_say_the_split(name: str, tmp_path: Path) -> None:
    written = SHARDS[name](str(tmp_path))
    objects = listed(tmp_path)
    layout = read_layout("auto", str(tmp_path), objects)
    assert (layout.name, layout.pairs, layout.rejects) == (written.layout, [], [])
    names = {image_id.rpartition("/")[0] for image_id in written.samples}
    assert {(shard.name, shard.split) for shard in layout.shards} == {(name, name.partition("-")[0]) for name in names}
    assert {(shard.url, shard.size) for shard in layout.shards} == {
        (item.url, item.size) for item in objects if Path(item.url).stem in names
    }
    assert layout.passed_over(objects) == []
    assert list(layout.codings) == ["values"]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("end", ["", "/"])
def test_a_tree_is_recognised_with_a_slash_after_the_url_and_without(name: str, end: str) -> None:
    layout = read_layout("auto", SOURCE + end, listing(TREES[name]))
    assert layout.name == name
    assert [(pair.image_url, pair.label_url) for pair in layout.pairs] == [tuple(f"{SOURCE}/{p}" for p in TREES[name])]


def test_folders_pairs_by_path_below_the_split(folders) -> None:
    nested = ("images/train/city/a.b.JPG", "labels/train/city/a.b.png")
    layout = folders(*PAIR, *nested, "images/val/a.tiff", "labels/val/a.PNG")
    assert {pair.image_id: pair.split for pair in layout.pairs} == {
        "train/a": "train",
        "train/city/a.b": "train",
        "val/a": "val",
    }
    assert layout.rejects == []
    assert layout.classes.names == ("road", "car", "sky")
    assert layout.codings["values"].values == {0: 0, 1: 1, 2: 2, 255: IGNORE_LABEL}


def test_folders_takes_the_splits_that_it_finds(folders) -> None:
    layout = folders(*PAIR, "images/night/a.jpg", "labels/night/a.png", "images/dusk/a.jpg", "labels/dawn/a.png")
    assert {pair.split for pair in layout.pairs} == {"train", "night"}
    assert {(reject.split, reject.reason) for reject in layout.rejects} == {("dusk", "no_label"), ("dawn", "no_image")}


def test_a_split_of_a_name_that_is_kept_for_other_things_is_refused(folders) -> None:
    with pytest.raises(PipelineError, match=r"has a split named '_rejects': rename it"):
        folders("images/_rejects/a.jpg", "labels/_rejects/a.png")


@pytest.mark.parametrize("order", [1, -1])
def test_ids_do_not_depend_on_the_place_or_the_order_of_the_listing(order: int) -> None:
    paths = ["train/a.png", "train/b.png", "trainannot/a.png", "trainannot/b.png"]
    other = "/elsewhere/photos"
    assert {pair.image_id for pair in read_layout("camvid", other, listing(paths, other)[::order]).pairs} == {
        "train/a",
        "train/b",
    }


def test_what_has_no_partner_is_rejected_and_nothing_is_lost() -> None:
    layout = camvid_tree(
        "train/a.png", "trainannot/a.png", "train/alone.png", "trainannot/orphan.png", "test/unlabelled.png"
    )
    assert set(pairs(layout)) == {"train/a"}
    assert rejects(layout) == {
        ("train/alone.png", "train", "no_label"),
        ("trainannot/orphan.png", "train", "no_image"),
        ("test/unlabelled.png", "test", "no_label"),
    }
    details = {reject.reason: reject.detail for reject in layout.rejects if "train" in reject.split}
    assert details["no_label"] == "no label named alone: add it, or remove the image"
    assert details["no_image"] == "no image named orphan: add it, or remove the label"


def test_two_images_or_two_labels_of_one_stem_are_rejected_but_for_the_first() -> None:
    layout = camvid_tree(
        "train/a.jpg", "train/a.png", "trainannot/a.png", "train/b.jpg", "trainannot/b.PNG", "trainannot/b.png"
    )
    assert pairs(layout) == {
        "train/a": ("train", "train/a.jpg", "trainannot/a.png"),
        "train/b": ("train", "train/b.jpg", "trainannot/b.PNG"),
    }
    assert rejects(layout) == {
        ("train/a.png", "train", "duplicate_stem"),
        ("trainannot/b.png", "train", "duplicate_stem"),
    }
    assert all(" and " in reject.detail for reject in layout.rejects)


def test_files_that_are_no_images_are_passed_over() -> None:
    paths = ("train/a.png", "trainannot/a.png", "train/notes.txt", "trainannot/colours.csv", "train.zip")
    layout = camvid_tree(*paths)
    assert rejects(layout) == set()
    assert passed_over(layout, listing(paths)) == {"train/notes.txt", "trainannot/colours.csv", "train.zip"}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.{}", "train"),
        ("train-00000-of-00004.{}", "train"),
        ("val_012.{}", "val"),
        ("test2017.{}", "test"),
        ("val.0.{}", "val"),
        ("cityscapes-train-000.{}", "train"),
        ("data/validation-00000-of-00001.{}", "validation"),
        ("default/test-0000.{}", "test"),
        ("val/part-0.{}", "val"),
        ("night/deeper/train-0.{}", "night"),
        ("TRAIN-0.{}", "TRAIN"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_the_split_of_a_shard_is_its_folder_or_what_its_name_begins_with(kind: str, path: str, split: str, folders):
    layout = folders(path.format(kind), layout="auto")
    assert layout.name == {"parquet": "parquet", "tar": "webdataset"}[kind]
    assert splits(layout) == {split: {path.removesuffix(".{}")}}
    assert layout.codings["values"].values == {0: 0, 1: 1, 2: 2, 255: IGNORE_LABEL}


@pytest.mark.parametrize("path", ["00017.tar", "my-photos.parquet", "training_set.tar"])
def test_a_shard_whose_name_tells_no_split_is_refused(path: str, folders) -> None:
    with pytest.raises(PipelineError, match=f"the name of {path} tells no split: begin it with one, as in train-000"):
        folders(path, layout="auto")


def test_a_tree_with_classes_of_its_own_is_no_benchmark(folders) -> None:
    tree = ("images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png")
    with pytest.raises(PipelineError, match="is none of the known layouts"):
        folders(*tree, layout="auto")


def test_shards_in_a_folder_named_data_have_their_splits_by_name(folders) -> None:
    layout = folders("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", layout="auto")
    assert {shard.split for shard in layout.shards} == {"train", "validation"}


def test_shards_of_another_kind_and_folders_that_are_no_split_are_passed_over(tmp_path: Path, folders) -> None:
    paths = ["train.parquet", "_rejects/part-0.parquet", "train.tar", "train.parquet.crc"]
    layout = folders(*paths, layout="parquet")
    assert splits(layout) == {"train": {"train"}}
    assert passed_over(layout, listing(paths, str(tmp_path)), tmp_path) == set(paths[1:])


def test_an_archive_that_is_compressed_is_no_shard(folders) -> None:
    with pytest.raises(PipelineError, match="is none of the known layouts"):
        folders("train.tar.gz", layout="auto")


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_tree_without_a_single_shard_is_refused(layout: str, folders) -> None:
    with pytest.raises(PipelineError, match=rf"has no image with a label in the layout '{layout}'"):
        folders("a.txt", layout=layout)


def canonical(url: str, names: list[str], palette: list[list[int]]) -> list[storage.StoredObject]:
    """A canonical dataset of two splits, of which only `dataset.json` is a real file."""
    info = {
        split: SplitInfo(rows=1, labelled=1, pixels=[1] * len(names), files={f"{split}/0.parquet": 1})
        for split in ("train", "val")
    }
    fields = {"rejected": 0, "source": SOURCE, "layout": "folders", "fingerprint": "0"}
    dataset.write_info(url, DatasetInfo(names=names, palette=palette, splits=info, **fields))
    return listing(["dataset.json", "train/0.parquet", "val/0.parquet", "_rejects/part-0.parquet"], url)


def test_a_canonical_dataset_is_read_as_parquet_with_the_classes_that_it_has(tmp_path: Path) -> None:
    objects = canonical(str(tmp_path), CLASSES["names"], CLASSES["palette"])
    layout = read_layout("auto", str(tmp_path), objects)
    assert layout.name == "parquet"
    assert layout.classes is not None
    assert layout.classes.names == ("road", "car", "sky")
    assert layout.codings["canonical"].values == {0: 0, 1: 1, 2: 2, 255: IGNORE_LABEL}
    assert splits(layout) == {"train": {"train/0"}, "val": {"val/0"}}
    assert passed_over(layout, objects, tmp_path) == {"_rejects/part-0.parquet"}


def test_unlabelled_images_may_lie_anywhere_and_keep_their_suffix_in_the_id() -> None:
    paths = ["a.jpg", "a.png", "deep/er/B.JPEG", "notes.txt"]
    layout = read_layout("auto", SOURCE, listing(paths))
    assert layout.name == "unlabelled"
    assert layout.classes is None
    assert layout.codings == {}
    assert pairs(layout) == {f"all/{path}": ("all", path, None) for path in paths[:3]}
    assert passed_over(layout, listing(paths)) == {"notes.txt"}


@pytest.mark.parametrize(
    "path",
    ["masks/a.png", "a_label.png", "Annotations/a.xml", "segmentation/a.jpg", "gt/a.png", "a_gt.png", "aGT.png"],
)
def test_images_with_something_named_like_a_label_are_unlabelled_only_if_the_layout_is_named(path: str) -> None:
    objects = listing(["photos/a.jpg", path])
    with pytest.raises(PipelineError, match="is none of the known layouts"):
        read_layout("auto", SOURCE, objects)
    named = read_layout("unlabelled", SOURCE, objects)
    assert "all/photos/a.jpg" in pairs(named)
    assert rejects(named) == set()


@pytest.mark.parametrize("path", ["washington/a.jpg", "wavelength-600.png", "night/a.jpg"])
def test_a_word_that_only_has_the_letters_of_ground_truth_is_no_label(path: str) -> None:
    assert read_layout("auto", SOURCE, listing(["b.jpg", path])).name == "unlabelled"


def test_auto_tells_the_trees_apart(folders) -> None:
    assert folders(*PAIR, layout="auto").name == "folders"
    assert {name: read_layout("auto", SOURCE, listing(paths)).name for name, paths in TREES.items()} == {
        name: name for name in TREES
    }


def test_an_unknown_layout_is_answered_with_the_known_ones() -> None:
    with pytest.raises(PipelineError) as refusal:
        read_layout("cityscape", SOURCE, listing(["train/a.png"]))
    assert str(refusal.value) == (
        "There is no layout 'cityscape': choose auto, camvid, ade20k, cityscapes, pascal_context, pascal_context_60, "
        "coco_stuff10k, coco_stuff164k, voc, folders, webdataset, parquet, unlabelled."
    )


@pytest.mark.parametrize(
    "paths",
    [["a.jpg", "labels/c.png"], ["labels/a.png"], ["notes.txt"], [], ["images/train2017/1.jpg", "annotations/a.json"]],
)
def test_a_tree_that_is_none_of_them_is_answered_with_how_they_look(paths: list[str]) -> None:
    with pytest.raises(PipelineError) as refusal:
        read_layout("auto", SOURCE, listing(paths))
    message = str(refusal.value)
    assert f"The tree of {SOURCE} ({len(paths)} objects) is none of the known layouts" in message
    assert all(f"{name}: {definition.tree}" in message for name, definition in LAYOUTS.items())
    assert message.endswith("correct the URL, or rearrange the bucket as the layout `folders`.")


def test_a_tree_without_a_single_pair_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"s3://raw/photos has no image with a label in the layout 'camvid'.*2 obj"):
        camvid_tree("train/a.png", "trainannot/b.png")
