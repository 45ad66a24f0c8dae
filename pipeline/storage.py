"""URL to filesystem, atomic writes, listing with versions: the only module that knows one store from another.

A place is `s3://bucket/key`, `gs://bucket/key`, `file:///path` or a plain path. Keys are taken literally: `%`, `#`,
`?`, `+` and blanks are part of the name and are never decoded.

What is read in parts (Parquet) and what Ray stores itself (checkpoints) goes through pyarrow's filesystems
(`arrow_filesystem`), which Ray retries best. Whole objects (images, files written in one step) and listings with ETags
go through fsspec. Credentials and endpoints come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...) or
the cloud's identity.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any

import fsspec
import pyarrow.fs as arrow_fs
from fsspec.asyn import sync

from pipeline.errors import PipelineError
from pipeline.redaction import redacted
from pipeline.storage_errors import StorageError, explanation, no_bucket

SCHEMES = ("s3", "gs", "file")
UPLOADED_TOGETHER = 32  # files that upload_folder holds in memory
NOTHING_THERE = (errno.ENOENT, errno.ELOOP)  # the latter of links that lead to each other

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # the last are what Python makes of bytes that are no UTF-8


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
        StorageError: for a scheme that is not supported, a URL without a bucket or with credentials in it, a name that
            a store's client library would take for another, or an empty URL.
    """
    if not url:
        raise StorageError("An empty URL was given: name a place like s3://bucket/prefix or a folder.")
    _refuse_misread_names(url)
    scheme, separator, path = url.partition("://")
    if not separator:
        before_colon, colon, _ = url.partition(":")
        if colon and before_colon in SCHEMES:
            raise StorageError(f"{redacted(url)} lacks a slash: write {before_colon}:// before the place.")
        return "file", os.path.abspath(Path(url).expanduser())  # noqa: PTH100 - resolve() would follow links
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(f"{redacted(url)} has the unknown scheme {scheme}://: use {known} or a plain path.")
    if scheme == "file":
        if not path.startswith("/"):
            raise StorageError(f"{url} has a host or a relative path: write file:///absolute/path.")
        return scheme, os.path.abspath(path)  # noqa: PTH100
    if redacted(url) != url:
        raise StorageError(f"{redacted(url)} carries credentials: remove them and set them in the environment instead.")
    bucket = path.partition("/")[0]
    if not bucket:
        raise StorageError(f"{url} names no bucket: write {scheme}://bucket/prefix.")
    if not _BUCKET.fullmatch(bucket):
        raise StorageError(
            f"{url}: {bucket!r} cannot be a bucket's name: use letters, digits, dots, dashes and underscores only."
        )
    return scheme, path.rstrip("/")


def _refuse_misread_names(url: str) -> None:
    found = _UNUSABLE.search(url)
    if found:
        what = "bytes that are not UTF-8" if found.group() > "\x7f" else "a control character"
        raise StorageError(f"{redacted(url)!r} has {what} in its name: rename it.")
    if "?versionId=" in url and "://" in url:  # s3fs drops this and all that follows: another object's name
        raise StorageError(f"{redacted(url)} names a version: name the object alone, without ?versionId=.")


def usable_name(url: str) -> bool:
    """Whether the name of a listed object can be read and written down; `split` says of others why not."""
    try:
        _refuse_misread_names(url)
    except StorageError:
        return False
    return True


def printable(url: str) -> str:
    """A name with what makes it unusable written as an escape."""
    return _UNUSABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), url)


def join(url: str, *parts: str) -> str:
    """The place `parts` below `url`; a part that begins with a slash is below it, too."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


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
        return _fsspec(scheme).cat_file(path, **options)


def open_input(url: str) -> IO[bytes]:
    """The object as a file to be read and moved in, without fetching it whole.

    Raises:
        FileNotFoundError, StorageError: as `read_bytes`.
    """
    scheme, path = split(url)
    with explained(url, absence=False):
        return _fsspec(scheme).open(path, "rb")


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole object or nothing: readers see the old bytes or the new ones, never a part.

    An object store replaces atomically by itself; on a local disk the bytes go to a temporary name first.
    """
    scheme, path = split(url)
    with explained(url):
        if scheme != "file":
            _fsspec(scheme).pipe_file(path, data)
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
            _fsspec(scheme).info(path)  # not exists(): that says no where a bucket cannot be reached
    except FileNotFoundError:
        return False
    return True


def list_objects(url: str) -> Iterator[StoredObject]:
    """Every object at or below `url`, recursively, sorted by key.

    Hidden names (a path part with a leading dot) are left out. An empty prefix lists nothing; a bucket that does not
    exist is an error.
    """
    scheme, path = split(url)
    with explained(url):
        found = _local_files(path) if scheme == "file" else _fsspec(scheme).find(path, detail=True)
    prefix = f"{scheme}://" if "://" in url else ""
    for key in sorted(found):
        info = found[key]
        below = key[len(path) :]
        if info.get("type") == "directory" or key.endswith("/") or "/." in below:
            continue
        yield StoredObject(url=prefix + key, size=int(info["size"] or 0), version=_version(info))


def _local_files(path: str, within: frozenset[tuple[int, int]] = frozenset()) -> dict[str, dict[str, Any]]:
    """Size and modification time of every file at or below a local path, hidden ones and their folders left out.

    Links are followed, as an object store knows none; fsspec's own listing gives the link's time and not the file's,
    and passes over folders that it may not read. `within` holds the folders above, so that a link to one of them ends.
    """
    place = Path(path)
    try:
        status = place.stat()
    except OSError as error:
        if error.errno not in NOTHING_THERE:
            raise
        # A link to nothing is listed, so that whoever reads it learns of it; what was just deleted is not.
        return {path: {"size": 0, "mtime": place.lstat().st_mtime}} if place.is_symlink() else {}
    if S_ISREG(status.st_mode):
        return {path: {"size": status.st_size, "mtime": status.st_mtime}}
    identity = (status.st_dev, status.st_ino)
    if not S_ISDIR(status.st_mode) or identity in within:
        return {}
    found = {}
    for below in place.iterdir():
        if not below.name.startswith("."):
            found.update(_local_files(str(below), within | {identity}))
    return found


def stat(url: str) -> StoredObject:
    """One object as it is now, for telling whether it has changed since it was listed.

    Raises:
        FileNotFoundError: if there is no such object.
        StorageError: if the store cannot say.
    """
    scheme, path = split(url)
    with explained(url, absence=False):
        info = _fsspec(scheme).info(path)
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
            _fsspec(scheme).cp_file(path, target_path)
            _fsspec(scheme).rm_file(path)


@dataclass(frozen=True)
class Document:
    """A small object that several processes may change, as it was read or written.

    Args:
        data: its bytes.
        tag: by which the store knows this state of it from any other.
    """

    data: bytes
    tag: str


class Conflict(StorageError):
    """Another process has changed a document in the meantime."""


def read_document(url: str) -> Document | None:
    """A document to be changed by `compare_and_swap`; None where there is none."""
    scheme, path = split(url)
    try:
        with explained(url, absence=False):
            if scheme == "s3":
                bucket, _, key = path.partition("/")
                answer = _fsspec(scheme).call_s3("get_object", Bucket=bucket, Key=key)
                body: Any = sync(_fsspec(scheme).loop, answer["Body"].read)
                return Document(body, answer["ETag"])
            data = _fsspec(scheme).cat_file(path)
    except FileNotFoundError:
        return None
    return Document(data, hashlib.sha256(data).hexdigest())


def compare_and_swap(url: str, data: bytes, expected: Document | None) -> Document:
    """Write a document if it is still as it was read, in one step of the store's.

    On a local disk that step is made by a lock beside the file. `gs://` has none here: what another process writes in
    the moment between looking and writing is lost.

    Args:
        data: what is written; must be unlike every earlier state, so that each has a tag of its own.
        expected: what `read_document` or the last `compare_and_swap` returned; None if there is to be none yet.

    Returns:
        The document as it is now.

    Raises:
        Conflict: if it is not as expected any more.
        StorageError: if the store fails.
    """
    scheme, path = split(url)
    if scheme == "s3":
        return _swapped_on_s3(url, data, expected)
    with explained(url), _document_lock(path) if scheme == "file" else contextlib.nullcontext():
        if read_document(url) != expected:
            raise Conflict(f"{url} has been changed by another process.")
        write_bytes(url, data)
    return Document(data, hashlib.sha256(data).hexdigest())


def _swapped_on_s3(url: str, data: bytes, expected: Document | None) -> Document:
    bucket, _, key = split(url)[1].partition("/")
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected.tag}
    with explained(url):
        try:
            answer = _fsspec("s3").call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if code not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise
            now = read_document(url)
            if (
                now is None or now.data != data
            ):  # else an earlier attempt of the client's has had no answer, but an effect
                raise Conflict(f"{url} has been changed by another process.") from error
            return now
    return Document(data, answer["ETag"])


@contextlib.contextmanager
def _document_lock(path: str) -> Iterator[None]:
    """Keep other processes of this disk from changing a document; the system frees it when the process ends."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def delete(url: str) -> None:
    """Delete an object, or everything below a prefix. Nothing there is no error."""
    scheme, path = split(url)
    with explained(url):
        if scheme != "file":
            filesystem = _fsspec(scheme)
            for key in {*filesystem.find(path), path} - {path.partition("/")[0]}:
                filesystem.rm_file(key)
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
            _fsspec(scheme).pipe({split(place)[1]: file.read_bytes() for place, file in pairs})


def require_bucket(url: str) -> None:
    """Raise StorageError if the bucket of an object-store URL does not exist or cannot be reached."""
    scheme, path = split(url)
    if scheme != "file":
        bucket = path.partition("/")[0]
        with explained(url):
            try:
                _fsspec(scheme).info(bucket)
            except FileNotFoundError as error:
                raise no_bucket(url) from error


def _fsspec(scheme: str) -> Any:
    # fsspec and s3fs keep the client that they first made. Another endpoint or identity in the environment, and another
    # process after a fork, need another one.
    environment = frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))
    return _client(scheme, environment, os.getpid())


@functools.lru_cache(maxsize=8)
def _client(scheme: str, environment: frozenset[tuple[str, str]], process: int) -> Any:  # noqa: ARG001 - cache keys
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise StorageError(f"{scheme}:// needs a package that is not installed: {error}") from error


def _version(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag")
    if etag:
        return str(etag).strip('"')
    modified = info.get("mtime") or info.get("LastModified") or info.get("updated") or 0
    return f"{info['size']}-{modified}"


@contextlib.contextmanager
def explained(url: str, *, absence: bool = True) -> Iterator[None]:
    """A `with` block whose errors become a StorageError; that nothing is there only if `absence` is to be explained."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        nothing_there = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in NOTHING_THERE
        if nothing_there and not absence:
            raise FileNotFoundError(f"{url} does not exist") from error
        raise explanation(url, error) from error
