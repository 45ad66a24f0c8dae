"""Trees of labelled images, most of them listings alone, and what layouts find in them."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.layouts import Layout, read_layout
from tests.pipeline.labelled_source import CLASSES

SOURCE = "s3://raw/photos"
PAIR = ("images/train/a.jpg", "labels/train/a.png")
TREES = {
    "camvid": ["train/a.png", "trainannot/a.png"],
    "ade20k": ["images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png"],
    "cityscapes": ["leftImg8bit/val/ulm/u_1_leftImg8bit.png", "gtFine/val/ulm/u_1_gtFine_labelIds.png"],
    "coco_stuff164k": ["images/val2017/000000000139.jpg", "annotations/val2017/000000000139.png"],
}


def listing(paths: Iterable[str], source: str = SOURCE) -> list[storage.StoredObject]:
    """What a store would say of objects at these paths."""
    return [storage.StoredObject(f"{source}/{path}", 10, "1") for path in sorted(paths)]


def listed(source: Path) -> list[storage.StoredObject]:
    """The listing of a folder that is there."""
    return list(storage.list_objects(str(source)))


def camvid_tree(*paths: str) -> Layout:
    """What CamVid's layout makes of some paths."""
    return read_layout("camvid", SOURCE, listing(paths))


def pairs(layout: Layout, source: str | Path = SOURCE) -> dict[str, tuple[str, str, str | None]]:
    """Image id -> split, image and label, as places below the source."""
    below = len(f"{source}/")
    return {
        pair.image_id: (pair.split, pair.image_url[below:], pair.label_url and pair.label_url[below:])
        for pair in layout.pairs
    }


def rejects(layout: Layout, source: str | Path = SOURCE) -> set[tuple[str, str, str]]:
    """Place below the source, split and reason of each reject."""
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
    """Places below the source of what a layout has no use for."""
    return {url.removeprefix(f"{source}/") for url in layout.passed_over(objects)}


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Layout]:
    """Reads a tree of which only the lists are real files."""

    def read(*paths: str, lists: Mapping[str, str], layout: str = "auto") -> Layout:
        for path, text in lists.items():
            storage.write_bytes(f"{tmp_path}/{path}", text.encode())
        return read_layout(layout, str(tmp_path), listing([*paths, *lists], str(tmp_path)))

    return read


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Layout]:
    """Reads a tree of the layout `folders`; `classes.json` is a real file beside the listing."""

    def read(*paths: str, classes: object = CLASSES, layout: str = "folders") -> Layout:
        (tmp_path / "classes.json").write_text(classes if isinstance(classes, str) else json.dumps(classes), "utf-8")
        return read_layout(layout, str(tmp_path), listing(["classes.json", *paths], str(tmp_path)))

    return read
