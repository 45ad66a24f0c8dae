"""Batches on the device that computes, one ahead: the next is copied there while the last is in use."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor


@dataclass(frozen=True)
class DeviceBatch:
    """A batch for one step.

    Args:
        image_ids: (B,) names.
        images: (B, 3, H, W) float32, normalised.
        labels: (B, H, W) int64.
    """

    image_ids: list[str]
    images: Tensor
    labels: Tensor


def device_batches(
    batches: Iterator[dict[str, np.ndarray]],
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    memory_format: torch.memory_format,
) -> Iterator[DeviceBatch]:
    """The batches of `pipeline.sample_stream` on a device.

    For a GPU they are put in pinned memory, and copied and normalised on a stream of their own.

    Args:
        batches: are asked for one earlier than they are given.
        device: of the model.
        mean, std: of the model's pixels, by channel, of values 0 to 1.
        memory_format: of the images.
    """
    names: deque[list[str]] = deque()

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            names.append(batch["image_id"].tolist())
            images, labels = torch.from_numpy(batch["image"]), torch.from_numpy(batch["label"])
            yield (images.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (images, labels)

    loader: Any = pairs()
    for images, labels in PrefetchLoader(loader, mean, std, device=device):
        yield DeviceBatch(names.popleft(), images.to(memory_format=memory_format), labels.long())
