"""Names of places: URLs and paths, taken apart, put together, and refused. Asks no store anything.

A place is `s3://bucket/key`, `gs://bucket/key`, `file:///path` or a plain path. Keys are taken literally: `%`, `#`,
`?`, `+` and blanks are part of the name and are never decoded.
"""

import os
import re
from pathlib import Path

from pipeline.redaction import redacted
from pipeline.storage_errors import StorageError

SCHEMES = ("s3", "gs", "file")

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # the last are what Python makes of bytes that are no UTF-8


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
