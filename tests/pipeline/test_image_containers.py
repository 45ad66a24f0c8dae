"""Images inside the files of a dataset or inside tar files: what is listed of them, and that it is read."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import dataset, storage
from pipeline.errors import PipelineError
from pipeline.image_sources import ImageSource, Unread, list_part, parts, read, tars
from tests.pipeline.listed_images import ODD_NAMES, images, listed, place, places, status, write

__all__ = ["place"]  # a fixture


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
