"""What a prediction holds in memory beside the image, the model and the result."""

from types import SimpleNamespace

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

    def forward(self, images):
        return SimpleNamespace(logits=self.logits.expand(len(images), -1, -1, -1))


def test_a_wide_image_needs_a_few_times_its_band():
    model, image = OneAnswer(), torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    band = CLASSES * (CROP // 4) * (WIDTH // 4) * 4
    with PeakMemory([image, *model.parameters()]) as memory:
        Predictor(model, window_batch=1)([image])
    result = HEIGHT * WIDTH * 5
    assert band < memory.peak - result < 5 * band
