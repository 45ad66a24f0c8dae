"""A bucket of any number of synthetic objects, which exist only in answers to ListObjectsV2: to list more than one has.

    with endless_s3(objects=10_000_000, folders=100) as bucket:
        storage.list_objects(bucket.url)

The server is a process of its own, so that it takes no memory, and no interpreter's lock, from what is measured. An
answer is a page that was made before, with another folder and number put in.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

PAGE = 1000  # keys, as S3 gives them
BUCKET = "synthetic"

_FOLDER, _PAGE = b"@F@", b"@PAG@"
_HEAD = (
    b'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<Name>synthetic</Name>"
)
_END = b"</ListBucketResult>"
_OBJECT = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;{etag}&quot;</ETag><Size>123456</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


@dataclass(frozen=True)
class EndlessS3:
    """A running server.

    Args:
        endpoint: its URL.
        url: of the bucket, `s3://synthetic`, whose keys are like `007/00001234.jpg`.
    """

    endpoint: str
    url: str = f"s3://{BUCKET}"


def key_of(folder: int, number: int) -> str:
    """The key of an object."""
    return f"{folder:03}/{number:08}.jpg"


def etag_of(folder: int, number: int) -> str:
    """Its ETag, always the same."""
    return f"{0:021}{folder:03}{number:08}"


@contextlib.contextmanager
def endless_s3(objects: int, folders: int = 100) -> Iterator[EndlessS3]:
    """A bucket with so many objects, spread evenly over folders; `s3://` means this server inside the `with` block.

    Args:
        objects: divisible by `folders`.
        folders: at most 1000.
    """
    command = [sys.executable, __file__, str(objects // folders), str(folders)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with mock.patch.dict(os.environ, environment):
            yield EndlessS3(endpoint)
    finally:
        server.stdin.close()  # which ends it
        server.wait()


class _Pages:
    """The answers of a bucket with `folders` folders of `each` objects."""

    def __init__(self, each: int, folders: int) -> None:
        self.each, self.folders = each, folders
        self._page = "".join(
            _OBJECT.format(
                key=f"{_FOLDER.decode()}/{_PAGE.decode()}{number:03}.jpg",
                etag=f"{0:021}{_FOLDER.decode()}{_PAGE.decode()}{number:03}",
            )
            for number in range(PAGE)
        ).encode()
        self._length = len(self._page) // PAGE

    def answer(self, query: dict[str, str]) -> bytes:
        """To a request for a listing; a token is the folder and the page in it that come next."""
        prefix, most = query.get("prefix", ""), int(query.get("max-keys", PAGE))
        if query.get("delimiter") and "/" not in prefix:
            names = [name for name in (f"{folder:03}/" for folder in range(self.folders)) if name.startswith(prefix)]
            shared = "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in names).encode()
            return self._list(shared, len(names), None)
        if self.has(prefix):
            return self._list(self._contents(int(prefix[:3]), int(prefix[4:12]), 1), 1, None)
        wanted = [folder for folder in range(self.folders) if f"{folder:03}/".startswith(prefix)]
        if not wanted:
            return self._list(b"", 0, None)
        folder, page = map(int, query.get("continuation-token", f"{wanted[0]} 0").split())
        count = min(PAGE, most, self.each - page * PAGE)
        contents = self._contents(folder, page * PAGE, count)
        if (page + 1) * PAGE < self.each:
            following = f"{folder} {page + 1}"
        else:
            following = f"{folder + 1} 0" if folder < wanted[-1] else None
        return self._list(contents, count, following)

    def has(self, key: str) -> bool:
        """Whether there is an object of this name."""
        found = re.fullmatch(r"(\d{3})/(\d{8})\.jpg", key)
        return found is not None and int(found[1]) < self.folders and int(found[2]) < self.each

    def _contents(self, folder: int, first: int, count: int) -> bytes:
        page, start = divmod(first, PAGE)
        part = self._page[start * self._length : (start + count) * self._length]
        return part.replace(_FOLDER, b"%03d" % folder).replace(_PAGE, b"%05d" % page)

    def _list(self, contents: bytes, count: int, following: str | None) -> bytes:
        token = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
        end = f"<IsTruncated>{'true' if following else 'false'}</IsTruncated><KeyCount>{count}</KeyCount>{token}"
        return _HEAD + end.encode() + contents + _END


def _serve(each: int, folders: int) -> None:
    pages = _Pages(each, folders)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 2**20  # headers and body in one packet

        def do_GET(self) -> None:
            query = dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))
            if query.get("list-type") == "2" and self.path.startswith(f"/{BUCKET}?"):
                self._answer(200, pages.answer(query))
            else:
                self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>only a listing</Message></Error>")

        def do_HEAD(self) -> None:
            bucket, _, key = self.path.lstrip("/").partition("/")
            self._answer(200 if bucket == BUCKET and (not key or pages.has(key)) else 404, b"")

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        print(server.server_port, flush=True)
        sys.stdin.read()  # until whoever started this ends, however
        server.shutdown()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
