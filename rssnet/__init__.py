"""RSSNet: semantic segmentation by representation separation, on any timm backbone. Pure PyTorch and timm."""

from .classes import Classes
from .config import (
    CrossAttentionConfig,
    LocalPathwayConfig,
    LossConfig,
    RSSNetConfig,
    SeparationConfig,
)
from .decoder import Auxiliary, RSSNetOutput
from .losses import RSSNetLoss, check_batch
from .model import RSSNet

__all__ = [
    "Auxiliary",
    "Classes",
    "CrossAttentionConfig",
    "LocalPathwayConfig",
    "LossConfig",
    "RSSNet",
    "RSSNetConfig",
    "RSSNetLoss",
    "RSSNetOutput",
    "SeparationConfig",
    "check_batch",
]
