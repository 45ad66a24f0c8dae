"""The benchmarks' presets: made from one table, accepted by the trainer, and each backbone's family takes a step."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.command_line import load
from pipeline.recipes import BACKBONES, BENCHMARKS, presets
from pipeline.train_config import TrainConfig
from pipeline.train_parts import build_optimizer
from pipeline.train_step import TrainStep
from rssnet import RSSNet, RSSNetLoss

PRESETS = Path(__file__).parents[2] / "workflows" / "presets"
CLASSES = {"ade20k": 150, "coco_stuff10k": 171, "coco_stuff164k": 171, "pascal_context": 59, "cityscapes": 19}
# A small member of each backbone's family.
STAND_INS = {
    "beit_large": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "beit_base": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "vit_large": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "dinov2_large": ("vit_small_patch14_dinov2", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "dinov3_large": ("vit_small_patch16_dinov3", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "eva02_large": ("eva02_tiny_patch14_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "swin_large": (
        "swin_tiny_patch4_window7_224",
        {"depths": [1, 1, 1, 1], "embed_dim": 12, "num_heads": [1, 2, 2, 4]},
    ),
    "pvt_v2_b2": ("pvt_v2_b0", {}),
    "convnext_base": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
}


def config_of(path: str) -> TrainConfig:
    document = yaml.safe_load((PRESETS / path).read_text())
    return load(TrainConfig, document, {"dataset": "data", "run": "run"})


def test_the_presets_are_those_of_the_table() -> None:
    made = {path.relative_to(PRESETS).as_posix(): path.read_text() for path in PRESETS.glob("*/*.yaml")}
    assert made == presets(), "run `make presets`"
    assert len(made) == len(BENCHMARKS) * len(BACKBONES) == 45


@pytest.mark.parametrize(("benchmark", "backbone", "crop", "stride", "iterations", "lr"), [
    ("ade20k", "beit_large", 640, 426, 80_000, 2e-5),
    ("ade20k", "pvt_v2_b2", 512, 341, 80_000, 3e-5),
    ("coco_stuff10k", "beit_base", 512, 341, 20_000, 3e-5),
    ("coco_stuff164k", "eva02_large", 644, 426, 80_000, 2e-5),
    ("pascal_context", "dinov2_large", 490, 320, 20_000, 2e-5),
    ("cityscapes", "swin_large", 768, 512, 80_000, 2e-5),
])  # fmt: skip
def test_a_preset_holds_the_published_recipe(
    benchmark: str, backbone: str, crop: int, stride: int, iterations: int, lr: float
) -> None:
    config = config_of(f"{benchmark}/{backbone}.yaml")
    assert config.model.image_hw == config.inference.crop_size == (crop, crop)
    assert config.inference.stride == (stride, stride)
    assert (config.iterations, config.batch_size, config.optimizer.lr) == (iterations, 16, lr)
    assert (config.optimizer.weight_decay, config.optimizer.warmup_iterations) == (0.05, 1500)
    large = BACKBONES[backbone].size == "large"
    assert (config.optimizer.layer_decay, config.model.drop_path) == ((0.95, 0.3) if large else (0.9, 0.1))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_preset_s_model_is_one_that_its_backbone_can_be(backbone: str) -> None:
    configs = [config_of(f"{benchmark}/{backbone}.yaml") for benchmark in BENCHMARKS]
    assert all(config.model.image_hw[0] % BACKBONES[backbone].divisor == 0 for config in configs)
    largest = max(configs, key=lambda config: config.model.image_hw)
    height, width = largest.model.image_hw
    with torch.device("meta"):
        model = RSSNet(dataclasses.replace(largest.model, pretrained=False, num_classes=19)).eval()
        logits = model(torch.empty(1, 3, height, width)).logits
        build_optimizer(model, largest)
    assert logits.shape == (1, 19, height // 4, width // 4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_preset_takes_a_step_with_a_small_backbone_of_its_family(benchmark: str, backbone: str) -> None:
    config = config_of(f"{benchmark}/{backbone}.yaml")
    name, options = STAND_INS[backbone]
    side = 4 * BACKBONES[backbone].divisor
    small = dataclasses.replace(
        config.model, backbone=name, backbone_options=options, pretrained=False, image_size=side, decoder_width=16,
        num_classes=CLASSES[benchmark],
    )  # fmt: skip
    torch.manual_seed(0)
    model = RSSNet(small)
    criterion = RSSNetLoss(config.loss, CLASSES[benchmark])
    step = TrainStep(model, model, criterion, *build_optimizer(model, config), precision=config.precision)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = step(torch.randn(1, 3, side, side), torch.randint(0, CLASSES[benchmark], (1, side, side)))
    assert loss.isfinite()
    assert step.skipped == 0
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
