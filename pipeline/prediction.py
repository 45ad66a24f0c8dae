"""A saved model as a predictor on a Ray worker: loading, its identity, and the pool of workers that hold one each."""

import functools
import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from pipeline import storage
from pipeline.cluster import IO_TASK_CPUS, require_capacity
from pipeline.errors import PipelineError
from pipeline.run_record import identity
from rssnet import RSSNet
from rssnet.classes import Classes
from rssnet.inference import Predictor
from rssnet.serialization import CLASSES, CONFIG, WEIGHTS

_INFERENCE = "inference.json"


@dataclass(frozen=True)
class InferenceConfig:
    """How a model is applied to whole images. See `rssnet.inference.Predictor`.

    What is not given is as the model's training validated with, which lies beside the model in `inference.json`.

    Args:
        crop_size: height and width of the sliding window, in pixels; where training gave none, the model's image size.
        stride: from one window to the next, in pixels; where training gave none, two thirds of the crop.
        window_batch: windows in one forward pass. Changes speed and memory, not the masks.
        scales: the probabilities at these scales of the image are averaged; where training gave none, 1 alone.
        flip: average with the mirrored image too; where training did not say, no.
    """

    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    window_batch: int = field(default=8, metadata={"identity": False})
    scales: tuple[float, ...] | None = None
    flip: bool | None = None


def write_inference(folder: Path, inference: InferenceConfig) -> None:
    """Keep the settings that a model was validated with in its folder."""
    (folder / _INFERENCE).write_text(json.dumps(identity(inference), indent=2) + "\n")


def inference_of(model_url: str, inference: InferenceConfig) -> InferenceConfig:
    """The settings with those that are not given taken from the model's folder, where it has any.

    Raises:
        PipelineError: if what lies there is no such settings.
    """
    try:
        saved = storage.read_json(storage.join(model_url, _INFERENCE))
    except FileNotFoundError:
        return inference
    except ValueError as error:
        raise PipelineError(f"The model at {model_url} has a broken {_INFERENCE}: {error}") from error
    known = identity(InferenceConfig())
    if not isinstance(saved, dict) or not saved.keys() <= known.keys():
        raise PipelineError(
            f"The model at {model_url} has a broken {_INFERENCE}: it must have no fields but {', '.join(known)}."
        )
    missing = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    given = {name: value for name in known if (value := getattr(inference, name)) is not None}
    return replace(inference, **{**missing, **given})


def model_id(model_url: str, inference: InferenceConfig) -> str:
    """Short digest of what the masks depend on: weights, model configuration, classes and inference settings.

    The same model copied to another place keeps its id.

    Raises:
        PipelineError: if there is no model at `model_url`.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, CLASSES, WEIGHTS):
        digest.update(hashlib.sha256(_model_file(model_url, name)).digest())
    digest.update(json.dumps(identity(inference_of(model_url, inference)), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def model_classes(model_url: str) -> Classes:
    """Names and colours of a saved model's classes, without loading its weights.

    Raises:
        PipelineError: if there is no model at `model_url`, or its classes cannot be understood.
    """
    try:
        return Classes.from_json(_model_file(model_url, CLASSES).decode())
    except ValueError as error:
        raise PipelineError(f"The model at {model_url} has a broken {CLASSES}: {error}") from error


def load_predictor(model_url: str, inference: InferenceConfig) -> Predictor:
    """The model as a predictor: on the GPU that Ray has given to this worker, else on as many threads as it gave CPUs.

    Outside Ray's workers it runs on the CPU, with as many threads as torch has been told to use.

    Raises:
        PipelineError: if there is no model at `model_url`, it is broken, or it refuses the inference settings.
    """
    resources: dict[str, float] = {}
    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        resources = ray.get_runtime_context().get_assigned_resources()
        torch.set_num_threads(max(1, math.ceil(resources.get("CPU", 1))))
    try:
        model = RSSNet.from_pretrained(model_url)
        model = model.eval().to("cuda" if resources.get("GPU") else "cpu")
        return predictor_of(model, inference_of(model_url, inference))
    except (ValueError, OSError) as error:
        raise PipelineError(f"The model at {model_url} cannot be used: {error}") from error


def predictor_of(model: RSSNet, inference: InferenceConfig) -> Predictor:
    """A model in memory as a predictor; ValueError for settings that it refuses."""
    return Predictor(
        model,
        crop_size=inference.crop_size,
        stride=inference.stride,
        window_batch=inference.window_batch,
        scales=(1.0,) if inference.scales is None else inference.scales,
        flip=bool(inference.flip),
    )


class PredictorActor:
    """Base of what a pool of actors runs: a predictor that is loaded with the first batch.

    Not when the actor starts: Ray passes on the cause of a failing call, but of a failing constructor only its text,
    and a broken model would end in a traceback instead of its one sentence.
    """

    def __init__(self, model_url: str, inference: InferenceConfig) -> None:
        self.model_url, self.inference = model_url, inference

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The model, on this worker's device."""
        return load_predictor(self.model_url, self.inference)


def predictor_pool(workers: int, cpus_per_worker: float, use_gpu: bool, batch_size: int) -> dict[str, Any]:
    """The arguments of `Dataset.map_batches` for a fixed number of actors that hold a predictor each.

    Raises:
        PipelineError: if a number is out of range, or this machine can never hold them beside the task that feeds them.
            A cluster that was joined by its address may still grow, so there the wait is announced instead.
    """
    if workers < 1 or cpus_per_worker <= 0 or batch_size < 1:
        raise PipelineError(
            f"workers is {workers}, cpus_per_worker is {cpus_per_worker} and batch_size is {batch_size}: "
            "give at least 1, more than 0, and at least 1."
        )
    require_capacity(
        cpus=workers * cpus_per_worker + IO_TASK_CPUS,
        gpus=workers if use_gpu else 0,
        what=f"{workers} workers and what feeds them",
        remedy="lower workers or cpus_per_worker, or join a larger cluster",
    )
    return {
        "compute": ray.data.ActorPoolStrategy(size=workers),
        "num_cpus": cpus_per_worker,
        "num_gpus": 1 if use_gpu else 0,
        "batch_size": batch_size,
    }


def _model_file(model_url: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(model_url, name))
    except FileNotFoundError as error:
        raise PipelineError(
            f"There is no model at {model_url} (no {name}): correct the URL, or run workflows/train.py."
        ) from error
