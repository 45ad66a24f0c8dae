"""A saved model as a predictor on a Ray worker: loading, its identity, and the pool of workers that hold one each."""

import functools
import hashlib
import json
import math
from dataclasses import replace
from typing import Any

import ray
import ray.data
import torch

from pipeline import storage
from pipeline.cluster import IO_TASK_CPUS, require_capacity
from pipeline.errors import PipelineError
from pipeline.inference_config import INFERENCE_FILE, InferenceConfig, inference_of
from pipeline.mask_products import ProductsConfig
from pipeline.run_folder import MODEL_FOLDER
from pipeline.run_record import identity
from rssnet import RSSNet
from rssnet.classes import Classes
from rssnet.inference import Predictor
from rssnet.serialization import CLASSES, CONFIG, WEIGHTS

_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def model_id(model_url: str, inference: InferenceConfig, products: ProductsConfig | None = None) -> str:
    """Short digest of what the rows depend on: weights, model configuration, classes, inference settings and products.

    The same model copied to another place keeps its id. Saying what would hold unsaid changes nothing either.

    Raises:
        PipelineError: if there is no model at `model_url`.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, CLASSES, WEIGHTS):
        digest.update(hashlib.sha256(_model_file(model_url, name)).digest())
    settings = _without_usual_windows(model_url, _with_defaults(inference_of(model_url, inference)))
    digest.update(json.dumps(identity(settings), sort_keys=True).encode())
    made = identity((products or ProductsConfig()).normalized())
    if made != identity(ProductsConfig()):
        digest.update(json.dumps(made, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _with_defaults(inference: InferenceConfig) -> InferenceConfig:
    """What neither the caller nor training has said, so that saying it makes no other id."""
    return replace(
        inference,
        scales=(1.0,) if inference.scales is None else inference.scales,
        flip=bool(inference.flip),
        precision=inference.precision or "fp32",
    )


def model_versions(model_url: str) -> tuple[str, ...]:
    """The versions of a saved model's files, which tell whether it was overwritten without reading it again.

    Raises:
        PipelineError: if there is no model at `model_url`.
    """
    return tuple(_version(model_url, name) for name in (CONFIG, CLASSES, WEIGHTS, INFERENCE_FILE))


def _version(model_url: str, name: str) -> str:
    try:
        return storage.stat(storage.join(model_url, name)).version
    except FileNotFoundError as error:
        if name == INFERENCE_FILE:  # not all have one
            return ""
        raise _no_model(model_url, name) from error


def _without_usual_windows(model_url: str, inference: InferenceConfig) -> InferenceConfig:
    """The settings without a crop or stride that the model would have anyway."""
    size = json.loads(_model_file(model_url, CONFIG)).get("image_size")
    usual = (size, size) if isinstance(size, int) else tuple(size or ())
    crop = inference.crop_size or usual
    stride = None if inference.stride == tuple(max(1, side * 2 // 3) for side in crop) else inference.stride
    return replace(inference, crop_size=None if inference.crop_size == usual else inference.crop_size, stride=stride)


def model_classes(model_url: str) -> Classes:
    """Names and colours of a saved model's classes, without loading its weights.

    Raises:
        PipelineError: if there is no model at `model_url`, or its classes cannot be understood.
    """
    try:
        return Classes.from_json(_model_file(model_url, CLASSES).decode())
    except ValueError as error:
        raise PipelineError(f"The model at {model_url} has a broken {CLASSES}: {error}") from error


def load_predictor(model_url: str, inference: InferenceConfig, top_k: int = 1) -> Predictor:
    """The model as a predictor: on the GPU that Ray has given to this worker, else on as many threads as it gave CPUs.

    Outside Ray's workers it runs on the CPU, with as many threads as torch has been told to use.

    Args:
        model_url: URL of a saved model.
        inference: how it is applied.
        top_k: how many classes of each pixel are kept.

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
        if inference.channels_last:
            model = model.to(memory_format=torch.channels_last)  # what the weights are, cuDNN makes of the images
        return predictor_of(model, inference_of(model_url, inference), top_k)
    except (ValueError, OSError) as error:
        raise PipelineError(f"The model at {model_url} cannot be used: {error}") from error


def predictor_of(model: RSSNet, inference: InferenceConfig, top_k: int = 1) -> Predictor:
    """A model in memory as a predictor; ValueError for settings that it refuses. The model's layout stays."""
    settings = _with_defaults(inference)
    if settings.precision not in _DTYPES:
        raise ValueError(f"precision is {settings.precision!r}: give one of {', '.join(_DTYPES)}.")
    assert settings.scales is not None
    return Predictor(
        model,
        crop_size=settings.crop_size,
        stride=settings.stride,
        window_batch=settings.window_batch,
        scales=settings.scales,
        flip=bool(settings.flip),
        dtype=_DTYPES[settings.precision],
        top_k=top_k,
        compile=settings.compile,
    )


class PredictorActor:
    """Base of what a pool of actors runs: a predictor that is loaded with the first batch.

    Not when the actor starts: Ray passes on the cause of a failing call, but of a failing constructor only its text,
    and a broken model would end in a traceback instead of its one sentence.
    """

    def __init__(self, model_url: str, inference: InferenceConfig, top_k: int = 1) -> None:
        self.model_url, self.inference, self.top_k = model_url, inference, top_k

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The model, on this worker's device."""
        return load_predictor(self.model_url, self.inference, self.top_k)


def predictor_pool(
    workers: int,
    cpus_per_worker: float,
    use_gpu: bool,
    batch_size: int,
    *,
    min_workers: int | None = None,
    gpus_per_worker: float = 1.0,
    cpus_beside: float = IO_TASK_CPUS,
) -> dict[str, Any]:
    """The arguments of `Dataset.map_batches` for a pool of actors that hold a predictor each.

    Args:
        workers: how many actors; with `min_workers`, at most.
        cpus_per_worker: CPUs of each.
        use_gpu: whether each has a GPU, or a part of one.
        batch_size: images that an actor gets at a time.
        min_workers: start with so many, and add others as long as images wait and the cluster has room. Without it
            there are always `workers`.
        gpus_per_worker: with `use_gpu`, GPUs of each actor: a part of one, 0.5 for two actors that share it, or a whole
            number. Ray counts the parts; that the models fit into the memory together is the caller's to see to.
        cpus_beside: CPUs of one task of each stage before and after the actors; where they are lacking, the last stages
            begin when the actors have ended.

    Raises:
        PipelineError: if a number is out of range, or this machine has no room for the fewest workers with the tasks
            beside them. A cluster that was joined by its address may still grow, so there it is announced.
    """
    for name, number in (("workers", workers), ("batch_size", batch_size)):
        if number < 1:
            raise PipelineError(f"{name} is {number}: give at least 1.")
    if cpus_per_worker <= 0:
        raise PipelineError(f"cpus_per_worker is {cpus_per_worker}: give more than 0.")
    fewest = workers if min_workers is None else min_workers
    if not 1 <= fewest <= workers:
        raise PipelineError(f"min_workers is {min_workers}: give 1 or more, and at most the {workers} of workers.")
    if not (0 < gpus_per_worker <= 1 or (gpus_per_worker > 1 and float(gpus_per_worker).is_integer())):
        raise PipelineError(
            f"gpus_per_worker is {gpus_per_worker:g}: give a part of a GPU, such as 0.5, or a whole number of them; "
            "without use_gpu no worker has any."
        )
    require_capacity(
        cpus=fewest * cpus_per_worker + cpus_beside,
        gpus=_whole_gpus(fewest, gpus_per_worker) if use_gpu else 0,
        what=f"{fewest} {'worker' if fewest == 1 else 'workers'} and the tasks beside",
        remedy=f"lower {'workers' if min_workers is None else 'min_workers'} or cpus_per_worker"
        f"{', or set use_gpu false' if use_gpu else ''}, or join a larger cluster",
    )
    fixed = fewest == workers
    return {
        "compute": ray.data.ActorPoolStrategy(size=workers)
        if fixed
        else ray.data.ActorPoolStrategy(min_size=fewest, max_size=workers),
        "num_cpus": cpus_per_worker,
        "num_gpus": gpus_per_worker if use_gpu else 0,
        "batch_size": batch_size,
    }


def _whole_gpus(workers: int, gpus_per_worker: float) -> int:
    """How many GPUs so many workers take up: no worker has parts of two."""
    if gpus_per_worker > 1:
        return workers * int(gpus_per_worker)
    return math.ceil(workers / math.floor(1 / gpus_per_worker + 1e-9))


def _model_file(model_url: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(model_url, name))
    except FileNotFoundError as error:
        raise _no_model(model_url, name) from error


def _no_model(model_url: str, name: str) -> PipelineError:
    below = storage.join(model_url, MODEL_FOLDER)  # a run was named, and not its model
    if storage.exists(storage.join(below, name)):
        return PipelineError(f"There is no model at {model_url} (no {name}), but one at {below}: give that.")
    return PipelineError(f"There is no model at {model_url} (no {name}): correct the URL, or run workflows/train.py.")
