"""A training on Ray Train: its workers, started again where they are lost, and what ends them for good.

Imports neither the model nor the training loop: Ray Train's controller and the process of a trial, which run this
module, would take as long to load timm as a worker does.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ray.train import CheckpointConfig, ControllerError, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback

from pipeline import storage
from pipeline.cluster import interruptible
from pipeline.errors import mendable_cause
from pipeline.progress import Reporter, announce
from pipeline.run_folder import CHECKPOINTS_FOLDER
from pipeline.storage_errors import StorageOutage, explanation, patiently
from pipeline.train_config import TrainConfig
from pipeline.train_resources import FEEDING_CPUS

CONTROLLER_FAILURES = 3  # ray retries a group that cannot start for ever unless told a number


def fit(
    config: TrainConfig,
    reporter: Reporter,
    callbacks: Sequence[UserCallback] = (),
    start: str | None = None,
    count_gflops: bool = False,
) -> Result:
    """Run the training loop on the cluster; goes on from the last checkpoint below `config.run`, if there is one.

    Args:
        config: as `completed` returns it.
        reporter: is told iterations and loss.
        callbacks: Ray Train's, called in its controller process.
        start: URL of another run's checkpoint, whose weights a run that has none of its own begins with.
        count_gflops: whether what is reported, and the history, have the model's `gflops`.
    """
    job = {"config": config, "reporter": reporter, "start": start, "count_gflops": count_gflops}
    outages = 0
    while True:
        try:
            return _fit(config, job, [EndForGood(), *callbacks])
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


def _fit(config: TrainConfig, job: dict[str, Any], callbacks: Sequence[UserCallback]) -> Result:
    filesystem, path = storage.arrow_filesystem(config.run)
    resources = config.resources
    workers = resources.workers if resources.min_workers is None else (resources.min_workers, resources.workers)
    per_worker: dict[str, Any] = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if not resources.use_gpu:  # what feeds it runs beside it: an elastic group takes every CPU that there is
        per_worker = {"CPU": resources.cpus_per_worker + FEEDING_CPUS}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=job,
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


def _train_worker(job: dict[str, Any]) -> None:
    from pipeline.train_loop import train_worker  # in the workers alone, see above

    train_worker(**job)
