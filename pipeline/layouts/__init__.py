"""Datasets as published: where images and labels lie, which belong together, what the label values mean.

A layout looks at a listing, and into the small files that say which images make a split or what the classes are; never
into an image. To add one: write a function from (source, objects) to `Layout` and name it in `LAYOUTS`, with how its
tree looks.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.layouts import own, published
from pipeline.layouts.classes import class_set
from pipeline.layouts.layout import CANONICAL, CLASSES_FILE, IMAGE_SUFFIXES, Layout, Pair, Reject, Shard
from pipeline.layouts.pairing import only_images

__all__ = [
    "CANONICAL", "CLASSES_FILE", "IMAGE_SUFFIXES", "LAYOUTS", "Layout", "Pair", "Reject", "Shard", "class_set",
    "read_layout",
]  # fmt: skip


@dataclass(frozen=True)
class _Definition:
    """A layout.

    Args:
        tree: how it looks, for messages.
        marks: patterns of paths below the source; a tree that has a path for each of them is taken for this layout.
            Empty if it must be named.
        has_own_classes: whether its classes may be those of a `classes.json`.
    """

    tree: str
    marks: tuple[str, ...]
    read: Callable[[str, list[storage.StoredObject]], Layout]
    has_own_classes: bool = False


# In the order in which trees are recognised.
LAYOUTS: Mapping[str, _Definition] = {
    "camvid": _Definition(
        "train/*.jpg with trainannot/*.png, likewise val and test", (r"train/", r"trainannot/"), published.camvid
    ),
    "ade20k": _Definition(
        "images/{training,validation}/*.jpg with annotations/{training,validation}/*.png",
        (
            r"(ADEChallengeData2016/)?images/(training|validation)/ADE_",
            r"(ADEChallengeData2016/)?annotations/(training|validation)/ADE_",
        ),
        published.ade20k,
    ),
    "cityscapes": _Definition(
        "leftImg8bit/{train,val,test}/<city>/*_leftImg8bit.png with gtFine/.../*_gtFine_labelIds.png",
        (r"leftImg8bit/.*_leftImg8bit\.png", r"gtFine/.*_gtFine_label(Train)?Ids\.png"),
        published.cityscapes,
    ),
    "pascal_context": _Definition(
        "JPEGImages/*.jpg with SegmentationClassContext/*.png and ImageSets/SegmentationContext/{train,val}.txt",
        (r"(VOCdevkit/)?(VOC2010/)?JPEGImages/", r"(VOCdevkit/)?(VOC2010/)?ImageSets/SegmentationContext/.*\.txt"),
        published.pascal_context_59,
    ),
    "pascal_context_60": _Definition(
        "as pascal_context, its background being a class; never recognised, must be named",
        (),
        published.pascal_context_60,
    ),
    "coco_stuff10k": _Definition(
        "images/*.jpg with annotations/*.mat and imageLists/{train,test}.txt",
        (r"images/", r"annotations/", r"imageLists/.*\.txt"),
        published.coco_stuff10k,
    ),
    "coco_stuff164k": _Definition(
        "images/{train,val}2017/*.jpg with annotations/{train,val}2017/*.png",
        (r"images/(train|val)2017/", r"annotations/(train|val)2017/.*\.png"),
        published.coco_stuff164k,
    ),
    "voc": _Definition(
        "JPEGImages/*.jpg with SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt",
        (r"(VOCdevkit/)?(VOC\d+/)?JPEGImages/", r"(VOCdevkit/)?(VOC\d+/)?SegmentationClass/"),
        own.voc,
        has_own_classes=True,
    ),
    "folders": _Definition(
        "images/<split>/* with labels/<split>/* of the same stem, and classes.json",
        (r"images/", r"labels/"),
        own.folders,
        has_own_classes=True,
    ),
    "webdataset": _Definition("*.tar shards, and classes.json", (r".*\.tar$",), own.webdataset, True),
    "parquet": _Definition(
        "*.parquet with columns image and label, and classes.json", (r".*\.parquet$",), own.parquet, True
    ),
    "unlabelled": _Definition("images alone, nothing being named like a label", (), own.unlabelled),
}


def read_layout(name: str, source: str, objects: list[storage.StoredObject]) -> Layout:
    """Find the images and labels in a listing of `source`.

    Args:
        name: a key of `LAYOUTS`, or `auto` to recognise the tree.

    Raises:
        PipelineError: for an unknown name, a tree that no layout recognises, or one without a single image.
    """
    if name == "auto":
        name = _recognise(source, objects)
    if name not in LAYOUTS:
        raise PipelineError(f"There is no layout {name!r}: choose auto, {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name].read(source, objects)
    if not layout.pairs and not layout.shards:
        raise PipelineError(
            f"{source} has no image with a label in the layout {name!r} ({LAYOUTS[name].tree}): "
            f"{len(objects)} objects were listed; correct the URL or name another layout."
        )
    if len({pair.image_id for pair in layout.pairs}) != len(layout.pairs):
        raise AssertionError(f"the layout {layout.name} has made an image_id twice")
    return layout


def _recognise(source: str, objects: list[storage.StoredObject]) -> str:
    prefix = len(source.rstrip("/")) + 1
    paths = [item.url[prefix:] for item in objects]
    for name, definition in LAYOUTS.items():
        marks = [re.compile(mark) for mark in definition.marks]
        if CLASSES_FILE in paths and not definition.has_own_classes:
            continue  # a benchmark's classes are not the source's own
        if marks and all(any(mark.match(path) for path in paths) for mark in marks):
            return name
    named_like_labels = re.compile("annot|label|mask|segm|(?<![a-z])gt|gt(?![a-z])", re.IGNORECASE)
    if only_images(dict.fromkeys(paths)) and not any(named_like_labels.search(path) for path in paths):
        return "unlabelled"
    trees = "; ".join(f"{name}: {definition.tree}" for name, definition in LAYOUTS.items())
    raise PipelineError(
        f"The tree of {source} ({len(objects)} objects) is none of the known layouts ({trees}): "
        "correct the URL, or rearrange the bucket as the layout `folders`."
    )
