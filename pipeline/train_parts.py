"""What a training is built of, from its configuration: whether it can be, the optimizer, and what the model costs."""

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import PipelineError
from pipeline.prediction import predictor_of
from pipeline.train_config import TrainConfig
from rssnet import RSSNet, RSSNetLoss, parameter_groups, poly_with_warmup
from rssnet.classes import Classes


def require_buildable(config: TrainConfig, classes: Classes) -> None:
    """Raise PipelineError if model, inference, losses or optimizer cannot be made of what `completed` returns.

    Args:
        config: with the number of classes set.
        classes: of the dataset.
    """
    try:
        with torch.device("meta"):
            model = RSSNet(dataclasses.replace(config.model, pretrained=False), classes)
            predictor_of(model, config.inference)
        RSSNetLoss(config.loss, len(classes))
        build_optimizer(model, config)
    except (ValueError, RuntimeError, TypeError) as error:
        raise PipelineError(f"The configuration cannot be used: {error}") from error


def build_optimizer(
    model: torch.nn.Module, config: TrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and the learning rate schedule of a run; ValueError for settings that cannot serve."""
    options = config.optimizer
    groups = parameter_groups(model, options.lr, options.weight_decay, options.layer_decay, options.decoder_lr_scale)
    on_gpu = next(model.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=on_gpu)
    warmup = min(options.warmup_iterations, config.iterations - 1)
    return optimizer, poly_with_warmup(optimizer, config.iterations, warmup, options.warmup_lr, options.power)


def gflops(config: TrainConfig) -> float:
    """Multiply-adds of one image through the model, twice over and in thousands of millions, as torch counts them."""
    height, width = config.model.image_hw
    with torch.device("meta"):
        model = RSSNet(dataclasses.replace(config.model, pretrained=False)).eval()
        image = torch.empty(1, 3, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / 1e9
