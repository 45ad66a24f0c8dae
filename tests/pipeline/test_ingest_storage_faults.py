"""An ingest whose store answers late, refuses, breaks off or loses what it has listed: the same dataset comes of it."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import boto3
import numpy as np
import pyarrow as pa
import pytest
import ray

from pipeline import dataset, storage
from pipeline.images import encode_png
from pipeline.ingest import IngestConfig, ingest
from pipeline.inventory import Selection, selected_layout
from pipeline.parquet_files import write_table
from pipeline.run_record import read_record
from tests.pipeline.faulty_s3 import FOREVER, LISTING, Fault, FaultyS3, faulty_s3
from tests.pipeline.labelled_source import CLASSES, REPOSITORY, label_values, photograph, reject_rows, write_source

PLACE = "s3://test/ingest-storage-faults"
LAYOUTS = ("folders", "webdataset", "parquet")

FAULTS = {
    LISTING: Fault(slow_down=1, cut=1),
    "*/folders/raw/classes.json": Fault(reset=1),
    # What is read pair by pair: images and labels.
    "*/raw/images/train/00.png": Fault(slow_down=2),
    "*/raw/images/train/01.png": Fault(reset=2),
    "*/raw/images/train/02.png": Fault(cut=2),
    "*/raw/images/train/03.png": Fault(slow=1),
    "*/raw/labels/train/04.png": Fault(slow_down=1, reset=1, cut=1, slow=1),
    "*/raw/labels/val/00.png": Fault(slow_down=2),
    "*/raw/images/val/01.png": Fault(gone=FOREVER),
    "*/raw/labels/val/02.png": Fault(gone=FOREVER),
    # What is read as a stream.
    "*/raw/train-0.tar": Fault(slow_down=1, reset=1, cut=1),
    "*/raw/train-1.tar": Fault(gone=FOREVER),
    "*/raw/train-0.parquet": Fault(slow_down=1, reset=1, cut=1),
    "*/raw/train-1.parquet": Fault(gone=FOREVER),
    # What the ingest itself writes, and reads again.
    "*/set/_ingest/*/chunks*.parquet": Fault(slow_down=1, reset=1, cut=1),
    "*/set/_ingest/*/000001.json": Fault(slow_down=1),
    "*/set/train/part-*-000000.parquet": Fault(slow_down=1),
    "*/set/_rejects/*": Fault(slow_down=1),
    "*/set/dataset.json": Fault(slow_down=1),
}

# It joins the tests' cluster, but its workers have the proxy for a store.
_DRIVER = """
import os, sys, ray
from pipeline import ingest as stage
from pipeline.inventory import Cut
ray.init(runtime_env={"env_vars": {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}}, log_to_driver=False)
stage.CUT = Cut(most_images=2)
for layout in sys.argv[2:]:
    place = f"{sys.argv[1]}/{layout}"
    stage.ingest(stage.IngestConfig(f"{place}/raw", f"{place}/set", layout, max_reject_fraction=0.7))
"""


def write_tar(url: str, seeds: range) -> None:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for seed in seeds:
            for ending, data in (("png", photograph(seed)), ("label.png", encode_png(label_values(seed)))):
                member = tarfile.TarInfo(f"{seed:03}.{ending}")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
    storage.write_bytes(url, buffer.getvalue())


def write_parquet(url: str, seeds: range) -> None:
    rows = [{"image": photograph(seed), "label": encode_png(label_values(seed))} for seed in seeds]
    write_table(url, pa.Table.from_pylist(rows))


def write_sources(place: str, whole: bool) -> None:
    """A source in each of `LAYOUTS`; if not whole, without what the proxy keeps back."""
    write_source(f"{place}/folders/raw", pairs=6)
    for layout, write, suffix in (("webdataset", write_tar, "tar"), ("parquet", write_parquet, "parquet")):
        storage.write_json(f"{place}/{layout}/raw/classes.json", CLASSES)
        for number in range(2 if whole else 1):
            write(f"{place}/{layout}/raw/train-{number}.{suffix}", range(20 * number, 20 * number + 20))
    if not whole:
        for number in ("01", "02"):
            for folder in ("images", "labels"):
                storage.delete(f"{place}/folders/raw/{folder}/val/{number}.png")


def content(url: str) -> dict[str, list[tuple[str, bytes, bytes]]]:
    """The rows of each split, sorted, without where they came from."""
    opened = dataset.open(url)
    return {
        split: sorted((row["image_id"], row["image"], row["label"]) for row in opened.rows(split))
        for split in opened.info.splits
    }


@dataclass(frozen=True)
class Ingested:
    undisturbed: str
    proxy: FaultyS3


@pytest.fixture(scope="module")
def ingested(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Ingested:  # noqa: ARG001
    """Each layout ingested through the proxy, and without it."""
    write_sources(PLACE, whole=True)
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], FAULTS) as proxy:
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        }
        command = [sys.executable, "-c", _DRIVER, PLACE, *LAYOUTS]
        driver = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    assert driver.returncode == 0, driver.stdout + driver.stderr
    undisturbed = str(tmp_path_factory.mktemp("undisturbed"))
    write_sources(undisturbed, whole=False)
    for layout in LAYOUTS:
        ingest(IngestConfig(f"{undisturbed}/{layout}/raw", f"{undisturbed}/{layout}/set", layout))
    return Ingested(undisturbed, proxy)


def test_each_fault_has_befallen_the_ingest(ingested: Ingested) -> None:
    assert ingested.proxy.unused() == set()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dataset_is_that_of_an_undisturbed_ingest(ingested: Ingested, layout: str) -> None:
    disturbed, undisturbed = f"{PLACE}/{layout}/set", f"{ingested.undisturbed}/{layout}/set"
    assert content(disturbed) == content(undisturbed)
    assert dataset.open(disturbed).info.fingerprint == dataset.open(undisturbed).info.fingerprint


@pytest.mark.parametrize(
    ("layout", "inputs", "gone"),
    [
        ("folders", 12, {"images/val/01.png": "images/val/01.png", "images/val/02.png": "labels/val/02.png"}),
        ("webdataset", 21, {"train-1.tar": "train-1.tar"}),
        ("parquet", 21, {"train-1.parquet": "train-1.parquet"}),
    ],
)
@pytest.mark.usefixtures("ingested")
def test_what_was_listed_but_is_gone_is_a_reject_and_all_else_a_row(layout: str, inputs: int, gone: dict[str, str]):
    raw, url = f"{PLACE}/{layout}/raw", f"{PLACE}/{layout}/set"
    assert sorted((row["source_uri"], row["reason"], row["detail"]) for row in reject_rows(url)) == [
        (f"{raw}/{name}", "missing", f"{raw}/{what} was listed but is gone") for name, what in gone.items()
    ]
    record = read_record(url)
    assert record is not None
    assert record.counts == {"in": inputs, "out": inputs - len(gone), "rejected": len(gone)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("ingested")
def test_nothing_is_left_but_what_the_dataset_names(layout: str) -> None:
    url = f"{PLACE}/{layout}/set"
    names = {item.url.removeprefix(f"{url}/") for item in storage.list_objects(url)}
    files = {path for split in dataset.open(url).info.splits.values() for path in split.files}
    assert {name for name in names if not name.startswith("_rejects/")} == files | {"dataset.json", "run.json"}


def through_arrow(url: str) -> bytes:
    filesystem, path = storage.arrow_filesystem(url)
    with filesystem.open_input_file(path) as file:
        return file.read()


def as_stream(url: str) -> bytes:
    with storage.open_input(url) as file:
        return file.read()


@pytest.mark.parametrize("read", [storage.read_bytes, as_stream, through_arrow])
@pytest.mark.parametrize("kind", ["reset", "cut", "slow_down"])
def test_bytes_that_are_read_are_whole(
    bucket: str, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], bytes], kind: str
) -> None:
    data = np.random.default_rng(0).bytes(200_000)
    storage.write_bytes(f"{bucket}/object", data)
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], {"*/object": Fault(**{kind: 2})}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert read(f"{bucket}/object") == data
        assert proxy.happened.total() == 2


def test_a_store_that_asks_to_slow_down_for_a_while_is_borne(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the client library bears it by itself."""
    storage.write_bytes(f"{bucket}/object", b"data")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], {"*/object": Fault(slow_down=6)}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert storage.read_bytes(f"{bucket}/object") == b"data"


@pytest.mark.usefixtures("s3")
def test_a_key_that_the_client_would_misread_is_a_reject(bucket: str) -> None:
    """s3fs takes what follows `?versionId=` for a version of another object."""
    write_source(bucket, pairs=2)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    key = f"{bucket.removeprefix('s3://test/')}/images/val/00?versionId=1.png"
    client.put_object(Bucket="test", Key=key, Body=photograph(1))
    layout, _, _ = selected_layout(bucket, "folders", Selection())
    assert len(layout.pairs) == 4
    assert [(reject.source_uri, reject.reason) for reject in layout.rejects] == [(f"s3://test/{key}", "bad_name")]


def test_what_is_gone_is_told_from_what_cannot_be_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{bucket}/object", b"data")
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], {"*/object": Fault(gone=FOREVER)}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for read in (storage.read_bytes, as_stream):
            with pytest.raises(FileNotFoundError):
                read(f"{bucket}/object")
