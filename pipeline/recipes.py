"""The recipes of the benchmarks in one table, and the presets that are made of it: `make presets` writes them.

They are the common recipe of segmentation with vision transformers, as BEiT, ViT-Adapter and SegViT publish it. Where
that says nothing (iterations of base and small backbones, all of pyramids), ours is that of the nearest row.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WORKERS, IMAGES_PER_STEP = 8, 16


@dataclass(frozen=True)
class Benchmark:
    """A data set's part of a recipe.

    Args:
        layout: that `workflows/ingest.py` reads it in.
        crop, stride: side of a training crop and of the sliding window, and its step, in pixels.
        small_crop, small_stride: the same for backbones below base size.
    """

    layout: str
    crop: int
    stride: int
    iterations: int
    small_crop: int | None = None
    small_stride: int | None = None


@dataclass(frozen=True)
class Backbone:
    """A backbone's part of a recipe.

    Args:
        name: of the timm model and its pre-trained weights.
        size: large, base or small.
        divisor: what the sides of an image must be multiples of, in pixels.
    """

    name: str
    size: str
    divisor: int = 32


BENCHMARKS = {
    "ade20k": Benchmark("ade20k", 640, 426, 80_000, small_crop=512, small_stride=341),
    "coco_stuff10k": Benchmark("coco_stuff10k", 512, 341, 20_000),
    "coco_stuff164k": Benchmark("coco_stuff164k", 640, 426, 80_000),
    "pascal_context": Benchmark("pascal_context", 480, 320, 20_000),
    "cityscapes": Benchmark("cityscapes", 768, 512, 80_000),
}
BACKBONES = {
    "beit_large": Backbone("beit_large_patch16_512.in22k_ft_in22k_in1k", "large", 16),
    "beit_base": Backbone("beit_base_patch16_384.in22k_ft_in22k_in1k", "base", 16),
    "vit_large": Backbone("vit_large_patch16_384.augreg_in21k_ft_in1k", "large", 16),
    "dinov2_large": Backbone("vit_large_patch14_dinov2.lvd142m", "large", 14),
    "dinov3_large": Backbone("vit_large_patch16_dinov3.lvd1689m", "large", 16),
    "eva02_large": Backbone("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", "large", 14),
    "swin_large": Backbone("swin_large_patch4_window12_384.ms_in22k", "large"),
    "pvt_v2_b2": Backbone("pvt_v2_b2.in1k", "small"),
    "convnext_base": Backbone("convnext_base.fb_in22k", "base"),
}
# By size: learning rate of the backbone's last layer, decay per layer below it, largest rate of stochastic depth.
_BY_SIZE = {"large": (2e-5, 0.95, 0.3), "base": (3e-5, 0.9, 0.1), "small": (3e-5, 0.9, 0.1)}


def preset(benchmark: Benchmark, backbone: Backbone) -> dict[str, Any]:
    """The fields of a `TrainConfig` in which the recipe of a benchmark differs from the defaults."""
    small = backbone.size == "small"
    crop = (benchmark.small_crop if small else None) or benchmark.crop
    stride = (benchmark.small_stride if small else None) or benchmark.stride
    side = math.ceil(crop / backbone.divisor) * backbone.divisor
    lr, layer_decay, drop_path = _BY_SIZE[backbone.size]
    return {
        "model": {"backbone": backbone.name, "pretrained": True, "image_size": side, "drop_path": drop_path},
        "optimizer": {"lr": lr, "layer_decay": layer_decay},
        "inference": {"crop_size": [side, side], "stride": [stride, stride]},
        "iterations": benchmark.iterations,
        "batch_size": IMAGES_PER_STEP,
        "evaluate_every": benchmark.iterations // 10,
        "precision": "bf16",
        "resources": {"workers": WORKERS, "use_gpu": True},
    }


def presets() -> dict[str, str]:
    """Each preset as YAML, by its path below `workflows/presets/`."""
    return {
        f"{data}/{name}.yaml": f"# Made by `make presets` from the table in pipeline/recipes.py. Ingest with --layout "
        f"{benchmark.layout}.\n{yaml.safe_dump(preset(benchmark, backbone), sort_keys=False, default_flow_style=None)}"
        for data, benchmark in BENCHMARKS.items()
        for name, backbone in BACKBONES.items()
    }


def main(folder: str) -> None:
    """Write all presets below a folder."""
    for path, text in presets().items():
        file = Path(folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
