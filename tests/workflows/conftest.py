"""A tiny chain: a few small street scenes on the local S3, and configurations that train on them in seconds."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipeline import storage
from pipeline.street_scenes import write_street_scenes
from tests.workflows.ray_head import Head

ROOT = Path(__file__).parents[2]

TRAIN = {
    "model": {"backbone": "vit_tiny_patch16_224", "backbone_options": {"depth": 2}, "image_size": [64, 96]},
    "optimizer": {"lr": 1e-3, "warmup_iterations": 1},
    "iterations": 4,
    "batch_size": 4,
    "evaluate_every": 2,
    "checkpoint_every": 2,
}
SWEEP = {
    "fixed": {"iterations": 2},
    "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
    "trials": 2,
    "grace_iterations": 1,
}


@dataclass(frozen=True)
class TinyChain:
    """Where the tiny chain's inputs lie."""

    labelled: str
    photos: str
    train: str
    sweep: str
    photographs: int
    pairs: int


@pytest.fixture(scope="session")
def tiny(s3: None, tmp_path_factory: pytest.TempPathFactory) -> TinyChain:  # noqa: ARG001 - its URLs are s3://
    """12 + 4 labelled street scenes and 5 photographs of 96 x 128 pixels, and two configurations, all on S3."""
    folder = tmp_path_factory.mktemp("scenes")
    write_street_scenes(folder, train=12, val=4, photos=5, size=(96, 128))
    place = "s3://test/tiny"
    storage.upload_folder(folder, place)
    chain = TinyChain(f"{place}/labelled", f"{place}/photos", f"{place}/train.yaml", f"{place}/sweep.yaml", 5, 16)
    storage.write_bytes(chain.train, yaml.safe_dump(TRAIN).encode())
    storage.write_bytes(chain.sweep, yaml.safe_dump({"base": chain.train, **SWEEP}).encode())
    return chain


@dataclass(frozen=True)
class Finished:
    """What a finished command has said."""

    code: int
    output: str
    errors: str


Run = Callable[..., Finished]


@pytest.fixture(scope="session")
def run_script(s3: None) -> Run:  # noqa: ARG001 - the scripts inherit the server's environment
    """Run a workflow as a person would: `run_script("ingest", "--source", ...)`."""

    def run(workflow: str, *arguments: str) -> Finished:
        command = [sys.executable, f"workflows/{workflow}.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


def chain_commands(tiny: TinyChain, root: str) -> dict[str, list[str]]:
    """The arguments of each workflow, in order, for a chain below `root`."""
    dataset, run, model = f"{root}/dataset", f"{root}/run", f"{root}/run/model"
    return {
        "ingest": ["--source", tiny.labelled, "--dataset", dataset],
        "train": ["--config", tiny.train, "--dataset", dataset, "--run", run],
        "evaluate": ["--model", model, "--dataset", dataset, "--out", f"{run}/eval"],
        "sweep": ["--config", tiny.sweep, "--dataset", dataset, "--run", f"{root}/sweep"],
        "segment": ["--model", model, "--images", tiny.photos, "--out", f"{root}/masks"],
    }


@pytest.fixture(scope="session")
def head(s3: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:  # noqa: ARG001
    """A running head; its processes are ended by their own parent, no other Ray on the machine is touched."""
    node = Head(tmp_path_factory.mktemp("home"))
    process = node.start()
    try:
        node.wait(process, 120)
        yield node
    finally:
        node.stop(process)
