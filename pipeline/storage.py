"""URL to filesystem, atomic writes, listing with versions: the only module that knows one store from another.

A place is `s3://bucket/key`, `gs://bucket/key`, `file:///path` or a plain path. Keys are taken literally: `%`, `#`,
`?`, `+` and blanks are part of the name and are never decoded.

Bulk bytes (Parquet, checkpoints) go through pyarrow's filesystems (`arrow_filesystem`), which Ray retries best. Small
control files and listings with ETags go through fsspec. Credentials and endpoints come from the environment
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...) or the cloud's identity.
"""

import contextlib
import errno
import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs as arrow_fs

from pipeline.errors import PipelineError

SCHEMES = ("s3", "gs", "file")


class StorageError(PipelineError):
    """A place that cannot be reached, read or written, with what to do about it."""


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


def split(url: str) -> tuple[str, str]:
    """The scheme and the path of a URL; the scheme of a plain path is `file`, and its path is made absolute.

    Raises:
        StorageError: for a scheme that is not supported, a URL without a bucket, or an empty URL.
    """
    if not url:
        raise StorageError("An empty URL was given: name a place like s3://bucket/prefix or a folder.")
    scheme, separator, path = url.partition("://")
    if not separator:
        return "file", os.path.abspath(Path(url).expanduser())  # noqa: PTH100 - resolve() would follow links
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(f"{redacted(url)} has the unknown scheme {scheme}://: use {known} or a plain path.")
    if scheme == "file":
        if not path.startswith("/"):
            raise StorageError(f"{url} has a host or a relative path: write file:///absolute/path.")
        return scheme, path
    if "@" in path.partition("/")[0]:
        raise StorageError(f"{redacted(url)} carries credentials: remove them and set them in the environment instead.")
    path = path.strip("/")
    if not path:
        raise StorageError(f"{url} names no bucket: write {scheme}://bucket/prefix.")
    return scheme, path


def redacted(url: str) -> str:
    """The URL without user name and password, fit for a log or a record."""
    return re.sub(r"://[^/@]*@", "://***@", url)


def join(url: str, *parts: str) -> str:
    """The place `parts` below `url`."""
    return posixpath.join(url.rstrip("/") or "/", *parts)


def absolute(url: str) -> str:
    """The same place in the form that stays valid in another working folder; URLs are returned as they are."""
    scheme, path = split(url)
    return path if scheme == "file" else f"{scheme}://{path}"


def arrow_filesystem(url: str) -> tuple[arrow_fs.FileSystem, str]:
    """The pyarrow filesystem of a URL and the path in it, for Parquet, checkpoints and Ray's `storage_filesystem`."""
    scheme, path = split(url)
    if scheme == "file":
        return arrow_fs.LocalFileSystem(), path
    bucket = path.partition("/")[0]
    with _explained(url):
        filesystem, _ = arrow_fs.FileSystem.from_uri(f"{scheme}://{bucket}")
    return filesystem, path


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: if there is no such object, so that callers can tell absence from failure.
        StorageError: for everything else that keeps it from being read.
    """
    scheme, path = split(url)
    try:
        return _fsspec(scheme).cat_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} does not exist") from error
    except Exception as error:
        raise _explanation(url, error) from error


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole object or nothing: readers see the old bytes or the new ones, never a part.

    An object store replaces atomically by itself; on a local disk the bytes go to a temporary name first.
    """
    scheme, path = split(url)
    with _explained(url):
        if scheme != "file":
            _fsspec(scheme).pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
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
    with _explained(url):
        return bool(_fsspec(scheme).exists(path))


def list_objects(url: str) -> Iterator[StoredObject]:
    """Every object at or below `url`, recursively, sorted by key.

    Hidden names (a path part with a leading dot) are left out. An empty prefix lists nothing; a bucket that does not
    exist is an error.
    """
    scheme, path = split(url)
    filesystem = _fsspec(scheme)
    with _explained(url):
        found = filesystem.find(path, detail=True)
    prefix = "" if scheme == "file" else f"{scheme}://"
    for key in sorted(found):
        info = found[key]
        below = key[len(path) :]
        if info.get("type") == "directory" or key.endswith("/") or "/." in below:
            continue
        yield StoredObject(url=prefix + key, size=int(info["size"] or 0), version=_version(info))


def stat(url: str) -> StoredObject:
    """One object as it is now, for telling whether it has changed since it was listed.

    Raises:
        FileNotFoundError: if there is no such object.
        StorageError: if the store cannot say.
    """
    scheme, path = split(url)
    try:
        info = _fsspec(scheme).info(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} does not exist") from error
    except Exception as error:
        raise _explanation(url, error) from error
    return StoredObject(url=url, size=int(info["size"] or 0), version=_version(info))


def delete(url: str) -> None:
    """Delete an object, or everything below a prefix. Nothing there is no error."""
    scheme, path = split(url)
    filesystem = _fsspec(scheme)
    with _explained(url):
        if scheme == "file":
            if Path(path).exists():
                filesystem.rm(path, recursive=True)
            return
        for key in filesystem.find(path):
            filesystem.rm_file(key)


def upload_folder(folder: Path, url: str) -> None:
    """Copy every file below a local folder to `url`, each atomically."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            write_bytes(join(url, file.relative_to(folder).as_posix()), file.read_bytes())


def require_bucket(url: str) -> None:
    """Raise StorageError if the bucket of an object-store URL does not exist or cannot be reached."""
    scheme, path = split(url)
    if scheme != "file":
        bucket = path.partition("/")[0]
        with _explained(url):
            _fsspec(scheme).ls(bucket)


def _fsspec(scheme: str) -> Any:
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise StorageError(f"{scheme}:// needs a package that is not installed: {error}") from error


def _version(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag")
    if etag:
        return str(etag).strip('"')
    modified = info.get("mtime") or info.get("LastModified") or info.get("updated") or 0
    return f"{info['size']}-{modified}"


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        raise _explanation(url, error) from error


def _explanation(url: str, error: Exception) -> StorageError:
    """The one sentence for a failure of a store's client library, whose classes differ by store and by layer."""
    place, text, kind = redacted(url), str(error), type(error).__name__
    bucket = split(url)[1].partition("/")[0]
    if "bucket does not exist" in text or "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return StorageError(f"{place}: there is no bucket named {bucket}: create it, or correct the name.")
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{place} does not exist: correct the URL, or run the step that writes it.")
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionError") or "NETWORK_CONNECTION" in text:
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "the store's default endpoint")
        return StorageError(f"{place}: no connection to {redacted(endpoint)}: check AWS_ENDPOINT_URL and the network.")
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(
            f"{place}: no credentials found: set them in the environment or give the machine an identity."
        )
    if isinstance(error, PermissionError) or "ACCESS_DENIED" in text:
        return StorageError(
            f"{place}: access denied: check the credentials in the environment and the bucket's policy."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(f"{place}: no space left on the device: free some, or choose another place.")
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return StorageError(
            f"{place}: a file and a folder of the same name are in each other's way: choose another place."
        )
    return StorageError(f"{place}: {kind}: {' '.join(text.split())[:300]}")
