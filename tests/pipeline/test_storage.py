"""Places: every operation does the same on a local folder and on an S3 server, whatever the names, and is atomic."""

import errno
import functools
import os
import resource
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage, store_listing
from pipeline.local_s3 import LocalS3
from pipeline.storage_errors import StorageError, StorageOutage
from tests.pipeline.endless_s3 import endless_s3
from tests.pipeline.faulty_s3 import OUTAGE, faulty_s3

# Whatever a file may be called, but for the few names that are refused.
NAMES = (
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
    .filter(lambda name: not name.startswith(".") and "?versionId=" not in name)
    .filter(lambda name: len(name.encode()) <= 255)
)
ODD_NAMES = [
    "a b",
    " a ",
    "a+b",
    "a%20b",
    "%",
    "a#b",
    "a?b=c",
    "日本.jpg",
    "é",
    "a:b",
    "@",
    "~",
    "*[x]{y}",
    "'\"\\",
    "n" * 255,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with LocalS3(tmp_path_factory.mktemp("s3")) as s3:
        s3.create_bucket("data")
        yield s3


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of either kind."""
    if request.param == "folder":
        return str(tmp_path / "place")
    request.getfixturevalue("server")
    return f"s3://data/{uuid.uuid4().hex}"


def urls(place: str) -> list[str]:
    return [item.url for item in storage.list_objects(place)]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_taken_literally_by_every_operation(place: str, name: str) -> None:
    url = storage.join(place, "below", name)
    storage.write_bytes(url, name.encode())
    filesystem, path = storage.arrow_filesystem(url)
    with filesystem.open_input_stream(path) as file:
        assert file.read() == name.encode()
    assert storage.read_bytes(url) == name.encode()
    assert storage.exists(url)
    assert storage.stat(url) in list(storage.list_objects(place))
    storage.delete(url)
    assert not storage.exists(url)
    assert urls(place) == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.dictionaries(st.tuples(NAMES, NAMES), st.binary(max_size=100), min_size=1, max_size=3))
def test_what_is_written_is_listed_and_read_back(place: str, contents: dict[tuple[str, str], bytes]) -> None:
    storage.delete(place)
    written = {storage.join(place, *names): data for names, data in contents.items()}
    for url, data in written.items():
        storage.write_bytes(url, data)
    listed = list(storage.list_objects(place))
    assert [item.url for item in listed] == sorted(written)
    assert {item.url: item.size for item in listed} == {url: len(data) for url, data in written.items()}
    assert {url: storage.read_bytes(url) for url in written} == written


def test_what_is_not_there(place: str) -> None:
    url = storage.join(place, "absent")
    for read in (storage.read_bytes, storage.read_json, storage.stat):
        with pytest.raises(FileNotFoundError, match="absent does not exist"):
            read(url)
    assert not storage.exists(url)
    assert urls(url) == []
    storage.delete(url)


def test_writing_again_replaces_and_changes_the_version(place: str) -> None:
    url = storage.join(place, "object")
    storage.write_bytes(url, b"first")
    first = storage.stat(url)
    storage.write_bytes(url, b"second")
    assert storage.read_bytes(url) == b"second"
    assert storage.stat(url).version != first.version
    assert storage.stat(url).size == 6


def test_json(place: str) -> None:
    url = storage.join(place, "document.json")
    document = {"name": "日本", "numbers": [1, 2.5, None]}
    storage.write_json(url, document)
    assert storage.read_json(url) == document
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(url, {"loss": float("nan")})
    assert storage.read_json(url) == document
    storage.write_bytes(url, b'{"cut of')
    with pytest.raises(StorageError, match=r"document.json is not valid JSON .*: delete it and run the step"):
        storage.read_json(url)


def test_a_listing_is_of_what_is_below_sorted_without_hidden_names(place: str) -> None:
    for name in ("pre/b", "pre/a/2", "pre/a/10", "pre/.hidden", "pre/.folder/x", "prefix/c", "pre.txt"):
        storage.write_bytes(storage.join(place, name), b"1")
    assert urls(storage.join(place, "pre")) == [storage.join(place, f"pre/{name}") for name in ("a/10", "a/2", "b")]
    assert urls(storage.join(place, "pre/b")) == [storage.join(place, "pre/b")]
    assert urls(storage.join(place, "pr")) == []
    assert urls(storage.join(place, "pre/.folder")) == [storage.join(place, "pre/.folder/x")]


def test_a_listing_without_what_is_below_a_further_slash(place: str) -> None:
    for name in ("pre/b", "pre/a/2", "pre/.hidden", "pre/c", "prefix/c"):
        storage.write_bytes(storage.join(place, name), b"1")
    listed = list(storage.list_objects(storage.join(place, "pre"), recursive=False))
    assert [item.url for item in listed] == [storage.join(place, name) for name in ("pre/b", "pre/c")]
    assert listed[0] == storage.stat(listed[0].url)


def test_a_level_has_objects_and_folders(place: str) -> None:
    for name in ("pre/b", "pre/a b/2", "pre/a/2/3", "pre/.hidden", "pre/.folder/x", "prefix/c"):
        storage.write_bytes(storage.join(place, name), b"1")
    level = storage.list_level(storage.join(place, "pre"), most=10)
    assert level is not None
    assert level.objects == [storage.stat(f"{place}/pre/b")]
    assert sorted(level.folders) == [f"{place}/pre/a b/", f"{place}/pre/a/"]
    assert storage.list_level(f"{place}/pre/", most=10) == level
    assert [item.url for folder in level.folders for item in storage.list_objects(folder)] == [
        f"{place}/pre/a b/2",
        f"{place}/pre/a/2/3",
    ]
    assert storage.list_level(storage.join(place, "pre"), most=2) is None
    assert storage.list_level(storage.join(place, "absent"), most=2) == storage.Level([], [])
    assert storage.folder_names(storage.join(place, "pre")) == ["a", "a b"]
    assert storage.folder_names(storage.join(place, "absent")) == []


@pytest.mark.usefixtures("server")
def test_an_object_with_the_name_of_a_folder_is_listed_beside_it_and_not_in_it() -> None:
    names = ["both", "both/below", "both/below/more", "both//x", "bothersome", "both."]
    for name in names:
        storage.write_bytes(f"s3://data/twice/{name}", b"1")
    assert urls("s3://data/twice") == sorted(f"s3://data/twice/{name}" for name in names)
    assert urls("s3://data/twice/both") == [
        f"s3://data/twice/{name}" for name in ("both", "both//x", "both/below", "both/below/more")
    ]
    assert urls("s3://data/twice/both/") == urls("s3://data/twice/both")[1:]
    assert storage.list_level("s3://data/twice/both", most=10) is None  # a folder without a name has no URL
    storage.delete("s3://data/twice")


@pytest.mark.usefixtures("server")
def test_a_listing_of_many_pages_is_whole_and_only_what_is_asked_for_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(25):
        storage.write_bytes(f"s3://data/pages/{number:02}", b"1")
    pages = []
    list_page = store_listing.list_page

    def short_page(client: Any, bucket: str, **request: Any) -> dict[str, Any]:
        monkeypatch.setattr(client, "call_s3", functools.partial(call_s3, client, type(client).call_s3))
        pages.append(request)
        return list_page(client, bucket, **request)

    def call_s3(client: Any, call: Any, method: str, **request: Any) -> Any:
        return call(client, method, **{"MaxKeys": 10} | request)

    monkeypatch.setattr(store_listing, "list_page", short_page)
    listing = storage.list_objects("s3://data/pages")
    assert next(listing).url == "s3://data/pages/00"
    assert len(pages) == 1
    assert [item.url for item in listing] == [f"s3://data/pages/{number:02}" for number in range(1, 25)]
    assert len(pages) == 3
    level = storage.list_level("s3://data/pages", most=25)
    assert level is not None
    assert len(level.objects) == 25


def test_an_outage_is_waited_for_in_the_middle_of_a_listing_but_not_at_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        endless_s3(objects=3_000, folders=1) as bucket,
        faulty_s3(bucket.endpoint, {}) as proxy,
        monkeypatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's; s3fs still tries five times
        listing = storage.list_objects(bucket.url)
        assert next(listing).size > 0
        proxy.down.set()
        timer = threading.Timer(4.0, proxy.down.clear)  # longer than s3fs's own patience
        timer.start()
        assert sum(1 for _ in listing) == 2_999
        assert proxy.happened[OUTAGE] > 5
        proxy.down.set()
        with pytest.raises(StorageOutage, match="the store is overloaded or failing"):
            next(storage.list_objects(bucket.url))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_bytes_come_with_the_version_that_they_are_of(place: str, name: str) -> None:
    url = storage.join(place, name)
    storage.write_bytes(url, b"0123456789")
    version = storage.stat(url).version
    assert storage.read_versioned(url) == (b"0123456789", version)
    assert storage.read_range(url, 3, 4) == (b"3456", version)
    assert storage.read_range(url, 8, 4) == (b"89", version)
    assert storage.read_range(url, 8, 0) == (b"", version)
    storage.write_bytes(url, b"")
    assert storage.read_versioned(url) == (b"", storage.stat(url).version)


def test_versioned_bytes_of_what_is_not_there(place: str) -> None:
    storage.write_bytes(f"{place}/short", b"1")
    for read in (storage.read_versioned, lambda url: storage.read_range(url, 0, 1)):
        with pytest.raises(FileNotFoundError, match="absent does not exist"):
            read(f"{place}/absent")
    if place.startswith("s3"):
        with pytest.raises(StorageError, match="short"):
            storage.read_range(f"{place}/short", 5, 1)
        with pytest.raises(StorageError, match="s3://data is a bucket: name an object"):
            storage.read_versioned("s3://data")


def test_a_file_that_is_overwritten_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version is never given to bytes of another; that the file is never at rest is said."""
    url = str(tmp_path / "x")
    storage.write_bytes(url, b"0")
    left = [1]

    def overwritten(_: LocalFileSystem, path: str) -> bytes:
        data = Path(path).read_bytes()
        if left[0]:
            left[0] -= 1
            storage.write_bytes(path, data + b"1")
        return data

    monkeypatch.setattr(LocalFileSystem, "cat_file", overwritten)
    assert storage.read_versioned(url) == (b"01", storage.stat(url).version)
    left[0] = 10
    with pytest.raises(StorageError, match="is overwritten again and again while it is read"):
        storage.read_versioned(url)


def test_deleting_takes_all_that_is_below_and_no_neighbour(place: str) -> None:
    for name in ("pre/a/1", "pre/.hidden", "prefix"):
        storage.write_bytes(storage.join(place, name), b"1")
    filesystem, path = storage.arrow_filesystem(storage.join(place, "pre/empty"))
    filesystem.create_dir(path)
    storage.delete(storage.join(place, "pre"))
    assert not storage.exists(storage.join(place, "pre"))
    assert urls(place) == [storage.join(place, "prefix")]
    storage.delete(place)
    assert not storage.exists(place)


@pytest.mark.usefixtures("server")
def test_an_object_with_others_below_it_is_deleted_with_them() -> None:
    storage.write_bytes("s3://data/both", b"1")
    storage.write_bytes("s3://data/both/below", b"1")
    storage.delete("s3://data/both")
    assert not storage.exists("s3://data/both")


def test_upload_folder(place: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a b" / "empty").mkdir(parents=True)
    (source / "a b" / "1%.bin").write_bytes(b"1")
    (source / "top").write_bytes(b"2")
    storage.upload_folder(source, place)
    assert {url: storage.read_bytes(url) for url in urls(place)} == {
        storage.join(place, "a b/1%.bin"): b"1",
        storage.join(place, "top"): b"2",
    }


@pytest.mark.usefixtures("server")
def test_a_listing_has_the_form_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("folder/a b", b"1")
    storage.write_bytes("s3://data/form/a b", b"1")
    assert urls("folder") == [f"{tmp_path}/folder/a b"]
    assert urls(f"file://{tmp_path}/folder/") == [f"file://{tmp_path}/folder/a b"]
    assert urls("s3://data/form/") == ["s3://data/form/a b"]


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\x7fb"])
def test_a_control_character_is_refused(place: str, name: str) -> None:
    with pytest.raises(StorageError, match="has a control character in its name: rename it"):
        storage.write_bytes(storage.join(place, name), b"")


@pytest.mark.usefixtures("server")
def test_names_that_a_client_would_misread_are_refused(tmp_path: Path) -> None:
    """s3fs would write to `photo`."""
    with pytest.raises(StorageError, match="name the object alone"):
        storage.write_bytes("s3://data/photo?versionId=1", b"")
    assert not storage.exists("s3://data/photo")
    storage.write_bytes(str(tmp_path / "photo?versionId=1"), b"")
    assert [path.name for path in tmp_path.iterdir()] == ["photo?versionId=1"]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Files cannot grow above half a megabyte: a write that fails halfway, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files_only")
def test_a_write_that_fails_halfway_leaves_the_old_bytes_and_nothing_else(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"old")
    with pytest.raises(StorageError, match="File too large"):
        storage.write_bytes(str(tmp_path / "x"), b"n" * 2**20)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_readers_see_old_or_new_bytes_and_listings_no_part(tmp_path: Path) -> None:
    url, done = str(tmp_path / "x"), threading.Event()
    storage.write_bytes(url, b"0" * 2**20)

    def write() -> None:
        for turn in range(60):
            storage.write_bytes(url, b"%d" % (turn % 10) * 2**20)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not done.is_set():
            data = storage.read_bytes(url)
            assert data == data[:1] * 2**20
            assert urls(str(tmp_path)) == [url]
    finally:
        writer.join()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="no space left on the device: free some, or choose another place"):
        storage.write_bytes(str(tmp_path / "x"), b"1")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_used(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    storage.write_bytes(str(secret / "x"), b"1")
    user = os.geteuid()
    secret.chmod(0)
    if user == 0:
        os.seteuid(65534)  # permissions do not hold root
    try:
        for operation in (storage.read_bytes, urls, lambda url: storage.write_bytes(url, b"")):
            with pytest.raises(StorageError, match="permission denied: change the folder's permissions"):
                operation(str(secret / "x"))
        with pytest.raises(StorageError, match="permission denied"):
            urls(str(tmp_path))
    finally:
        os.seteuid(user)
        secret.chmod(0o700)


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"1")
    with pytest.raises(StorageError, match="a file and a folder of the same name are in each other's way"):
        storage.write_bytes(str(tmp_path / "x/y"), b"1")
    storage.write_bytes(str(tmp_path / "folder/y"), b"1")
    for operation in (storage.read_bytes, lambda url: storage.write_bytes(url, b"1")):
        with pytest.raises(StorageError, match="a file and a folder of the same name"):
            operation(str(tmp_path / "folder"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x"]


def test_a_name_too_long_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the name is too long for this disk: shorten it"):
        storage.write_bytes(str(tmp_path / ("n" * 256)), b"1")
    assert not list(tmp_path.iterdir())


def test_links_stand_for_what_they_lead_to(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    storage.write_bytes(str(elsewhere / "below/photo"), b"12345")
    folder.mkdir()
    (folder / "file").symlink_to(elsewhere / "below/photo")
    (folder / "into").symlink_to(elsewhere)
    (folder / "nowhere").symlink_to(tmp_path / "absent")
    (elsewhere / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe")  # reading it would wait for ever
    listed = {item.url.removeprefix(f"{folder}/"): item for item in storage.list_objects(str(folder))}
    assert sorted(listed) == ["file", "into/below/photo", "nowhere"]
    assert listed["file"].version == storage.stat(str(folder / "file")).version == listed["into/below/photo"].version
    assert listed["file"].size == 5
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(listed["nowhere"].url)
    storage.delete(str(folder / "into"))
    storage.delete(str(folder / "nowhere"))
    storage.delete(str(folder))
    assert (elsewhere / "below/photo").exists()
