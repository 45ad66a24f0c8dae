"""Training on real Ray Train: killed and resumed it ends with the same weights, and workers share a batch exactly."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed
from PIL import Image

from pipeline import storage
from pipeline.errors import PipelineError, mendable_cause
from pipeline.ingest import IngestConfig, ingest
from pipeline.run_record import read_record
from pipeline.street_scenes import write_street_scenes
from pipeline.train_step import TrainStep, mean_over_workers
from pipeline.training import AugmentationConfig, OptimizerConfig, ResourcesConfig, TrainConfig, train
from rssnet import LossConfig, RSSNet, RSSNetConfig, RSSNetLoss
from rssnet.losses import alone
from tests.pipeline.labelled_source import REPOSITORY

pytestmark = pytest.mark.slow

MODEL = RSSNetConfig(
    backbone="vit_tiny_patch16_224",
    backbone_options={"depth": 2, "embed_dim": 48, "num_heads": 3},
    image_size=(64, 96),
    decoder_width=16,
    drop_path=0.2,
)
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
_TRAIN = """
import pickle, sys
from pipeline.training import train
train(pickle.load(open(sys.argv[1], "rb")))
"""


@pytest.fixture(scope="module")
def scenes(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: ARG001
    """A dataset of 12 + 5 street scenes of 96 x 128 pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    write_street_scenes(folder, train=12, val=5, photos=0, size=(96, 128))
    ingest(IngestConfig(str(folder / "labelled"), str(folder / "dataset")))
    return str(folder / "dataset")


def config_of(scenes: str, run: Path | str, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        dataset=scenes,
        run=str(run),
        model=MODEL,
        optimizer=OptimizerConfig(lr=1e-3, warmup_iterations=2, clip_grad_norm=1.0, ema_decay=0.9),
        augmentation=AugmentationConfig(scale=(0.7, 1.3)),
        iterations=24,
        batch_size=2,
        evaluate_every=12,
        checkpoint_every=6,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def undisturbed(scenes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody has killed."""
    run = tmp_path_factory.mktemp("undisturbed")
    record = train(config_of(scenes, run))
    assert record.counts == {"iterations": 24, "skipped": 0, "images": 12}
    return run


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def await_checkpoint(run: Path, while_true: Callable[[], bool]) -> None:
    """Until Ray Train has written down that there is a checkpoint."""
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "checkpoint_manager_snapshot.json").exists():
        assert while_true(), "the training ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


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
    scenes: str, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config_of(scenes, run)))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", _TRAIN, str(tmp_path / "config.pickle")]
    driver = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
    try:
        await_checkpoint(run, lambda: driver.poll() is None)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    record = read_record(str(run))
    assert record is not None
    assert record.outcome == "running"
    assert not (run / "model").exists()
    half = run / "checkpoints" / "checkpoint_of_a_killed_upload"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    train(config_of(scenes, run))
    assert weights(run) == weights(undisturbed)
    assert not half.exists()


def test_a_training_whose_gradients_are_not_finite_ends_and_says_with_which_images(scenes: str, tmp_path: Path) -> None:
    config = config_of(scenes, tmp_path, nonfinite_limit=3, resources=ResourcesConfig(max_failures=0))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(lr=1e25, warmup_iterations=0))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - what Ray wraps it in is not ours
        train(config)
    error = mendable_cause(caught.value)
    assert isinstance(error, PipelineError)
    assert "3 steps in a row, up to iteration" in str(error)
    assert str(error).endswith("lower optimizer.lr, or clip the gradient.")
    skipped = storage.read_json(str(tmp_path / "history.json"))["skipped"]
    assert len(skipped) == 3
    assert all(len(worker["images"]) == 2 for step in skipped for worker in step["workers"])
    assert not (tmp_path / "model").exists()


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images, each with other classes and another number of labelled pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 96, generator=generator)
    labels = torch.randint(0, 5, (4, 8, 12), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :40] = 255
    labels[1] = labels[1].clamp(max=1)
    labels[3, :, 90:] = 255
    return images, labels


def _steps_on_a_share(rank: int, workers: int, meeting: str) -> dict[str, torch.Tensor]:
    """The weights of a worker that has taken two plain steps on its share of one batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = RSSNet(dataclasses.replace(MODEL, num_classes=5, drop_path=0.0))
    parallel: torch.nn.Module = model
    if workers > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    criterion = RSSNetLoss(LossConfig(separation_supervision=0.5), 5, mean_over_workers if workers > 1 else alone)
    step = TrainStep(model, parallel, criterion, optimizer, schedule)
    images, labels = _batch()
    share = slice(rank * 4 // workers, (rank + 1) * 4 // workers)
    for _ in range(2):
        step(images[share], labels[share])
    if workers > 1:
        torch.distributed.destroy_process_group()
    return step.model.state_dict()


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_take_the_step_that_one_takes_on_the_joined_batch(tmp_path: Path) -> None:
    worker = ray.remote(num_cpus=0.5)(_steps_on_a_share)
    one = ray.get(worker.remote(0, 1, ""))
    first, second = ray.get([worker.remote(rank, 2, str(tmp_path / "meeting")) for rank in (0, 1)])
    torch.manual_seed(0)
    start = RSSNet(dataclasses.replace(MODEL, num_classes=5)).state_dict()
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in start)
    for name, expected in one.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[name], second[name])


@pytest.mark.heavy
def test_two_workers_train_and_validate_every_image_once(scenes: str, tmp_path: Path) -> None:
    resources = ResourcesConfig(workers=2, cpus_per_worker=0.5)
    record = train(config_of(scenes, tmp_path, iterations=2, resources=resources))
    assert record.counts == {"iterations": 2, "skipped": 0, "images": 12}
    assert 0 <= record.results["aacc"] <= 1
