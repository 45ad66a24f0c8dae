"""What a prediction holds in memory beside the image, the model and the result."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rssnet import Predictor
from tests.rssnet.peak_memory import PeakMemory

CLASSES, CROP, HEIGHT, WIDTH = 150, 128, 256, 640


class OneAnswer(nn.Module):
    """Says the same of every window, and takes no memory for it."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(image_size=CROP)
        self.pixel_mean = self.pixel_std = (0.5, 0.5, 0.5)
        self.logits = nn.Parameter(torch.randn(1, CLASSES, CROP // 4, CROP // 4))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return SimpleNamespace(logits=self.logits.expand(len(images), -1, -1, -1))


@pytest.mark.parametrize("top_k", [1, 4])
def test_a_wide_image_needs_a_few_times_its_band(top_k):
    model, image = OneAnswer(), torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    band = CLASSES * (CROP // 4) * (WIDTH // 4) * 4
    with PeakMemory([image, *model.parameters()]) as memory:
        Predictor(model, window_batch=1, top_k=top_k)([image])
    result = HEIGHT * WIDTH * 5 * top_k
    assert band < memory.peak - result < 5 * band


def test_a_large_image_among_small_ones_takes_hardly_more_than_they_do_apart_and_shares_their_batches():
    model = OneAnswer()
    small = [torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8) for _ in range(5)]

    def peak(images):
        with PeakMemory([*images, *model.parameters()]) as memory:
            predictions = Predictor(model, window_batch=4)(images)
        return memory.peak - sum(prediction.class_map.numel() * 5 for prediction in predictions)

    high, higher = (torch.zeros(3, rows, 256, dtype=torch.uint8) for rows in (4 * CROP, 16 * CROP))
    apart = max(peak(small), peak([high]))
    model.batches.clear()
    assert peak([*small[:2], higher, *small[2:]]) < 1.25 * apart
    assert model.batches[:-1] == [4] * (len(model.batches) - 1)
