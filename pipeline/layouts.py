"""Datasets as published: where images and labels lie, which belong together, what the label values mean.

A layout looks at a listing alone, never into a file. To add one: write a function from (source, objects) to `Layout`
and name it in `LAYOUTS`, with a function that recognises its tree.
"""

import importlib.resources
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.dataset import IGNORE_LABEL
from pipeline.errors import PipelineError
from rssnet.classes import Classes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png",)
CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class Pair:
    """An image and its label.

    Args:
        image_id: unique in the dataset and the same at every ingest: the image's path below the source, without what
            the layout itself fixes.
        size: bytes of the image file.
    """

    image_id: str
    split: str
    image_url: str
    label_url: str
    size: int


@dataclass(frozen=True)
class Reject:
    """An input that cannot become a row: `reason` is a short constant to count by, `detail` a sentence."""

    source_uri: str
    split: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Layout:
    """What a layout has found.

    Args:
        label_values: published label value to training id; any other value makes a label bad.
    """

    name: str
    classes: Classes
    label_values: Mapping[int, int]
    pairs: list[Pair] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def passed_over(self, objects: Iterable[storage.StoredObject]) -> list[str]:
        """The URLs of listed objects that are neither image, label nor reject: other files, or in no place it knows."""
        used = {pair.image_url for pair in self.pairs} | {pair.label_url for pair in self.pairs}
        used |= {reject.source_uri for reject in self.rejects}
        return [item.url for item in objects if item.url not in used and PurePosixPath(item.url).name != CLASSES_FILE]


def read_layout(name: str, source: str, objects: list[storage.StoredObject]) -> Layout:
    """Find the pairs of images and labels in a listing of `source`.

    Args:
        name: a key of `LAYOUTS`, or `auto` to recognise the tree.

    Raises:
        PipelineError: for an unknown name, a tree that no layout recognises, or one without a single pair.
    """
    if name == "auto":
        name = _recognise(source, objects)
    if name not in LAYOUTS:
        raise PipelineError(f"There is no layout {name!r}: choose auto, {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name].read(source, objects)
    if not layout.pairs:
        raise PipelineError(
            f"{source} has no image with a label in the layout {name!r} ({LAYOUTS[name].tree}): "
            f"{len(objects)} objects were listed; correct the URL or name another layout."
        )
    _require_unique_ids(layout)
    return layout


def class_set(name: str) -> Classes:
    """The class names and palette of a published benchmark, from the data files of this package."""
    text = (importlib.resources.files("pipeline") / "class_sets" / f"{name}.json").read_text("utf-8")
    return _classes_from(json.loads(text), f"class set {name}")


def _recognise(source: str, objects: list[storage.StoredObject]) -> str:
    paths = {_below(source, item.url) for item in objects}
    for name, definition in LAYOUTS.items():
        if definition.recognises(paths):
            return name
    trees = "; ".join(f"{name}: {definition.tree}" for name, definition in LAYOUTS.items())
    raise PipelineError(
        f"The tree of {source} ({len(objects)} objects) is none of the known layouts ({trees}): "
        "correct the URL, or rearrange the bucket as the layout `folders`."
    )


def _camvid(source: str, objects: list[storage.StoredObject]) -> Layout:
    """CamVid as in the SegNet tutorial: `{train,val,test}/` and `{...}annot/`, 0 to 10, 11 is unlabelled."""
    values = {value: value for value in range(11)} | {11: IGNORE_LABEL}
    layout = Layout("camvid", class_set("camvid"), values)
    by_folder = _by_folder(source, objects)
    for split in ("train", "val", "test"):
        _pair_up(layout, split, by_folder.get(split, []), by_folder.get(f"{split}annot", []), source)
    return layout


def _folders(source: str, objects: list[storage.StoredObject]) -> Layout:
    """A user's own: `images/<split>/...`, `labels/<split>/...` with the same stem, and `classes.json` beside them."""
    place = storage.join(source, CLASSES_FILE)
    try:
        document = storage.read_json(place)
    except FileNotFoundError:
        raise PipelineError(
            f"The layout folders needs {place}, which does not exist: write one like "
            '{"names": ["road", "car"], "palette": [[128, 64, 128], [64, 0, 128]], "ignore_label": 255}.'
        ) from None
    classes = _classes_from(document, place)
    ignore = document.get("ignore_label", IGNORE_LABEL)
    if type(ignore) is not int or not 0 <= ignore <= 65535:
        raise PipelineError(f"{place}: ignore_label is {ignore!r}: give an integer from 0 to 65535.")
    if ignore < len(classes):
        raise PipelineError(
            f"{place}: ignore_label {ignore} is also the value of the class {classes.names[ignore]!r}: "
            f"the {len(classes)} classes take the values 0 to {len(classes) - 1}, so give another one."
        )
    values = {value: value for value in range(len(classes.names))} | {ignore: IGNORE_LABEL}
    layout = Layout("folders", classes, values)
    by_folder = _by_folder(source, objects, depth=2)
    parts = [folder.partition("/") for folder in by_folder]
    for split in sorted({split for kind, _, split in parts if kind in ("images", "labels") and split}):
        if split.startswith("_"):
            raise PipelineError(
                f"{source} has a split named {split!r}: rename it, a leading _ is for what is no split."
            )
        _pair_up(layout, split, by_folder.get(f"images/{split}", []), by_folder.get(f"labels/{split}", []), source)
    return layout


@dataclass(frozen=True)
class _Definition:
    tree: str
    recognises: Callable[[set[str]], bool]
    read: Callable[[str, list[storage.StoredObject]], Layout]


LAYOUTS: Mapping[str, _Definition] = {
    "camvid": _Definition(
        "train/*.jpg with trainannot/*.png, likewise val and test",
        lambda paths: any(path.startswith("trainannot/") for path in paths),
        _camvid,
    ),
    "folders": _Definition(
        "images/<split>/* with labels/<split>/* of the same stem, and classes.json",
        lambda paths: (
            any(path.startswith("images/") for path in paths) and any(path.startswith("labels/") for path in paths)
        ),
        _folders,
    ),
}


def _pair_up(
    layout: Layout,
    split: str,
    images: Iterable[storage.StoredObject],
    labels: Iterable[storage.StoredObject],
    source: str,
) -> None:
    """Match images and labels of a split by their path without suffix, below their own folders."""
    images = [item for item in images if item.url.lower().endswith(IMAGE_SUFFIXES)]
    waiting: dict[str, storage.StoredObject] = {}
    for label in labels:
        if label.url.lower().endswith(LABEL_SUFFIXES):
            stem = _stem(source, label.url)
            if stem in waiting:
                detail = f"{label.url} and {waiting[stem].url} have the same stem: remove one"
                layout.rejects.append(Reject(label.url, split, "duplicate_stem", detail))
            else:
                waiting[stem] = label
    seen: dict[str, str] = {}
    for image in images:
        stem = _stem(source, image.url)
        if stem in seen:
            detail = f"{image.url} and {seen[stem]} have the same stem: rename one"
            layout.rejects.append(Reject(image.url, split, "duplicate_stem", detail))
            continue
        seen[stem] = image.url
        label = waiting.pop(stem, None)
        if label is None:
            detail = f"no label named {stem}.png: add it, or remove the image"
            layout.rejects.append(Reject(image.url, split, "no_label", detail))
            continue
        layout.pairs.append(Pair(f"{split}/{stem}", split, image.url, label.url, image.size))
    for stem, label in waiting.items():
        if stem not in seen:
            detail = f"no image named {stem}: add it, or remove the label"
            layout.rejects.append(Reject(label.url, split, "no_image", detail))


def _by_folder(
    source: str, objects: list[storage.StoredObject], depth: int = 1
) -> dict[str, list[storage.StoredObject]]:
    """Objects grouped by the first `depth` parts of their path below the source."""
    groups: dict[str, list[storage.StoredObject]] = {}
    for item in objects:
        parts = PurePosixPath(_below(source, item.url)).parts
        if len(parts) > depth:
            groups.setdefault("/".join(parts[:depth]), []).append(item)
    return groups


def _below(source: str, url: str) -> str:
    return url[len(source.rstrip("/")) + 1 :]


def _stem(source: str, url: str) -> str:
    """The path below the split's folder, without suffix: `city/a` for `images/train/city/a.jpg`, `train/city/a.jpg`."""
    parts = PurePosixPath(_below(source, url)).with_suffix("").parts
    return "/".join(parts[2:] if parts[0] in ("images", "labels") else parts[1:])


def _classes_from(document: object, place: str) -> Classes:
    try:
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        names, palette = document["names"], document["palette"]
        if not isinstance(names, list) or len(names) > IGNORE_LABEL:
            raise ValueError(
                f"names must be a list of 2 to {IGNORE_LABEL} names, {IGNORE_LABEL} being the ignore label"
            )
        return Classes(tuple(names), tuple((int(r), int(g), int(b)) for r, g, b in palette))
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(
            f"{place} does not describe classes ({type(error).__name__}: {error}): "
            'write {"names": [...], "palette": [[r, g, b], ...]} with one colour for each name.'
        ) from error


def _require_unique_ids(layout: Layout) -> None:
    if len({pair.image_id for pair in layout.pairs}) != len(layout.pairs):
        raise AssertionError(f"the layout {layout.name} has made an image_id twice")
