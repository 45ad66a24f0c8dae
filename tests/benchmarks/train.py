"""What a training costs beside its steps: waiting for data, the trainer around the steps, checkpoints, bytes read.

    python -m tests.benchmarks.train --data /path/to/camvid

The bare loop takes the same steps of the same model, on as many processes that share gradients in the same way, over
one batch that it has in memory. The trainer's rate is that of all its time, validations left out; the first steps do
not count. On a machine with as many workers as cores, decoding takes its share of the same cores: the table says how
much of one that is.
"""

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed
from torch import multiprocessing

from pipeline import dataset, storage
from pipeline.cluster import connected
from pipeline.images import decode_label, decode_photograph
from pipeline.ingest import IngestConfig, ingest
from pipeline.local_s3 import LocalS3
from pipeline.sample_stream import plan_windows, sample_batches
from pipeline.train_config import OptimizerConfig, TrainConfig, completed
from pipeline.train_loop import LOG_EVERY
from pipeline.train_parts import build_optimizer
from pipeline.train_resources import ResourcesConfig
from pipeline.train_step import TrainStep, mean_over_workers
from pipeline.training import train
from pipeline.transforms import Augmentation
from rssnet import RSSNet, RSSNetConfig, RSSNetLoss
from rssnet.losses import alone
from tests.benchmarks.machine import describe, results_file
from tests.pipeline.faulty_s3 import faulty_s3

WARM = 10  # steps that do not count
STEPS = 60  # that do
CHECKPOINT_EVERY = 30
CHECKPOINTS = 5
NEVER = 10**9


def config_of(data: str, run: str, workers: int, checkpoint_every: int = NEVER, device: str = "cpu") -> TrainConfig:
    """A small ViT on windows of 224 x 224 pixels; on a GPU a large one at 512 x 512."""
    on_gpu = device == "cuda"
    backbone = "vit_large_patch16_224" if on_gpu else "vit_small_patch16_224"
    return TrainConfig(
        dataset=data,
        run=run,
        model=RSSNetConfig(backbone=backbone, image_size=512 if on_gpu else 224),
        optimizer=OptimizerConfig(warmup_iterations=10),
        iterations=WARM + STEPS,
        batch_size=8 if on_gpu else 2 * workers,
        precision="bf16" if on_gpu else "fp32",
        evaluate_every=NEVER,
        checkpoint_every=checkpoint_every,
        resources=ResourcesConfig(workers=workers, use_gpu=on_gpu, cpus_per_worker=0.6 if workers > 1 else 1.0),
    )


def bare_loop(rank: int, config: TrainConfig, meeting: str, results: Any) -> None:
    """Steps on one batch in memory: one process of as many as there are workers."""
    workers = config.resources.workers
    device = torch.device("cuda" if config.resources.use_gpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    data = dataset.open(config.dataset)
    config = completed(config, data)
    torch.manual_seed(0)
    model = RSSNet(config.model, data.classes).to(device)
    parallel: torch.nn.Module = model
    if workers > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
    criterion = RSSNetLoss(config.loss, len(data.classes), mean_over_workers if workers > 1 else alone).to(device)
    step = TrainStep(model, parallel, criterion, *build_optimizer(model, config), precision=config.precision)
    share = config.batch_size // workers
    rows = data.chunks(config.train_split)[0].read(["image", "label"]).to_pylist()[rank * share : (rank + 1) * share]
    augment = Augmentation(config.augmentation, config.model.image_hw, (0, 0, 0))
    pairs = [augment(decode_photograph(row["image"]), decode_label(row["label"]), 0) for row in rows]
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).to(device)
    labels = torch.from_numpy(np.stack([label for _, label in pairs])).to(device).long()
    started = 0.0
    for number in range(WARM + STEPS):
        if number == WARM:
            started = time.perf_counter()
        step(images.float() / 127.5 - 1, labels)
    if rank == 0:
        results.put(config.batch_size * STEPS / (time.perf_counter() - started))


def bare_rate(config: TrainConfig) -> float:
    """Images per second of the bare loop."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (config, f"{folder}/meeting", results)
        multiprocessing.spawn(bare_loop, arguments, nprocs=config.resources.workers)  # pyright: ignore[reportPrivateImportUsage]
    return float(results.get())


def decode_seconds(data: str, config: TrainConfig) -> float:
    """Of one core, for an image and its label: decoding and augmentation."""
    torch.set_num_threads(1)
    rows = dataset.open(data).chunks("train")[0].read(["image", "label"]).to_pylist()
    augment = Augmentation(config.augmentation, config.model.image_hw, (0, 0, 0))
    started = time.perf_counter()
    for row in rows:
        augment(decode_photograph(row["image"]), decode_label(row["label"]), 0)
    return (time.perf_counter() - started) / len(rows)


def trained(config: TrainConfig) -> tuple[float, float]:
    """Images per second of a training, and the share of its steps that it waited for data, once it is warm."""
    train(config)
    points = storage.read_json(storage.join(config.run, "history.json"))["training"]
    warm = [point for point in points if point["iteration"] >= WARM]
    steps = warm[-1]["iteration"] - warm[0]["iteration"]
    rate = config.batch_size * steps / (warm[-1]["time"] - warm[0]["time"])
    return rate, float(np.mean([point["data_wait"] for point in warm[1:]]))


def checkpoint_seconds(config: TrainConfig) -> tuple[float, float]:
    """What a checkpoint costs, and a step without one: of one run, in which the steps beside checkpoints are compared
    with those between them, so that both have the same machine.
    """
    train(dataclasses.replace(config, iterations=CHECKPOINT_EVERY * (CHECKPOINTS + 1)))
    points = storage.read_json(storage.join(config.run, "history.json"))["training"]
    spans = {False: [], True: []}  # seconds of LOG_EVERY iterations, by whether they begin with a checkpoint
    for first, last in itertools.pairwise(point for point in points if point["iteration"] >= WARM):
        spans[first["iteration"] % CHECKPOINT_EVERY == 0].append(last["time"] - first["time"])
    assert len(spans[True]) == CHECKPOINTS
    return float(np.mean(spans[True]) - np.mean(spans[False])), float(np.mean(spans[False])) / LOG_EVERY


def stream_rate(data: str, config: TrainConfig, ahead: int) -> float:
    """Images per second of the sample stream alone, with crops of 512 x 512 pixels, once it is warm."""
    opened, batch_size = dataset.open(data), 4
    augment = Augmentation(config.augmentation, (512, 512), (0, 0, 0))
    windows = plan_windows(opened.chunks("train"), 0, (0, 1), 0, 2 * opened.split("train").rows)
    batches = sample_batches(windows, augment, 0, batch_size, ahead)
    for _ in itertools.islice(batches, 20):
        pass
    started = time.perf_counter()
    count = sum(len(batch["image"]) for batch in itertools.islice(batches, 100))
    return count / (time.perf_counter() - started)


def bytes_of_an_epoch(source: str) -> tuple[int, int, int]:
    """Bytes of the training split's files, those that one epoch over S3 has fetched of them, and row groups."""
    with LocalS3(Path(tempfile.mkdtemp())) as server:
        server.create_bucket("bench")
        storage.upload_folder(Path(source), "s3://bench/set")
        data = dataset.open("s3://bench/set")
        files = {f"bench/set/{name}": info for name, info in data.split("train").files.items()}
        size = sum(storage.stat(f"s3://{name}").size for name in files)
        with faulty_s3(os.environ["AWS_ENDPOINT_URL"], {}) as proxy:
            environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
            command = [sys.executable, "-m", "tests.benchmarks.train", "--epoch", "s3://bench"]
            subprocess.run(command, env=environment, check=True)
            return size, sum(proxy.served[name] for name in files), len(data.chunks("train"))


def one_epoch(bucket: str) -> None:
    """A training that sees each image of the training split once."""
    images = dataset.open(f"{bucket}/set").split("train").rows
    config = config_of(f"{bucket}/set", f"{bucket}/epoch", workers=1)
    model = RSSNetConfig(
        backbone="vit_tiny_patch16_224",
        backbone_options={"depth": 1, "embed_dim": 48, "num_heads": 3},
        image_size=64,
        decoder_width=16,
    )
    resources = config.resources
    train(TrainConfig(**{**vars(config), "model": model, "iterations": images // 2, "resources": resources}))


def camvid_of(source: Path, folder: Path) -> str:
    """CamVid with a single photograph to validate on, for validation is not what is measured."""
    for name in ("train", "trainannot", "val", "valannot"):
        (folder / name).mkdir(parents=True)
        files = sorted((source / name).iterdir())
        for file in files if name.startswith("train") else files[:1]:
            (folder / name / file.name).symlink_to(file)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the CamVid folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--epoch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epoch:
        one_epoch(arguments.epoch)
        return
    if not arguments.data:
        parser.error("--data is missing: the CamVid folder")
    device = torch.device(arguments.device)
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder, connected():
        data = f"{folder}/set"
        ingest(IngestConfig(camvid_of(arguments.data.resolve(), Path(folder) / "source"), data))
        for workers in (1,) if device.type == "cuda" else (1, 2):
            of = partial(config_of, data, workers=workers, device=arguments.device)
            bare = bare_rate(of(run=f"{folder}/none"))
            rate, waited = trained(of(run=f"{folder}/plain{workers}"))
            decoding = decode_seconds(data, of(run="")) * rate
            rows.append(f"| {workers} | {bare:.2f} | {rate:.2f} | {rate / bare:.2f} | {waited:.1%} | {decoding:.2f} |")
            print(rows[-1], flush=True)
        of = partial(config_of, data, workers=1, device=arguments.device)
        cost, step = checkpoint_seconds(of(run=f"{folder}/kept", checkpoint_every=CHECKPOINT_EVERY))
        rates = [f"{stream_rate(data, of(run=''), ahead):.0f} images/s with {ahead}" for ahead in (1, 2)]
        size, fetched, groups = (0, 0, 0) if device.type == "cuda" else bytes_of_an_epoch(data)
    header = "\n".join(f"- {name}: {value}" for name, value in describe(device).items())
    model = "ViT-L at 512 x 512, bf16" if device.type == "cuda" else "ViT-S at 224 x 224, fp32, one thread each"
    text = f"""# Training

{header}
- ray: {ray.__version__}
- model: {model}; {STEPS} steps after {WARM}; CamVid

| workers | bare loop, images/s | trainer, images/s | trainer over bare | waiting for data | cores that decode |
|---|---|---|---|---|---|
{chr(10).join(rows)}

A checkpoint, to the disk of this machine, costs {cost:.2f} s of the step loop, where a step takes {step:.2f} s: \
{cost / (50 * step):.1%} of throughput at every 50 steps. One worker, {CHECKPOINTS} checkpoints; the {LOG_EVERY} steps \
after each beside all others of the same run.

The sample stream alone, crops of 512 x 512: {", ".join(rates)} task(s) that decode at a time.
"""
    if size:
        text += f"""
One epoch over S3 fetches {fetched:,} bytes of the {size:,} that the training split's files have: {fetched / size:.3f} \
times each, in {groups} row groups.
"""
    results_file("train", device, ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
