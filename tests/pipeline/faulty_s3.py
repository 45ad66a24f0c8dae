"""A proxy before an S3 server that fails as stores and networks do, to see who bears it."""

import fnmatch
import http.client
import os
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET

LISTING = "(listing)"  # in place of a key
OUTAGE = ("*", "down")
SLOW_SECONDS = 1.0
FOREVER = 10**9

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_NO_SUCH_KEY = b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>"


@dataclass
class Fault:
    """What befalls the requests for a key; each kind is over when its number is used up.

    Args:
        slow_down: the next so many are answered with 503 SlowDown.
        reset: of the next so many answers with a body, half is sent, and then the connection reset.
        cut: of the next so many answers with a body, half is sent, and then the connection closed.
        slow: the next so many are answered after `SLOW_SECONDS`.
        gone: the next so many are answered with 404.
    """

    slow_down: int = 0
    reset: int = 0
    cut: int = 0
    slow: int = 0
    gone: int = 0


@dataclass(frozen=True)
class FaultyS3:
    """A running proxy.

    Args:
        endpoint: its URL.
        faults: by pattern of `bucket/key`, or `LISTING` for listings.
        happened: how often each (pattern, kind of fault) has befallen a request, and under `OUTAGE` how many were
            refused while it was down.
        served: bytes of the bodies that were sent, by `bucket/key`.
        requests: how many there were, by method and `bucket/key`, as in `GET bucket/key`.
        down: while it is set, every request is answered with 503.
    """

    endpoint: str
    faults: Mapping[str, Fault]
    happened: Counter[tuple[str, str]]
    served: Counter[str]
    requests: Counter[str]
    down: threading.Event

    def unused(self) -> set[tuple[str, str]]:
        """Faults that have befallen nothing: what was tested without them."""
        kinds = {
            (pattern, kind.name)
            for pattern, fault in self.faults.items()
            for kind in fields(Fault)
            if getattr(fault, kind.name)
        }
        return {one for one in kinds if not self.happened[one]}


@contextmanager
def faulty_s3(server: str, faults: Mapping[str, Fault]) -> Iterator[FaultyS3]:
    """A proxy on 127.0.0.1 before the server at a URL, for the time of a `with` block."""
    left = {
        (pattern, kind.name): getattr(fault, kind.name) for pattern, fault in faults.items() for kind in fields(Fault)
    }
    happened = Counter[tuple[str, str]]()
    lock = threading.Lock()

    def strikes(key: str, kind: str) -> bool:
        with lock:
            for pattern in faults:
                if left[pattern, kind] > happened[pattern, kind] and fnmatch.fnmatchcase(key, pattern):
                    happened[pattern, kind] += 1
                    return True
        return False

    served, requests = Counter[str](), Counter[str]()
    down = threading.Event()

    class Handler(_Handler):
        upstream = urllib.parse.urlsplit(server).netloc

        def count(self, content: bytes) -> None:
            with lock:
                served[self.key] += len(content)

        def is_down(self) -> bool:
            with lock:
                requests[f"{self.command} {self.key}"] += 1
                happened[OUTAGE] += down.is_set()
            return down.is_set()

        def strikes(self, kind: str) -> bool:
            return strikes(self.key, kind)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield FaultyS3(f"http://127.0.0.1:{proxy.server_port}", faults, happened, served, requests, down)
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str

    def strikes(self, kind: str) -> bool:
        """Whether a fault of this kind befalls the request, which counts it."""
        raise NotImplementedError

    def count(self, content: bytes) -> None:
        """Remember how much of an object was sent."""
        raise NotImplementedError

    def is_down(self) -> bool:
        """Whether nothing is answered now."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        path, _, query = self.path.partition("?")
        return LISTING if "list-type=" in query else urllib.parse.unquote(path).lstrip("/")

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.is_down() or self.strikes("slow_down"):
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        if self.strikes("gone"):
            self._answer(404, {"Content-Type": "application/xml"}, _NO_SUCH_KEY)
            return
        if self.strikes("slow"):
            time.sleep(SLOW_SECONDS)
        connection = http.client.HTTPConnection(self.upstream)
        try:
            connection.request(self.command, self.path, content, dict(self.headers))
            response = connection.getresponse()
            body = response.read()
            self.count(body)
            self._answer(response.status, dict(response.headers), body)
        finally:
            connection.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - names that the base class looks for

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        half = content[: len(content) // 2]
        resets = bool(half) and status < 300 and self.strikes("reset")
        cuts = bool(half) and status < 300 and not resets and self.strikes("cut")
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(half if resets or cuts else content)
        self.close_connection = resets or cuts
        if resets:
            time.sleep(0.05)  # a reset overtakes what was sent just before it
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # a mere close() would wait for the files that are open on it
