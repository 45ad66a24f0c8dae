"""A cluster of hosts with addresses of their own: jobs are submitted with a token, and a host's link is cut."""

import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from pipeline.cluster import LOCAL_ENVIRONMENT
from pipeline.street_scenes import write_street_scenes
from tests.workflows.conftest import ROOT, TRAIN
from tests.workflows.hosts import Hosts, why_not

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2400)]

BIN = Path(sys.executable).parent
PHOTOS = 400
START_SECONDS, JOB_SECONDS = 240.0, 1200.0

# What is put into the store, and what is read from it in the end, by a process on the head's host.
FILL = """
import sys, boto3, pathlib
from pipeline import storage
boto3.client("s3").create_bucket(Bucket="test")
storage.upload_folder(pathlib.Path(sys.argv[1]), "s3://test/tiny")
"""
READ = """
import json
from pipeline.masks import read_masks
rows = read_masks("s3://test/masks").to_pylist()
print(json.dumps([[row["image_uri"], row["status"]] for row in rows]))
"""
COUNT_NODES = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print("alive", sum(node["Alive"] for node in ray.nodes()))
"""


@contextmanager
def cluster(folder: Path) -> Iterator[Hosts]:
    """A store, a head on which no tasks run, and two workers, behind a token."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environment = kept | {
        **LOCAL_ENVIRONMENT,
        "HOME": str(folder),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # How long a task may seem to run on a host that has gone silent; Ray asks after five minutes by default.
        "RAY_grpc_client_keepalive_time_ms": "70000",
        "RAY_grpc_client_keepalive_timeout_ms": "20000",
        "AWS_ENDPOINT_URL": "http://10.77.0.4:5000",
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "*",
    }
    # A short path, for the names of sockets are below it.
    with (
        tempfile.TemporaryDirectory(prefix="rn", dir="/tmp") as short,
        Hosts(["head", "one", "two", "store"], environment) as hosts,
    ):
        address = hosts.addresses["head"]
        hosts.start("store", ["moto_server", "-H", hosts.addresses["store"], "-p", "5000"], folder / "store.log")
        node = ["ray", "start", "--block", "--object-store-memory", str(200 * 2**20)]
        head = ["--head", "--port", "6379", "--dashboard-host", address, "--num-cpus", "0", "--temp-dir", short]
        hosts.start("head", [*node, *head, "--node-ip-address", address], folder / "head.log")
        wait_for_nodes(hosts, 1)
        for number, name in enumerate(("one", "two"), start=2):
            own = ["--address", f"{address}:6379", "--node-ip-address", hosts.addresses[name], "--num-cpus", "3"]
            hosts.start(name, [*node, *own], folder / f"{name}.log")
            # One after the other: Ray numbers its sockets by those that it finds in the folder, which they share.
            wait_for_nodes(hosts, number)
        yield hosts


def wait_for_nodes(hosts: Hosts, number: int) -> None:
    until = time.monotonic() + START_SECONDS
    said = ""
    while f"alive {number}" not in said:
        assert time.monotonic() < until, said
        time.sleep(1)
        said = hosts.run(
            "head", ["python", "-c", COUNT_NODES, f"{hosts.addresses['head']}:6379"], timeout=START_SECONDS
        ).stdout


def submitted(hosts: Hosts, workflow: str, *arguments: str) -> list[str]:
    address = f"http://{hosts.addresses['head']}:8265"
    command = ["ray", "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", "python"]
    return [*command, f"workflows/{workflow}.py", *arguments]


def write_inputs(folder: Path) -> None:
    """Labelled scenes, a configuration, and many photographs, which are the same few under many names."""
    write_street_scenes(folder, train=8, val=2, photos=4, size=(96, 128))
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    scenes = sorted(path for path in (folder / "photos").rglob("*") if path.is_file())
    for number in range(PHOTOS - len(scenes)):
        scene = scenes[number % len(scenes)]
        (folder / "photos" / f"again-{number:03}{scene.suffix}").write_bytes(scene.read_bytes())


def cut_in_the_middle(hosts: Hosts, host: str, log: Path) -> int:
    """Cut a host's link once some images are done; how many."""
    until = time.monotonic() + JOB_SECONDS
    while time.monotonic() < until:
        done = [int(number) for number in re.findall(rf"segment: (\d+)/{PHOTOS} images", log.read_text("utf-8"))]
        if done and done[-1] > 0:
            hosts.cut(host)
            return done[-1]
        time.sleep(0.5)
    raise AssertionError(f"nothing is segmented: {log.read_text('utf-8')}")


def test_a_host_whose_link_is_cut_takes_no_image_with_it(tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    write_inputs(tmp_path / "tiny")
    with cluster(tmp_path) as hosts:
        filled = hosts.run("head", ["python", "-c", FILL, str(tmp_path / "tiny")], START_SECONDS)
        assert filled.returncode == 0, filled.stdout

        without = dict(hosts.environment)
        hosts.environment.pop("RAY_AUTH_TOKEN_PATH")
        refused = hosts.run("head", submitted(hosts, "segment", "--help"), START_SECONDS)
        hosts.environment = without
        assert refused.returncode != 0
        assert "token" in refused.stdout.lower()

        stages = {
            "ingest": ["--source", "s3://test/tiny/labelled", "--dataset", "s3://test/set"],
            "train": ["--config", "s3://test/tiny/train.yaml", "--dataset", "s3://test/set", "--run", "s3://test/run"],
        }
        for workflow, arguments in stages.items():
            done = hosts.run("head", submitted(hosts, workflow, *arguments), JOB_SECONDS)
            assert done.returncode == 0, done.stdout[-5000:]

        log = tmp_path / "segment.log"
        places = ["--model", "s3://test/run/model", "--images", "s3://test/tiny/photos", "--out", "s3://test/masks"]
        job = hosts.start("head", submitted(hosts, "segment", *places, "--workers", "2", "--batch_size", "1"), log)
        done_before = cut_in_the_middle(hosts, "one", log)
        assert done_before < PHOTOS, "the link was cut too late to harm"
        assert job.wait(JOB_SECONDS) == 0, log.read_text("utf-8")[-5000:]
        wait_for_nodes(hosts, 2)  # the other one is lost indeed

        read = hosts.run("head", ["python", "-c", READ], START_SECONDS)
        rows = json.loads(read.stdout.strip().splitlines()[-1])
        print(f"{done_before} of {PHOTOS} images were done when the link was cut; {len(rows)} rows in the end")
        assert len(rows) == len({uri for uri, _ in rows}) == PHOTOS
        assert {status for _, status in rows} == {"ok"}
