"""What a store says when it is asked what lies at a path, page after page. `pipeline.storage` explains what fails."""

import functools
from collections.abc import Iterator
from typing import Any

from pipeline.local_files import folders_in, local_files
from pipeline.s3_requests import first_key, list_page
from pipeline.storage_errors import explained, patiently
from pipeline.store_clients import client


def objects_at(scheme: str, path: str, recursive: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths of objects at or below a path, in order, and what the store says of them."""
    if scheme == "file":
        for file in local_files(path, recursive=recursive):
            yield file.path, {"size": file.size, "mtime": file.mtime}
    elif scheme == "s3":
        bucket, _, key = path.partition("/")
        itself = first_key(client(scheme), bucket, key) if key else None
        if itself and itself["Key"] == key:
            yield path, _s3_info(itself)
        for page in _s3_pages(path, "" if recursive else "/"):
            for item in page.get("Contents", []):
                yield f"{bucket}/{item['Key']}", _s3_info(item)
    else:
        found = client(scheme).find(path, maxdepth=None if recursive else 1, detail=True)
        for key in sorted(found):
            if found[key].get("type") != "directory":
                yield key, found[key]


def entries_at(scheme: str, path: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Names directly below a path; those of folders have a slash at the end, and nothing is said of them."""
    if scheme == "s3":
        key = path.partition("/")[2]
        cut = len(key) + 1 if key else 0
        for page in _s3_pages(path, "/"):
            for item in page.get("CommonPrefixes", []):
                yield item["Prefix"][cut:], None
            for item in page.get("Contents", []):
                if item["Key"][cut:]:
                    yield item["Key"][cut:], _s3_info(item)
    elif scheme == "file":
        for folder in folders_in(path):
            yield f"{folder[len(path) :].lstrip('/')}/", None
        for found, info in objects_at(scheme, path, False):
            if found != path:
                yield found[len(path) :].lstrip("/"), info
    else:
        for info in client(scheme).ls(path, detail=True):
            name = info["name"][len(path) + 1 :]
            if name.rstrip("/"):
                yield (f"{name.rstrip('/')}/", None) if info["type"] == "directory" else (name, info)


def _s3_pages(path: str, delimiter: str) -> Iterator[dict[str, Any]]:
    """The pages of a listing of what is below a path; for all but the first, an outage is waited for."""
    bucket, _, key = path.partition("/")
    request: dict[str, Any] = {"prefix": f"{key}/" if key else "", "delimiter": delimiter}
    page = list_page(client("s3"), bucket, **request)
    yield page
    while page.get("IsTruncated"):
        token = page["NextContinuationToken"]
        page = patiently(functools.partial(_next_page, bucket, request, token))
        yield page


def _next_page(bucket: str, request: dict[str, Any], token: str) -> dict[str, Any]:
    with explained(f"s3://{bucket}/{request['prefix']}"):
        return list_page(client("s3"), bucket, **request, token=token)


def _s3_info(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "size": item["Size"]}
