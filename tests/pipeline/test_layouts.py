"""Which tree is taken for which layout, which images and labels belong together, and what is said of everything else.

What label values mean is the matter of `test_labels.py`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from pipeline import dataset, storage
from pipeline.dataset import IGNORE_LABEL, DatasetInfo, SplitInfo
from pipeline.errors import PipelineError
from pipeline.labels import LabelCoding
from pipeline.layouts import LAYOUTS, Layout, class_set, read_layout
from tests.pipeline.published_trees import FILES, NAMED, SHARDS

SOURCE = "s3://raw/photos"
CLASSES = {"names": ["road", "car", "sky"], "palette": [[128, 64, 128], [64, 0, 128], [0, 0, 255]]}


def listing(paths: Iterable[str], source: str = SOURCE) -> list[storage.StoredObject]:
    return [storage.StoredObject(f"{source}/{path}", 10, "1") for path in sorted(paths)]


def listed(source: Path) -> list[storage.StoredObject]:
    return list(storage.list_objects(str(source)))


def camvid_tree(*paths: str) -> Layout:
    return read_layout("camvid", SOURCE, listing(paths))


def pairs(layout: Layout, source: str | Path = SOURCE) -> dict[str, tuple[str, str, str | None]]:
    """Image id -> split, image and label, as places below the source."""
    below = len(f"{source}/")
    return {
        pair.image_id: (pair.split, pair.image_url[below:], pair.label_url and pair.label_url[below:])
        for pair in layout.pairs
    }


def rejects(layout: Layout, source: str | Path = SOURCE) -> set[tuple[str, str, str]]:
    return {(reject.source_uri.removeprefix(f"{source}/"), reject.split, reject.reason) for reject in layout.rejects}


def splits(layout: Layout) -> dict[str, set[str]]:
    """Split -> names of its images, or of its shards."""
    found: dict[str, set[str]] = {}
    for pair in layout.pairs:
        found.setdefault(pair.split, set()).add(pair.image_id.removeprefix(f"{pair.split}/"))
    for shard in layout.shards:
        found.setdefault(shard.split, set()).add(shard.name)
    return found


def passed_over(layout: Layout, objects: list[storage.StoredObject], source: str | Path = SOURCE) -> set[str]:
    return {url.removeprefix(f"{source}/") for url in layout.passed_over(objects)}


@pytest.fixture
def tree(tmp_path: Path):
    """Reads a tree of which only the lists are real files."""

    def read(*paths: str, lists: Mapping[str, str], layout: str = "auto") -> Layout:
        for path, text in lists.items():
            storage.write_bytes(f"{tmp_path}/{path}", text.encode())
        return read_layout(layout, str(tmp_path), listing([*paths, *lists], str(tmp_path)))

    return read


@pytest.fixture
def folders(tmp_path: Path):
    """Reads a tree of the layout `folders`; `classes.json` is a real file beside the listing."""

    def read(*paths: str, classes: object = CLASSES, layout: str = "folders") -> Layout:
        (tmp_path / "classes.json").write_text(classes if isinstance(classes, str) else json.dumps(classes), "utf-8")
        return read_layout(layout, str(tmp_path), listing(["classes.json", *paths], str(tmp_path)))

    return read


PAIR = ("images/train/a.jpg", "labels/train/a.png")


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


TREES = {
    "camvid": ["train/a.png", "trainannot/a.png"],
    "ade20k": ["images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png"],
    "cityscapes": ["leftImg8bit/val/ulm/u_1_leftImg8bit.png", "gtFine/val/ulm/u_1_gtFine_labelIds.png"],
    "coco_stuff164k": ["images/val2017/000000000139.jpg", "annotations/val2017/000000000139.png"],
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("end", ["", "/"])
def test_a_tree_is_recognised_with_a_slash_after_the_url_and_without(name: str, end: str) -> None:
    layout = read_layout("auto", SOURCE + end, listing(TREES[name]))
    assert layout.name == name
    assert [(pair.image_url, pair.label_url) for pair in layout.pairs] == [tuple(f"{SOURCE}/{p}" for p in TREES[name])]


@pytest.mark.parametrize("top", ["", "ADEChallengeData2016/"])
def test_ade20k_may_lie_in_the_folder_of_its_archive(top: str) -> None:
    layout = read_layout("auto", SOURCE, listing(f"{top}{path}" for path in TREES["ade20k"]))
    assert layout.name == "ade20k"
    assert {pair.image_id for pair in layout.pairs} == {"val/ADE_val_00000001"}


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


def test_a_tree_like_ade20ks_with_other_names_is_not_taken_for_it() -> None:
    paths = ["images/training/21.png", "annotations/training/21.png"]
    with pytest.raises(PipelineError, match="is none of the known layouts"):
        read_layout("auto", SOURCE, listing(paths))


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


@pytest.mark.parametrize("layout", ["folders", "webdataset", "parquet"])
def test_without_classes_json_it_is_said_how_to_write_one(layout: str, tmp_path: Path) -> None:
    paths = [*PAIR, "train.tar", "train.parquet"]
    with pytest.raises(PipelineError) as refusal:
        read_layout(layout, str(tmp_path), listing(paths, str(tmp_path)))
    assert f"The layout {layout} needs {tmp_path}/classes.json, which does not exist" in str(refusal.value)
    example = json.loads(str(refusal.value).partition(" like ")[2].rstrip("."))
    assert example.keys() == {"names", "palette", "ignore_label"}


def grey(count: int) -> dict[str, list]:
    return {"names": [f"class {number}" for number in range(count)], "palette": [[0, 0, 0]] * count}


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ("{", "classes.json is not valid JSON"),
        ([], "it is not a JSON object"),
        ({"names": ["road", "car"]}, "palette"),
        ({"palette": [[0, 0, 0]]}, "names"),
        ({**CLASSES, "names": ["road", "car"]}, "2 class names but 3 colours"),
        ({**CLASSES, "names": ["road", "car", "road"]}, "repeated: road"),
        ({**CLASSES, "names": "sky"}, "names must be a list"),
        ({**CLASSES, "palette": [[1, 2], [3, 4], [5, 6]]}, "classes.json does not describe classes"),
        ({**CLASSES, "palette": [[1, 2, 256], [3, 4, 5], [5, 6, 7]]}, "channel outside 0 to 255"),
        ({**CLASSES, "palette": ["red", "green", "blue"]}, "classes.json does not describe classes"),
        (grey(1), "needs 2 or more"),
        (grey(256), "names must be a list of 2 to 255 names"),
        ({**CLASSES, "ignore_label": "void"}, "ignore_label is 'void': give an integer from 0 to 65535"),
        ({**CLASSES, "ignore_label": -1}, "ignore_label is -1"),
        ({**CLASSES, "ignore_label": 65536}, "ignore_label is 65536"),
        ({**CLASSES, "ignore_label": True}, "ignore_label is True"),
        ({**CLASSES, "ignore_label": 2}, "ignore_label 2 is also the value of the class 'sky'"),
        ({**CLASSES, "ignore_colour": "white"}, "ignore_colour is 'white': give three integers from 0 to 255"),
        ({**CLASSES, "ignore_colour": [1, 2]}, "ignore_colour is [1, 2]"),
        ({**CLASSES, "ignore_colour": [1.5, 2, 3]}, "ignore_colour is [1.5, 2, 3]"),
        ({**CLASSES, "ignore_colour": [0, 256, 0]}, "ignore_colour is [0, 256, 0]"),
        ({**CLASSES, "ignore_colour": [0, -1, 0]}, "ignore_colour is [0, -1, 0]"),
        ({**CLASSES, "ignore_colour": [0, 0, 255]}, "ignore_colour [0, 0, 255] is also the colour of 'sky'"),
    ],
)
def test_broken_classes_are_answered_with_what_is_wrong(folders, tmp_path: Path, classes: object, says: str) -> None:
    with pytest.raises(PipelineError) as refusal:
        folders(*PAIR, classes=classes)
    assert says in str(refusal.value)
    assert f"{tmp_path}/classes.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_as_many_classes_as_a_label_can_hold_and_another_ignore_value_are_accepted(folders) -> None:
    layout = folders(*PAIR, classes={**grey(255), "ignore_label": 1000})
    values = {**{value: value for value in range(255)}, 1000: IGNORE_LABEL}
    assert layout.codings == {"values": LabelCoding(values, colours=None)}
