"""RSSNet: semantic segmentation by representation separation, on any timm backbone. Pure PyTorch and timm.

Names are imported when they are first used: who needs only `Classes` or a config, such as a task that reads files, does
not pay seconds and half a gigabyte for torch and timm.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classes import Classes
    from .config import CrossAttentionConfig, LocalPathwayConfig, LossConfig, RSSNetConfig, SeparationConfig
    from .decoder import Auxiliary, RSSNetOutput
    from .inference import Prediction, Predictor
    from .losses import RSSNetLoss, check_batch
    from .metrics import BoundaryIoU, ConfusionMatrix
    from .model import RSSNet
    from .optim import parameter_groups, poly_with_warmup

__version__ = "0.1.0"

__all__ = [
    "Auxiliary",
    "BoundaryIoU",
    "Classes",
    "ConfusionMatrix",
    "CrossAttentionConfig",
    "LocalPathwayConfig",
    "LossConfig",
    "Prediction",
    "Predictor",
    "RSSNet",
    "RSSNetConfig",
    "RSSNetLoss",
    "RSSNetOutput",
    "SeparationConfig",
    "check_batch",
    "parameter_groups",
    "poly_with_warmup",
]

_MODULE_OF = {
    "Auxiliary": "decoder",
    "BoundaryIoU": "metrics",
    "Classes": "classes",
    "ConfusionMatrix": "metrics",
    "CrossAttentionConfig": "config",
    "LocalPathwayConfig": "config",
    "LossConfig": "config",
    "Prediction": "inference",
    "Predictor": "inference",
    "RSSNet": "model",
    "RSSNetConfig": "config",
    "RSSNetLoss": "losses",
    "RSSNetOutput": "decoder",
    "SeparationConfig": "config",
    "check_batch": "losses",
    "parameter_groups": "optim",
    "poly_with_warmup": "optim",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
