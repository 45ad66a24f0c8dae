"""What each training worker runs: steps, validation, checkpoints, and the model at the end."""

import contextlib
import math
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util import get_current_placement_group
from torch import nn

from pipeline import dataset, storage
from pipeline.errors import PipelineError
from pipeline.prediction import predictor_of, write_inference
from pipeline.progress import Reporter
from pipeline.sample_stream import plan_windows, sample_batches
from pipeline.scoring import COLUMNS, confusion_matrix
from pipeline.train_step import TrainStep, mean_over_workers
from pipeline.training import HISTORY_FILE, MODEL_FOLDER, TrainConfig, build_optimizer
from pipeline.training_log import PICTURED, TensorBoardLog, write_pictures
from pipeline.transforms import Augmentation
from rssnet import RSSNet
from rssnet.losses import RSSNetLoss, alone, check_batch
from rssnet.metrics import ConfusionMatrix

LOG_EVERY = 10
STATE_FILE = "state.pt"
SCORES = ("miou", "macc", "aacc")  # of a validation
PLACEMENT_GROUP = "placement_group"  # among the reported metrics: its id


def train_worker(job: dict[str, Any]) -> None:
    """Ray Train's entry point on each worker.

    Args:
        job: `config`, a `TrainConfig` with its number of classes set, and `reporter`.
    """
    config: TrainConfig = job["config"]
    if not config.resources.use_gpu:
        torch.set_num_threads(max(1, math.ceil(config.resources.cpus_per_worker)))
    _Training(config, job["reporter"]).run()


class _Training:
    """The state of one worker's training, and its steps in order."""

    def __init__(self, config: TrainConfig, reporter: Reporter) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.reporter = config, reporter
        self.device = ray.train.torch.get_device()
        self.data = dataset.open(config.dataset)
        self.layout = torch.channels_last if config.resources.channels_last else torch.contiguous_format

        torch.manual_seed(config.seed)  # the same initial weights on every worker
        model = RSSNet(config.model, self.data.classes).to(self.device)
        model = model.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue] torch has it, its types do not
        if self.world_size > 1 and config.resources.use_gpu:
            model = cast(RSSNet, nn.SyncBatchNorm.convert_sync_batchnorm(model))  # only some backbones have any
        self.mean = torch.tensor(model.pixel_mean, device=self.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(model.pixel_std, device=self.device).view(1, 3, 1, 1) * 255
        shared = mean_over_workers if self.world_size > 1 else alone
        parallel = ray.train.torch.prepare_model(model, move_to_device=False)
        self.step = TrainStep(
            model,
            cast(nn.Module, torch.compile(parallel)) if config.resources.compile else parallel,
            RSSNetLoss(config.loss, len(self.data.classes), shared).to(self.device),
            *build_optimizer(model, config),
            precision=config.precision,
            accumulation=config.optimizer.accumulation,
            clip_grad_norm=config.optimizer.clip_grad_norm,
            ema_decay=config.optimizer.ema_decay,
        )
        self.history: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "skipped": []}
        self._restore()
        self.tensorboard = TensorBoardLog(config.run, self.step.iteration) if self.rank == 0 else None
        self.started, self.first, self.waited = time.monotonic(), self.step.iteration, 0.0

    @property
    def model(self) -> RSSNet:
        """What is validated and kept."""
        return cast(RSSNet, self.step.evaluated)

    def run(self) -> None:
        config = self.config
        for batch in self._batches():
            # Seeded anew for each step: a resumed run draws the same drop path masks without stored random states.
            torch.manual_seed(hash((config.seed, self.step.iteration, self.rank)) % 2**63)
            images, labels = self._on_device(batch)
            loss = self.step(images, labels)
            if self.step.skipped_in_a_row:
                self._skipped(batch, images, labels, loss)
            log, evaluate, checkpoint = self._due()
            if log:
                self._log(float(loss))
            if evaluate or checkpoint:
                self._report(float(loss), evaluate, checkpoint)
        if self.rank == 0:
            self._write_history()  # again: a run that was killed between its last report and this has not
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                write_inference(Path(folder), config.inference)
                storage.upload_folder(Path(folder), storage.join(config.run, MODEL_FOLDER))

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches that are still to come; the time that they are waited for is counted."""
        config, done = self.config, self.step.iteration
        if done >= config.iterations:
            return
        batch_size = config.batch_size // self.world_size
        fill = tuple(round(255 * value) for value in self.model.pixel_mean)
        augmentation = Augmentation(config.augmentation, config.model.image_hw, (fill[0], fill[1], fill[2]))
        chunks = self.data.chunks(config.train_split)
        shard = (self.rank, self.world_size)
        windows = plan_windows(chunks, config.seed, shard, done * batch_size, config.iterations * batch_size)
        with contextlib.closing(sample_batches(windows, augmentation, config.seed, batch_size)) as batches:
            for _ in range(done, config.iterations):
                asked = time.monotonic()
                batch = next(batches)
                self.waited += time.monotonic() - asked
                yield batch

    def _on_device(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.as_tensor(batch["image"], device=self.device).to(memory_format=self.layout)
        return (images.float() - self.mean) / self.std, torch.as_tensor(batch["label"], device=self.device).long()

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether this iteration is logged, evaluated, and kept as a checkpoint."""
        config, iteration = self.config, self.step.iteration
        last = iteration == config.iterations
        log = iteration == 1 or iteration % LOG_EVERY == 0
        return log, last or iteration % config.evaluate_every == 0, last or iteration % config.checkpoint_every == 0

    def _log(self, loss: float) -> None:
        if self.tensorboard is None:
            return
        lr = float(self.step.schedule.get_last_lr()[-1])
        passed = time.monotonic() - self.started
        rate = (self.step.iteration - self.first) * self.config.batch_size / passed
        point = {"iteration": self.step.iteration, "loss": loss if math.isfinite(loss) else None, "lr": lr}
        self.history["training"].append(point)
        waited = self.waited / passed
        scalars = {"train/loss": loss, "train/lr": lr, "speed/images_per_second": rate, "speed/data_wait_share": waited}
        self.tensorboard.add(self.step.iteration, scalars)
        note = f"loss {loss:.3f}, lr {lr:.1e}, {rate:.1f} images/s, {100 * waited:.0f} % waiting for data"
        note += f", {_peak_memory(self.device) / 2**30:.1f} GB"
        if self.step.skipped:
            note += f", {self.step.skipped} steps skipped"
        self.reporter.update(self.step.iteration, note)

    def _skipped(
        self, batch: dict[str, np.ndarray], images: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor
    ) -> None:
        """Write down what a skipped step was taken with, and end the training where too many follow each other.

        All workers are here, for what they skip by is the gradient that they share.
        """
        mine: dict[str, Any] = {"worker": self.rank, "loss": str(float(loss)), "images": batch["image_id"].tolist()}
        try:
            check_batch(images, labels, self.step.criterion.num_classes)
        except ValueError as error:
            mine["fault"] = str(error)
        gathered: list[Any] = [mine]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            torch.distributed.all_gather_object(gathered, mine)
        self.history["skipped"].append({"iteration": self.step.iteration, "workers": gathered})
        if self.step.skipped_in_a_row >= self.config.nonfinite_limit:
            if self.rank == 0:
                self._write_history()
            faults = [worker["fault"] for worker in gathered if "fault" in worker]
            raise PipelineError(
                f"{self.step.skipped_in_a_row} steps in a row, up to iteration {self.step.iteration}, had a gradient "
                f"that is not finite; their images are listed in {storage.join(self.config.run, HISTORY_FILE)}: "
                + (faults[0] if faults else "lower optimizer.lr, or clip the gradient.")
            )

    def _report(self, loss: float, evaluate: bool, checkpoint: bool) -> None:
        if evaluate:
            self._evaluate()
        metrics: dict[str, Any] = {"iteration": self.step.iteration, "loss": loss, "evaluated": evaluate}
        group = get_current_placement_group()
        if group is not None:  # for who stops this run from outside, and has to free what it holds
            metrics[PLACEMENT_GROUP] = group.id.hex()
        if self.history["validation"]:
            metrics |= {name: self.history["validation"][-1][name] for name in SCORES}
        with tempfile.TemporaryDirectory() as folder:
            state = None
            if checkpoint and self.rank == 0:
                self._save(Path(folder))
                state = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=state)
        if self.tensorboard is not None:
            self.tensorboard.upload()
            self._write_history()

    def _write_history(self) -> None:
        storage.write_json(storage.join(self.config.run, HISTORY_FILE), self.history)

    def _evaluate(self) -> None:
        """Validate on all workers, each its share; the sum of their confusion matrices is exact."""
        self.model.eval()
        predictor = predictor_of(self.model, self.config.inference)
        rows = self.data.rows(self.config.val_split, COLUMNS, shard=(self.rank, self.world_size))
        matrix = confusion_matrix(predictor, rows, len(self.data.classes))
        counts = torch.as_tensor(matrix.counts, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(counts)
        scores = ConfusionMatrix(len(self.data.classes), counts=counts.cpu()).scores()
        iteration, found = self.step.iteration, {name: float(getattr(scores, name)) for name in SCORES}
        self.history["validation"].append({"iteration": iteration, **found})
        if self.tensorboard is not None:
            self.tensorboard.add(iteration, {f"validation/{name}": value for name, value in found.items()})
            first = list(islice(self.data.rows(self.config.val_split, COLUMNS), PICTURED))
            write_pictures(self.config.run, iteration, first, predictor, self.data.classes)

    def _save(self, folder: Path) -> None:
        torch.save({"step": self.step.state_dict(), "history": self.history}, folder / STATE_FILE)

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        if "step" not in state:
            raise PipelineError(f"{self.config.run} has checkpoints of another version: start afresh with --new true.")
        self.step.load_state_dict(state["step"])
        self.history = state["history"]


def _peak_memory(device: torch.device) -> int:
    """Bytes that this worker has held at most: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
