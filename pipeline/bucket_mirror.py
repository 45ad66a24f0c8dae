"""Buckets of an S3 server as folders on disk: loading them into the server, and saving what has changed there."""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

_PARTS_FILE, _PARTIAL_FOLDER = ".parts.json", ".partial"  # the leading dot tells them from buckets
_NAME_BYTES = 255


@dataclass(frozen=True, order=True)
class Place:
    """An object of a server: its bucket and key."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


class UnfitKeyError(Exception):
    """A key that cannot be the name of a file, with why."""


class BucketMirror:
    """Keeps `folder/<bucket>/<key>` the same as the objects of a server.

    Bytes and ETags survive the way to the folder and back; metadata and old versions do not. An empty folder stands for
    the marker object, whose key ends in a slash, with which some clients make folders.

    Args:
        folder: mirror of the buckets; has to be there.
        client: botocore's S3 client of the server. What it raises, and what the disk raises, comes through.
    """

    def __init__(self, folder: Path, client: Any) -> None:
        self.folder = folder
        self._client = client
        self._saved: dict[Place, str] = {}  # ETag of what the folder holds
        self._parts: dict[Place, list[int]] = {}  # bytes of each part, where the ETag depends on it

    def load(self) -> None:
        """Store everything below the folder on the server; hidden files beside the buckets are left out.

        Raises:
            PipelineError: if our own note on parts has been damaged.
        """
        shutil.rmtree(self.folder / _PARTIAL_FOLDER, ignore_errors=True)  # of a save that was killed
        parts = self._read_parts()
        for bucket in sorted(self.folder.iterdir()):
            if bucket.name.startswith(".") or not bucket.is_dir():
                continue
            self._client.create_bucket(Bucket=bucket.name)
            for path in sorted(bucket.rglob("*")):
                place = Place(bucket.name, path.relative_to(bucket).as_posix())
                if path.is_file():
                    self._saved[place] = self._upload(place, path, parts.get(place, []))
                elif path.is_dir() and not any(path.iterdir()):
                    marker = Place(place.bucket, f"{place.key}/")
                    answer = self._client.put_object(Bucket=marker.bucket, Key=marker.key, Body=b"")
                    self._saved[marker] = _etag(answer)

    def save(self) -> None:
        """Write new and changed objects to the folder, each atomically, and remove deleted ones.

        Files that were neither loaded nor written here are left alone.

        Raises:
            PipelineError: if keys cannot be file names; everything else is saved all the same.
        """
        stored = self._stored()
        for place in sorted(self._saved.keys() - stored.keys(), reverse=True):  # a folder's files before its marker
            self._remove(place)
        refused = []
        for place, (etag, size) in sorted(stored.items()):
            if self._saved.get(place) == etag and self._lies_in_folder(place, size):
                continue
            try:
                self._write(place)
            except UnfitKeyError as error:
                refused.append(f"{place} ({error})")
        self._write_parts()
        if refused:
            raise PipelineError(
                f"{len(refused)} objects cannot be files below {self.folder} and will be lost with the server: "
                f"{'; '.join(refused[:3])}: give them other keys."
            )

    def _upload(self, place: Place, path: Path, parts: list[int]) -> str:
        """Store a file in as many parts as before, for they decide its ETag: one, unless `parts` says otherwise."""
        target = {"Bucket": place.bucket, "Key": place.key}
        with path.open("rb") as file:
            if not parts or sum(parts) != path.stat().st_size:
                return _etag(self._client.put_object(**target, Body=file))
            target["UploadId"] = self._client.create_multipart_upload(**target)["UploadId"]
            etags = []
            for number, size in enumerate(parts, start=1):
                answer = self._client.upload_part(**target, PartNumber=number, Body=file.read(size))
                etags.append({"PartNumber": number, "ETag": answer["ETag"]})
        self._parts[place] = parts
        return _etag(self._client.complete_multipart_upload(**target, MultipartUpload={"Parts": etags}))

    def _stored(self) -> dict[Place, tuple[str, int]]:
        """ETag and size of every object on the server. Makes the folders of the buckets, too."""
        stored = {}
        for bucket in self._client.list_buckets()["Buckets"]:
            (self.folder / bucket["Name"]).mkdir(exist_ok=True)
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"]):
                for item in page.get("Contents", []):
                    stored[Place(bucket["Name"], item["Key"])] = (_etag(item), item["Size"])
        return stored

    def _path(self, place: Place) -> Path:
        """The file of an object, or the folder of a marker.

        Raises:
            UnfitKeyError: if there can be no file of this name.
        """
        names = place.key.removesuffix("/").split("/")
        for name in names:
            if name in ("", ".", "..") or "\0" in name:
                raise UnfitKeyError(f"{name!r} is not a file name")
            if len(os.fsencode(name)) > _NAME_BYTES:
                raise UnfitKeyError(f"it has a name of more than {_NAME_BYTES} bytes")
        return self.folder.joinpath(place.bucket, *names)

    def _lies_in_folder(self, place: Place, size: int) -> bool:
        path = self._path(place)
        if place.key.endswith("/"):
            return path.is_dir()
        return path.is_file() and path.stat().st_size == size

    def _write(self, place: Place) -> None:
        path = self._path(place)
        if place not in self._saved and path.is_file():
            # Somebody else's, or the disk does not tell upper from lower case: in neither case ours to replace.
            raise UnfitKeyError("another file is in its place")
        try:
            answer = self._client.get_object(Bucket=place.bucket, Key=place.key)
        except self._client.exceptions.NoSuchKey:
            return  # deleted since it was listed
        try:
            if not place.key.endswith("/"):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._replace(path, answer["Body"])
            elif answer["ContentLength"] == 0:
                path.mkdir(parents=True, exist_ok=True)
            else:
                raise UnfitKeyError("a folder's name, with bytes")
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UnfitKeyError("a file and a folder of the same name") from error
        self._saved[place] = _etag(answer)
        self._parts.pop(place, None)
        if "-" in _etag(answer):
            self._parts[place] = self._part_sizes(place)

    def _replace(self, path: Path, body: Any) -> None:
        temporary = self.folder / _PARTIAL_FOLDER / uuid.uuid4().hex
        temporary.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                shutil.copyfileobj(body, file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _part_sizes(self, place: Place) -> list[int]:
        target = {"Bucket": place.bucket, "Key": place.key}
        first = self._client.head_object(**target, PartNumber=1)
        rest = range(2, first["PartsCount"] + 1)
        sizes = [self._client.head_object(**target, PartNumber=number)["ContentLength"] for number in rest]
        return [first["ContentLength"], *sizes]

    def _remove(self, place: Place) -> None:
        """Delete the file, and the folders that it leaves empty unless the server has markers for them."""
        path = self._path(place)
        if not place.key.endswith("/"):
            path.unlink(missing_ok=True)
            path = path.parent
        del self._saved[place]
        self._parts.pop(place, None)
        bucket = self.folder / place.bucket
        while path != bucket and path.is_dir() and not any(path.iterdir()):
            if Place(place.bucket, f"{path.relative_to(bucket).as_posix()}/") in self._saved:
                return
            path.rmdir()
            path = path.parent

    def _read_parts(self) -> dict[Place, list[int]]:
        note = self.folder / _PARTS_FILE
        try:
            return {Place(bucket, key): sizes for bucket, key, sizes in json.loads(note.read_bytes())}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise PipelineError(
                f"{note} cannot be read ({error}): delete it; some objects then get other ETags."
            ) from error

    def _write_parts(self) -> None:
        if not self._parts and not (self.folder / _PARTS_FILE).exists():
            return
        temporary = self.folder / f"{_PARTS_FILE}.new"
        temporary.write_text(
            json.dumps([[place.bucket, place.key, self._parts[place]] for place in sorted(self._parts)])
        )
        temporary.replace(self.folder / _PARTS_FILE)


def _etag(answer: dict[str, Any]) -> str:
    return answer["ETag"].strip('"')
