"""One optimizer step of a training worker: precision, accumulation, clipping, steps that are skipped, averaged weights.

Nothing here knows Ray; workers that share a batch are told of through torch.distributed, where it is initialized.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rssnet.losses import RSSNetLoss

_COUNTERS = ("iteration", "skipped", "skipped_in_a_row")


class TrainStep:
    """Updates a model, batch after batch.

    A step whose gradient is not finite is skipped: weights, moments and averages stay as they are, and only the
    schedule goes on. The gradient is that of the whole batch after all workers have shared theirs, so they all skip.

    Args:
        model: on its device, whole or this worker's shards of it; what is saved and evaluated.
        parallel: what the batch goes through: the model, or a wrapper of it such as DistributedDataParallel.
        criterion: of the model's output and labels.
        optimizer, schedule: stepped once per batch.
        precision: `bf16` for autocast in the forward pass.
        accumulation: parts that a batch is computed in, one after the other, to save memory. Each part is averaged
            over its own pixels, as each batch is.
        clip_grad_norm: largest norm of the gradient, beyond which it is scaled down; 0 is off.
        average: the exponential moving average of the weights, of the same shards; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: nn.Module,
        criterion: RSSNetLoss,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        precision: str = "fp32",
        accumulation: int = 1,
        clip_grad_norm: float = 0.0,
        average: ModelEmaV3 | None = None,
    ) -> None:
        self.model, self.parallel, self.criterion = model, parallel, criterion
        self.optimizer, self.schedule = optimizer, schedule
        self.precision, self.accumulation, self.clip_grad_norm = precision, accumulation, clip_grad_norm
        self.average = average
        self.iteration = self.skipped = self.skipped_in_a_row = 0

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and to keep: the average, where there is one."""
        return self.average.module if self.average is not None else self.model

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Update the model once.

        Args:
            images: (B, 3, H, W), normalised.
            labels: (B, H, W).

        Returns:
            The loss, of this worker's batch alone; on its device, so that asking for its value is the caller's choice.

        Raises:
            ValueError: for labels that the criterion refuses.
        """
        self.parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        cuts = (images.tensor_split(self.accumulation), labels.tensor_split(self.accumulation))
        parts = list(zip(*cuts, strict=True))
        shares = _shares(parts)
        for number, (part, truth) in enumerate(parts, start=1):
            with self._gradients_kept_back(number < len(parts)):
                with torch.autocast(part.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    output = self.parallel(part)
                loss = self.criterion(output, truth)["loss"] * shares[number - 1]
                loss.backward()
            losses.append(loss.detach())
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if math.isfinite(float(norm)):  # the one time that a step waits for its device
            if self.clip_grad_norm:
                clip_grads_with_norm_(self.model.parameters(), self.clip_grad_norm, norm)
            self.optimizer.step()
            self.skipped_in_a_row = 0
            if self.average is not None:
                self.average.update(self.model, step=self.iteration + 1 - self.skipped)
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.schedule.step()
        self.iteration += 1
        return torch.stack(losses).sum()

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on as if it were this one.

        The tensors are those that the next step changes, on their device: copy them before it. Of a model in shards
        they are gathered, whole and on the CPU, so that another number of workers can go on with them. All workers have
        to call this then, and the first one alone gets tensors.
        """
        whole = StateDictOptions(full_state_dict=True, cpu_offload=isinstance(self.model, FSDPModule))
        model = get_model_state_dict(self.model, options=whole)
        optimizer = None  # before the first step that was not skipped
        if self.optimizer.state:
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=whole)
        average = None
        if self.average is not None:
            average = get_model_state_dict(self.average.module, options=whole)
        counters = {name: getattr(self, name) for name in _COUNTERS}
        schedule = self.schedule.state_dict()
        return {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule, **counters}

    def load_state_dict(self, state: dict[str, Any], settings: bool = True) -> None:
        """Go on where `state_dict` was taken, with any number of workers; each of them is given the whole state.

        Args:
            settings: whether learning rates, weight decays and the schedule are the state's, too, and not this step's.
        """
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, state["model"], options=whole)
        optimizer = state["optimizer"]
        if optimizer is not None:
            if not settings:
                own = get_optimizer_state_dict(self.model, self.optimizer, options=whole)
                optimizer = {**optimizer, "param_groups": own["param_groups"]}
            set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=whole)
        if self.average is not None:
            set_model_state_dict(self.average.module, state["average"] or state["model"], options=whole)
        if settings:
            self.schedule.load_state_dict(state["schedule"])
        else:
            self.schedule.last_epoch = state["iteration"] - 1
            self.schedule.step()
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        for name in _COUNTERS:
            setattr(self, name, state[name])

    @contextlib.contextmanager
    def _gradients_kept_back(self, kept: bool) -> Iterator[None]:
        """Workers share their gradients once per batch, at its last part."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(not kept)
        no_sync = getattr(self.parallel, "no_sync", None)  # of DistributedDataParallel, compiled or not
        with no_sync() if kept and no_sync else contextlib.nullcontext():
            yield


def _shares(parts: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The share of the whole batch, over all workers, that each part is: so each image counts as much as another."""
    sizes = torch.tensor([len(images) for images, _ in parts], dtype=torch.float32, device=parts[0][0].device)
    if len(parts) > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sizes)
    return (sizes / sizes.sum()).tolist()


def mean_over_workers(count: Tensor) -> Tensor:
    """The normaliser (`rssnet.losses.Normalizer`) of workers that average their gradients."""
    count = count.detach().clone()
    torch.distributed.all_reduce(count)
    return count / torch.distributed.get_world_size()
