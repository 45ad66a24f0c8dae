"""Training on real Ray Train: killed and resumed it ends with the same weights, and workers share a batch exactly."""

import copy
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
import torch
import torch.distributed
from PIL import Image
from timm.utils.model_ema import ModelEmaV3

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.fit import EndForGood
from pipeline.lease import Held, Lease
from pipeline.parallel_model import shard, whole_model
from pipeline.run_record import read_record
from pipeline.storage_errors import StorageOutage
from pipeline.train_config import OptimizerConfig
from pipeline.train_resources import Parallelism, ResourcesConfig
from pipeline.train_step import TrainStep, mean_over_workers
from pipeline.training import train
from rssnet import LossConfig, RSSNet, RSSNetLoss
from rssnet.losses import alone
from tests.pipeline.labelled_source import REPOSITORY
from tests.pipeline.training_runs import (
    GUARDED_SCRIPT,
    MODEL,
    TRAIN_SCRIPT,
    await_checkpoint,
    config_of,
    weights,
    write_scenes,
)

pytestmark = pytest.mark.slow

_KILL_WORKER = """
import psutil, sys, time
from pathlib import Path
run, driver = Path(sys.argv[1]), psutil.Process(int(sys.argv[2]))
while not list(run.glob("checkpoints/checkpoint_manager_snapshot.json")):
    time.sleep(0.01)
processes = driver.children(recursive=True)
(worker,) = [process for process in processes if process.cmdline()[:1] == ["ray::RayTrainWorker"]]
worker.kill()
(run / "killed").touch()
"""


@pytest.fixture(scope="module")
def scenes(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: ARG001
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def undisturbed(scenes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody has killed."""
    run = tmp_path_factory.mktemp("undisturbed")
    record = train(config_of(scenes, run))
    assert record.counts == {"iterations": 24, "skipped": 0, "images": 12}
    return run


def test_a_run_leaves_its_curves_and_a_strip_of_pictures_for_each_validation(undisturbed: Path) -> None:
    history = storage.read_json(str(undisturbed / "history.json"))
    assert [point["iteration"] for point in history["training"]] == [1, 10, 20]
    assert [point["iteration"] for point in history["validation"]] == [12, 24]
    (events,) = (undisturbed / "tensorboard").iterdir()
    assert all(0 <= point["data_wait"] <= 1 for point in history["training"])
    for curve in (b"train/loss", b"train/lr", b"speed/data_wait_share", b"validation/miou"):
        assert curve in events.read_bytes()
    strips = sorted((undisturbed / "validation").iterdir())
    assert [strip.name for strip in strips] == ["0000012.png", "0000024.png"]
    for strip in strips:
        picture = np.asarray(Image.open(strip).convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_a_run_keeps_its_last_checkpoints_and_the_model_of_its_best_validation(undisturbed: Path) -> None:
    assert len(list((undisturbed / "checkpoints").glob("checkpoint_*/state.pt"))) == 2
    validation = storage.read_json(str(undisturbed / "history.json"))["validation"]
    best = max(validation, key=lambda found: (found["miou"], -found["iteration"]))["iteration"]
    (kept,) = (undisturbed / "best").iterdir()
    assert kept.name == f"{best:07}"
    same = (kept / "model.safetensors").read_bytes() == weights(undisturbed)
    assert same == (best == 24)
    RSSNet.from_pretrained(str(kept))


@pytest.mark.heavy
def test_a_killed_worker_is_replaced_and_the_weights_are_those_of_an_undisturbed_run(
    scenes: str, undisturbed: Path, tmp_path: Path
) -> None:
    killer = subprocess.Popen([sys.executable, "-c", _KILL_WORKER, str(tmp_path), str(os.getpid())], cwd=REPOSITORY)
    try:
        record = train(config_of(scenes, tmp_path))
    finally:
        killer.kill()
        killer.wait()
    assert (tmp_path / "killed").exists(), "the training ended before its worker was killed"
    assert record.outcome == "done"
    assert weights(tmp_path) == weights(undisturbed)


def test_after_a_killed_driver_the_same_command_goes_on_and_ends_with_the_same_weights(
    scenes: str, undisturbed: Path, bucket: str, tmp_path: Path
) -> None:
    config = config_of(scenes, bucket)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", TRAIN_SCRIPT, str(tmp_path / "config.pickle")]
    driver = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
    try:
        await_checkpoint(bucket, lambda: driver.poll() is None)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    record = read_record(bucket)
    assert record is not None
    assert record.outcome == "running"
    assert not storage.exists(storage.join(bucket, "model"))
    half = storage.join(bucket, "checkpoints", "checkpoint_of_a_killed_upload")
    storage.write_bytes(storage.join(half, "state.pt"), b"half")
    train(config)
    assert weights(bucket) == weights(undisturbed)
    assert not storage.exists(half)
    first, second = storage.read_json(storage.join(bucket, "history.json"))["starts"]
    assert (first["iteration"], second["iteration"] % 6) == (0, 0)
    assert second["iteration"] > 0


def test_a_training_whose_gradients_are_not_finite_ends_at_once_and_says_with_which_images(
    scenes: str, tmp_path: Path
) -> None:
    config = config_of(scenes, tmp_path, nonfinite_limit=3)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(lr=1e25, warmup_iterations=0))
    assert config.resources.max_failures > 0
    with pytest.raises(PipelineError, match="3 steps in a row, up to iteration") as caught:
        train(config)
    assert str(caught.value).endswith("lower optimizer.lr, or clip the gradient.")
    skipped = storage.read_json(str(tmp_path / "history.json"))["skipped"]
    assert len(skipped) == 3
    assert all(len(worker["images"]) == 2 for step in skipped for worker in step["workers"])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1, "the workers were started again"
    assert not (tmp_path / "model").exists()


def test_a_run_is_trained_by_one_process_at_a_time(scenes: str, tmp_path: Path) -> None:
    with Lease(str(tmp_path), "another", seconds=2), pytest.raises(Held, match="is held by run another"):
        train(config_of(scenes, tmp_path))
    assert read_record(str(tmp_path)) is None


def test_only_what_would_come_again_ends_a_training_at_once() -> None:
    ends = EndForGood()
    lost, outage = RuntimeError("a worker was lost"), StorageOutage("the store is away")
    ends.after_exception(None, {0: lost, 1: outage})  # both may go better another time
    wrapped = RuntimeError("in the training function")
    wrapped.__cause__ = PipelineError("Lower the rate.")
    with pytest.raises(PipelineError, match=r"Lower the rate\."):
        ends.after_exception(None, {0: lost, 1: wrapped})


def test_a_driver_that_is_asked_to_end_says_so_in_one_line(scenes: str, tmp_path: Path) -> None:
    config = config_of(scenes, tmp_path / "run")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", GUARDED_SCRIPT, str(tmp_path / "config.pickle")]
    driver = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("run/checkpoints/*")):  # which Ray Train makes before it has any
            assert driver.poll() is None
            assert time.monotonic() < deadline, "no training has begun"
            time.sleep(0.02)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=60)
    finally:
        driver.kill()
        driver.wait()
    assert (driver.returncode, said) == (130, "interrupted: run the same command again to go on\n")
    record = read_record(config.run)
    assert record is not None
    assert (record.outcome, record.error) == ("failed", "interrupted")


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images, each with other classes and another number of labelled pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 96, generator=generator)
    labels = torch.randint(0, 5, (4, 8, 12), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :40] = 255
    labels[1] = labels[1].clamp(max=1)
    labels[3, :, 90:] = 255
    return images, labels


def _steps_on_a_share(rank: int, workers: int, meeting: str, parallelism: str = "ddp") -> dict[str, Any]:
    """The state of a worker that has taken two plain steps on its share of one batch, and what it validates."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = RSSNet(dataclasses.replace(MODEL, num_classes=5, drop_path=0.0))
    parallel: torch.nn.Module = model
    average = ModelEmaV3(model, 0.9, foreach=parallelism == "ddp")
    if workers > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
        if parallelism == "fsdp":
            shard(model)
            shard(cast(RSSNet, average.module))
        else:
            parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    criterion = RSSNetLoss(LossConfig(separation_supervision=0.5), 5, mean_over_workers if workers > 1 else alone)
    step = TrainStep(model, parallel, criterion, optimizer, schedule, clip_grad_norm=1.0, average=average)
    images, labels = _batch()
    share = slice(rank * 4 // workers, (rank + 1) * 4 // workers)
    step(images[share], labels[share])
    state = copy.deepcopy(step.state_dict())
    step(images[share], labels[share])
    if workers > 1:  # taken up again from the state of the first worker, as after a crash
        states = [state]
        torch.distributed.broadcast_object_list(states)
        step.load_state_dict(states[0])
        step(images[share], labels[share])
    found = {
        "weights": whole_model(model).state_dict(),
        "average": whole_model(cast(RSSNet, average.module)).state_dict(),
    }
    if workers > 1:
        torch.distributed.destroy_process_group()
    return found


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_workers_take_the_step_that_one_takes_on_the_joined_batch(parallelism: str, tmp_path: Path) -> None:
    worker: Any = ray.remote(num_cpus=0.5)(_steps_on_a_share)
    one: dict[str, Any] = ray.get(worker.remote(0, 1, ""))
    meeting = str(tmp_path / "meeting")
    first, second = ray.get([worker.remote(rank, 2, meeting, parallelism) for rank in (0, 1)])
    torch.manual_seed(0)
    start = RSSNet(dataclasses.replace(MODEL, num_classes=5)).state_dict()
    assert any((one["weights"][name] - start[name]).abs().max() > 1e-3 for name in start)
    for kind, tensors in one.items():
        for name, expected in tensors.items():
            torch.testing.assert_close(first[kind][name], expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(first[kind][name], second[kind][name])


@pytest.mark.heavy
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_workers_train_and_validate_every_image_once(scenes: str, tmp_path: Path, parallelism: Parallelism) -> None:
    resources = ResourcesConfig(workers=2, cpus_per_worker=0.5, parallelism=parallelism)
    record = train(config_of(scenes, tmp_path, resources=resources))
    assert record.counts == {"iterations": 24, "skipped": 0, "images": 12}
    assert 0 <= record.results["aacc"] <= 1
    assert RSSNet.from_pretrained(str(tmp_path / "model")).classes is not None
    assert len(list((tmp_path / "checkpoints").glob("checkpoint_*/state.pt"))) == 2
