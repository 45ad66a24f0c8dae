"""What each published benchmark has of its own: folders of its archive, lists of its splits, kinds of its labels."""

import json
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.layouts import class_set, read_layout
from tests.pipeline.labelled_source import CLASSES
from tests.pipeline.listed_trees import (
    SOURCE,
    TREES,
    camvid_tree,
    listed,
    listing,
    pairs,
    passed_over,
    rejects,
    splits,
    tree,
)
from tests.pipeline.published_trees import NAMED

__all__ = ["tree"]  # a fixture


def test_camvid_pairs_each_image_with_the_label_of_its_name() -> None:
    layout = camvid_tree("train/a.png", "trainannot/a.png", "val/a.png", "valannot/a.png", "README.md")
    assert pairs(layout) == {
        "train/a": ("train", "train/a.png", "trainannot/a.png"),
        "val/a": ("val", "val/a.png", "valannot/a.png"),
    }
    assert rejects(layout) == set()
    assert layout.classes == class_set("camvid")


def test_camvid_as_published_is_recognised(camvid: Path) -> None:
    source = str(camvid)
    layout = read_layout("auto", source, list(storage.list_objects(source)))
    assert layout.name == "camvid"
    assert [sum(pair.split == split for pair in layout.pairs) for split in ("train", "val", "test")] == [367, 101, 0]
    assert layout.rejects == []
    assert all(pair.label_url and Path(pair.image_url).stem == Path(pair.label_url).stem for pair in layout.pairs)


@pytest.mark.parametrize("top", ["", "ADEChallengeData2016/"])
def test_ade20k_may_lie_in_the_folder_of_its_archive(top: str) -> None:
    layout = read_layout("auto", SOURCE, listing(f"{top}{path}" for path in TREES["ade20k"]))
    assert layout.name == "ade20k"
    assert {pair.image_id for pair in layout.pairs} == {"val/ADE_val_00000001"}


def test_a_tree_like_ade20ks_with_other_names_is_not_taken_for_it() -> None:
    paths = ["images/training/21.png", "annotations/training/21.png"]
    with pytest.raises(PipelineError, match="is none of the known layouts"):
        read_layout("auto", SOURCE, listing(paths))


@pytest.mark.parametrize("top", ["", "VOC2010/", "VOCdevkit/VOC2010/"])
def test_pascal_context_may_lie_in_the_folders_of_its_archive(top: str, tree) -> None:
    lists = {f"{top}ImageSets/SegmentationContext/{split}.txt": f"{split}_1\n" for split in ("train", "val")}
    paths = [
        f"{top}{folder}/{name}"
        for split in ("train", "val")
        for folder, name in (("JPEGImages", f"{split}_1.jpg"), ("SegmentationClassContext", f"{split}_1.png"))
    ]
    layout = tree(*paths, lists=lists)
    assert layout.name == "pascal_context"
    assert splits(layout) == {"train": {"train_1"}, "val": {"val_1"}}


@pytest.mark.parametrize("top", ["", "VOC2012/", "VOCdevkit/VOC2012/", "VOCdevkit/VOC2007/", "VOC2008/", "VOC2011/"])
def test_voc_of_any_year_may_lie_in_the_folders_of_its_archive(top: str, tree) -> None:
    paths = [f"{top}JPEGImages/2007_1.jpg", f"{top}SegmentationClass/2007_1.png"]
    layout = tree(*paths, lists={f"{top}ImageSets/Segmentation/val.txt": "2007_1\n"})
    assert layout.name == "voc"
    assert splits(layout) == {"val": {"2007_1"}}


LISTED = {
    "voc": ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "val"),
    "pascal_context": ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext", "val"),
    "coco_stuff10k": ("images", "annotations", "imageLists", "test"),
}
LABEL = {"voc": ".png", "pascal_context": ".png", "coco_stuff10k": ".mat"}


@pytest.mark.parametrize("name", LISTED)
def test_lists_say_what_is_in_a_split_and_other_images_are_no_rejects(name: str, tmp_path: Path, tree) -> None:
    images, labels, lists, other = LISTED[name]
    paths = [f"{images}/{stem}.jpg" for stem in "abcde"] + [f"{labels}/{stem}{LABEL[name]}" for stem in "abdf"]
    texts = {f"{lists}/train.txt": "a\r\n\nmissing  1\na\nc\n", f"{lists}/{other}.txt": "\ufeffb\na"}
    layout = tree(*paths, lists=texts, layout=name)
    assert pairs(layout, tmp_path) == {
        f"{split}/{stem}": (split, f"{images}/{stem}.jpg", f"{labels}/{stem}{LABEL[name]}")
        for split, stem in (("train", "a"), (other, "b"), (other, "a"))
    }
    assert rejects(layout, tmp_path) == {
        ("train/missing", "train", "no_image"),
        (f"{images}/c.jpg", "train", "no_label"),
    }
    unused = {f"{images}/d.jpg", f"{images}/e.jpg", f"{labels}/d{LABEL[name]}", f"{labels}/f{LABEL[name]}"}
    assert passed_over(layout, listing([*paths, *texts], str(tmp_path)), tmp_path) == unused
    (missing,) = (reject for reject in layout.rejects if reject.reason == "no_image")
    assert missing.detail == "the list of train names missing, of which there is no image: add it, or mend the list"


@pytest.mark.parametrize("name", ["pascal_context", "coco_stuff10k"])
def test_a_missing_list_is_answered_with_its_place(name: str, tmp_path: Path, tree) -> None:
    images, labels, lists, other = LISTED[name]
    with pytest.raises(PipelineError) as refusal:
        tree(f"{images}/a.jpg", f"{labels}/a{LABEL[name]}", lists={f"{lists}/train.txt": "a\n"})
    assert str(refusal.value).startswith(f"The layout {name} needs {tmp_path}/{lists}/{other}.txt, the list of")
    assert "\n" not in str(refusal.value)


def test_the_place_of_a_missing_list_has_the_folder_of_the_archive(tmp_path: Path, tree) -> None:
    lists = {"VOC2010/ImageSets/SegmentationContext/val.txt": "a\n"}
    with pytest.raises(PipelineError, match=f"needs {tmp_path}/VOC2010/ImageSets/SegmentationContext/train.txt,"):
        tree("VOC2010/JPEGImages/a.jpg", lists=lists)
    with pytest.raises(PipelineError, match=f"like {tmp_path}/VOC2012/ImageSets/Segmentation/train.txt: add them"):
        tree("VOC2012/JPEGImages/a.jpg", "VOC2012/SegmentationClass/a.png", lists={}, layout="voc")


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (("train", "val", "trainval"), {"train", "val"}),
        (("train", "trainaug"), {"train"}),
        (("trainval",), {"trainval"}),
        (("night", "rain"), {"night", "rain"}),
    ],
)
def test_voc_has_the_splits_of_its_lists_and_no_image_twice_by_trainval(lists, expected: set[str], tree) -> None:
    texts = {f"ImageSets/Segmentation/{split}.txt": "a\n" for split in lists}
    layout = tree("JPEGImages/a.jpg", "SegmentationClass/a.png", lists=texts)
    assert set(splits(layout)) == expected


def test_a_split_of_voc_of_which_nothing_is_labelled_has_no_labels(tree) -> None:
    lists = {"ImageSets/Segmentation/train.txt": "a\n", "ImageSets/Segmentation/test.txt": "b\n"}
    layout = tree("JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png", lists=lists)
    assert {pair.image_id: pair.label_url is None for pair in layout.pairs} == {"train/a": False, "test/b": True}
    assert layout.rejects == []


def test_voc_has_its_own_classes_or_those_of_a_file(tree) -> None:
    paths = ("JPEGImages/a.jpg", "SegmentationClass/a.png")
    lists = {"ImageSets/Segmentation/train.txt": "a\n"}
    assert tree(*paths, lists=lists).classes == class_set("voc")
    own = tree(*paths, lists={**lists, "classes.json": json.dumps(CLASSES)})
    assert own.name == "voc"
    assert own.classes.names == ("road", "car", "sky")
    assert set(own.codings["values"].values) == {0, 1, 2, 255}


@pytest.mark.parametrize("name", NAMED)
def test_the_background_of_pascal_context_is_a_class_only_if_the_layout_is_named(name: str, tmp_path: Path) -> None:
    written = NAMED[name](str(tmp_path))
    objects = listed(tmp_path)
    recognised, named = (read_layout(choice, str(tmp_path), objects) for choice in ("auto", "pascal_context_60"))
    assert (recognised.name, named.name) == ("pascal_context", "pascal_context_60")
    assert recognised.classes == class_set("pascal_context_59")
    assert named.classes == class_set("pascal_context_60")
    assert recognised.pairs == named.pairs
    assert {pair.image_id for pair in named.pairs} == set(written.samples)


@pytest.mark.parametrize(
    ("labels", "coding"),
    [
        (["SegmentationClassContext/a.png", "trainval/a.png", "trainval/a.mat"], "converted"),
        (["trainval/a.png", "trainval/a.mat"], "raw.png"),
        (["trainval/a.mat"], "raw.mat"),
        (["SegmentationClassContext/a.mat"], "raw.mat"),
    ],
)
def test_pascal_context_is_read_from_the_most_converted_labels(labels, coding: str, tmp_path: Path, tree) -> None:
    lists = {f"ImageSets/SegmentationContext/{split}.txt": text for split, text in (("train", "a"), ("val", ""))}
    layout = tree("JPEGImages/a.jpg", *labels, lists=lists)
    assert pairs(layout, tmp_path) == {"train/a": ("train", "JPEGImages/a.jpg", labels[0])}
    assert [pair.coding for pair in layout.pairs] == [coding]


CITY = "train/aachen/aachen_1"


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        (["labelIds", "labelTrainIds"], "labelIds"),
        (["labelTrainIds"], "labelTrainIds"),
        (["labelIds"], "labelIds"),
    ],
)
def test_training_ids_of_cityscapes_are_read_only_where_there_are_no_others(labels: list[str], read: str) -> None:
    other = "train/bochum/bochum_1"
    paths = [f"leftImg8bit/{name}_leftImg8bit.png" for name in (CITY, other)]
    paths += [f"gtFine/{CITY}_gtFine_{kind}.png" for kind in labels] + [f"gtFine/{other}_gtFine_labelTrainIds.png"]
    layout = read_layout("auto", SOURCE, listing(paths))
    assert pairs(layout) == {
        CITY: ("train", f"leftImg8bit/{CITY}_leftImg8bit.png", f"gtFine/{CITY}_gtFine_{read}.png"),
        other: ("train", f"leftImg8bit/{other}_leftImg8bit.png", f"gtFine/{other}_gtFine_labelTrainIds.png"),
    }
    assert {pair.image_id: pair.coding for pair in layout.pairs} == {
        CITY: f"_gtFine_{read}.png",
        other: "_gtFine_labelTrainIds.png",
    }
    assert layout.rejects == []
    assert passed_over(layout, listing(paths)) == set()


def test_cityscapes_without_partners_are_rejected_and_its_test_labels_are_passed_over() -> None:
    paths = [
        "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png",
        "leftImg8bit/train/ulm/ulm_2_leftImg8bit.png",
        "gtFine/train/ulm/ulm_2_gtFine_color.png",
        "gtFine/train/ulm/ulm_1_gtFine_labelIds.png",
        "gtFine/train/ulm/ulm_3_gtFine_labelIds.png",
        "gtFine/val/ulm/ulm_4_gtFine_labelTrainIds.png",
        "leftImg8bit/test/bonn/bonn_1_leftImg8bit.png",
        "gtFine/test/bonn/bonn_1_gtFine_labelIds.png",
        "gtFine/test/bonn/bonn_1_gtFine_labelTrainIds.png",
    ]
    layout = read_layout("auto", SOURCE, listing(paths))
    assert pairs(layout) == {
        "train/ulm/ulm_1": ("train", paths[0], paths[3]),
        "test/bonn/bonn_1": ("test", paths[6], None),
    }
    assert rejects(layout) == {
        (paths[1], "train", "no_label"),
        (paths[4], "train", "no_image"),
        (paths[5], "val", "no_image"),
    }
    assert passed_over(layout, listing(paths)) == {paths[2], *paths[7:]}


@pytest.mark.parametrize(
    ("endings", "read"), [([".png", "_labelTrainIds.png"], ".png"), (["_labelTrainIds.png"], "_labelTrainIds.png")]
)
def test_training_ids_of_coco_stuff164k_are_read_only_where_there_are_no_others(endings: list[str], read: str) -> None:
    paths = ["images/train2017/1.jpg", "images/val2017/2.jpg", "annotations/val2017/2.png"]
    paths += [f"annotations/train2017/1{ending}" for ending in endings]
    layout = read_layout("auto", SOURCE, listing(paths))
    assert pairs(layout) == {
        "train/1": ("train", paths[0], f"annotations/train2017/1{read}"),
        "val/2": ("val", *paths[1:3]),
    }
    assert {pair.image_id: pair.coding for pair in layout.pairs} == {"train/1": read, "val/2": ".png"}
    assert layout.rejects == []
    assert passed_over(layout, listing(paths)) == set()


def test_the_matlab_labels_of_coco_stuff10k_go_before_converted_ones(tmp_path: Path, tree) -> None:
    paths = ["images/a.jpg", "images/train2014/a.jpg", "annotations/a.mat"]
    paths += ["annotations/train2014/a_labelTrainIds.png"]
    layout = tree(*paths, lists={"imageLists/train.txt": "a\n", "imageLists/test.txt": ""})
    assert pairs(layout, tmp_path) == {"train/a": ("train", "images/a.jpg", "annotations/a.mat")}
    assert [pair.coding for pair in layout.pairs] == [".mat"]


@pytest.mark.parametrize("folder", ["", "test2014/"])
def test_converted_labels_of_coco_stuff10k_lie_flat_or_by_split(folder: str, tmp_path: Path, tree) -> None:
    image, label = f"images/{folder}a.jpg", f"annotations/{folder}a_labelTrainIds.png"
    layout = tree(image, label, lists={"imageLists/train.txt": "", "imageLists/test.txt": "a\n"})
    assert pairs(layout, tmp_path) == {"test/a": ("test", image, label)}
    assert [pair.coding for pair in layout.pairs] == ["_labelTrainIds.png"]
