"""Images below a prefix: what is listed, in which parts; and that what was listed is read, or it is said why not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_sources import ImageSource, Unread, parts, prefixes, read, reading
from tests.pipeline.endless_s3 import endless_s3, etag_of, key_of
from tests.pipeline.faulty_s3 import Fault, FaultyS3, faulty_s3
from tests.pipeline.listed_images import ODD_NAMES, images, listed, place, places, status, write

__all__ = ["place"]  # a fixture
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "READ_WAITS", (0.0, 0.0))


class TestPrefix:
    def test_every_image_is_listed_with_its_version_and_read(self, place: str) -> None:
        written = write(place, ODD_NAMES)
        write(place, ["notes.txt", "a.tar", ".hidden.png", ".folder/x.png"])
        rows, others = listed(ImageSource(place))
        assert {row["image_uri"]: row["version"] for row in rows} == {url: storage.stat(url).version for url in written}
        assert others == 2
        assert {row["container"] for row in rows} == {None}
        assert dict(zip([row["image_uri"] for row in rows], read(rows), strict=True)) == written

    def test_patterns_are_matched_against_the_place_below_the_url(self, place: str) -> None:
        write(place, ["a/front/1.png", "a/back/1.png", "b/front/2.png", "front.png"])
        rows, others = listed(ImageSource(place, include=("*/front/*", "f*"), exclude=("b/*",)))
        assert places(rows, place) == ["a/front/1.png", "front.png"]
        assert others == 2

    def test_one_image(self, place: str) -> None:
        write(place, ["a.png", "a.png.png"])
        assert places(images(f"{place}/a.png"), place) == ["a.png"]
        assert images(f"{place}/a.png", include=("b*",)) == []

    @pytest.mark.parametrize("levels", [1, 2, 64])
    def test_parts_together_are_the_listing(self, bucket: str, monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
        """Also where an object has the name of a folder, and where a folder has no name."""
        monkeypatch.setattr(prefixes, "MOST_LEVELS", levels)
        names = ["1.png", "x/1.png", "x/y/1.png", "x/y/z/1.png", "x.png", "x.png/1.png", "w/a/1.png", "w//b.png"]
        write(bucket, names)
        rows, _ = listed(ImageSource(bucket))
        whole = [item.url for item in storage.list_objects(bucket)]
        storage.delete(bucket)  # no folder could keep them when the server ends
        assert places(rows, bucket) == sorted(names)
        assert sorted(row["image_uri"] for row in rows) == whole

    def test_a_bucket_is_divided_by_its_folders_near_the_top(self, bucket: str) -> None:
        write(bucket, [f"photos/{folder}/{day}/1.png" for folder in "ab" for day in range(20)] + ["photos/1.png"])
        found = parts(ImageSource(bucket))
        assert len(found) == 4 + 40  # the bucket, photos, and a and b themselves; and each day
        assert len(images(bucket)) == 41

    def test_many_folders_are_put_together_and_a_level_of_too_much_is_not_divided(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(bucket, [f"{folder:02}/1.png" for folder in range(40)])
        monkeypatch.setattr(prefixes, "MOST_PARTS", 8)
        assert len(parts(ImageSource(bucket))) == 1 + 8
        assert len(images(bucket)) == 40
        monkeypatch.setattr(prefixes, "MOST_ENTRIES", 39)
        assert len(parts(ImageSource(bucket))) == 1
        assert len(images(bucket)) == 40

    @pytest.mark.usefixtures("s3")
    def test_a_name_that_no_record_can_hold_is_a_row_that_says_so(self, bucket: str, tmp_path: Path) -> None:
        name, _, prefix = bucket.partition("://")[2].partition("/")
        boto3.client("s3").put_object(Bucket=name, Key=f"{prefix}/a\tb.png", Body=b"1")
        boto3.client("s3").put_object(Bucket=name, Key=f"{prefix}/photo.png?versionId=1.png", Body=b"1")
        (tmp_path / os.fsdecode(b"a\xffb.png")).write_bytes(b"1")
        rows = [*images(bucket), *images(str(tmp_path))]
        assert [row["status"] for row in rows] == ["bad_name"] * 3
        assert rows[0]["image_uri"] == f"{bucket}/a\\tb.png"
        assert rows[2]["image_uri"] == f"{tmp_path}/a\\udcffb.png"
        assert {"its name has characters that cannot be read back or written down: rename it"} == {
            row["error"] for row in rows
        }
        assert list(read(rows)) == [Unread(*status(row)) for row in rows]

    def test_nothing_there(self, place: str) -> None:
        with pytest.raises(PipelineError, match=r"There is nothing at .*place|nothing: correct the URL of the images"):
            parts(ImageSource(f"{place}/nothing"))

    @pytest.mark.usefixtures("s3")
    def test_no_bucket(self) -> None:
        with pytest.raises(PipelineError, match="no bucket named absent"):
            parts(ImageSource("s3://absent/x"))

    def test_an_empty_folder_is_no_failure(self, tmp_path: Path) -> None:
        assert listed(ImageSource(str(tmp_path))) == ([], 0)

    def test_an_unknown_kind(self) -> None:
        with pytest.raises(PipelineError, match="kind 'zip' is none of auto, prefix, manifest, dataset, tar"):
            parts(ImageSource("x", "zip"))  # pyright: ignore[reportArgumentType]


class TestReading:
    @pytest.fixture
    def proxy(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
        write(bucket, ["slow_down.png", "reset.png", "cut.png", "gone.png", "never.png", "fine.png"])
        faults = {
            "*/slow_down.png": Fault(slow_down=3),
            "*/reset.png": Fault(reset=2),
            "*/cut.png": Fault(cut=2),
            "*/gone.png": Fault(gone=1),
            "*/never.png": Fault(slow_down=10**6),
        }
        with faulty_s3(os.environ["AWS_ENDPOINT_URL"], faults) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's; s3fs still tries five times
            yield proxy

    def test_a_store_that_fails_for_a_while_is_borne(self, bucket: str, proxy: FaultyS3) -> None:
        rows = [row for row in images(bucket) if "never" not in row["image_uri"]]
        found = {row["image_uri"].rpartition("/")[2]: data for row, data in zip(rows, read(rows), strict=True)}
        gone = found.pop("gone.png")
        assert found == {name: name.encode() for name in ("cut.png", "fine.png", "reset.png", "slow_down.png")}
        assert gone == Unread("changed", f"{bucket}/gone.png was listed, but is not there")
        assert {pattern for pattern, _ in proxy.unused()} == {"*/never.png"}

    def test_a_store_that_fails_for_good_costs_only_the_image(self, bucket: str, proxy: FaultyS3) -> None:
        rows = [row for row in images(bucket) if row["image_uri"].endswith(("never.png", "fine.png"))]
        fine, never = read(rows)
        assert fine == b"fine.png"
        assert isinstance(never, Unread)
        assert never.status == "storage_error"
        assert "the store is overloaded or failing: try again later" in never.error
        assert proxy.happened["*/never.png", "slow_down"] >= 3 * 5

    def test_an_object_is_read_in_one_request(self, bucket: str, proxy: FaultyS3) -> None:
        rows = [row for row in images(bucket) if row["image_uri"].endswith("fine.png")]
        before = proxy.requests.copy()
        assert list(read(rows)) == [b"fine.png"]
        key = rows[0]["image_uri"].removeprefix("s3://")
        assert proxy.requests - before == {f"GET {key}": 1}

    def test_what_changed_between_listing_and_reading_is_not_taken_for_what_was_listed(self, place: str) -> None:
        write(place, ["deleted.png", "overwritten.png", "same.png"])
        rows = images(place)
        storage.write_bytes(f"{place}/overwritten.png", b"other content")
        storage.delete(f"{place}/deleted.png")
        assert list(read(rows)) == [
            Unread("changed", f"{place}/deleted.png was listed, but is not there"),
            Unread("changed", f"{place}/overwritten.png was overwritten after it was listed"),
            b"same.png",
        ]

    def test_only_some_are_read_ahead(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(str(tmp_path), [f"{number:02}.png" for number in range(30)])
        begun = []
        read_versioned = storage.read_versioned
        monkeypatch.setattr(storage, "read_versioned", lambda url: begun.append(url) or read_versioned(url))
        assert next(read(images(str(tmp_path)))) == b"00.png"
        assert len(begun) <= 1 + reading.FETCHED_AHEAD


def test_memory_does_not_grow_with_the_number_of_objects() -> None:
    """50,000 objects in one folder: with all of them in memory, it would be 50 MB."""
    code = (
        "import sys\n"
        "from pipeline.image_sources import ImageSource, list_part, parts\n"
        "from pipeline.process_memory import peak_memory\n"
        "first = ''\n"
        "count = 0\n"
        "for part in parts(ImageSource(sys.argv[1])):\n"
        "    for listed in list_part(part):\n"
        "        count += listed.table.num_rows\n"
        "        first = first or peak_memory()\n"
        "print(count, peak_memory() - first)"
    )
    with endless_s3(objects=50_000, folders=1) as bucket:
        ended = subprocess.run(
            [sys.executable, "-c", code, bucket.url], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        count, grown = map(int, ended.stdout.split())
    assert count == 50_000
    assert grown < 15e6


def test_a_synthetic_bucket_is_listed_like_a_real_one() -> None:
    with endless_s3(objects=6_000, folders=3) as bucket:
        rows = images(bucket.url)
        assert len(parts(ImageSource(bucket.url))) == 1 + 3
        assert [row["image_uri"] for row in rows] == [
            f"{bucket.url}/{key_of(folder, number)}" for folder in range(3) for number in range(2_000)
        ]
        assert len({row["version"] for row in rows}) == 6_000
        assert rows[2_001]["version"] == etag_of(1, 1)
        assert [item.url for item in storage.list_objects(bucket.url)] == [row["image_uri"] for row in rows]
        one = f"{bucket.url}/{key_of(2, 1_999)}"
        assert [row["image_uri"] for row in images(one)] == [one]


def test_tasks_that_list_and_read_do_not_load_torch_or_ray() -> None:
    code = "import sys, pipeline.image_sources; raise SystemExit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
