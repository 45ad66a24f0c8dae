"""What befalls clusters, and what a training makes of it: nodes that go, storage that is away, disks that are full.

All of these take minutes: `make test-heavy`.
"""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from pipeline import storage
from pipeline.train_config import TrainConfig
from pipeline.train_loop import LOG_EVERY, NOTICED_EVERY
from pipeline.train_resources import ResourcesConfig
from pipeline.training import train
from tests.pipeline.faulty_s3 import OUTAGE, faulty_s3
from tests.pipeline.labelled_source import REPOSITORY
from tests.pipeline.training_runs import TRAIN_SCRIPT, await_checkpoint, config_of, weights, write_scenes

pytestmark = pytest.mark.heavy

TWO_WORKERS = ResourcesConfig(workers=2, cpus_per_worker=0.6)  # of which a node of one CPU holds but one
# It joins the tests' cluster, but its workers have another store, or another folder for what is temporary.
_JOIN = """
import json, os, ray
ray.init(runtime_env={"env_vars": json.loads(os.environ["OF_WORKERS"])}, log_to_driver=False)
"""


@pytest.fixture(scope="module")
def scenes(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: ARG001
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def train_on_two_nodes(config: TrainConfig, fault: str, folder: Path) -> dict:
    """The history of a run on a cluster of its own, to which `fault` of two_nodes.py happens."""
    file = folder / "config.pickle"
    file.write_bytes(pickle.dumps(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "tests.pipeline.two_nodes", str(file), fault]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{fault} has happened" in done.stdout, "the training ended before it could be disturbed"
    return storage.read_json(storage.join(config.run, "history.json"))


@pytest.fixture(scope="module")
def two_workers_undisturbed(scenes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    history = train_on_two_nodes(config_of(scenes, folder / "run", resources=TWO_WORKERS), "none", folder)
    assert history["starts"] == [{"iteration": 0, "workers": 2}]
    return folder / "run"


def test_a_killed_node_is_waited_for_and_the_weights_are_those_of_an_undisturbed_run(
    scenes: str, two_workers_undisturbed: Path, tmp_path: Path
) -> None:
    history = train_on_two_nodes(config_of(scenes, tmp_path / "run", resources=TWO_WORKERS), "replace", tmp_path)
    first, second = history["starts"]
    assert first == {"iteration": 0, "workers": 2}
    assert second["workers"] == 2
    assert second["iteration"] in (6, 12, 18, 24)
    assert weights(tmp_path / "run") == weights(two_workers_undisturbed)


def test_an_elastic_run_goes_on_with_the_workers_that_are_left(scenes: str, tmp_path: Path) -> None:
    elastic = ResourcesConfig(workers=2, min_workers=1, cpus_per_worker=0.6)
    config = config_of(scenes, tmp_path / "run", iterations=60, resources=elastic)
    history = train_on_two_nodes(config, "kill", tmp_path)
    first, second = history["starts"]
    assert first == {"iteration": 0, "workers": 2}
    assert second["workers"] == 1
    assert second["iteration"] % 6 == 0
    assert second["iteration"] > 0
    assert history["validation"][-1]["iteration"] == 60


def test_after_a_spot_notice_checkpoints_follow_each_other_until_the_node_goes(scenes: str, tmp_path: Path) -> None:
    config = config_of(
        scenes,
        tmp_path / "run",
        iterations=400,
        evaluate_every=400,
        checkpoint_every=111,  # no multiple of the iterations at which notices are looked for
        keep_checkpoints=99,
        resources=TWO_WORKERS,
    )
    train_on_two_nodes(config, "preempt", tmp_path)
    kept = list((tmp_path / "run" / "checkpoints").glob("checkpoint_*/state.pt"))
    iterations = sorted(torch.load(file, weights_only=True)["step"]["iteration"] for file in kept)
    noticed = [iteration for iteration in iterations if iteration not in (111, 222, 333, 400)]
    assert noticed[0] % LOG_EVERY == 0
    assert len(noticed) >= 3
    assert all(iteration % NOTICED_EVERY == 0 for iteration in noticed)


@pytest.fixture
def undisturbed(scenes: str, tmp_path: Path) -> Path:
    train(config_of(scenes, tmp_path / "undisturbed", iterations=60))
    return tmp_path / "undisturbed"


def test_a_minute_without_storage_is_waited_out(scenes: str, undisturbed: Path, bucket: str, tmp_path: Path) -> None:
    remote = storage.join(bucket, "dataset")
    storage.upload_folder(Path(scenes), remote)
    config = config_of(remote, storage.join(bucket, "run"), iterations=60)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], {}) as store:
        theirs = {"AWS_ENDPOINT_URL": store.endpoint}
        environment = {**os.environ, **theirs, "OF_WORKERS": json.dumps(theirs)}
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", _JOIN + TRAIN_SCRIPT, str(tmp_path / "config.pickle")]
        driver = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
        try:
            await_checkpoint(config.run, lambda: driver.poll() is None)
            store.down.set()
            time.sleep(60)
            store.down.clear()
            assert driver.wait(timeout=400) == 0
        finally:
            driver.kill()
            driver.wait()
    assert store.happened[OUTAGE] > 3
    history = storage.read_json(storage.join(config.run, "history.json"))
    assert [start["iteration"] for start in history["starts"]] == [0]
    assert weights(config.run) == weights(undisturbed)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 kB."""
    place = tmp_path / "full"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("whose", ["worker", "run"])
def test_a_full_disk_ends_the_training_with_one_sentence_and_more_space_lets_it_go_on(
    scenes: str, full_disk: Path, tmp_path: Path, whose: str
) -> None:
    run = full_disk if whose == "run" else tmp_path / "run"
    config = config_of(scenes, run, resources=ResourcesConfig(max_failures=0))
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    theirs = {"TMPDIR": str(full_disk)} if whose == "worker" else {}
    environment = {**os.environ, "OF_WORKERS": json.dumps(theirs)}
    environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", _JOIN + TRAIN_SCRIPT, str(tmp_path / "config.pickle")]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1
    assert "no space left on the device" in done.stderr
    assert not (run / "model").exists()
    subprocess.run(["mount", "-o", "remount,size=100m", str(full_disk)], check=True)
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "model" / "model.safetensors").exists()
