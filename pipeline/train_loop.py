"""What each training worker runs: steps, validation, checkpoints, and the model at the end."""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util import get_current_placement_group
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from pipeline import dataset, metrics, storage
from pipeline.checkpoints import Checkpoints, best_iterations
from pipeline.device_batches import DeviceBatch, device_batches
from pipeline.errors import PipelineError
from pipeline.inference_config import write_inference
from pipeline.parallel_model import parallel_model, shard, whole_model, with_shared_statistics
from pipeline.prediction import predictor_of
from pipeline.process_memory import peak_memory
from pipeline.progress import Reporter
from pipeline.run_folder import BEST_FOLDER, HISTORY_FILE, MODEL_FOLDER
from pipeline.sample_stream import batches_ahead, plan_windows, sample_batches
from pipeline.scoring import COLUMNS, confusion_matrix
from pipeline.storage_errors import patiently
from pipeline.train_config import TrainConfig
from pipeline.train_parts import build_optimizer, gflops, require_buildable
from pipeline.train_step import TrainStep, mean_over_workers
from pipeline.training_log import PICTURED, RunLog
from pipeline.transforms import Augmentation
from rssnet import RSSNet
from rssnet.losses import RSSNetLoss, alone, check_batch
from rssnet.metrics import ConfusionMatrix
from rssnet.serialization import CONFIG

LOG_EVERY = 10
NOTICED_EVERY = 5  # iterations between looks at whether another checkpoint can be made before a node goes
SCORES = ("miou", "macc", "aacc")  # of a validation
PLACEMENT_GROUP = "placement_group"  # among the reported metrics: its id


def train_worker(config: TrainConfig, reporter: Reporter, start: str | None, count_gflops: bool) -> None:
    """What each worker of a training does.

    Args:
        config, reporter, start, count_gflops: as of `fit`.

    Raises:
        PipelineError: if nothing can be built from the configuration, or too many steps have no finite gradient.
    """
    if not config.resources.use_gpu:
        torch.set_num_threads(max(1, math.ceil(config.resources.cpus_per_worker)))
    _Training(config, reporter, start, count_gflops).run()


class _Training:
    """The state of one worker's training, and its steps in order."""

    def __init__(self, config: TrainConfig, reporter: Reporter, start: str | None, count_gflops: bool) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.reporter = config, reporter
        self.device = ray.train.torch.get_device()
        self.data = patiently(partial(dataset.open, config.dataset))
        require_buildable(config, self.data.classes)  # of a trial nobody has seen to that: its process loads no timm
        self.layout = torch.channels_last if config.resources.channels_last else torch.contiguous_format

        torch.manual_seed(config.seed)  # the same initial weights on every worker
        model = RSSNet(config.model, self.data.classes).to(self.device)
        if config.resources.channels_last:
            model = model.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue] as in parallel_model
        if self.world_size > 1 and config.resources.use_gpu:
            model = with_shared_statistics(model)
        shared = mean_over_workers if self.world_size > 1 else alone
        average = self._average(model)
        parallel = parallel_model(model, config.resources.parallelism)
        self.step = TrainStep(
            model,
            cast(nn.Module, torch.compile(parallel)) if config.resources.compile else parallel,
            RSSNetLoss(config.loss, len(self.data.classes), shared).to(self.device),
            *build_optimizer(model, config),
            precision=config.precision,
            accumulation=config.optimizer.accumulation,
            clip_grad_norm=config.optimizer.clip_grad_norm,
            average=average,
        )
        self.history: dict[str, Any] = {"starts": [], "training": [], "validation": [], "skipped": [], "trackers": {}}
        self.checkpoints = Checkpoints(config.run, writes=self.rank == 0)
        state = self.checkpoints.restore()
        if state is not None:
            self.step.load_state_dict(state["step"])
            self.history = state["history"]
        elif start is not None:
            begun = self.checkpoints.read(start)
            self.step.load_state_dict(begun["step"], settings=False)
            self.history = begun["history"] | {"trackers": {}}
        if count_gflops and self.rank == 0 and "gflops" not in self.history:
            self.history["gflops"] = gflops(config)
        self.history["starts"].append({"iteration": self.step.iteration, "workers": self.world_size})
        self.log: RunLog | None = None
        if self.rank == 0:
            self.log = RunLog(config, self.step.iteration, self.history)
        if state is not None:
            self._keep_best_again()
        self.clock, self.preempted, self.images_per_second = _Clock(), False, None

    @property
    def model(self) -> RSSNet:
        """What is validated and kept, whole or in shards."""
        return cast(RSSNet, self.step.evaluated)

    def _average(self, model: RSSNet) -> ModelEmaV3 | None:
        """The moving average of the weights, in shards where the model is to be."""
        config, sharded = self.config, self.config.resources.parallelism == "fsdp"
        if not config.optimizer.ema_decay:
            return None
        # timm's faster way does not take parameters that are in shards together with buffers that are not.
        average = ModelEmaV3(model, decay=config.optimizer.ema_decay, use_warmup=True, foreach=not sharded)
        if sharded:
            shard(cast(RSSNet, average.module))
        return average

    def run(self) -> None:
        config = self.config
        for batch in self._batches():
            # Seeded anew for each step: a resumed run draws the same drop path masks without stored random states.
            torch.manual_seed(hash((config.seed, self.step.iteration, self.rank)) % 2**63)
            loss = self.step(batch.images, batch.labels)
            if self.step.skipped_in_a_row:
                self._skipped(batch, loss)
            self.clock.stepped()
            log, evaluate, checkpoint = self._due()
            if log:
                self._log(float(loss))
            if evaluate or checkpoint:
                self._report(float(loss), evaluate, checkpoint)
                self.clock.start()
        model = whole_model(self.model)
        if self.log is not None:
            self.log.write(self.history)  # again: a run that was killed between its last report and this has not
            self._keep(model, MODEL_FOLDER)
            self.log.finish()

    def _batches(self) -> Iterator[DeviceBatch]:
        """The batches that are still to come; the time that they are waited for is counted."""
        config, resources, done = self.config, self.config.resources, self.step.iteration
        if done >= config.iterations:
            return
        share, rest = divmod(config.batch_size, self.world_size)
        batch_size = share + (self.rank < rest)
        fill = tuple(round(255 * value) for value in self.model.pixel_mean)
        augmentation = Augmentation(config.augmentation, config.model.image_hw, (fill[0], fill[1], fill[2]))
        chunks = self.data.chunks(config.train_split)
        shard = (self.rank, self.world_size)
        windows = plan_windows(chunks, config.seed, shard, done * batch_size, config.iterations * batch_size)
        ahead, beside = batches_ahead(self.world_size, resources.cpus_per_worker), not resources.use_gpu
        samples = sample_batches(windows, augmentation, config.seed, batch_size, ahead, beside)

        def waited_for() -> Iterator[dict[str, Any]]:
            for _ in range(done, config.iterations):
                with self.clock.waiting():
                    batch = next(samples)
                yield batch

        self.clock.start()
        yield from device_batches(
            waited_for(), self.device, self.model.pixel_mean, self.model.pixel_std, memory_format=self.layout
        )

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether this iteration is logged, evaluated, and kept as a checkpoint."""
        config, iteration = self.config, self.step.iteration
        last = iteration == config.iterations
        log, evaluate = iteration == 1 or iteration % LOG_EVERY == 0, last or iteration % config.evaluate_every == 0
        checkpoint = last or iteration % config.checkpoint_every == 0
        if iteration % LOG_EVERY == 0 and not self.preempted and ray.train.get_preemption_info() is not None:
            checkpoint = self.preempted = True  # a node is to be taken away: what is done so far is kept now
        elif iteration % NOTICED_EVERY == 0 and self.preempted:  # and from now on as often as that costs nothing
            checkpoint |= self._first_is_idle()
        return log, evaluate, checkpoint

    def _first_is_idle(self) -> bool:
        """Whether the first worker has stored its last checkpoint, as all of them are told."""
        idle = torch.tensor(float(self.checkpoints.idle), device=self.device)
        if self.world_size > 1:
            torch.distributed.broadcast(idle, 0)
        return bool(idle)

    def _log(self, loss: float) -> None:
        if self.log is None:
            return
        iteration, lr = self.step.iteration, float(self.step.schedule.get_last_lr()[-1])
        rate, waited = self.clock.read()
        metrics.STEP_SECONDS.set(1 / rate, run=self.config.run)
        metrics.DATA_WAIT.set(waited, run=self.config.run)
        rate *= self.config.batch_size
        self.images_per_second = rate
        self.history["training"].append(
            {
                "iteration": iteration,
                "loss": loss if math.isfinite(loss) else None,
                "lr": lr,
                "data_wait": waited,
                "time": time.time(),
            }
        )
        curves = {"train/loss": loss, "train/lr": lr, "speed/images_per_second": rate, "speed/data_wait_share": waited}
        self.log.add(iteration, curves)
        note = f"loss {loss:.3f}, decoder lr {lr:.1e}, {rate:.1f} images/s, {100 * waited:.0f} % waiting for data"
        note += f", {_peak_memory(self.device) / 2**30:.1f} GB"
        if self.step.skipped:
            note += f", {self.step.skipped} steps skipped"
        if self.log.lost:
            note += f", {self.log.lost}"
        self.reporter.update(iteration, note)

    def _skipped(self, batch: DeviceBatch, loss: torch.Tensor) -> None:
        """Write down what a skipped step was taken with, and end the training where too many follow each other.

        All workers are here, for what they skip by is the gradient that they share.
        """
        mine: dict[str, Any] = {"worker": self.rank, "loss": str(float(loss)), "images": batch.image_ids}
        try:
            check_batch(batch.images, batch.labels, self.step.criterion.num_classes)
        except ValueError as error:
            mine["fault"] = str(error)
        gathered: list[Any] = [mine]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            torch.distributed.all_gather_object(gathered, mine)
        self.history["skipped"].append({"iteration": self.step.iteration, "workers": gathered})
        if self.step.skipped_in_a_row >= self.config.nonfinite_limit:
            if self.log is not None:
                self.log.write(self.history)
                self.log.finish(failed=True)
            if self.world_size > 1:
                torch.distributed.barrier()  # else the first worker is ended while it still writes
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
        metrics |= {"images_per_second": self.images_per_second, "gflops": self.history.get("gflops")}
        group = get_current_placement_group()
        if group is not None:  # for who stops this run from outside, and has to free what it holds
            metrics[PLACEMENT_GROUP] = group.id.hex()
        if self.history["validation"]:
            metrics |= {name: self.history["validation"][-1][name] for name in SCORES}
        state = {"step": self.step.state_dict(), "history": self.history} if checkpoint else None
        self.checkpoints.report(metrics, state)
        if self.log is not None:
            self.log.write(self.history)

    def _evaluate(self) -> None:
        """Validate on all workers, each its share; the sum of their confusion matrices is exact."""
        model = whole_model(self.model).eval()
        if self.world_size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():  # such as the averages of batch norms, which are each worker's own
                    torch.distributed.broadcast(buffer, 0)
        predictor = predictor_of(model, self.config.inference)
        rows = self.data.rows(self.config.val_split, COLUMNS, shard=(self.rank, self.world_size))
        matrix = confusion_matrix(predictor, rows, len(self.data.classes))
        counts = torch.as_tensor(matrix.counts, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(counts)
        scores = ConfusionMatrix(len(self.data.classes), counts=counts.cpu()).scores()
        iteration, found = self.step.iteration, {name: float(getattr(scores, name)) for name in SCORES}
        self.history["validation"].append({"iteration": iteration, **found})
        if self.log is None:
            return
        metrics.SCORE.set(found["miou"], workflow="train", score="miou")
        self.log.add(iteration, {f"validation/{name}": value for name, value in found.items()})
        first = list(islice(self.data.rows(self.config.val_split, COLUMNS), PICTURED))
        self.log.add_pictures(iteration, first, predictor, self.data.classes)
        self._keep_best(model)

    def _keep_best(self, model: RSSNet) -> None:
        """Have the model uploaded if its validation is among the best, and those deleted that no longer are."""
        assert self.log is not None
        best = best_iterations(self.history["validation"], self.config.keep_best)
        if self.step.iteration in best:
            self._keep(model, f"{BEST_FOLDER}/{self.step.iteration:07}")
        place, kept = storage.join(self.config.run, BEST_FOLDER), {f"{iteration:07}" for iteration in best}

        def delete_others() -> None:
            for name in set(storage.folder_names(place)) - kept:
                storage.delete(storage.join(place, name))

        self.log.uploads.add(delete_others)

    def _keep_best_again(self) -> None:
        """Of a run that goes on, of which an earlier process may have been killed too soon. All workers call this."""
        if self.step.iteration in best_iterations(self.history["validation"], self.config.keep_best):
            model = whole_model(self.model)
            if self.log is not None:
                self._keep_best(model)

    def _keep(self, model: RSSNet, name: str) -> None:
        """Have the model uploaded to a folder of the run; its configuration last, without which it is no model."""
        assert self.log is not None
        folder = tempfile.TemporaryDirectory()
        with storage.explained(folder.name):
            model.save_pretrained(folder.name)
            write_inference(Path(folder.name), self.config.inference)
            last = (Path(folder.name) / CONFIG).read_bytes()
            (Path(folder.name) / CONFIG).unlink()
        place = storage.join(self.config.run, name)

        def upload() -> None:
            storage.upload_folder(Path(folder.name), place)
            storage.write_bytes(storage.join(place, CONFIG), last)
            folder.cleanup()

        self.log.uploads.add(upload)


class _Clock:
    """How fast steps follow each other, and how much of the time they wait for data, since it was last read."""

    def __init__(self) -> None:
        self._begun = self._seconds = self._waited = 0.0
        self._steps = 0

    def start(self) -> None:
        """A step begins: what was between the last one and this does not count."""
        self._begun = time.monotonic()

    def stepped(self) -> None:
        """A step has ended, and the next one begins."""
        now = time.monotonic()
        self._seconds, self._begun, self._steps = self._seconds + now - self._begun, now, self._steps + 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A `with` block that waits for data."""
        asked = time.monotonic()
        yield
        self._waited += time.monotonic() - asked

    def read(self) -> tuple[float, float]:
        """Steps per second, and the share of them that was spent waiting."""
        rate, waited = self._steps / self._seconds, self._waited / self._seconds
        self._seconds = self._waited = 0.0
        self._steps = 0
        return rate, waited


def _peak_memory(device: torch.device) -> int:
    """Bytes that this worker has held at most: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
