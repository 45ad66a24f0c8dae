"""The layouts of published benchmarks, as their archives unpack, and what their label values mean."""

from collections.abc import Iterable, Mapping

from pipeline import storage
from pipeline.dataset import IGNORE_LABEL
from pipeline.errors import PipelineError
from pipeline.labels import LabelCoding
from pipeline.layouts.classes import class_set
from pipeline.layouts.layout import Layout
from pipeline.layouts.pairing import LABEL_SUFFIXES, Tree, by_name, only_images, pair_up, without_labels

ADE20K_TOPS = ("ADEChallengeData2016",)
PASCAL_CONTEXT_TOPS = ("VOCdevkit/VOC2010", "VOC2010")

# Ids of the 459 classes of Pascal Context's raw labels that are used; their rank is the class, 0 the background.
PASCAL_CONTEXT_IDS = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
PASCAL_CONTEXT_RAW_CLASSES = 459

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_LABEL_IDS = 34  # 0 to 33, and 255 for what is outside any label

# Ids of COCO-Stuff from 1 that no image uses.
COCO_STUFF_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_STUFF_IDS = tuple(value for value in range(1, 183) if value not in COCO_STUFF_UNUSED)

TRAIN_IDS = "_labelTrainIds.png"


def camvid(source: str, objects: list[storage.StoredObject]) -> Layout:
    """CamVid as in the SegNet tutorial: `{train,val,test}/` and `{...}annot/`, 0 to 10, 11 is unlabelled."""
    layout = Layout("camvid", class_set("camvid"), {"values": LabelCoding(_in_order(range(11)) | {11: IGNORE_LABEL})})
    tree = Tree(source, objects)
    for split in ("train", "val", "test"):
        images = by_name(layout, split, only_images(tree.below(split)))
        pair_up(layout, split, images, by_name(layout, split, tree.below(f"{split}annot", LABEL_SUFFIXES)))
    return layout


def ade20k(source: str, objects: list[storage.StoredObject]) -> Layout:
    """ADE20K's scene parsing benchmark: 0 is other, 1 to 150 the classes."""
    layout = Layout("ade20k", class_set("ade20k"), {"values": LabelCoding(_from_one(150))})
    tree = Tree(source, objects, ADE20K_TOPS)
    for folder, split in (("training", "train"), ("validation", "val")):
        images = by_name(layout, split, only_images(tree.below(f"images/{folder}")))
        pair_up(layout, split, images, by_name(layout, split, tree.below(f"annotations/{folder}", LABEL_SUFFIXES)))
    return layout


def cityscapes(source: str, objects: list[storage.StoredObject]) -> Layout:
    """Cityscapes' fine labels, as ids or training ids; those of its test split are dummies."""
    ids = _in_order(CITYSCAPES_IDS) | {
        value: IGNORE_LABEL for value in (*range(CITYSCAPES_LABEL_IDS), 255) if value not in CITYSCAPES_IDS
    }
    codings = {
        "_gtFine_labelIds.png": LabelCoding(ids),
        f"_gtFine{TRAIN_IDS}": LabelCoding(_in_order(range(19)) | {255: IGNORE_LABEL}),
    }
    layout = Layout("cityscapes", class_set("cityscapes"), codings)
    tree = Tree(source, objects)
    for split in ("train", "val"):
        images = by_name(layout, split, tree.below(f"leftImg8bit/{split}"), "_leftImg8bit.png")
        _pair_with_either(layout, split, images, tree.below(f"gtFine/{split}"))
    without_labels(layout, "test", by_name(layout, "test", tree.below("leftImg8bit/test"), "_leftImg8bit.png"))
    return layout


def pascal_context_59(source: str, objects: list[storage.StoredObject]) -> Layout:
    """Pascal Context without its background, which is ignored."""
    converted = _from_one(59)
    return _pascal_context("pascal_context", "pascal_context_59", converted, source, objects)


def pascal_context_60(source: str, objects: list[storage.StoredObject]) -> Layout:
    """Pascal Context, the background being a class."""
    converted = _in_order(range(60))
    return _pascal_context("pascal_context_60", "pascal_context_60", converted, source, objects)


def _pascal_context(
    name: str, classes: str, converted: dict[int, int], source: str, objects: list[storage.StoredObject]
) -> Layout:
    """Converted labels lie in `SegmentationClassContext`; raw ones are `.mat` files, or lie in `trainval`."""
    rank = {value: place for place, value in enumerate(PASCAL_CONTEXT_IDS)}
    raw = {value: converted[rank.get(value, 0)] for value in range(PASCAL_CONTEXT_RAW_CLASSES + 1)}
    codings = {
        "converted": LabelCoding(converted | {255: IGNORE_LABEL}),
        "raw.png": LabelCoding(raw),
        "raw.mat": LabelCoding(raw, variable="LabelMap"),
    }
    layout = Layout(name, class_set(classes), codings)
    tree, unpacked_beside = Tree(source, objects, PASCAL_CONTEXT_TOPS), Tree(source, objects)
    images = by_name(layout, "", only_images(tree.below("JPEGImages")))
    kinds = {
        "converted": tree.below("SegmentationClassContext", LABEL_SUFFIXES),
        "raw.png": (tree.below("trainval", LABEL_SUFFIXES) or unpacked_beside.below("trainval", LABEL_SUFFIXES)),
        "raw.mat": tree.below("SegmentationClassContext", (".mat",))
        | (tree.below("trainval", (".mat",)) or unpacked_beside.below("trainval", (".mat",))),
    }
    coding = next((kind for kind, found in kinds.items() if found), "converted")
    labels = by_name(layout, "", kinds[coding])
    for split in ("train", "val"):
        listed = _require_lines(layout, tree, f"ImageSets/SegmentationContext/{split}.txt")
        pair_up(layout, split, images, labels, coding, listed)
    return layout


def coco_stuff10k(source: str, objects: list[storage.StoredObject]) -> Layout:
    """COCO-Stuff 10K: `.mat` labels with the published ids, or converted ones where 0 is unlabelled.

    The converted ones and their images may lie in a folder for each split, as mmsegmentation's script puts them.
    """
    ids = {0: IGNORE_LABEL} | _in_order(COCO_STUFF_IDS)
    codings = {
        ".mat": LabelCoding(ids, variable="S"),
        TRAIN_IDS: LabelCoding(_from_one(171) | {255: IGNORE_LABEL}),
    }
    layout = Layout("coco_stuff10k", class_set("coco_stuff"), codings)
    tree = Tree(source, objects)
    images = by_name(layout, "", only_images(tree.below("images")))
    found = tree.below("annotations")
    ending = ".mat" if any(path.endswith(".mat") for path in found) else TRAIN_IDS
    labels = by_name(layout, "", found, ending)
    for split in ("train", "test"):
        listed = _require_lines(layout, tree, f"imageLists/{split}.txt")
        folder = f"{split}2014/"
        pair_up(layout, split, _lifted(images, folder), _lifted(labels, folder), ending, listed)
    return layout


def _lifted(objects: Mapping[str, storage.StoredObject], folder: str) -> dict[str, storage.StoredObject]:
    """Objects by name, those of a folder as if they lay beside it, where what has their name goes first."""
    inside = {name.removeprefix(folder): item for name, item in objects.items() if name.startswith(folder)}
    return {**inside, **objects}


def coco_stuff164k(source: str, objects: list[storage.StoredObject]) -> Layout:
    """COCO-Stuff 164K: labels with the published ids less one, or training ids beside them."""
    ids = _in_order(value - 1 for value in COCO_STUFF_IDS)
    codings = {
        ".png": LabelCoding(ids | {255: IGNORE_LABEL}),
        TRAIN_IDS: LabelCoding(_in_order(range(171)) | {255: IGNORE_LABEL}),
    }
    layout = Layout("coco_stuff164k", class_set("coco_stuff"), codings)
    tree = Tree(source, objects)
    for folder, split in (("train2017", "train"), ("val2017", "val")):
        images = by_name(layout, split, only_images(tree.below(f"images/{folder}")))
        _pair_with_either(layout, split, images, tree.below(f"annotations/{folder}"))
    return layout


def _pair_with_either(
    layout: Layout,
    split: str,
    images: Mapping[str, storage.StoredObject],
    labels: Mapping[str, storage.StoredObject],
) -> None:
    """Pairs images with labels of the layout's first coding, or where an image has none, of its second.

    Codings are named by how their files' names end; the shorter ending may end the longer too.
    """
    first, second = layout.codings
    converted = by_name(layout, split, labels, second)
    published = by_name(
        layout, split, {path: item for path, item in labels.items() if not path.endswith(second)}, first
    )
    layout.used.update(item.url for name, item in converted.items() if name in published)
    only = {name: item for name, item in converted.items() if name not in published}
    with_second = {name: item for name, item in images.items() if name in only}
    pair_up(layout, split, {name: item for name, item in images.items() if name not in only}, published, first)
    pair_up(layout, split, with_second, only, second)


def _require_lines(layout: Layout, tree: Tree, path: str) -> list[str]:
    lines = tree.lines(layout, path)
    if lines is None:
        raise PipelineError(
            f"The layout {layout.name} needs {tree.source}/{tree.top}{path}, the list of a split's images, "
            "which is not there: add it, or name another layout."
        )
    return lines


def _in_order(values: Iterable[int]) -> dict[int, int]:
    """Published values, in the order of the classes that they mean."""
    return {value: training_id for training_id, value in enumerate(values)}


def _from_one(classes: int) -> dict[int, int]:
    """0 is ignored, k means the class k - 1."""
    return {0: IGNORE_LABEL} | {value: value - 1 for value in range(1, classes + 1)}
