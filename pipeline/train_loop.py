"""What each training worker runs: steps, validation, checkpoints, and the model at the end."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util import get_current_placement_group
from torch import nn

from pipeline import dataset, storage
from pipeline.errors import PipelineError
from pipeline.evaluation import confusion_matrix
from pipeline.prediction import predictor_of, write_inference
from pipeline.progress import Reporter
from pipeline.sample_stream import plan_windows, sample_batches
from pipeline.training import HISTORY_FILE, MODEL_FOLDER, TrainConfig, build_optimizer
from pipeline.transforms import Augmentation
from rssnet import RSSNet
from rssnet.losses import RSSNetLoss, check_batch
from rssnet.metrics import ConfusionMatrix

LOG_EVERY = 10
STATE_FILE = "state.pt"
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

        torch.manual_seed(config.seed)  # the same initial weights on every worker
        self.model = RSSNet(config.model, self.data.classes).to(self.device)
        self.criterion = RSSNetLoss(config.loss, len(self.data.classes))
        self.optimizer, self.schedule = build_optimizer(self.model, config)
        self.iteration = 0
        self.history: dict[str, list[dict[str, float]]] = {"training": [], "validation": []}
        self._restore()
        self.parallel: nn.Module = ray.train.torch.prepare_model(self.model, move_to_device=False)

    def run(self) -> None:
        config = self.config
        mean = torch.tensor(self.model.pixel_mean, device=self.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.model.pixel_std, device=self.device).view(1, 3, 1, 1) * 255
        started, first = time.monotonic(), self.iteration
        if self.iteration < config.iterations:
            for batch in self._batches():
                images = (torch.as_tensor(batch["image"], device=self.device).float() - mean) / std
                labels = torch.as_tensor(batch["label"], device=self.device).long()
                loss = self._step(images, labels)
                log, evaluate, checkpoint = self._due()
                if log or evaluate or checkpoint:  # the device is waited for at these steps alone
                    value = self._finite(loss, images, labels)
                    if log:
                        self._log(value, started, first)
                    if evaluate or checkpoint:
                        self._report(value, evaluate, checkpoint)
                if self.iteration == config.iterations:
                    break
        if self.rank == 0:
            self._write_history()  # again: a run that was killed between its last report and this has not
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                write_inference(Path(folder), config.inference)
                storage.upload_folder(Path(folder), storage.join(config.run, MODEL_FOLDER))

    def _batches(self) -> Any:
        config = self.config
        batch_size = config.batch_size // self.world_size
        fill = tuple(round(255 * value) for value in self.model.pixel_mean)
        augmentation = Augmentation(config.augmentation, config.model.image_hw, (fill[0], fill[1], fill[2]))
        chunks = self.data.chunks(config.train_split)
        start, stop = self.iteration * batch_size, config.iterations * batch_size
        windows = plan_windows(chunks, config.seed, (self.rank, self.world_size), start, stop)
        return sample_batches(windows, augmentation, config.seed, batch_size)

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether this iteration is logged, evaluated, and kept as a checkpoint."""
        config, last = self.config, self.iteration == self.config.iterations
        log = self.iteration == 1 or self.iteration % LOG_EVERY == 0
        return (
            log,
            last or self.iteration % config.evaluate_every == 0,
            last or self.iteration % config.checkpoint_every == 0,
        )

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Seeded anew for each step, so that a resumed run draws the same drop path masks without stored random states.
        torch.manual_seed(hash((self.config.seed, self.iteration, self.rank)) % 2**63)
        self.parallel.train()
        loss = self.criterion(self.parallel(images), labels)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.optimizer.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.iteration += 1
        return loss.detach()

    def _log(self, loss: float, started: float, first: int) -> None:
        if self.rank:
            return
        lr = float(self.schedule.get_last_lr()[-1])
        rate = (self.iteration - first) * self.config.batch_size / (time.monotonic() - started)
        self.history["training"].append({"iteration": self.iteration, "loss": loss, "lr": lr})
        self.reporter.update(self.iteration, f"loss {loss:.3f}, lr {lr:.1e}, {rate:.1f} images/s")

    def _finite(self, loss: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> float:
        """The loss, if it is a number; what diverged must become neither a checkpoint nor a model."""
        value = float(loss)
        if not math.isfinite(value):
            where = f"The loss is {value} at iteration {self.iteration}"
            try:
                check_batch(images, labels, self.criterion.num_classes)
            except ValueError as error:
                raise PipelineError(f"{where}: {error}") from error
            raise PipelineError(f"{where}: lower optimizer.lr or clip the gradient.")
        return value

    def _report(self, loss: float, evaluate: bool, checkpoint: bool) -> None:
        if evaluate:
            self._evaluate()
        metrics: dict[str, Any] = {"iteration": self.iteration, "loss": loss, "evaluated": evaluate}
        group = get_current_placement_group()
        if group is not None:  # for who stops this run from outside, and has to free what it holds
            metrics[PLACEMENT_GROUP] = group.id.hex()
        if self.history["validation"]:
            metrics |= {name: self.history["validation"][-1][name] for name in ("miou", "macc", "aacc")}
        with tempfile.TemporaryDirectory() as folder:
            state = None
            if checkpoint and self.rank == 0:
                self._save(Path(folder))
                state = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=state)
        if self.rank == 0:
            self._write_history()

    def _write_history(self) -> None:
        storage.write_json(storage.join(self.config.run, HISTORY_FILE), self.history)

    def _evaluate(self) -> None:
        """Validate on all workers, each its share; the sum of their confusion matrices is exact."""
        self.model.eval()
        rows = self.data.rows(self.config.val_split, ["image", "label"], shard=(self.rank, self.world_size))
        matrix = confusion_matrix(predictor_of(self.model, self.config.inference), rows, len(self.data.classes))
        counts = torch.as_tensor(matrix.counts, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(counts)
        scores = ConfusionMatrix(len(self.data.classes), counts=counts.cpu()).scores()
        self.history["validation"].append(
            {
                "iteration": self.iteration,
                "miou": float(scores.miou),
                "macc": float(scores.macc),
                "aacc": float(scores.aacc),
            }
        )

    def _save(self, folder: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "iteration": self.iteration,
            "history": self.history,
        }
        torch.save(state, folder / STATE_FILE)

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.iteration, self.history = state["iteration"], state["history"]
