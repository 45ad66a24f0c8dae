"""Images that a manifest or an S3 Inventory names: what is listed of them, and what is said of a list that is wrong."""

import gzip
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_sources import ImageSource, Unread, manifests, parts, read
from pipeline.storage_errors import StorageError
from tests.pipeline.listed_images import images, listed, place, places, status, write

__all__ = ["place"]  # a fixture


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
