"""What a wrong URL, missing or wrong credentials, a missing bucket and a wrong endpoint are answered with."""

import importlib.util
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.local_s3 import LocalS3
from pipeline.redaction import redacted
from pipeline.storage_errors import StorageError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with LocalS3(tmp_path_factory.mktemp("s3")) as s3:
        s3.create_bucket("data")
        yield s3


def write(url: str) -> None:
    storage.write_bytes(url, b"")


def listing(url: str) -> list[storage.StoredObject]:
    return list(storage.list_objects(url))


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("s3://bucket/x", ["y"], "s3://bucket/x/y"),
        ("s3://bucket/x/", ["y", "z"], "s3://bucket/x/y/z"),
        ("s3://bucket", ["/etc/passwd"], "s3://bucket/etc/passwd"),
        ("/", ["y"], "/y"),
        ("folder", ["s3://bucket"], "folder/s3://bucket"),
    ],
)
def test_join_never_leaves_its_base(base: str, parts: list[str], joined: str) -> None:
    assert storage.join(base, *parts) == joined


def test_absolute_is_one_form_for_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    forms = ["x", "./x/", "y/../x", f"{tmp_path}/x/", f"file://{tmp_path}/x/", f"file://{tmp_path}//x"]
    assert {storage.absolute(form) for form in forms} == {f"{tmp_path}/x"}
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"
    assert storage.absolute("~") == str(Path.home())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "An empty URL was given"),
        ("s3://", "s3:// names no bucket: write s3://bucket/prefix"),
        ("s3:///data/x", "names no bucket"),
        ("s3:/data/x", "lacks a slash: write s3:// before the place"),
        ("s3:data", "lacks a slash"),
        ("s3://My Photos/x", "'My Photos' cannot be a bucket's name"),
        ("S3://data/x", "unknown scheme S3://: use s3://, gs://, file:// or a plain path"),
        ("https://data/x", "unknown scheme https://"),
        ("file://host/x", "has a host or a relative path: write file:///absolute/path"),
    ],
)
def test_a_wrong_url_is_answered_with_the_right_form(url: str, message: str) -> None:
    with pytest.raises(StorageError) as failure:
        storage.read_bytes(url)
    assert message in str(failure.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hush@data/x",
        "s3://KEY:hu/sh@data/x",
        "s3://KEY:hu@sh/hush@data/x",
        "s3://hush@data/x",
        "s3://KEY:hush",
        "gs://KEY:hush/x",
        "s3://data/x?access_key=hush&secret_key=hush",
        "https://KEY:hush@data/x",
        "https://data/x?X-Amz-Algorithm=1&X-Amz-Signature=hush",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    for operation in (storage.split, storage.exists, storage.arrow_filesystem, storage.read_bytes):
        with pytest.raises(StorageError) as failure:
            operation(url)
        assert "hu" not in str(failure.value)
        assert "sh@" not in str(failure.value)
        assert "carries credentials: remove them and set them in the env" in str(failure.value) or "https" in url


@pytest.mark.parametrize(
    "text",
    [
        "s3://data/me@home.jpg",
        "s3://data/a:b@c",
        "file:///data/a:b@c",
        "http://127.0.0.1:9000/x@y",
        "no connection to http://[::1]:9000: check it",
        "a@b and c:d@e",
        "s3://data/x?y=1",
    ],
)
def test_what_is_no_credential_is_left_as_it_is(text: str) -> None:
    assert redacted(text) == text


def test_a_text_is_redacted_around_its_urls() -> None:
    text = "from s3://KEY:hu/sh@data/x to https://u@host:1/y?sig=hush&n=1, done"
    assert redacted(text) == "from s3://***@data/x to https://***@host:1/y?sig=***&n=1, done"


@pytest.mark.usefixtures("server")
def test_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for operation in (storage.read_bytes, storage.exists, storage.require_bucket, listing):
        with pytest.raises(StorageError, match="no credentials found: set them in the environment"):
            operation("s3://data/x")


@pytest.fixture
def strict(server: LocalS3) -> Iterator[None]:
    """moto checks keys only after as many requests as it is told."""
    address, form = f"{server.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(address, b"0", form)).close()
    yield
    urllib.request.urlopen(urllib.request.Request(address, b"inf", form)).close()


@pytest.mark.usefixtures("strict")
def test_with_wrong_credentials() -> None:
    def read_with_arrow(url: str) -> None:
        filesystem, path = storage.arrow_filesystem(url)
        with storage.explained(url):
            filesystem.open_input_file(path)

    for operation in (storage.read_bytes, storage.exists, storage.require_bucket, listing, read_with_arrow):
        with pytest.raises(StorageError, match=r"s3://data.*: access denied: check the credentials in the environment"):
            operation("s3://data/x")
    with pytest.raises(StorageError, match="access denied"):
        storage.exists("s3://data")


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("operation", [storage.require_bucket, storage.delete, listing, write])
def test_a_missing_bucket(operation: Callable[[str], object]) -> None:
    with pytest.raises(StorageError, match="s3://absent/x: there is no bucket named absent: create it, or correct"):
        operation("s3://absent/x")


@pytest.mark.usefixtures("server")
def test_nothing_exists_in_a_missing_bucket() -> None:
    assert not storage.exists("s3://absent/x")
    assert not storage.exists("s3://absent")
    assert storage.exists("s3://data")


@pytest.mark.usefixtures("server")
def test_a_bucket_is_no_object() -> None:
    for operation in (storage.read_bytes, write):
        with pytest.raises(StorageError, match="s3://data is a bucket: name an object or a prefix in it"):
            operation("s3://data")


@pytest.mark.usefixtures("server")
def test_requiring_a_bucket_that_is_there() -> None:
    storage.require_bucket("s3://data")
    storage.require_bucket("s3://data/nothing/here")
    storage.require_bucket("/no/such/folder")


@pytest.mark.usefixtures("server")
def test_a_wrong_endpoint_is_no_absence_and_is_forgotten_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes("s3://data/endpoint", b"1")
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_MAX_ATTEMPTS", "1")
        wrong.setattr("s3fs.S3FileSystem.retries", 1)  # of its own, beside those of botocore
        wrong.setenv("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:1")
        for operation in (storage.read_bytes, storage.exists):
            with pytest.raises(StorageError, match=r"no connection to http://\*\*\*@127.0.0.1:1: check AWS"):
                operation("s3://data/endpoint")
        with pytest.raises(StorageError, match="no connection"):
            storage.exists("s3://data")
    assert storage.read_bytes("s3://data/endpoint") == b"1"


@pytest.mark.usefixtures("server")
def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL=127.0.0.1:9000 is not a URL: write it like https://"):
        storage.read_bytes("s3://data/x")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_store_whose_client_is_not_installed() -> None:
    with pytest.raises(StorageError, match=r"gs:// needs a package that is not installed: .*gcsfs"):
        storage.read_bytes("gs://data/x")
