"""The README.md that lies beside a saved model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .classes import Classes
from .config import RSSNetConfig


def model_card(config: RSSNetConfig, classes: Classes, weights: Mapping[str, Tensor]) -> str:
    """Markdown that says what a model is, how to load it and what its classes are.

    Args:
        config: The model's config.
        classes: Its classes.
        weights: Its parameters by name, to count them.
    """
    parameters = sum(tensor.numel() for tensor in weights.values())
    height, width = config.image_hw
    rows = "\n".join(
        f"| {index} | {name.replace('|', '&#124;')} | #{red:02x}{green:02x}{blue:02x} |"
        for index, (name, (red, green, blue)) in enumerate(zip(classes.names, classes.palette, strict=True))
    )
    return f"""---
library_name: rssnet
pipeline_tag: image-segmentation
tags: [semantic-segmentation, rssnet, timm]
---

# {_title(config)}

Semantic segmentation into {len(classes)} classes: {_title(config)}, {parameters / 1e6:.1f} M parameters, for images of
{height} x {width} pixels. RSSNet is an implementation of arXiv 2212.13764.

```python
from rssnet import Predictor, RSSNet

model = RSSNet.from_pretrained("this/folder").eval()
(prediction,) = Predictor(model)([photograph])  # (3, H, W) uint8 of any size; prediction.class_map is (H, W)
logits = model(images).logits  # images (B, 3, {height}, {width}), normalised with model.pixel_mean and model.pixel_std
```

If an `inference.json` lies beside this file, the model was validated as it says: give `Predictor` its scales, flip and
windows, or predictions are others than those that were scored.

Scores are not written here by the library: they belong to the data they were measured on, and to whoever measured them.

| id | class | colour |
|---|---|---|
{rows}
"""


def _title(config: RSSNetConfig) -> str:
    names = {"rssnet": "RSSNet", "linear": "Linear head", "upernet": "UPerNet"}
    return f"{names[config.head]} on {config.backbone}"
