"""Optimizer parameter groups and the learning-rate schedule of the RSSNet recipes.

For an exponential moving average of the weights take timm's `timm.utils.ModelEmaV3` as it is:

    ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    ...                                     # after each optimizer step:
    ema.update(model, step=iteration)
    ema.module                              # the averaged RSSNet: evaluate it, save it

This module knows no training loop.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage] it is in timm's manual
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Only the weights of these multiply features; everything else (norms, biases, class queries, embeddings, LayerScale,
# relative positions) is a location or a scale that decay would pull to a value without meaning.
_DECAYED_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    decoder_lr_scale: float = 10.0,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for a torch optimizer, each with its own learning rate and weight decay.

    The backbone's layers get `lr * layer_decay ** depth below the last one` through timm's grouping (BEiT; Bao et al.
    2021), the decoder `lr * decoder_lr_scale`. Biases, norms, queries and LayerScale are not decayed, nor is what the
    backbone itself names in `no_weight_decay` (position embeddings and the like).

    Args:
        model: an RSSNet: `model.backbone` and `model.decoder` hold all of its parameters between them.
        lr: learning rate of the backbone's last layer.
        weight_decay: for everything that is decayed.
        layer_decay: factor on the learning rate from one layer of the backbone to the one below; 1 for none.
        decoder_lr_scale: the decoder's learning rate as a multiple of `lr`.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`; frozen parameters are in none.

    Raises:
        ValueError: a number is out of range, or the model has a parameter outside backbone and decoder.
    """
    _check_range("lr", lr, lr > 0, "above 0")
    _check_range("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
    _check_range("layer_decay", layer_decay, 0 < layer_decay <= 1, "above 0 and at most 1")
    _check_range("decoder_lr_scale", decoder_lr_scale, decoder_lr_scale > 0, "above 0")
    backbone, decoder = model.get_submodule("backbone"), model.get_submodule("decoder")
    groups = _backbone_groups(backbone, lr, weight_decay, layer_decay)
    groups += _plain_groups("decoder", decoder, lr * decoder_lr_scale, weight_decay)
    _check_all_grouped(model, groups)
    return groups


def poly_with_warmup(
    optimizer: Optimizer,
    iterations: int,
    warmup_iterations: int = 1500,
    warmup_lr: float = 1e-6,
    power: float = 1.0,
) -> LambdaLR:
    """Learning rate that rises linearly for the first iterations and then falls to zero as a polynomial.

    With `t` the iterations done and `w` those of the warm-up: from `warmup_lr` (or the group's own rate, should that be
    lower) to the group's rate for t < w, then `rate * (1 - (t - w) / (iterations - w)) ** power`.

    Args:
        optimizer: its groups' learning rates are the highest that the schedule reaches.
        iterations: of the whole run, warm-up included; the rate is zero from there on.
        warmup_iterations: of the warm-up; 0 for none.
        warmup_lr: learning rate of the very first iteration, for every group.
        power: of the polynomial; 1 is a straight line.

    Returns:
        A torch scheduler: `step()` once after each optimizer step, not each epoch; `state_dict()` resumes it.

    Raises:
        ValueError: a number is out of range or the warm-up isn't shorter than the run.
    """
    _check_range("iterations", iterations, iterations >= 1, "at least 1")
    _check_range("warmup_iterations", warmup_iterations, warmup_iterations >= 0, "at least 0")
    _check_range("warmup_lr", warmup_lr, warmup_lr >= 0, "at least 0")
    _check_range("power", power, power > 0, "above 0")
    if warmup_iterations >= iterations:
        raise ValueError(
            f"a warm-up of {warmup_iterations} iterations must be shorter than the run of {iterations}; "
            "lower warmup_iterations or raise iterations."
        )
    factors = [
        _PolyFactor(iterations, warmup_iterations, warmup_lr / max(group["lr"], warmup_lr) if warmup_lr else 0.0, power)
        for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, factors)


@dataclass
class _PolyFactor:
    """What a group's learning rate is multiplied with; an object, not a function, so that LambdaLR can save it."""

    iterations: int
    warmup_iterations: int
    start: float
    power: float

    def __call__(self, iteration: int) -> float:
        if iteration < self.warmup_iterations:
            return self.start + (1 - self.start) * iteration / self.warmup_iterations
        falling = self.iterations - self.warmup_iterations
        return max(0.0, 1 - (iteration - self.warmup_iterations) / falling) ** self.power


def _backbone_groups(backbone: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    # The timm model that knows its layers may be wrapped; what the wrapper adds stands nowhere in the depth.
    body = next((module for module in (backbone, *backbone.children()) if hasattr(module, "group_matcher")), None)
    if body is None:
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no group_matcher() to tell its layers by; "
            "take a backbone from timm, which all have one."
        )
    no_weight_decay = getattr(body, "no_weight_decay", set)
    groups = param_groups_layer_decay(
        body, weight_decay=weight_decay, no_weight_decay_list=no_weight_decay(), layer_decay=layer_decay
    )
    # timm's own key for the factor goes: timm's schedulers would apply it a second time.
    scaled = [{**group, "lr": lr * group.pop("lr_scale"), "name": "backbone"} for group in groups]
    of_body = set(body.parameters())
    return scaled + _plain_groups("backbone", backbone, lr, weight_decay, skip=of_body)


def _plain_groups(
    name: str, module: nn.Module, lr: float, weight_decay: float, skip: Set[nn.Parameter] = frozenset()
) -> list[dict[str, Any]]:
    """One group that is decayed and one that isn't, of all of a module's trainable parameters that aren't to skip."""
    decayed: dict[nn.Parameter, None] = {}
    kept: dict[nn.Parameter, None] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad and parameter not in skip:
                is_weight = isinstance(layer, _DECAYED_LAYERS) and parameter.ndim > 1
                (decayed if is_weight else kept)[parameter] = None
    groups = [(decayed, weight_decay), (kept, 0.0)]
    return [{"params": list(p), "lr": lr, "weight_decay": decay, "name": name} for p, decay in groups if p]


def _check_all_grouped(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """An optimizer that misses a parameter trains it not at all and says nothing."""
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    missed = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in grouped]
    if missed:
        raise ValueError(
            f"the parameters {missed} are neither in model.backbone nor in model.decoder, so no learning rate is "
            "defined for them; move them into one of the two."
        )


def _check_range(name: str, value: float, accepted: bool, meaning: str) -> None:
    if not accepted:
        raise ValueError(f"{name} must be {meaning}, got {value}.")
