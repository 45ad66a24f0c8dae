"""Trainings of a tiny model on street scenes, for the tests that disturb them."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import dataset, storage
from pipeline.augmentation_config import AugmentationConfig
from pipeline.dataset import SCHEMA, DatasetInfo, SplitInfo
from pipeline.images import encode_png
from pipeline.parquet_files import write_table
from pipeline.street_scenes import NAMES, PALETTE, draw_scene
from pipeline.train_config import OptimizerConfig, TrainConfig
from rssnet import RSSNetConfig

MODEL = RSSNetConfig(
    backbone="vit_tiny_patch16_224",
    backbone_options={"depth": 2, "embed_dim": 48, "num_heads": 3},
    image_size=(64, 96),
    decoder_width=16,
    drop_path=0.2,
)
TRAIN_SCRIPT = """
import pickle, sys
from pipeline.training import train
train(pickle.load(open(sys.argv[1], "rb")))
"""
# As a workflow does it: with one line for whatever goes wrong, and an exit code.
GUARDED_SCRIPT = """
import pickle, sys
from pipeline.command_line import guarded
from pipeline.training import train
raise SystemExit(guarded(lambda: train(pickle.load(open(sys.argv[1], "rb")))))
"""


def write_scenes(folder: Path) -> str:
    """A dataset of 12 + 5 street scenes of 96 x 128 pixels, in files of at most four."""
    splits = {}
    for name, seeds in (("train", range(12)), ("val", range(12, 17))):
        scenes = [draw_scene(seed, (96, 128)) for seed in seeds]
        rows = [
            {
                "image_id": f"{name}/{seed}",
                "image": encode_png(scene.image),
                "label": encode_png(scene.label),
                "height": 96,
                "width": 128,
                "source_uri": f"{seed}.png",
            }
            for seed, scene in zip(seeds, scenes, strict=True)
        ]
        files = {f"{name}/part-{begin}.parquet": rows[begin : begin + 4] for begin in range(0, len(rows), 4)}
        for path, part in files.items():
            write_table(storage.join(str(folder), path), pa.Table.from_pylist(part, schema=SCHEMA))
        pixels = np.bincount(np.concatenate([scene.label.ravel() for scene in scenes]), minlength=256)
        counts = pixels[: len(NAMES)].tolist()
        splits[name] = SplitInfo(len(rows), len(rows), counts, {path: len(part) for path, part in files.items()})
    colours = [list(colour) for colour in PALETTE]
    dataset.write_info(str(folder), DatasetInfo(list(NAMES), colours, splits, 0, "drawn", "folders", "0" * 64))
    return str(folder)


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


def weights(run: Path | str) -> bytes:
    return storage.read_bytes(storage.join(str(run), "model", "model.safetensors"))


def has_checkpoint(run: str) -> bool:
    """Whether Ray Train has written down that there is a checkpoint."""
    return storage.exists(storage.join(run, "checkpoints", "checkpoint_manager_snapshot.json"))


def await_checkpoint(run: str, while_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not has_checkpoint(run):
        assert while_true(), "the training ended before it could be disturbed"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
