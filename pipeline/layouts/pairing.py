"""Matching images and labels by name, for layouts that keep them in folders of their own."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import TypeVar

from pipeline import storage
from pipeline.layouts.layout import IMAGE_SUFFIXES, Layout, Pair, Reject

LABEL_SUFFIXES = (".png",)

Item = TypeVar("Item")


class Tree:
    """A listing by path below its source.

    Args:
        source: the URL that was listed.
        objects: what was found there.
        tops: names of a folder that a benchmark's archive unpacks to, in which its tree may lie.
    """

    def __init__(self, source: str, objects: Iterable[storage.StoredObject], tops: tuple[str, ...] = ()) -> None:
        self.source = source.rstrip("/")
        self.objects = {item.url[len(self.source) + 1 :]: item for item in objects}
        self.top = next((f"{top}/" for top in tops if any(path.startswith(f"{top}/") for path in self.objects)), "")

    def below(self, folder: str, suffixes: tuple[str, ...] = ("",)) -> dict[str, storage.StoredObject]:
        """Objects in a folder, at any depth, by their path in it; names end in one of the suffixes, in any case."""
        prefix = f"{self.top}{folder}/"
        return {
            path[len(prefix) :]: item
            for path, item in self.objects.items()
            if path.startswith(prefix) and path.lower().endswith(suffixes)
        }

    def folders(self, within: str) -> list[str]:
        """Names of the folders just below one, sorted."""
        return sorted({path.partition("/")[0] for path in self.below(within) if "/" in path})

    def lines(self, layout: Layout, path: str) -> list[str] | None:
        """The names in a list of the layout, one a line, without VOC's flags behind them; None if it is not there."""
        item = self.objects.get(f"{self.top}{path}")
        if item is None:
            return None
        layout.used.add(item.url)
        text = storage.read_bytes(item.url).decode("utf-8-sig", errors="replace")
        return [re.sub(r"\s+-?[01]$", "", line.strip()) for line in text.splitlines() if line.strip()]


def by_name(
    layout: Layout, split: str, objects: Mapping[str, storage.StoredObject], ending: str = ""
) -> dict[str, storage.StoredObject]:
    """Objects by their path without its suffix, or without a longer ending that the layout fixes.

    Of several of one name the first counts and the others become rejects of the layout; what lacks the ending is left
    out.
    """
    found: dict[str, storage.StoredObject] = {}
    for path, item in objects.items():
        if not path.endswith(ending):
            continue
        name = path.removesuffix(ending) if ending else PurePosixPath(path).with_suffix("").as_posix()
        if name in found:
            detail = f"{item.url} and {found[name].url} have the same stem: rename or remove one"
            layout.rejects.append(Reject(item.url, split, "duplicate_stem", detail))
        else:
            found[name] = item
    return found


def pair_up(
    layout: Layout,
    split: str,
    images: Mapping[str, storage.StoredObject],
    labels: Mapping[str, storage.StoredObject],
    coding: str = "values",
    listed: Iterable[str] | None = None,
) -> None:
    """Adds the pairs of a split to a layout, and as rejects what has no partner.

    Args:
        images, labels: by the name that an image and its label share.
        coding: that of the labels.
        listed: names of the split's images, where a list says so; others belong to other splits.
    """
    if listed is None:
        for name, label in labels.items():
            if name not in images:
                detail = f"no image named {name}: add it, or remove the label"
                layout.rejects.append(Reject(label.url, split, "no_image", detail))
    for name in images if listed is None else dict.fromkeys(listed):
        image, label = images.get(name), labels.get(name)
        if image is None:
            layout.rejects.append(_listed_in_vain(split, name))
        elif label is None:
            detail = f"no label named {name}: add it, or remove the image"
            layout.rejects.append(Reject(image.url, split, "no_label", detail))
        else:
            layout.pairs.append(Pair(f"{split}/{name}", split, image.url, label.url, coding, image.size))


def without_labels(
    layout: Layout, split: str, images: Mapping[str, storage.StoredObject], listed: Iterable[str] | None = None
) -> None:
    """Adds images of a split that has no labels, by their names, or those of them that a list names."""
    for name in images if listed is None else dict.fromkeys(listed):
        if name in images:
            layout.pairs.append(Pair(f"{split}/{name}", split, images[name].url, None, "", images[name].size))
        else:
            layout.rejects.append(_listed_in_vain(split, name))


def _listed_in_vain(split: str, name: str) -> Reject:
    detail = f"the list of {split} names {name}, of which there is no image: add it, or mend the list"
    return Reject(f"{split}/{name}", split, "no_image", detail)


def only_images(objects: Mapping[str, Item]) -> dict[str, Item]:
    """Those whose path has an image's suffix."""
    return {path: item for path, item in objects.items() if path.lower().endswith(IMAGE_SUFFIXES)}
