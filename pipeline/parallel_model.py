"""A model on several training workers: whole on each of them, or in shards, of which each worker holds its own.

Whole copies (DistributedDataParallel) are the faster way while a GPU's memory holds weights, gradients and moments.
Shards (FSDP2) divide these by the number of workers, and gather a block's weights just before they are used.
"""

import dataclasses
from typing import cast

import torch
import torch.distributed
from ray.train.torch import prepare_model
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from pipeline.train_resources import Parallelism
from rssnet import RSSNet


def parallel_model(model: RSSNet, parallelism: Parallelism) -> nn.Module:
    """What a batch goes through so that workers share their gradients.

    Args:
        model: the same on all workers, on its device; `fsdp` leaves only this worker's shards of it there.
        parallelism: `ddp` or `fsdp`.
    """
    if parallelism == "fsdp":
        shard(model)
        return model
    return cast(nn.Module, prepare_model(model, move_to_device=False))


def shard(model: RSSNet) -> None:
    """Leave each worker its part of all parameters, in place; blocks of the backbone are gathered one at a time."""
    # FSDP2 refuses other layouts, such as the decoder's channels-last weights of convolutions.
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue] torch has it, its types do not
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for block in _blocks(model.backbone):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def with_shared_statistics(model: RSSNet) -> RSSNet:
    """The model with batch norms that take their statistics over all workers; only some backbones have any.

    They compute on GPUs alone. By timm's converter, for torch's drops the activations that timm's norms hold.
    """
    return cast(RSSNet, convert_sync_batchnorm(model))


def whole_model(model: RSSNet) -> RSSNet:
    """The model with all of its parameters, for use on this worker alone; itself where it is not in shards.

    Every worker of a sharded model has to call this.
    """
    if not isinstance(model, FSDPModule):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.device("meta"):
        whole = RSSNet(dataclasses.replace(model.config, pretrained=False), model.classes)
    return whole.fill(cast(dict[str, torch.Tensor], state), device=next(model.parameters()).device)


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """The modules of which the backbone has several in a row, inner ones first."""
    found: dict[nn.Module, None] = {}
    for parent in backbone.modules():
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            kinds = [type(child) for child in parent.children()]
            repeated = (child for child in parent.children() if kinds.count(type(child)) > 1)
            blocks = (child for child in repeated if not isinstance(child, nn.ModuleList))  # which nobody calls
            found |= dict.fromkeys(child for child in blocks if len(list(child.children())) > 1)
    return list(reversed(found))
