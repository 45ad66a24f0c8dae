"""URL to filesystem, atomic writes, listing with versions: hides which store is at work from all that use it.

Places, and what they are called, are those of `pipeline.places`; what only one kind of store knows lies in
`pipeline.store_clients`, `pipeline.store_listing`, `pipeline.s3_requests` and `pipeline.local_files`.

What is read in parts (Parquet) and what Ray stores itself (checkpoints) goes through pyarrow's filesystems
(`arrow_filesystem`), which Ray retries best. Whole objects (images, files written in one step) and listings with ETags
go through fsspec. Credentials and endpoints come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...) or
the cloud's identity.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as arrow_fs

from pipeline.places import absolute as absolute
from pipeline.places import join as join
from pipeline.places import printable as printable
from pipeline.places import split as split
from pipeline.places import usable_name as usable_name
from pipeline.s3_requests import get_object, put_object_if
from pipeline.storage_errors import StorageError, no_bucket
from pipeline.storage_errors import explained as explained
from pipeline.storage_errors import explained_items as explained_items
from pipeline.store_clients import client
from pipeline.store_listing import entries_at, objects_at

UPLOADED_TOGETHER = 32  # files that upload_folder holds in memory
DELETED_TOGETHER = 16
_READINGS = 3  # of an object that is overwritten meanwhile


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing.

    Args:
        url: full URL, in the form in which the listing was asked for.
        size: bytes.
        version: the store's ETag; where it has none, size and modification time. Changes whenever the bytes do.
    """

    url: str
    size: int
    version: str


def arrow_filesystem(url: str) -> tuple[arrow_fs.FileSystem, str]:
    """The pyarrow filesystem of a URL and the path in it, for Parquet, checkpoints and Ray's `storage_filesystem`."""
    scheme, path = split(url)
    if scheme == "file":
        return arrow_fs.LocalFileSystem(), path
    bucket = path.partition("/")[0]
    with explained(url):
        filesystem, _ = arrow_fs.FileSystem.from_uri(f"{scheme}://{bucket}")
    return filesystem, path


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: if there is no such object, so that callers can tell absence from failure.
        StorageError: for everything else that keeps it from being read.
    """
    scheme, path = split(url)
    # In one request: s3fs would first ask for the size, and gives up sooner where that is answered with "slow down".
    options = {"max_concurrency": 1} if scheme == "s3" else {}
    with explained(url, absence=False):
        return client(scheme).cat_file(path, **options)


def read_versioned(url: str) -> tuple[bytes, str]:
    """The whole object, and the version that these very bytes are of, as a listing would have it.

    Raises:
        FileNotFoundError, StorageError: as `read_bytes`; also if the object is overwritten all the time.
    """
    return _read_versioned(url)


def read_range(url: str, start: int, length: int) -> tuple[bytes, str]:
    """`length` bytes of an object from `start` on, fewer where it ends before, and the version that they are of.

    Raises:
        FileNotFoundError, StorageError: as `read_versioned`; also if the object ends before `start`.
    """
    if length == 0:  # which a range in HTTP cannot say
        return b"", stat(url).version
    return _read_versioned(url, start, length)


def _read_versioned(url: str, start: int = 0, length: int | None = None) -> tuple[bytes, str]:
    scheme, path = split(url)
    if scheme == "s3":
        bucket, _, key = path.partition("/")
        with explained(url, absence=False):
            data, etag = get_object(client(scheme), bucket, key, start, length)
        return data, _version({"ETag": etag})
    with explained(url, absence=False):
        filesystem = client(scheme)
        span = {} if length is None else {"start": start, "end": start + length}
        for _ in range(_READINGS):
            before = _version(filesystem.info(path))
            data = filesystem.cat_file(path, **span)
            if _version(filesystem.info(path)) == before:
                return data, before
    raise StorageError(f"{url} is overwritten again and again while it is read: wait until it is written.")


def open_input(url: str, read_ahead: int | None = None) -> IO[bytes]:
    """The object as a file to be read and moved in, without fetching it whole.

    Args:
        read_ahead: bytes that are fetched at a time; what the client library thinks best if None.

    Raises:
        FileNotFoundError, StorageError: as `read_bytes`.
    """
    scheme, path = split(url)
    with explained(url, absence=False):
        return client(scheme).open(path, "rb", **({} if read_ahead is None else {"block_size": read_ahead}))


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole object or nothing: readers see the old bytes or the new ones, never a part.

    An object store replaces atomically by itself; on a local disk the bytes go to a temporary name first.
    """
    scheme, path = split(url)
    with explained(url):
        if scheme != "file":
            client(scheme).pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex}.part")  # hidden from listings, short for any name
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(url: str) -> Any:
    """The JSON document at `url`; FileNotFoundError if there is none, StorageError if it is not JSON."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{url} is not valid JSON ({error}): delete it and run the step that writes it.") from error


def write_json(url: str, document: Any) -> None:
    """Write a JSON document, indented, atomically."""
    write_bytes(url, (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def exists(url: str) -> bool:
    """Whether an object, or anything below a prefix, is there."""
    scheme, path = split(url)
    try:
        with explained(url, absence=False):
            client(scheme).info(path)  # not exists(): that says no where a bucket cannot be reached
    except FileNotFoundError:
        return False
    return True


def list_objects(url: str, *, recursive: bool = True) -> Iterator[StoredObject]:
    """Every object at or below `url`, recursively, sorted by key, with one page of the listing in memory at a time.

    Hidden names (a path part with a leading dot) are left out. An empty prefix lists nothing; a bucket that does not
    exist is an error. An outage in the middle of a listing is waited for, one at its beginning is an error.

    Args:
        url: with a slash at its end, of objects only what is below it; without, also the one of that very name.
        recursive: False leaves out what is below a further slash.
    """
    scheme, path = split(url)
    prefix = f"{scheme}://" if "://" in url else ""
    found = explained_items(url, objects_at(scheme, path, recursive))
    for key, info in found:
        below = key[len(path) :]
        if key.endswith("/") or "/." in below or (not below and url.endswith("/") and scheme != "file"):
            continue
        yield StoredObject(url=prefix + key, size=int(info["size"] or 0), version=_version(info))


@dataclass(frozen=True)
class Level:
    """What lies directly at a prefix.

    Args:
        objects: as `list_objects` gives them.
        folders: URLs of the prefixes that end with the next slash, which is part of them.
    """

    objects: list[StoredObject]
    folders: list[str]


def list_level(url: str, most: int) -> Level | None:
    """What lies directly below a prefix, hidden names left out; no more is asked for than this.

    Returns:
        None if there is more than `most`, or if one of the folders has a name that no URL can have, such as an empty
        one. Then only `list_objects` finds everything.

    Raises:
        StorageError: as `list_objects`.
    """
    scheme, path = split(url)
    base = f"{url.rstrip('/')}/"
    folders: list[str] = []
    objects: list[StoredObject] = []
    for name, found in explained_items(url, entries_at(scheme, path)):
        if len(folders) + len(objects) >= most:
            return None
        if not name.startswith("."):
            if found is not None:
                objects.append(StoredObject(base + name, int(found["size"] or 0), _version(found)))
            elif name.rstrip("/") and not name.endswith("//") and usable_name(base + name):
                folders.append(base + name)
            else:
                return None
    return Level(objects, sorted(folders))


def folder_names(url: str) -> list[str]:
    """Names of the folders directly below a prefix, hidden ones left out, without listing what is in them.

    Raises:
        StorageError: if the store fails; nothing there is no error.
    """
    scheme, path = split(url)
    try:
        with explained(url, absence=False):
            names = [name.rstrip("/") for name, found in entries_at(scheme, path) if found is None]
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name and not name.startswith("."))


def stat(url: str) -> StoredObject:
    """One object as it is now, for telling whether it has changed since it was listed.

    Raises:
        FileNotFoundError: if there is no such object.
        StorageError: if the store cannot say.
    """
    scheme, path = split(url)
    with explained(url, absence=False):
        info = client(scheme).info(path)
    return StoredObject(url=url, size=int(info["size"] or 0), version=_version(info))


def move(source: str, target: str) -> None:
    """Give an object another place in the same store, whole or not at all; something may be at `target`.

    On an object store it is at both places for a moment, and then at `target` alone.

    Raises:
        FileNotFoundError: if there is no such object.
        StorageError: if the store fails.
    """
    (scheme, path), (_, target_path) = split(source), split(target)
    with explained(source, absence=False):
        if scheme == "file":
            Path(target_path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).replace(target_path)
        else:
            client(scheme).cp_file(path, target_path)
            client(scheme).rm_file(path)


def put_if(url: str, data: bytes, version: str | None) -> str | None:
    """Write an object of `s3://` if it has this version, or if there is none, in one step of the store's.

    Returns:
        Its new version; None if it had another one.
    """
    bucket, _, key = split(url)[1].partition("/")
    with explained(url):
        etag = put_object_if(client("s3"), bucket, key, data, version)
    return None if etag is None else _version({"ETag": etag})


def delete(url: str) -> None:
    """Delete an object, or everything below a prefix. Nothing there is no error."""
    scheme, path = split(url)
    with explained(url):
        if scheme != "file":
            filesystem = client(scheme)
            keys = {*filesystem.find(path), path} - {path.partition("/")[0]}
            with ThreadPoolExecutor(DELETED_TOGETHER) as pool:
                list(pool.map(filesystem.rm_file, keys))
        elif Path(path).is_dir() and not Path(path).is_symlink():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def upload_folder(folder: Path, url: str) -> None:
    """Copy every file below a local folder to `url`, each atomically, to an object store several at a time."""
    scheme, _ = split(url)
    if not folder.is_dir():
        raise StorageError(f"There is no folder {folder} to upload: correct the path.")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    places = [join(url, file.relative_to(folder).as_posix()) for file in files]
    if scheme == "file":
        for file, place in zip(files, places, strict=True):
            write_bytes(place, file.read_bytes())
        return
    for start in range(0, len(files), UPLOADED_TOGETHER):
        together = slice(start, start + UPLOADED_TOGETHER)
        pairs = zip(places[together], files[together], strict=True)
        with explained(url):
            client(scheme).pipe({split(place)[1]: file.read_bytes() for place, file in pairs})


def require_bucket(url: str) -> None:
    """Raise StorageError if the bucket of an object-store URL does not exist or cannot be reached."""
    scheme, path = split(url)
    if scheme != "file":
        bucket = path.partition("/")[0]
        with explained(url):
            try:
                client(scheme).info(bucket)
            except FileNotFoundError as error:
                raise no_bucket(url) from error


def _version(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag")
    if etag:
        return str(etag).strip('"')
    modified = info.get("mtime") or info.get("LastModified") or info.get("updated") or 0
    return f"{info['size']}-{modified}"
