"""A segmentation to which something happens, as it does to clusters: in the end each image has its one row."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from pipeline import lease, mask_store, masks, storage
from pipeline.images import encode_png
from pipeline.local_s3 import LocalS3
from pipeline.run_record import read_record
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment
from tests.pipeline.faulty_s3 import LISTING, Fault, faulty_s3

pytestmark = pytest.mark.heavy

REPOSITORY = Path(__file__).parents[2]
IMAGES = 600
LEASE_SECONDS = 4.0

# Small files and frequent commits, so that many moments of a run lie between two of them.
_DRIVER = """
import os, sys, ray
from pipeline import lease, mask_stager, segmentation
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment_in_turn
lease.LEASE_SECONDS, mask_stager.COMMIT_SECONDS, segmentation.ROWS_PER_FILE = 4.0, 0.2, 4
environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
if os.environ.get("RAY_ADDRESS"):
    ray.init(runtime_env={"env_vars": environment}, log_to_driver=False)
segment_in_turn(SegmentConfig(*sys.argv[1:], cpus_per_worker=0.5, batch_size=2))
"""


def _photograph(seed: int, side: int = 150) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (side // 10 + 1, side // 10 + 1, 3), dtype=np.uint8)
    return encode_png(blocks.repeat(10, axis=0).repeat(10, axis=1)[:side, :side])


def _write_photographs(url: str, count: int = IMAGES) -> None:
    for number in range(count):
        storage.write_bytes(storage.join(url, f"{number % 7}/{number:05}.png"), _photograph(number))


def _driver(model: str, images: str, out: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, model, images, out],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _content(url: str, images: str) -> dict[str, Any]:
    """What the rows say of each image; each is there once, for readers with and without knowledge of transactions."""
    rows = masks.read_masks(url).to_pylist()
    assert max(Counter(tuple(row[name] for name in masks.KEY) for row in rows).values()) == 1
    listed = {item.url for item in storage.list_objects(storage.join(url, mask_store.FOLDER))}
    assert listed == set(mask_store.files(url))
    return {row["image_uri"].removeprefix(images): (row["status"], row["mask"], row["class_pixels"]) for row in rows}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("photographs"))
    _write_photographs(url)
    return url


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tiny_model: str, images: str, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ARG001
    out = str(tmp_path_factory.mktemp("undisturbed"))
    segment(SegmentConfig(tiny_model, images, out, cpus_per_worker=0.5, batch_size=2))
    content = _content(out, images)
    assert len(content) == IMAGES
    assert {status for status, _, _ in content.values()} == {"ok"}
    return content


def _same(content: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same rows; where windows share a batch with others than before, a few pixels may tip to the other class."""
    assert content.keys() == expected.keys()
    for name, (status, mask, _) in content.items():
        assert status == expected[name][0]
        here, there = (masks.decode({"mask": png}) for png in (mask, expected[name][1]))
        assert (here == there).mean() > 0.999


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", LEASE_SECONDS)


@pytest.mark.usefixtures("short_lease")
def test_a_driver_that_is_killed_at_ten_random_moments(tiny_model, images, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    out, moments = str(tmp_path), random.Random(0)
    done = [0]
    for attempt in range(10):
        driver = _driver(tiny_model, images, out)
        before = storage.read_bytes(storage.join(out, lease.FILE_NAME)) if done[1:] else b""
        while not storage.exists(storage.join(out, lease.FILE_NAME)) or before == storage.read_bytes(
            storage.join(out, lease.FILE_NAME)
        ):
            assert driver.poll() is None
            time.sleep(0.02)
        if attempt % 2:  # half of them while it connects, lists and loads the model, half while it segments and commits
            while masks.open_masks(out).count_rows() == done[-1] and driver.poll() is None:
                time.sleep(0.02)
        time.sleep(moments.uniform(0, 1 if attempt % 2 else 10))
        assert driver.poll() is None, "the run ended before it could be killed"
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        rows = masks.read_masks(out, columns=list(masks.KEY)).to_pylist()
        assert max(Counter(tuple(row.values()) for row in rows).values(), default=1) == 1
        assert len(rows) >= done[-1]
        done.append(len(rows))
    print("rows after each kill:", done[1:])
    assert 0 < done[-1] < IMAGES, "the kills came too early or too late to meet a run at work"
    segment(SegmentConfig(tiny_model, images, out, cpus_per_worker=0.5, batch_size=2))
    _same(_content(out, images), undisturbed)
    assert not list(storage.list_objects(storage.join(out, mask_store.WORK_FOLDER)))


@pytest.mark.usefixtures("short_lease")
def test_two_runs_that_begin_at_once(tiny_model, images, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    drivers = [_driver(tiny_model, images, str(tmp_path)) for _ in range(2)]
    outputs = [driver.communicate()[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert sorted("is held by run" in output for output in outputs) == [False, True]
    _same(_content(str(tmp_path), images), undisturbed)


def test_an_actor_that_is_killed(tiny_model, images, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    driver = _driver(tiny_model, images, str(tmp_path))
    killed = 0
    deadline = time.monotonic() + 300
    while killed < 2 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        if len(list(tmp_path.glob("masks/*.parquet"))) > 2 * killed:
            for process in psutil.Process().children(recursive=True):  # other Rays may run on the machine
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "MapWorker(MapBatches(Segmenter))" in " ".join(process.cmdline()):
                        process.kill()
                        killed += 1
    output, _ = driver.communicate()
    assert killed >= 2, output
    assert driver.returncode == 0, output
    _same(_content(str(tmp_path), images), undisturbed)


_TWO_NODES = """
import sys, time, json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pipeline import mask_stager, segmentation
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment
mask_stager.COMMIT_SECONDS, segmentation.ROWS_PER_FILE = 0.2, 4
node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(**node)
ray.init(address=cluster.address, log_to_driver=False)
out = Path(sys.argv[3])
with ThreadPoolExecutor(1) as executor:
    running = executor.submit(segment, SegmentConfig(*sys.argv[1:], cpus_per_worker=0.4, batch_size=2, workers=2))
    while len(list(out.glob("masks/*.parquet"))) < 3 and not running.done():
        time.sleep(0.05)
    killed = not running.done()
    if killed:
        cluster.remove_node(second, allow_graceful=False)
        time.sleep(1)
        cluster.add_node(**node)
    record = running.result()
print(json.dumps({"killed": killed, **record.counts}), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_is_killed_and_replaced(tiny_model, images, undisturbed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-c", _TWO_NODES, tiny_model, images, str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith('{"killed"'))  # a dying raylet says more
    counts = json.loads(line)
    assert counts["killed"], "the run ended before the node could be killed"
    assert counts["ok"] == IMAGES
    _same(_content(str(tmp_path), images), undisturbed)


FAULTS = {
    LISTING: Fault(slow_down=2, cut=1),
    "*/photos/0/*": Fault(slow_down=3),
    "*/photos/1/*": Fault(reset=3),
    "*/photos/2/*": Fault(cut=3),
    "*/photos/3/*": Fault(slow=2),
    "*/out/_work/*/pending-*": Fault(slow_down=1, reset=1),
    "*/out/_work/*": Fault(slow_down=4),
    "*/out/masks/*": Fault(slow_down=3),
    "*/out/transaction.json": Fault(slow_down=2, slow=1),
    "*/out/lease.json": Fault(slow_down=1, slow=1),
    "*/out/run.json": Fault(slow_down=1),
}


def test_a_store_that_refuses_breaks_off_and_dawdles(tiny_model, undisturbed, images, tmp_path, monkeypatch):
    """Which also rewrites the folder of photographs as a bucket: versions and places differ, masks do not."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    with LocalS3(tmp_path / "s3") as server:
        server.create_bucket("faulty")
        _write_photographs("s3://faulty/photos")
        with faulty_s3(server.endpoint, FAULTS) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            driver = _driver(tiny_model, "s3://faulty/photos", "s3://faulty/out")
            output, _ = driver.communicate()
            unused = proxy.unused()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        assert driver.returncode == 0, output
        assert not unused
        _same(_content("s3://faulty/out", "s3://faulty/photos"), undisturbed)
        record = read_record("s3://faulty/out")
        assert record is not None
        assert record.counts["ok"] == IMAGES
    assert images


def test_an_image_of_300_megapixels_beside_small_ones(tiny_model, ray_cluster, tmp_path):  # noqa: ARG001
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / "images" / f"{number}.png").write_bytes(_photograph(number))
    rows = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    (tmp_path / "images" / "large.png").write_bytes(encode_png(rows.repeat(100, axis=0).repeat(100, axis=1)))
    out = str(tmp_path / "out")
    record = segment(SegmentConfig(tiny_model, str(tmp_path / "images"), out, cpus_per_worker=1, batch_size=4))
    assert record.counts["ok"] == 9, record.results
    (large,) = (row for row in masks.read_masks(out).to_pylist() if row["image_uri"].endswith("large.png"))
    assert masks.decode(large).shape == (15_000, 20_000)
    assert sum(large["class_pixels"]) == 300_000_000


def test_thousands_of_tiny_images(tiny_model, ray_cluster, tmp_path):  # noqa: ARG001
    (tmp_path / "images").mkdir()
    for number in range(5000):
        (tmp_path / "images" / f"{number:04}.png").write_bytes(_photograph(number, side=8))
    out = str(tmp_path / "out")
    record = segment(SegmentConfig(tiny_model, str(tmp_path / "images"), out, cpus_per_worker=1, batch_size=32))
    assert record.counts["ok"] == 5000
    assert len(_content(out, str(tmp_path / "images"))) == 5000
    segment(SegmentConfig(out=out, compact=True))
    assert len(mask_store.files(out)) == 1
    assert len(_content(out, str(tmp_path / "images"))) == 5000
