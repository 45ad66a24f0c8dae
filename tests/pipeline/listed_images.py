"""Places of images, and what listing them as a source gives."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.image_sources import LISTED, ImageSource, Kind, list_part, parts

ODD_NAMES = ("with blank.jpg", "100%25.png", "a+b.png", "a#b?c=d.webp", "straße/日本.PNG", "set.tar#x.jpg")


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of either kind."""
    return str(tmp_path / "place") if request.param == "folder" else request.getfixturevalue("bucket")


def listed(source: ImageSource) -> tuple[list[dict[str, Any]], int]:
    """All rows of a source, and how many objects were passed over; each part is listed as in another process."""
    rows: list[dict[str, Any]] = []
    others = 0
    for part in pickle.loads(pickle.dumps(parts(source))):
        for some in list_part(part):
            assert some.table.schema == LISTED
            rows += some.table.to_pylist()
            others += some.others
    return rows, others


def images(url: str, kind: Kind = "auto", **options: Any) -> list[dict[str, Any]]:
    """All rows of a source."""
    return listed(ImageSource(url, kind, **options))[0]


def places(rows: Sequence[Mapping[str, Any]], url: str) -> list[str]:
    """Where the images of some rows lie below a URL, sorted."""
    return sorted(row["image_uri"].removeprefix(url).lstrip("/") for row in rows)


def write(url: str, names: Sequence[str]) -> dict[str, bytes]:
    """Objects below a URL, each of which has its own place as content."""
    written = {storage.join(url, name): name.encode() for name in names}
    for place, data in written.items():
        storage.write_bytes(place, data)
    return written


def status(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a row says of its image, and why."""
    return row["status"], row["error"]
