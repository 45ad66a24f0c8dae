"""The local S3 server: found through the environment, mirrored in a folder, and gone at the end, whatever ends it."""

import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.local_s3 import LocalS3

MEBIBYTE = 2**20

HOLDS_A_SERVER = """
import sys, time
from pathlib import Path
from pipeline import storage
from pipeline.local_s3 import LocalS3

with LocalS3(Path(sys.argv[1])) as s3:
    s3.create_bucket("data")
    storage.write_bytes("s3://data/early", b"early")
    s3.save()
    storage.write_bytes("s3://data/late", b"late")
    print(s3.endpoint, flush=True)
    time.sleep(600)
"""


def listing() -> dict[str, str]:
    return {item.url: item.version for item in storage.list_objects("s3://data")}


def answers(endpoint: str) -> bool:
    host, _, port = endpoint.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


def ends(endpoint: str, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while answers(endpoint):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """One server for the tests that need no restart."""
    with LocalS3(tmp_path_factory.mktemp("shared")) as s3:
        s3.create_bucket("data")
        yield s3


@pytest.fixture
def client(shared: LocalS3) -> Any:  # noqa: ARG001 - it finds the server through the environment
    """For keys that `storage` refuses."""
    return botocore.session.get_session().create_client("s3")


def test_it_is_found_whatever_the_machine_has_configured_and_leaves_the_environment_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "somebody-else")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle.pem")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "expired")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "intranet")
    before = dict(os.environ)
    with LocalS3(tmp_path) as s3:
        s3.create_bucket("data")
        storage.write_bytes("s3://data/fsspec", b"1")
        filesystem, path = storage.arrow_filesystem("s3://data/arrow")
        with filesystem.open_output_stream(path) as file:
            file.write(b"2")
        assert storage.read_bytes("s3://data/arrow") == b"2"
        assert os.environ["no_proxy"] == "intranet,127.0.0.1"
    assert dict(os.environ) == before
    assert not answers(s3.endpoint)
    assert (tmp_path / "data/fsspec").read_bytes() == b"1"


def test_a_restart_keeps_contents_and_etags(tmp_path: Path) -> None:
    large = os.urandom(11 * MEBIBYTE)
    odd = [
        "a b",
        "a+b",
        "a%20b",
        "100%",
        "a#b?c",
        "ü/日本.jpg",
        "x=1,y;z",
        "'q\"",
        "back\\slash",
        ".hidden",
        "~",
        "*?[x]",
    ]
    with LocalS3(tmp_path) as s3:
        s3.create_bucket("data")
        s3.create_bucket("empty-bucket")
        for key in odd:
            storage.write_bytes(f"s3://data/odd/{key}", key.encode())
        filesystem, _ = storage.arrow_filesystem("s3://data")
        for key, content in {"large": large, "small": b"small", "nothing": b""}.items():
            with filesystem.open_output_stream(f"data/parts/{key}") as file:  # pyarrow uploads in parts
                file.write(content)
        filesystem.create_dir("data/empty/folder")
        first = listing()
    with LocalS3(tmp_path):
        assert listing() == first
        assert first["s3://data/parts/large"].endswith("-2")
        assert storage.read_bytes("s3://data/parts/large") == large
        assert all(storage.read_bytes(f"s3://data/odd/{key}") == key.encode() for key in odd)
        assert storage.exists("s3://data/empty/folder")
        storage.require_bucket("s3://empty-bucket")
        storage.write_bytes("s3://data/parts/large", b"in one part now")
        second = listing()
        assert second != first
    with LocalS3(tmp_path):
        assert listing() == second


def test_files_put_into_the_folder_are_objects(tmp_path: Path) -> None:
    (tmp_path / "data/photos").mkdir(parents=True)
    (tmp_path / "data/photos/1.jpg").write_bytes(b"photograph")
    (tmp_path / "README").write_text("beside the buckets")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/half").write_bytes(b"of a save that was killed")
    with LocalS3(tmp_path):
        assert listing() == {"s3://data/photos/1.jpg": hashlib.md5(b"photograph").hexdigest()}
        assert storage.read_bytes("s3://data/photos/1.jpg") == b"photograph"
    assert not list((tmp_path / ".partial").glob("*"))
    assert (tmp_path / "README").exists()


def test_saving_writes_only_what_has_changed_and_removes_what_was_deleted(shared: LocalS3) -> None:
    folder = shared.folder / "data/saving"
    for name in ("same", "changed", "deleted", "below/deleted"):
        storage.write_bytes(f"s3://data/saving/{name}", b"old")
    shared.save()
    inode = (folder / "same").stat().st_ino
    (folder / "foreign").write_bytes(b"somebody else's")
    storage.write_bytes("s3://data/saving/changed", b"new")
    storage.delete("s3://data/saving/deleted")
    storage.delete("s3://data/saving/below")
    shared.save()
    assert sorted(path.name for path in folder.iterdir()) == ["changed", "foreign", "same"]
    assert (folder / "changed").read_bytes() == b"new"
    assert (folder / "same").stat().st_ino == inode


def test_a_file_that_vanished_from_the_folder_is_written_again(shared: LocalS3) -> None:
    storage.write_bytes("s3://data/vanished", b"here")
    shared.save()
    (shared.folder / "data/vanished").unlink()
    shared.save()
    assert (shared.folder / "data/vanished").read_bytes() == b"here"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("unfit/a//b", "'' is not a file name"),
        ("unfit/../b", "'..' is not a file name"),
        ("unfit/" + "n" * 300, "more than 255 bytes"),
        ("unfit/fits/below", "a file and a folder of the same name"),
        ("unfit/FOREIGN", "another file is in its place"),
    ],
)
def test_a_key_that_cannot_be_a_file_is_named_and_all_else_is_saved(
    shared: LocalS3, client: Any, key: str, reason: str
) -> None:
    storage.write_bytes("s3://data/unfit/fits", b"fits")
    (shared.folder / "data/unfit").mkdir(parents=True, exist_ok=True)
    (shared.folder / "data/unfit/FOREIGN").write_bytes(b"not ours")
    client.put_object(Bucket="data", Key=key, Body=b"unfit")
    try:
        with pytest.raises(PipelineError, match="1 objects cannot be files") as failure:
            shared.save()
        assert f"s3://data/{key} ({reason}" in str(failure.value).replace("it has a name of ", "")
        assert (shared.folder / "data/unfit/fits").read_bytes() == b"fits"
        assert (shared.folder / "data/unfit/FOREIGN").read_bytes() == b"not ours"
    finally:
        client.delete_object(Bucket="data", Key=key)
    shared.save()


def test_a_save_that_fails_halfway_leaves_the_old_file(shared: LocalS3) -> None:
    storage.write_bytes("s3://data/halfway", b"old")
    shared.save()
    storage.write_bytes("s3://data/halfway", b"n" * MEBIBYTE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEBIBYTE // 2, limits[1]))  # stands for a disk without room
    try:
        with pytest.raises(PipelineError, match="make room"):
            shared.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (shared.folder / "data/halfway").read_bytes() == b"old"
    assert not list((shared.folder / ".partial").iterdir())
    shared.save()
    assert (shared.folder / "data/halfway").stat().st_size == MEBIBYTE


def test_making_a_bucket_again_leaves_its_objects(shared: LocalS3) -> None:
    storage.write_bytes("s3://data/stays", b"1")
    shared.create_bucket("data")
    assert storage.read_bytes("s3://data/stays") == b"1"


@pytest.mark.parametrize("name", ["", "ab", "Upper", "under_score", "a/b", ".hidden", "end-", "x" * 64])
def test_names_that_s3_does_not_allow_are_refused(shared: LocalS3, name: str) -> None:
    with pytest.raises(PipelineError, match="cannot be a bucket: use 3 to 63"):
        shared.create_bucket(name)


def test_a_folder_that_cannot_be_a_bucket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "My Photos").mkdir()
    with pytest.raises(PipelineError, match=r"the folder .*My Photos cannot be a bucket"), LocalS3(tmp_path):
        pass
    (tmp_path / "My Photos").rename(tmp_path / "my-photos")
    with LocalS3(tmp_path):  # the failure has given the folder back
        storage.require_bucket("s3://my-photos")


def test_two_servers_cannot_have_one_folder(shared: LocalS3) -> None:
    with pytest.raises(PipelineError, match="Another local S3 server has the folder"), LocalS3(shared.folder):
        pass


def test_a_taken_port_is_named(shared: LocalS3, tmp_path: Path) -> None:
    port = int(shared.endpoint.rpartition(":")[2])
    with pytest.raises(PipelineError, match=f"port {port} is in use: choose another"), LocalS3(tmp_path, port=port):
        pass


def test_without_moto_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moto", None)
    with pytest.raises(PipelineError, match="needs the package moto: pip install"), LocalS3(tmp_path):
        pass


def test_a_server_that_cannot_start_tells_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "werkzeug.py").write_text("raise RuntimeError('this werkzeug is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(PipelineError, match=r"did not start: .*this werkzeug is broken"), LocalS3(tmp_path / "folder"):
        pass


def test_a_ctrl_c_at_the_terminal_is_not_for_the_server(shared: LocalS3) -> None:
    """It is still needed for saving."""
    assert os.getpgid(shared.pid) != os.getpgid(0)


def test_an_exception_ends_the_server_saves_and_comes_through(tmp_path: Path) -> None:
    endpoints = []

    def work() -> None:
        with LocalS3(tmp_path) as s3:
            endpoints.append(s3.endpoint)
            s3.create_bucket("data")
            storage.write_bytes("s3://data/kept", b"kept")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert not answers(endpoints[0])
    assert (tmp_path / "data/kept").read_bytes() == b"kept"


def test_a_server_that_died_is_told(tmp_path: Path) -> None:
    before = dict(os.environ)
    s3 = LocalS3(tmp_path)
    s3.__enter__()
    os.kill(s3.pid, signal.SIGKILL)
    assert ends(s3.endpoint)
    with pytest.raises(PipelineError, match="does not answer: start it again with the same folder"):
        s3.__exit__(None, None, None)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("sent", "saved"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
    ids=lambda value: str(value),
)
def test_the_server_ends_with_its_parent(tmp_path: Path, sent: signal.Signals, saved: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_SERVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background lets its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with parent:
        assert parent.stdout is not None
        endpoint = parent.stdout.readline().strip()
        assert answers(endpoint)
        os.killpg(parent.pid, sent)
        parent.wait(120)
    assert parent.returncode != 0
    assert ends(endpoint)
    assert (tmp_path / "data/early").read_bytes() == b"early"
    assert (tmp_path / "data/late").exists() == saved
    with LocalS3(tmp_path):  # nothing half-done is in the way
        assert storage.read_bytes("s3://data/early") == b"early"
