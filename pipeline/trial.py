"""What the process of one trial runs: a training on Ray Train, whose validations Ray Tune is told of.

`Tuner(TorchTrainer)` fails in ray 2.60; so a trial is a function that runs the trainer. The trainer's controller is
another process, which hands each validation over through a queue. Where trials exchange weights, each report carries a
small file that names the checkpoint to go on from; the checkpoint itself stays where the training has put it.
"""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.exceptions
import torch
from ray import tune
from ray.train import Checkpoint
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.queue import Empty, Queue

from pipeline import dataset, storage
from pipeline.errors import PipelineError, mendable_cause
from pipeline.fit import fit
from pipeline.objectives import Objectives
from pipeline.progress import Reporter
from pipeline.run_folder import HISTORY_FILE, MODEL_FOLDER
from pipeline.search_space import SearchSpace
from pipeline.searchers import FAILURE, PLANNED
from pipeline.storage_errors import StorageOutage
from pipeline.train_config import TrainConfig, completed
from rssnet.serialization import CONFIG

# Among the reported metrics, beside `searchers.FAILURE` and `searchers.PLANNED`.
ERROR, PARENT, RUN = "error", "parent", "run"
POINTER_FILE = "trained.json"
POLL_SECONDS = 1.0
# Seconds that a training waits for its place: another trial may hold it until its next validation.
_PLACE_SECONDS = 7 * 24 * 3600
_NO_MEMORY = (
    "out of memory",
    "outofmemory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "running low on memory",
    "memory pressure",
)


@dataclass(frozen=True)
class TrialJob:
    """What all trials of a sweep have in common.

    Args:
        dataset: URL.
        place: URL that each trial has a folder of its own below.
        space: which turns a trial's parameters into its configuration.
        objectives: of the sweep, each of which a validation has to have.
        pauses: whether trials are paused at validations, so that each of these needs a checkpoint.
        exchanges: whether a trial may go on with another one's weights, too, so that every checkpoint has to stay.
        reporter: is told how far trainings are.
    """

    dataset: str
    place: str
    space: SearchSpace
    objectives: Objectives
    pauses: bool
    exchanges: bool
    reporter: Reporter


@dataclass(frozen=True)
class Pointer:
    """Where a trial can be gone on with.

    Args:
        run: URL of the training.
        checkpoint: URL of its checkpoint.
        trial_id: of the trial that it belongs to.
    """

    run: str
    checkpoint: str
    trial_id: str


def run_trial(parameters: dict[str, Any], job: TrialJob) -> None:
    """Ray Tune's entry point. A failure that trying again cannot mend is reported as a result, others are raised."""
    trial_id = str(tune.get_context().get_trial_id())
    pointer = _pointer()
    run, start = _place(storage.join(job.place, trial_id), trial_id, pointer, parameters)
    told: dict[str, Any] = {RUN: run, "iteration": 0, "validations": 0}
    try:
        config = job.space.config(job.dataset, run, parameters)
        config = completed(config, dataset.open(config.dataset))
        if job.pauses:
            config = dataclasses.replace(config, checkpoint_every=config.evaluate_every)
        if job.exchanges:
            config = dataclasses.replace(config, keep_checkpoints=-(-config.iterations // config.evaluate_every))
        told[PLANNED] = config.iterations
        if start is not None and pointer is not None:
            told[PARENT] = pointer.trial_id
        for metrics, checkpoint in _validations(config, job, trial_id, start):
            told |= {name: value for name, value in metrics.items() if value is not None}
            if "images_per_second" in job.objectives.names and "images_per_second" not in told:
                continue  # a training that has gone on measures its speed a few steps later
            told["validations"] = -(-told["iteration"] // config.evaluate_every)
            if job.objectives.values(told) is None:
                found = ", ".join(f"{name} is {told.get(name)}" for name in job.objectives.names)
                raise PipelineError(f"At iteration {told['iteration']} the {found}, which cannot be compared.")
            _tell(told, Pointer(run, checkpoint, trial_id) if job.exchanges and checkpoint else None)
            told.pop(PARENT, None)
    except Exception as error:
        failure = failure_of(error)
        if failure is None:
            raise
        nothing = dict.fromkeys(job.objectives.names, math.nan)
        reason = " ".join(str(_root(error)).split())[:500] or type(_root(error)).__name__
        _tell(told | nothing | {FAILURE: failure, ERROR: reason})


def failure_of(error: BaseException) -> str | None:
    """`out_of_memory` or `failed` for an error that would come again; None for one of the cluster or the store."""
    if is_out_of_memory(error):
        return "out_of_memory"
    mendable = mendable_cause(error)
    if mendable is not None:
        return None if isinstance(mendable, StorageOutage) else "failed"
    if isinstance(error, WorkerGroupError):
        lost = [isinstance(failure, ray.exceptions.RayError) for failure in error.worker_failures.values()]
        return None if any(lost) else "failed"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or a machine had too little memory, as far as anybody says so.

    A process that the operating system's own killer has ended looks as any other that was killed.
    """
    kinds = (MemoryError, torch.OutOfMemoryError, ray.exceptions.OutOfMemoryError)
    root = _root(error)
    said = str(root).lower().replace("oom killer due to high memory usage", "")  # Ray's guess at every lost process
    return isinstance(root, kinds) or any(text in said for text in _NO_MEMORY)


def _root(error: BaseException) -> BaseException:
    """What a worker has raised, of all that Ray has wrapped around it."""
    mendable = mendable_cause(error)
    if mendable is not None:
        return mendable
    while True:
        inner: Any = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, WorkerGroupError) and error.worker_failures:
            inner = next(iter(error.worker_failures.values()))
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


def _place(own: str, trial_id: str, pointer: Pointer | None, parameters: Mapping[str, Any]) -> tuple[str, str | None]:
    """The URL of the training, and that of another trial's checkpoint which it begins with.

    A training that takes over weights has a place of its own, or Ray Train would go on with the one that lies there.
    The same weights with the same parameters have the same, so that a trial which is lost goes on where it was.
    """
    if pointer is None:
        return own, None
    if pointer.trial_id == trial_id:
        return pointer.run, None
    key = json.dumps([pointer.checkpoint, parameters], sort_keys=True, default=str)
    return f"{own}-{hashlib.sha256(key.encode()).hexdigest()[:12]}", pointer.checkpoint


def _validations(
    config: TrainConfig, job: TrialJob, trial_id: str, start: str | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Train, and yield the metrics of each validation with the URL of its checkpoint, if it has one."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_PLACE_SECONDS)
    # Ray Tune tries a failed trial again, not Ray Train: that would take a stopped trial's lost workers for a failure,
    # and start them anew in a placement group that nobody removes.
    config = dataclasses.replace(config, resources=dataclasses.replace(config.resources, max_failures=0))
    part = job.reporter.part(trial_id)
    done = 0
    if not storage.exists(storage.join(config.run, MODEL_FOLDER, CONFIG)):  # it has not ended yet
        queue = Queue(actor_options={"num_cpus": 0})
        training = _begun(partial(fit, config, part, [_HandOver(queue, config.run)], start, count_gflops=True))
        for metrics, checkpoint in _items(queue, training):
            done = metrics["iteration"]
            yield metrics, checkpoint
        training.result()
        queue.shutdown()
    if done < config.iterations:  # it had ended before its driver was killed
        last = storage.read_json(storage.join(config.run, HISTORY_FILE))
        logged = [point for point in last["training"] if point["loss"] is not None]
        loss = logged[-1]["loss"] if logged else math.nan
        yield {"loss": loss, "gflops": last.get("gflops"), **last["validation"][-1]}, ""
    part.update(config.iterations)


def _begun(call: Callable[[], Any]) -> Future[Any]:
    """The result of a call that a thread makes, which does not keep a process that is to end from ending."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="training", daemon=True).start()
    return result


def _items(queue: Queue, training: Future[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """What the training puts into the queue, until it has ended and the queue is empty."""
    while True:
        ended = training.done()
        try:
            yield queue.get(timeout=POLL_SECONDS if not ended else 0.01)
        except Empty:
            if ended:
                return


class _HandOver(UserCallback):
    """Puts the reports that carry a fresh validation into a queue; a checkpoint alone is none."""

    def __init__(self, queue: Queue, run: str) -> None:
        self.queue, self.run = queue, run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:  # noqa: ARG002
        if metrics[0]["evaluated"]:
            place = "" if checkpoint is None else _url_like(self.run, checkpoint.path)
            self.queue.put((metrics[0], place))


def _url_like(run: str, path: str) -> str:
    """The URL of a path in the file system of a run."""
    scheme, _ = storage.split(run)
    return f"{scheme}://{path}" if scheme != "file" else path


def _pointer() -> Pointer | None:
    """Where Ray Tune says that this trial goes on."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Pointer(**json.loads((Path(folder) / POINTER_FILE).read_text()))


def _tell(metrics: dict[str, Any], pointer: Pointer | None = None) -> None:
    if pointer is None:
        tune.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / POINTER_FILE).write_text(json.dumps(dataclasses.asdict(pointer)))
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
