"""Training on Ray Train: from a canonical dataset to a model, resumable from the run's own checkpoints."""

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from ray.train import CheckpointConfig, ControllerError, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback

from pipeline import dataset, storage
from pipeline.checkpoints import CHECKPOINTS_FOLDER
from pipeline.cluster import connected, interruptible, require_capacity
from pipeline.dataset import SegmentationDataset
from pipeline.errors import PipelineError, mendable_cause
from pipeline.evaluation import scores_text
from pipeline.lease import Lease
from pipeline.parallel_model import Parallelism
from pipeline.prediction import MODEL_FOLDER, InferenceConfig, predictor_of
from pipeline.progress import Progress, Reporter, announce
from pipeline.run_record import RunRecord, finished_record, record_run, refuse_other_work
from pipeline.sample_stream import DECODE_CPUS, FEEDING_CPUS
from pipeline.storage_errors import StorageOutage, explanation, patiently
from pipeline.trackers import tracker_names
from pipeline.transforms import AugmentationConfig
from rssnet import LossConfig, RSSNet, RSSNetConfig, RSSNetLoss, parameter_groups, poly_with_warmup

BEST_FOLDER = "best"
HISTORY_FILE = "history.json"
TENSORBOARD_FOLDER = "tensorboard"
PICTURES_FOLDER = "validation"
CONTROLLER_FAILURES = 3  # ray retries a group that cannot start for ever unless told a number


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
class ResourcesConfig:
    """What a training run asks the cluster for. Decoding and augmentation run on other CPUs of the cluster.

    Args:
        workers: training processes; the batch is shared among them.
        min_workers: train with as few of them while the cluster does not have more, and with more again when it does;
            each change goes back to the last checkpoint. Without it there are always `workers`.
        parallelism: `ddp` for a whole model on each worker; `fsdp` for its shards, where one GPU cannot hold weights,
            gradients and moments.
        use_gpu: a GPU for each worker.
        gpus_per_worker: the share of a GPU that Ray reserves for each worker; below 1, several trials of a sweep share
            one. They have to share its memory, too.
        cpus_per_worker: CPUs that Ray reserves for each worker; rounded up, its number of threads.
        max_failures: how often a failed worker group is started again from its last checkpoint; not after an error that
            would come again, such as too many steps without a finite gradient.
        compile: let torch.compile make the forward and backward pass faster, after minutes of compiling.
        channels_last: lay images and weights out as convolutions on GPUs like them.
    """

    workers: int = 1
    min_workers: int | None = None
    parallelism: Parallelism = "ddp"
    use_gpu: bool = False
    gpus_per_worker: float = 1.0
    cpus_per_worker: float = 1.0
    max_failures: int = 2
    compile: bool = False
    channels_last: bool = False

    @property
    def fewest_workers(self) -> int:
        """With fewer there is no training."""
        return self.workers if self.min_workers is None else self.min_workers


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


def train(config: TrainConfig) -> RunRecord:
    """Train, validate, and leave the model at `<run>/model`.

    Raises:
        Held: if another process is training this run.
        PipelineError: if the configuration, the dataset or the run's place cannot serve, or the training fails.
    """
    config = dataclasses.replace(config, dataset=storage.absolute(config.dataset), run=storage.absolute(config.run))
    data = dataset.open(config.dataset)
    config = completed(config, data)
    inputs = {"dataset": data.info.fingerprint}
    if not config.new:
        finished = finished_record(config.run, "train", config, inputs)
        if finished:
            announce(f"already trained: {config.run} ({scores_text(finished.results)})")
            return finished
        refuse_other_work(config.run, "train", config, inputs, resumes=True)
    outputs = [CHECKPOINTS_FOLDER, MODEL_FOLDER, HISTORY_FILE, TENSORBOARD_FOLDER, PICTURES_FOLDER]
    outputs += [BEST_FOLDER] if config.keep_best else []
    with Lease(config.run, f"train {uuid.uuid4().hex}"), connected():
        require_resources(config.resources)
        with record_run(config.run, "train", config, inputs, outputs, keep=not config.new) as record:
            with Progress("train", total=config.iterations, unit="iterations") as progress:
                fit(config, reporter=progress.reporter)
            history = storage.read_json(storage.join(config.run, HISTORY_FILE))
            split = data.split(config.train_split)
            record.counts = {"iterations": config.iterations, "skipped": len(history["skipped"]), "images": split.rows}
            record.results = history["validation"][-1]
    announce(f"trained {config.run}/{MODEL_FOLDER} ({scores_text(record.results)})")
    return record


def completed(config: TrainConfig, data: SegmentationDataset) -> TrainConfig:
    """The configuration with the dataset's number of classes, checked as far as is possible without training.

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
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes))
    try:
        with torch.device("meta"):
            model = RSSNet(dataclasses.replace(config.model, pretrained=False), data.classes)
            predictor_of(model, config.inference)
        RSSNetLoss(config.loss, classes)
        build_optimizer(model, config)
    except (ValueError, RuntimeError, TypeError) as error:
        raise PipelineError(f"The configuration cannot be used: {error}") from error
    return config


def build_optimizer(
    model: torch.nn.Module, config: TrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and the learning rate schedule of a run; ValueError for settings that cannot serve."""
    options = config.optimizer
    groups = parameter_groups(model, options.lr, options.weight_decay, options.layer_decay, options.decoder_lr_scale)
    on_gpu = next(model.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=on_gpu)
    warmup = min(options.warmup_iterations, config.iterations - 1)
    return optimizer, poly_with_warmup(optimizer, config.iterations, warmup, options.warmup_lr, options.power)


def fit(
    config: TrainConfig, reporter: Reporter, callbacks: Sequence[UserCallback] = (), start: str | None = None
) -> Result:
    """Run the training loop on the cluster; goes on from the last checkpoint below `config.run`, if there is one.

    Args:
        config: as `completed` returns it.
        reporter: is told iterations and loss.
        callbacks: Ray Train's, called in its controller process.
        start: URL of another run's checkpoint, whose weights a run that has none of its own begins with.
    """
    from pipeline.train_loop import train_worker  # the loop imports this module for its configuration

    outages = 0
    while True:
        try:
            return _fit(train_worker, config, reporter, [EndForGood(), *callbacks], start)
        except ControllerError as error:
            cause = mendable_cause(error.controller_failure)
            if cause is not None and not isinstance(cause, StorageOutage):
                raise cause from error
            # Ray's own record of the checkpoints is written without patience.
            outage = cause or explanation(config.run, error.controller_failure)
            outages += 1
            if not isinstance(outage, StorageOutage) or outages > CONTROLLER_FAILURES:
                raise
            announce(f"  {outage} Waiting for it, to go on from the last checkpoint.")
            patiently(partial(storage.exists, config.run))


class EndForGood(UserCallback):
    """Ends the training at once with an error that would come again, such as a value that cannot serve.

    Ray Train would start the workers anew `max_failures` times, whatever they have failed of. What a callback raises in
    its controller becomes the `controller_failure` of what `fit` raises.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raise the first PipelineError of the workers that waiting will not mend."""
        for error in worker_exceptions.values():
            cause = mendable_cause(error)
            if cause is not None and not isinstance(cause, StorageOutage):
                raise cause


def _fit(
    train_worker: Callable[[dict[str, Any]], None],
    config: TrainConfig,
    reporter: Reporter,
    callbacks: Sequence[UserCallback],
    start: str | None,
) -> Result:
    filesystem, path = storage.arrow_filesystem(config.run)
    resources = config.resources
    workers = resources.workers if resources.min_workers is None else (resources.min_workers, resources.workers)
    per_worker: dict[str, Any] = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if not resources.use_gpu:  # what feeds it runs beside it: an elastic group takes every CPU that there is
        per_worker = {"CPU": resources.cpus_per_worker + FEEDING_CPUS}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "reporter": reporter, "start": start},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=CHECKPOINTS_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            callbacks=list(callbacks),
        ),
    )
    with interruptible():
        return trainer.fit()


def needed_cpus(resources: ResourcesConfig) -> float:
    """CPUs of the workers, of the fewest where their number varies, and of the tasks that feed them."""
    if resources.use_gpu:  # one task after the other, if there is no more
        return resources.fewest_workers * resources.cpus_per_worker + DECODE_CPUS
    return resources.fewest_workers * (resources.cpus_per_worker + FEEDING_CPUS)


def require_resources(resources: ResourcesConfig, beside: float = 0.0) -> None:
    """Raise PipelineError if a local Ray can never hold these workers and what feeds them.

    Args:
        beside: CPUs that something else takes at the same time.
    """
    require_capacity(
        needed_cpus(resources) + beside,
        resources.fewest_workers * resources.gpus_per_worker if resources.use_gpu else 0,
        f"{resources.fewest_workers} training workers and the tasks that feed them",
        "lower resources.workers or resources.cpus_per_worker, or set resources.use_gpu false",
    )
