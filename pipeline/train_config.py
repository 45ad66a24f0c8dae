"""What a training is asked to do, and what of it is refused. Imports no timm, which takes a process some seconds."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from pipeline.augmentation_config import AugmentationConfig
from pipeline.dataset import SegmentationDataset
from pipeline.errors import PipelineError
from pipeline.inference_config import InferenceConfig
from pipeline.trackers import tracker_names
from pipeline.train_resources import ResourcesConfig
from rssnet import LossConfig, RSSNetConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a polynomial decay to zero.

    Args:
        lr: learning rate of the backbone's last layer.
        weight_decay: of weights; biases, norms and queries have none.
        layer_decay: factor on the learning rate per backbone layer, from the last to the first; 1 is off.
        decoder_lr_scale: factor on the learning rate of everything but the backbone.
        warmup_iterations: iterations of linear rise.
        warmup_lr: learning rate that the rise starts from.
        power: exponent of the polynomial decay.
        clip_grad_norm: largest norm of the gradient, beyond which it is scaled down; 0 is off.
        accumulation: parts that a worker computes its share of the batch in, one after the other, to save memory.
        ema_decay: of an exponential moving average of the weights, e.g. 0.9998, which is then what is validated and
            kept as the model; 0 is off.
    """

    lr: float = 3e-5
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    decoder_lr_scale: float = 10.0
    warmup_iterations: int = 1500
    warmup_lr: float = 1e-6
    power: float = 1.0
    clip_grad_norm: float = 0.0
    accumulation: int = 1
    ema_decay: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on a canonical dataset.

    Args:
        dataset: URL of a canonical dataset.
        run: URL for checkpoints, the model and the record. It is the run's identity: the same URL goes on where it was.
        model: the network; its number of classes comes from the dataset.
        loss: weights of the losses.
        optimizer: optimizer and learning rate schedule.
        augmentation: how samples are varied; the crop is the model's image size.
        inference: how validation applies the model to whole images.
        iterations: optimizer steps.
        batch_size: images per step, over all workers.
        precision: fp32, or bf16 for bfloat16 autocast in the forward pass.
        nonfinite_limit: steps in a row without a finite gradient, each of which is skipped, that end the training.
        evaluate_every: iterations between validations.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: the last so many checkpoints are kept.
        keep_best: the models of the so many validations with the highest mIoU are kept, in `<run>/best/<iteration>`.
        train_split: split to train on.
        val_split: split to validate on.
        seed: of weights, order and augmentation.
        resources: what to ask the cluster for.
        trackers: log to mlflow, wandb, or both, separated by commas, too. Their packages have to be installed; their
            own environment variables say where the server is.
        new: start afresh, replacing what an earlier run left there.
    """

    dataset: str
    run: str
    model: RSSNetConfig = field(default_factory=RSSNetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    iterations: int = 80_000
    batch_size: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    nonfinite_limit: int = 10
    evaluate_every: int = 4000
    checkpoint_every: int = 1000
    keep_checkpoints: int = field(default=2, metadata={"identity": False})
    keep_best: int = field(default=1, metadata={"identity": False})
    train_split: str = "train"
    val_split: str = "val"
    seed: int = 0
    resources: ResourcesConfig = field(default_factory=ResourcesConfig, metadata={"identity": False})
    trackers: str | None = field(default=None, metadata={"identity": False})
    new: bool = field(default=False, metadata={"identity": False})


def completed(config: TrainConfig, data: SegmentationDataset) -> TrainConfig:
    """The configuration with the dataset's number of classes, checked as far as is possible without building anything.

    The rest is for `train_parts.require_buildable`.

    Raises:
        PipelineError: naming the field and the value that cannot serve.
    """
    for split in (config.train_split, config.val_split):
        if not sum(data.require_labels(split).pixels):
            raise PipelineError(f"No image of the split {split!r} of {data.url} has a labelled pixel: choose another.")
    counts = ("iterations", "batch_size", "evaluate_every", "checkpoint_every", "nonfinite_limit", "keep_checkpoints")
    for name in counts:
        if getattr(config, name) < 1:
            raise PipelineError(f"{name} is {getattr(config, name)}: give 1 or more.")
    if config.keep_best < 0:
        raise PipelineError(f"keep_best is {config.keep_best}: give 0 or more.")
    workers, accumulation = config.resources.workers, config.optimizer.accumulation
    if workers < 1 or accumulation < 1 or config.batch_size < workers * accumulation:
        raise PipelineError(
            f"batch_size {config.batch_size} cannot be shared by resources.workers {workers} times "
            f"optimizer.accumulation {accumulation}: give 1 or more of each, and no more of both than images."
        )
    if not 1 <= config.resources.fewest_workers <= workers:
        raise PipelineError(
            f"resources.min_workers is {config.resources.min_workers}: give 1 or more, and at most the {workers} of "
            "resources.workers."
        )
    if config.resources.parallelism == "fsdp" and config.resources.channels_last:
        raise PipelineError("resources.channels_last is true, but shards (fsdp) have no such layout: leave it out.")
    tracker_names(config.trackers)
    if not 0 <= config.optimizer.ema_decay < 1:
        raise PipelineError(f"optimizer.ema_decay is {config.optimizer.ema_decay}: give 0 or more, and less than 1.")
    classes = len(data.classes)
    if config.model.num_classes not in (None, classes):
        raise PipelineError(
            f"model.num_classes is {config.model.num_classes}, but {data.url} has {classes} classes: leave it out."
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes))
