"""Images as objects below a prefix or files below a folder."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_sources.listing import SUFFIXES, ImageSource, Row, named

ENOUGH_PARTS = 32  # from which on none is divided further
MOST_PARTS = 256
MOST_LEVELS = 64  # that the driver looks at
MOST_ENTRIES = 10_000  # of a level that is divided: ten requests, and the driver's memory


@dataclass(frozen=True)
class PrefixPart:
    """Images below some prefixes.

    Args:
        source: of which this is a part.
        places: URLs.
        recursive: False for what lies directly at the prefixes.
    """

    source: ImageSource
    places: tuple[str, ...]
    recursive: bool

    def rows(self) -> Iterator[Row | None]:
        """One for each image; other objects are passed over."""
        for place in self.places:
            for item in storage.list_objects(place, recursive=self.recursive):
                below = item.url[len(self.source.images) :].lstrip("/") or item.url.rpartition("/")[2]
                wanted = item.url.lower().endswith(SUFFIXES) and self.source.wants(below)
                yield named(Row(item.url, item.version)) if wanted else None


def parts(source: ImageSource) -> list[PrefixPart]:
    """The folders of an object store near the top, and apart from them what lies beside folders that are divided.

    A local folder is one part: it is listed fast, and only from its top it is known which links lead in circles.

    Raises:
        PipelineError: if there is nothing.
    """
    whole = [PrefixPart(source, (source.images,), recursive=True)]
    if storage.split(source.images)[0] == "file":
        if not storage.exists(source.images):
            raise _nothing(source)
        return whole
    levels: list[str] = []  # whose own objects are listed apart
    folders: list[str] = []  # that are listed with all below them
    waiting = deque([source.images])
    for _ in range(MOST_LEVELS):
        if not waiting or len(waiting) + len(folders) >= ENOUGH_PARTS:
            break
        place = waiting.popleft()
        level = storage.list_level(place, MOST_ENTRIES)
        if level is None or not level.folders:
            folders.append(place)
        else:
            levels.append(place)
            waiting.extend(level.folders)
    folders.extend(waiting)
    if folders == [source.images]:
        if not storage.exists(source.images):
            storage.require_bucket(source.images)
            raise _nothing(source)
        return whole
    direct = [PrefixPart(source, (place,), recursive=False) for place in levels]
    size = -(-len(folders) // MOST_PARTS)
    together = [tuple(folders[start : start + size]) for start in range(0, len(folders), size)]
    return direct + [PrefixPart(source, places, recursive=True) for places in together]


def _nothing(source: ImageSource) -> PipelineError:
    return PipelineError(f"There is nothing at {source.images}: correct the URL of the images.")
