"""What tests of the model share."""

import pytest
import torch

from rssnet import RSSNet
from tests.rssnet.tiny_model import build


@pytest.fixture(scope="module")
def model() -> RSSNet:
    """The tiny model, in evaluation mode; not to be changed."""
    return build().eval()


@pytest.fixture
def images() -> torch.Tensor:
    """Two images of the tiny model's size."""
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
