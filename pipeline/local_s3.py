"""An S3 server on this machine that lasts as long as a `with` block, with a folder in which its objects outlive it.

For the demo and the tests: the same code and the same `s3://` URLs as on a cluster, without an account anywhere. Knows
nothing of datasets, models or Ray.
"""

import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.bucket_mirror import BucketMirror
from pipeline.errors import PipelineError

ACCESS_KEY, SECRET_KEY, REGION = "local", "local-secret", "us-east-1"
START_SECONDS = 60.0
STOP_SECONDS = 5.0
LOCK_FILE = ".lock"

_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

# moto's server as `python -m moto.server` runs it, but for two things: the system chooses the port, so that no other
# process can take it in between, and the server ends when its input does, which is when its parent ends, however.
_SERVER = """
import logging, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
application = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", int(sys.argv[1]), application, threaded=True, request_handler=MotoRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.port, flush=True)
sys.stdin.read()
"""

_log = logging.getLogger(__name__)


class LocalS3(AbstractContextManager["LocalS3"]):
    """A `with` block in which `s3://` URLs mean a server of our own on 127.0.0.1, found through the environment.

    The server (moto) keeps its objects in memory. `folder` is their mirror: what lies at `folder/<bucket>/<key>` is
    there from the start, and `save` or leaving the block, by an exception too, writes back what has changed. Bytes and
    ETags survive. A process that is killed loses what it has not saved; its server ends with it.

    Inside the block every other `AWS_*` variable is set aside, so that no profile, endpoint or certificate of the
    machine gets in the way; at its end they are as before. Ray reads the environment when it starts: start it inside.

    Args:
        folder: mirror of the buckets; made if it is not there. One server at a time may have it.
        port: 0 for any free one.

    Attributes:
        endpoint: URL of the server, once it runs.
        pid: id of its process.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.port = Path(folder).absolute(), port
        self.endpoint, self.pid = "", 0
        self._resources = ExitStack()
        self._server: _Server
        self._client: Any
        self._mirror: BucketMirror

    def __enter__(self) -> "LocalS3":
        """Start the server and fill it.

        Raises:
            PipelineError: if moto is not installed, the port is taken, the server does not start, another one has the
                folder, or something in the folder cannot be a bucket or an object.
        """
        with ExitStack() as resources:
            resources.enter_context(_locked(self.folder))
            self._server = resources.enter_context(_serving(self.port))
            self.endpoint, self.pid = self._server.endpoint, self._server.pid
            resources.enter_context(_environment(self.endpoint))
            config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
            self._client = botocore.session.get_session().create_client("s3", config=config)
            self._mirror = BucketMirror(self.folder, self._client)
            with self._explained():
                for item in self.folder.iterdir():
                    if item.is_dir() and not item.name.startswith("."):
                        _require_bucket_name(item.name, f"the folder {item}")
                self._mirror.load()
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._resources:
            try:
                self.save()
            except PipelineError as failure:
                if error is None:
                    raise
                _log.warning("%s", failure)  # what ended the block matters more

    def create_bucket(self, name: str) -> None:
        """Make a bucket, or leave the one that is there as it is.

        Raises:
            PipelineError: for a name that S3 does not allow.
        """
        _require_bucket_name(name, repr(name))
        with self._explained():
            self._client.create_bucket(Bucket=name)

    def save(self) -> None:
        """Bring the folder up to date: write new and changed objects, remove deleted ones. Costs little if few have.

        Raises:
            PipelineError: if the server has died, the disk is full, or a key cannot be a file's name; in the last case
                everything else is saved.
        """
        with self._explained():
            self._mirror.save()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the server and of the disk as one sentence."""
        try:
            yield
        except BotoCoreError as error:
            last = self._server.last_output()
            raise PipelineError(
                f"The local S3 server at {self.endpoint} does not answer{': ' + last if last else ''}: start it again "
                f"with the same folder; what was saved is in {self.folder}."
            ) from error
        except ClientError as error:
            raise PipelineError(f"The local S3 server at {self.endpoint} refuses: {error}.") from error
        except OSError as error:
            raise _disk_failure(self.folder, error) from error


@dataclass(frozen=True)
class _Server:
    endpoint: str
    pid: int
    output: IO[bytes]

    def last_output(self) -> str:
        """The last lines that the server wrote, as one."""
        return _tail(self.output)


@contextlib.contextmanager
def _serving(port: int) -> Iterator[_Server]:
    """The server as a child process, which is stopped at the end of the block."""
    if importlib.util.find_spec("moto") is None:
        raise PipelineError("The local S3 server needs the package moto: pip install '.[pipeline,dev]'.")
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVER, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # a Ctrl-C at the terminal is not for the server, which is needed for saving
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
            chosen = process.stdout.readline().strip() if ready else b""
            if not chosen:
                raise PipelineError(f"The local S3 server did not start: {_start_failure(port, bool(ready), output)}")
            yield _Server(f"http://127.0.0.1:{int(chosen)}", process.pid, output)
        finally:
            try:
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            finally:
                process.kill()


def _start_failure(port: int, ended: bool, output: IO[bytes]) -> str:
    said = _tail(output)
    if not ended:
        return (
            f"no answer within {START_SECONDS:.0f} seconds: try again when the machine has less to do. {said}".strip()
        )
    if "in use" in said:
        return f"port {port} is in use: choose another, or 0 for any free one."
    return (
        f"{said or 'it ended without a word'}: pip install '.[pipeline,dev]' mends an installation that is incomplete."
    )


def _tail(output: IO[bytes]) -> str:
    start = max(0, os.fstat(output.fileno()).st_size - 4096)
    lines = (
        os.pread(output.fileno(), 4096, start).decode(errors="replace").splitlines()
    )  # no seek: the server shares it
    return " ".join(line.strip() for line in lines[-6:] if line.strip())[-500:]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep the folder for this process; the system gives it back when the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("wb")
    except OSError as error:
        raise _disk_failure(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PipelineError(
                f"Another local S3 server has the folder {folder}: wait for its end, or use another folder."
            ) from error
        yield


def _disk_failure(folder: Path, error: OSError) -> PipelineError:
    return PipelineError(
        f"{error.filename or folder}: {error.strerror or error}: the local S3 server keeps its objects in {folder}: "
        "make room or mend the permissions there, or use another folder."
    )


def _require_bucket_name(name: str, what: str) -> None:
    if not _BUCKET_NAME.fullmatch(name):
        raise PipelineError(
            f"{what} cannot be a bucket: use 3 to 63 lower-case letters, digits, dots and dashes, with a letter or a "
            "digit at both ends."
        )


@contextlib.contextmanager
def _environment(endpoint: str) -> Iterator[None]:
    """The variables by which botocore, s3fs, pyarrow and Ray's workers find the server; at the end all is as before."""
    before = {name: value for name, value in os.environ.items() if _concerns_s3(name)}
    bypassed = before.get("no_proxy") or before.get("NO_PROXY")
    no_proxy = f"{bypassed},127.0.0.1" if bypassed else "127.0.0.1"
    _set_environment(
        {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_CONFIG_FILE": os.devnull,  # instead of ~/.aws/config, which may name another endpoint
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }
    )
    try:
        yield
    finally:
        _set_environment(before)


def _concerns_s3(name: str) -> bool:
    return name.startswith("AWS_") or name in ("NO_PROXY", "no_proxy")


def _set_environment(variables: dict[str, str]) -> None:
    for name in [name for name in os.environ if _concerns_s3(name)]:
        del os.environ[name]
    os.environ.update(variables)
