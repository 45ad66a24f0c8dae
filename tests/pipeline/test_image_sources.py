"""Where images come from: what is listed of each kind of source, in which parts, and that reading gives those bytes."""

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import dataset, storage
from pipeline.errors import PipelineError
from pipeline.image_sources import (
    LISTED,
    ImageSource,
    Unread,
    list_part,
    manifests,
    parts,
    prefixes,
    read,
    reading,
    tars,
)
from pipeline.storage_errors import StorageError
from tests.pipeline.endless_s3 import endless_s3, etag_of, key_of
from tests.pipeline.faulty_s3 import Fault, FaultyS3, faulty_s3

REPOSITORY = Path(__file__).parents[2]
ODD_NAMES = ("with blank.jpg", "100%25.png", "a+b.png", "a#b?c=d.webp", "straße/日本.PNG", "set.tar#x.jpg")


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of either kind."""
    return str(tmp_path / "place") if request.param == "folder" else request.getfixturevalue("bucket")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "READ_WAITS", (0.0, 0.0))


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


def images(url: str, kind: Any = "auto", **options: Any) -> list[dict[str, Any]]:
    return listed(ImageSource(url, kind, **options))[0]


def places(rows: Sequence[Mapping[str, Any]], url: str) -> list[str]:
    return sorted(row["image_uri"].removeprefix(url).lstrip("/") for row in rows)


def write(url: str, names: Sequence[str]) -> dict[str, bytes]:
    """Objects below a URL, each of which has its own place as content."""
    written = {storage.join(url, name): name.encode() for name in names}
    for place, data in written.items():
        storage.write_bytes(place, data)
    return written


def status(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["status"], row["error"]


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


class TestManifest:
    @pytest.mark.parametrize("form", ["list.txt", "list.csv", "bare.csv", "list.parquet"])
    def test_what_it_names_is_listed_in_every_form(self, place: str, form: str) -> None:
        written = write(place, ["a.jpg", "b/no suffix", "c,d.png"])
        uris = [f"{place}/a.jpg", "a.jpg", "b/no suffix", "./c,d.png"]
        write_manifest(f"{place}/{form}", [{"url": uri, "other": "x"} for uri in uris])
        rows = images(f"{place}/{form}")
        assert [row["image_uri"] for row in rows] == [*written]
        assert [row["version"] for row in rows] == [storage.stat(uri).version for uri in written]
        assert list(read(rows)) == list(written.values())

    def test_what_is_relative_to_a_folder_above(self, place: str) -> None:
        write(place, ["x/a.png", "b.png"])
        storage.write_bytes(f"{place}/lists/new/list.txt", b"../../x/a.png\n.././../b.png\n")
        assert places(images(f"{place}/lists/new/list.txt"), place) == ["b.png", "x/a.png"]

    def test_blank_lines_comments_and_marks(self, place: str) -> None:
        write(place, ["a.png", "b.png"])
        storage.write_bytes(f"{place}/list.txt", "\ufeffa.png\r\n\n  # a.png\n\t b.png".encode())
        assert places(images(f"{place}/list.txt"), place) == ["a.png", "b.png"]

    def test_a_long_text_is_divided_at_its_lines(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = [f"{number:0{1 + number % 7}}.png" for number in range(300)]
        names = list(dict.fromkeys(names))
        write(str(tmp_path), names)
        for size in (7, 64, 1000):
            monkeypatch.setattr(manifests, "TEXT_BYTES", size)
            storage.write_bytes(str(tmp_path / "list.txt"), "\n".join(names).encode())
            rows = images(str(tmp_path / "list.txt"))
            assert [row["image_uri"] for row in rows] == [f"{tmp_path}/{name}" for name in names]

    def test_a_version_is_believed_until_it_is_read(self, place: str) -> None:
        write(place, ["a.png", "b.png"])
        version = storage.stat(f"{place}/a.png").version
        rows = [
            {"Key": "a.png", "ETag": f'"{version}"'},
            {"Key": "b.png", "ETag": "0"},
            {"Key": "gone.png", "ETag": "1"},
        ]
        write_manifest(f"{place}/list.csv", rows)
        found = images(f"{place}/list.csv")
        assert [row["version"] for row in found] == [version, "0", "1"]
        first, second, third = read(found)
        assert first == b"a.png"
        assert second == Unread("changed", f"{place}/b.png was overwritten after it was listed")
        assert third == Unread("changed", f"{place}/gone.png was listed, but is not there")

    def test_what_cannot_be_used_is_a_row_that_says_why(self, place: str) -> None:
        entries = ["gone.png", "http://host/x.png", "folder/", "s3://bucket", "a\tb.png", "", "s3://KEY:hush@b/x.png"]
        write_manifest(f"{place}/list.parquet", [{"uri": entry} for entry in entries])
        rows = images(f"{place}/list.parquet")
        assert [row["status"] for row in rows] == ["missing"] + ["bad_uri"] * 6
        assert [row["version"] for row in rows] == [""] * 7
        messages = [
            "gone.png is named by the manifest, but is not there",
            "unknown scheme http://",
            "names a folder: name the image itself",
            "s3://bucket is a bucket: name an object in it",
            "has a control character in its name",
            "The entry names no image",
            "carries credentials",
        ]
        for row, message in zip(rows, messages, strict=True):
            assert message in row["error"]
            assert "hush" not in row["image_uri"] + row["error"]
        assert list(read(rows)) == [Unread(*status(row)) for row in rows]

    def test_patterns_are_matched_against_the_key(self, place: str) -> None:
        write(place, ["a/1.png", "b/1.png"])
        storage.write_bytes(f"{place}/list.txt", b"a/1.png\nb/1.png\n")
        rows, others = listed(ImageSource(f"{place}/list.txt", include=("t*/a/*",)))
        assert places(rows, place) == ["a/1.png"]
        assert others == 1

    def test_several_below_a_prefix_if_they_are_asked_for(self, place: str) -> None:
        write(place, ["a.png", "x/b.png", "c.png"])
        storage.write_bytes(f"{place}/1.txt", b"a.png")
        storage.write_bytes(f"{place}/x/2.csv", b"b.png\n")
        assert places(images(place), place) == ["a.png", "c.png", "x/b.png"]
        assert places(images(place, "manifest"), place) == ["a.png", "x/b.png"]

    def test_wrong_ones(self, place: str) -> None:
        write_manifest(f"{place}/list.csv", [{"size": 1, "label": 2}])
        write_manifest(f"{place}/list.parquet", [{"size": 1}])
        for form, said in (("csv", "size, label"), ("parquet", "size")):
            with pytest.raises(PipelineError, match=f"has the columns {said}: name that of the images one of image_ur"):
                parts(ImageSource(f"{place}/list.{form}"))
        with pytest.raises(PipelineError, match="There is no manifest at"):
            parts(ImageSource(f"{place}/absent", "manifest"))
        storage.write_bytes(f"{place}/empty.csv", b"")
        assert images(f"{place}/empty.csv") == []
        storage.write_bytes(f"{place}/broken.parquet", b"PAR1")
        with pytest.raises(StorageError, match=r"broken.parquet"):
            parts(ImageSource(f"{place}/broken.parquet"))


def write_manifest(url: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """In the form that the name asks for; a name `bare` has no header."""
    table = pa.Table.from_pylist([dict(row) for row in rows])
    if url.endswith(".parquet"):
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=2)
        storage.write_bytes(url, buffer.getvalue().to_pybytes())
        return
    name = next(iter(rows[0]))
    if url.endswith(".txt"):
        lines = [row[name] for row in rows]
    elif url.endswith("bare.csv"):
        lines = [f'"{row[name]}"' for row in rows]
    else:
        quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
        lines = [",".join(rows[0]), *quoted]
    storage.write_bytes(url, "\n".join(lines).encode())


class TestInventory:
    KEYS = ("a b/1+1.jpg", "ü%/2.png", ".hidden/3.png", "notes.txt", "old.png", "deleted.png")

    @pytest.fixture(params=["CSV", "Parquet"])
    def report(self, request: pytest.FixtureRequest, bucket: str) -> str:
        """A report on the bucket `photos` that lies below the test's prefix."""
        name, _, prefix = bucket.partition("://")[2].partition("/")
        rows = [
            ("photos", key, "v", key != "old.png", key == "deleted.png", 7, f"etag-{number}")
            for number, key in enumerate(self.KEYS)
        ]
        if request.param == "CSV":
            schema = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, ETag"
            lines = [
                ",".join(
                    f'"{value}"'
                    for value in (
                        b,
                        urllib.parse.quote_plus(key, safe="/"),
                        v,
                        str(new).lower(),
                        str(gone).lower(),
                        *rest,
                    )
                )
                for b, key, v, new, gone, *rest in rows
            ]
            data = gzip.compress("\n".join(lines).encode())
        else:
            schema = "message s3.inventory { required binary bucket (UTF8); ... }"
            names = ["bucket", "key", "version_id", "is_latest", "is_delete_marker", "size", "e_tag"]
            buffer = pa.BufferOutputStream()
            pq.write_table(pa.table(list(map(list, zip(*rows, strict=True))), names), buffer)
            data = buffer.getvalue().to_pybytes()
        storage.write_bytes(f"{bucket}/data/1", data)
        manifest = {
            "sourceBucket": "photos",
            "destinationBucket": f"arn:aws:s3:::{name}",
            "fileFormat": request.param,
            "fileSchema": schema,
            "files": [{"key": f"{prefix}/data/1", "size": len(data)}],
        }
        storage.write_json(f"{bucket}/2026-01-01T00-00Z/manifest.json", manifest)
        return f"{bucket}/2026-01-01T00-00Z/manifest.json"

    def test_its_latest_images_are_listed_without_a_request_for_each(self, report: str, tmp_path: Path) -> None:
        rows, others = listed(ImageSource(report))
        assert [(row["image_uri"], row["version"]) for row in rows] == [
            ("s3://photos/a b/1+1.jpg", "etag-0"),
            ("s3://photos/ü%/2.png", "etag-1"),
        ]
        assert others == 4
        rows, others = listed(ImageSource(report, include=("a*",)))
        assert [row["version"] for row in rows] == ["etag-0"]
        moved = str(tmp_path / "manifest.json")
        storage.write_bytes(moved, storage.read_bytes(report))
        assert images(moved, include=("a*",)) == rows

    def test_what_cannot_be_read_is_refused_in_a_sentence(self, report: str) -> None:
        document = storage.read_json(report)
        storage.write_json(report, document | {"fileFormat": "ORC"})
        with pytest.raises(PipelineError, match="is of a report in ORC: have the inventory made in CSV or Parquet"):
            parts(ImageSource(report))
        storage.write_json(report, {"name": "my site"})
        with pytest.raises(PipelineError, match="is not the manifest of an S3 Inventory"):
            parts(ImageSource(report))
        storage.write_json(report, document)
        storage.write_bytes(report.replace("2026-01-01T00-00Z/manifest.json", "data/1"), b"no such data")
        with pytest.raises(StorageError, match="data/1"):
            images(report)


class TestDataset:
    @pytest.fixture
    def written(self, place: str) -> str:
        """Two splits, of which one has 10 images in row groups of 4."""
        splits = {}
        for split, count in (("train", 10), ("val", 1)):
            rows = [{"image_id": f"{split[0]}{n}/x", "image": f"{split} {n}".encode()} for n in range(count)]
            buffer = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows, schema=dataset.SCHEMA), buffer, row_group_size=4)
            storage.write_bytes(f"{place}/{split}/part-0.parquet", buffer.getvalue().to_pybytes())
            splits[split] = dataset.SplitInfo(count, 0, [], {f"{split}/part-0.parquet": count})
        dataset.write_info(place, dataset.DatasetInfo([], [], splits, 0, "s3://raw", "folder", "0"))
        return place

    def test_images_are_named_by_split_and_id_and_read(self, written: str) -> None:
        rows = images(written)
        assert [row["image_uri"] for row in rows][::10] == [f"{written}/train/t0/x", f"{written}/val/v0/x"]
        assert [row["offset"] for row in rows] == [*range(10), 0]
        assert {row["version"] for row in rows[:10]} == {storage.stat(f"{written}/train/part-0.parquet").version}
        assert list(read(rows)) == [*(f"train {n}".encode() for n in range(10)), b"val 0"]
        assert list(read([rows[9], rows[0], rows[8], rows[10], rows[0]])) == [
            *(b"train 9", b"train 0", b"train 8", b"val 0", b"train 0")
        ]

    def test_each_row_group_is_read_once(self, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = images(written, include=("train/*",), exclude=("*t3/*",))
        assert len(rows) == 9
        groups = []
        read_row_group = pq.ParquetFile.read_row_group

        def counted(file: pq.ParquetFile, group: int, **options: Any) -> pa.Table:
            groups.append((group, options["columns"]))
            return read_row_group(file, group, **options)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
        list(read([rows[8], *rows[:5]]))
        assert groups == [(0, ["image"]), (1, ["image"]), (2, ["image"])]

    def test_a_file_that_was_overwritten_or_deleted(self, written: str) -> None:
        rows = images(written)
        url = f"{written}/train/part-0.parquet"
        for other in (storage.read_bytes(f"{written}/val/part-0.parquet"), b"PAR1"):
            storage.write_bytes(url, other)
            assert next(read(rows[:1])) == Unread("changed", f"{url} was overwritten after it was listed")
        storage.delete(url)
        assert next(read(rows)) == Unread("changed", f"{url} was listed, but is not there")

    def test_another_dataset_json_does_not_make_a_bucket_of_images_a_dataset(self, place: str) -> None:
        write(place, ["a.png"])
        storage.write_json(f"{place}/dataset.json", {"name": "holidays"})
        assert places(images(place), place) == ["a.png"]
        with pytest.raises(PipelineError, match="is not a dataset of schema version"):
            parts(ImageSource(place, "dataset"))


def tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    return buffer.getvalue()


class TestTar:
    def test_its_images_are_listed_by_place_and_read(self, place: str) -> None:
        contents = {name: name.encode() * 1000 for name in (*ODD_NAMES, "n" * 300 + ".png")}
        others = [("labels.json", b"{}"), (".hidden.png", b"1"), ("./.f/x.png", b"1"), ("empty.png", b"")]
        url = f"{place}/set #1.tar"
        storage.write_bytes(url, tar([*contents.items(), *others]))
        rows, passed_over = listed(ImageSource(url))
        assert [row["image_uri"] for row in rows] == [f"{url}#{name}" for name in (*contents, "empty.png")]
        assert {(row["container"], row["version"]) for row in rows} == {(url, storage.stat(url).version)}
        assert passed_over == 4  # with the link
        assert list(read(rows)) == [*contents.values(), b""]
        assert len(images(url, include=("a*",), exclude=("a+*",))) == 1

    def test_of_equal_names_the_last_stands(self, place: str) -> None:
        storage.write_bytes(f"{place}/x.tar", tar([("a.png", b"1"), ("b.png", b"2"), ("./a.png", b"3")]))
        rows, others = listed(ImageSource(f"{place}/x.tar"))
        uris = [row["image_uri"].rpartition("#")[2] for row in rows]
        assert dict(zip(uris, read(rows), strict=True)) == {"a.png": b"3", "b.png": b"2"}
        assert others == 2

    def test_below_a_prefix_only_if_they_are_asked_for(self, place: str) -> None:
        for name in ("1.tar", "x/2.tar"):
            storage.write_bytes(f"{place}/{name}", tar([("a.png", name.encode())]))
        write(place, ["b.png"])
        assert places(images(place), place) == ["b.png"]
        rows, others = listed(ImageSource(place, "tar"))
        assert places(rows, place) == ["1.tar#a.png", "x/2.tar#a.png"]
        assert others == 3
        assert list(read(rows)) == [b"1.tar", b"x/2.tar"]

    @pytest.mark.parametrize("damage", ["cut", "header", "content", "no tar", "empty"])
    def test_damage_is_a_row_after_those_before_it(self, place: str, damage: str) -> None:
        whole = tar([("a.png", b"1" * 600), ("b.png", b"2" * 600), ("c.png", b"3" * 600)])
        second = 512 + 1024
        data = {
            "cut": whole[: second + 100],
            "header": whole[:second] + b"?" * 512 + whole[second + 512 :],
            "content": whole[: second + 512 + 100],
            "no tar": b"?" * 2000,
            "empty": b"",
        }[damage]
        url = f"{place}/x.tar"
        storage.write_bytes(url, data)
        rows = images(url)
        assert rows[-1]["image_uri"] == url
        assert rows[-1]["status"] == "damaged_archive"
        assert rows[-1]["error"].startswith(f"{url} is damaged after ")
        assert "\n" not in rows[-1]["error"]
        readable = [data for data in read(rows) if isinstance(data, bytes)]
        assert readable[:1] == ([] if damage in ("no tar", "empty") else [b"1" * 600])

    def test_a_tar_that_was_overwritten_or_deleted(self, place: str) -> None:
        url = f"{place}/x.tar"
        storage.write_bytes(url, tar([("a.png", b"1" * 20_000), ("b.png", b"2")]))
        rows = images(url)
        for other in (tar([("c.png", b"3")]), b""):
            storage.write_bytes(url, other)
            unread = Unread("changed", f"{url} was overwritten after it was listed")
            assert list(read(rows)) == [unread, unread]
        found = parts(ImageSource(url))
        storage.delete(url)
        assert next(read(rows)) == Unread("changed", f"{url} was listed, but is not there")
        (row,) = next(list_part(found[0])).table.to_pylist()
        assert status(row) == ("changed", f"{url} was listed, but is not there")

    def test_a_tar_that_is_overwritten_while_it_is_listed_is_not_called_damaged(
        self, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = f"{place}/x.tar"
        members = tars.members

        def overwritten(*opened: Any) -> Iterator[tarfile.TarInfo]:
            for member in members(*opened):
                yield member
                storage.write_bytes(url, b"other")
                raise tarfile.ReadError("it reads other bytes")

        storage.write_bytes(url, tar([("a.png", b"1"), ("b.png", b"2")]))
        monkeypatch.setattr(tars, "members", overwritten)
        listed_before, fault = images(url)
        assert status(fault) == ("changed", f"{url} was overwritten or deleted while it was listed")
        assert list(read([listed_before])) == [Unread("changed", f"{url} was overwritten after it was listed")]

    def test_a_compressed_one_and_none(self, place: str) -> None:
        write(place, ["x.tar.gz", "b.png"])
        with pytest.raises(PipelineError, match=r"x.tar.gz is compressed, .*: unpack it to a plain .tar"):
            parts(ImageSource(f"{place}/x.tar.gz"))
        with pytest.raises(PipelineError, match=r"There is no \.tar file at"):
            parts(ImageSource(place, "tar"))

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        url = str(tmp_path / "x.tar")
        data = tar([("aXb.png", b"1"), ("c.png", b"2")])
        header = bytearray(data[:512].replace(b"X", b"\xff"))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        storage.write_bytes(url, bytes(header) + data[512:])
        assert [(row["image_uri"], row["status"]) for row in images(url)] == [
            (f"{url}#a\\udcffb.png", "bad_name"),
            (f"{url}#c.png", None),
        ]


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
