"""What a training run asks the cluster for."""

from dataclasses import dataclass
from typing import Literal

from pipeline.cluster import require_capacity

Parallelism = Literal["ddp", "fsdp"]
DECODE_CPUS = 1.0  # of a task on some other node
FEEDING_CPUS = 0.4  # reserved beside a worker that computes on CPUs, for tasks on its own node


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
