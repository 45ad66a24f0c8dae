"""Layouts for a user's own images: folders, PASCAL VOC's tree, shards of Parquet or tar files, images alone."""

import re
from pathlib import PurePosixPath

from pipeline import dataset, storage
from pipeline.errors import PipelineError
from pipeline.layouts.classes import class_set, own_classes, palette_coding
from pipeline.layouts.layout import CANONICAL, CLASSES_FILE, Layout, Shard
from pipeline.layouts.pairing import LABEL_SUFFIXES, Tree, by_name, only_images, pair_up, without_labels

VOC_TOPS = tuple(f"{folder}VOC{year}" for year in range(2012, 2006, -1) for folder in ("VOCdevkit/", ""))
VOC_VOID = (224, 224, 192)
UNLABELLED_SPLIT = "all"
NO_SPLITS = ("data", "default")
USUAL_SPLITS = ("train", "val", "validation", "test")

# `train` of train.parquet, train-00000-of-00004.parquet or train_012.tar
_SPLIT_OF_NAME = re.compile(r"(?P<split>[A-Za-z][A-Za-z0-9]*?)(?:[-_.]?\d[-_.\w]*)?")


def folders(source: str, objects: list[storage.StoredObject]) -> Layout:
    """`images/<split>/...`, `labels/<split>/...` with the same stem, and `classes.json` beside them."""
    classes, coding = own_classes(source, "folders")
    layout = Layout("folders", classes, {"values": coding})
    tree = Tree(source, objects)
    for split in sorted({*tree.folders("images"), *tree.folders("labels")}):
        _require_split_name(source, split)
        images = by_name(layout, split, only_images(tree.below(f"images/{split}")))
        pair_up(layout, split, images, by_name(layout, split, tree.below(f"labels/{split}", LABEL_SUFFIXES)))
    return layout


def voc(source: str, objects: list[storage.StoredObject]) -> Layout:
    """PASCAL VOC's tree: the 21 classes of VOC, or those of a `classes.json`; splits by lists of names."""
    tree = Tree(source, objects, VOC_TOPS)
    if CLASSES_FILE in tree.objects:
        classes, coding = own_classes(source, "voc")
    else:
        classes = class_set("voc")
        coding = palette_coding(classes, ignored=VOC_VOID)
    layout = Layout("voc", classes, {"values": coding})
    images = by_name(layout, "", only_images(tree.below("JPEGImages")))
    labels = by_name(layout, "", tree.below("SegmentationClass", LABEL_SUFFIXES))
    lists = "ImageSets/Segmentation"
    splits = [name.removesuffix(".txt") for name in sorted(tree.below(lists, (".txt",)))]
    if "train" in splits or "val" in splits:  # others, such as trainval and trainaug, name the same images again
        splits = [split for split in splits if split in ("train", "val", "test")]
    if not splits:
        raise PipelineError(f"The layout voc needs lists of names like {source}/{tree.top}{lists}/train.txt: add them.")
    for split in splits:
        _require_split_name(source, split)
        listed = tree.lines(layout, f"{lists}/{split}.txt") or []
        if split == "test" and not any(name in labels for name in listed):  # VOC 2012 keeps them to itself
            without_labels(layout, split, images, listed)
        else:
            pair_up(layout, split, images, labels, listed=listed)
    return layout


def parquet(source: str, objects: list[storage.StoredObject]) -> Layout:
    """Parquet files with the columns `image` and `label` of encoded bytes: a canonical dataset, or another's."""
    if dataset.INFO_FILE in Tree(source, objects).objects:
        classes = dataset.open(source).classes
        codings = {CANONICAL: palette_coding(classes)}
    else:
        classes, coding = own_classes(source, "parquet")
        codings = {"values": coding}
    layout = Layout("parquet", classes, codings)
    layout.used.add(storage.join(source, dataset.INFO_FILE))
    _add_shards(layout, source, objects, ".parquet")
    return layout


def webdataset(source: str, objects: list[storage.StoredObject]) -> Layout:
    """Tar shards, in which the files of one sample follow each other and share the name before the first dot."""
    classes, coding = own_classes(source, "webdataset")
    layout = Layout("webdataset", classes, {"values": coding})
    _add_shards(layout, source, objects, ".tar")
    return layout


def unlabelled(source: str, objects: list[storage.StoredObject]) -> Layout:
    """Any images, anywhere below the source."""
    layout = Layout("unlabelled", None, {})
    without_labels(layout, UNLABELLED_SPLIT, only_images(Tree(source, objects).objects))
    return layout


def _add_shards(layout: Layout, source: str, objects: list[storage.StoredObject], suffix: str) -> None:
    """Files of a suffix, in the splits that their paths name; their labels have the layout's one coding."""
    (coding,) = layout.codings
    for path, item in Tree(source, objects).objects.items():
        if not path.lower().endswith(suffix) or path.startswith("_"):
            continue
        split = _shard_split(source, path)
        _require_split_name(source, split)
        name = PurePosixPath(path).with_suffix("").as_posix()
        layout.shards.append(Shard(name, split, item.url, coding, item.size))


def _shard_split(source: str, path: str) -> str:
    """The split that a shard's path names.

    That is the first folder, but for those of the Hugging Face hub that are no split; else a usual name of a split
    in the file's name, else the word that it begins with.
    """
    *folders, file = PurePosixPath(path).parts
    if folders and folders[0] not in NO_SPLITS:
        return folders[0]
    stem = PurePosixPath(file).stem
    usual = [word for word in re.split(r"[-_.]", stem) if word in USUAL_SPLITS]
    if usual:
        return usual[0]
    match = _SPLIT_OF_NAME.fullmatch(stem)
    if not match:
        raise PipelineError(
            f"{source}: the name of {path} tells no split: begin it with one, as in train-000, or put it in a folder "
            "that is named after one."
        )
    return match["split"]


def _require_split_name(source: str, split: str) -> None:
    if split.startswith("_"):
        raise PipelineError(f"{source} has a split named {split!r}: rename it, a leading _ is for what is no split.")
