"""What a layout finds in a listing: inputs, how their labels are to be read, and what cannot be used."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.labels import LabelCoding
from rssnet.classes import Classes

CLASSES_FILE = "classes.json"
CANONICAL = "canonical"  # the coding of a dataset that was made here, where what has no label is to have none
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Pair:
    """An image and its label.

    Args:
        image_id: unique in the dataset and the same at every ingest: the split, and the image's path without what the
            layout itself fixes.
        label_url: None in an unlabelled split.
        coding: which of the layout's codings the label has.
        size: bytes of the image file.
    """

    image_id: str
    split: str
    image_url: str
    label_url: str | None
    coding: str
    size: int


@dataclass(frozen=True)
class Shard:
    """A file that holds many images with their labels; what is in it shows when it is read.

    Args:
        name: its path below the source without suffix; what its images' ids begin with.
        url: of a tar or Parquet file.
        coding: which of the layout's codings the labels in it have.
        size: its bytes.
    """

    name: str
    split: str
    url: str
    coding: str
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
        classes: None where nothing is labelled.
        codings: how labels say the class of a pixel, by a name that pairs and shards refer to.
        used: other objects that were read, such as lists of a split's images.
    """

    name: str
    classes: Classes | None
    codings: Mapping[str, LabelCoding]
    pairs: list[Pair] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def passed_over(self, objects: Iterable[storage.StoredObject]) -> list[str]:
        """The URLs of listed objects that are neither image, label nor reject: other files, or in no place it knows."""
        used = self.used | {pair.image_url for pair in self.pairs} | {pair.label_url for pair in self.pairs}
        used |= {reject.source_uri for reject in self.rejects} | {shard.url for shard in self.shards}
        return [item.url for item in objects if item.url not in used and PurePosixPath(item.url).name != CLASSES_FILE]
