"""A model in shards computes what the whole model does, and is whole again when asked for."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch.distributed.fsdp import FSDPModule

from pipeline.parallel_model import shard, whole_model, with_shared_statistics
from rssnet import RSSNet, RSSNetConfig

BACKBONES = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)},
    "hrnet_w18_small": {},
}


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_in_shards_is_the_same_model(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = BACKBONES[backbone]
    config = RSSNetConfig(backbone=backbone, backbone_options=options, num_classes=4, image_size=64, decoder_width=16)
    model, images = RSSNet(config).eval(), torch.randn(1, 3, 64, 64)
    assert whole_model(model) is model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images).logits
    shard(model)
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) > 2
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, expected)
    whole = whole_model(model)
    assert not isinstance(whole, FSDPModule)
    assert whole.state_dict().keys() == before.keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, before[name])
    whole.save_pretrained(str(tmp_path / "model"))
    with torch.no_grad():
        torch.testing.assert_close(RSSNet.from_pretrained(str(tmp_path / "model")).eval()(images).logits, expected)


def test_norms_with_shared_statistics_keep_weights_and_activations() -> None:
    """Without a group of workers they are ordinary batch norms, so that the CPU can tell."""
    torch.manual_seed(0)
    config = RSSNetConfig(backbone="efficientnet_lite0", num_classes=4, image_size=64, decoder_width=16)
    model, images = RSSNet(config), torch.randn(2, 3, 64, 64)
    converted = with_shared_statistics(copy.deepcopy(model))
    kinds = {type(module) for module in converted.modules()}
    assert SyncBatchNormAct in kinds
    assert not kinds & {BatchNormAct2d, torch.nn.BatchNorm2d}
    assert converted.state_dict().keys() == model.state_dict().keys()
    for either in (model, converted):
        either.train()
    torch.manual_seed(1)
    expected = model(images).logits
    torch.manual_seed(1)
    torch.testing.assert_close(converted(images).logits, expected)
    for either in (model, converted):
        either.eval()
    torch.testing.assert_close(converted(images).logits, model(images).logits)
