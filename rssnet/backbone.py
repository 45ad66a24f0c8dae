"""The global pathway: any timm backbone that gives intermediate features, as pre-trained, with nothing added inside it.

Plain transformers (one stride) and pyramids (one stride per stage) come out as the same thing: a list of feature maps,
each with its channels and stride known before the first image. Knows nothing of decoders.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .pretrained import WeightsReport, load_backbone_weights
from .resizing import load_resized

FAMILIES = (
    "plain: vit, deit3, beit, beitv2, eva02, dinov2, dinov3, siglip, MAE; "
    "pyramid: swin, swinv2, pvt_v2, twins, hiera, maxvit, mvitv2, davit, convnext, tiny_vit, efficientvit, hrnet"
)
_FINEST_STRIDE = 4  # maps finer than the logits' stride cost much and say little


@dataclass(frozen=True)
class Tap:
    """A place in a backbone that features are taken from.

    Attributes:
        index: Of the block (plain) or stage (pyramid), as timm counts.
        channels: Of the feature map.
        stride: Pixels of the image per cell of the feature map.
    """

    index: int
    channels: int
    stride: int


@dataclass(frozen=True)
class BackboneLayout:
    """Where a backbone can be tapped, known without building it.

    Attributes:
        name: timm's name of the backbone.
        taps: Every usable place, shallow to deep.
        fixed_image_size: Whether the backbone is built for one image size.
        takes_drop_path: Whether it has stochastic depth.
    """

    name: str
    taps: tuple[Tap, ...]
    fixed_image_size: bool
    takes_drop_path: bool

    @property
    def is_plain(self) -> bool:
        """Whether all taps have one stride, as in a plain vision transformer."""
        return len({tap.stride for tap in self.taps}) == 1

    def at(self, index: int) -> Tap:
        """The tap at timm's index.

        Raises:
            ValueError: no tap has that index.
        """
        for tap in self.taps:
            if tap.index == index:
                return tap
        indices = ", ".join(str(tap.index) for tap in self.taps)
        raise ValueError(f"{self.name} cannot be tapped at {index}; choose one of {indices}.")

    @property
    def shallow(self) -> Tap:
        """Plain: the block at a quarter of the depth. Pyramid: the first stage (of stride 4 or more)."""
        return self.taps[max(0, round(len(self.taps) / 4) - 1)] if self.is_plain else self.taps[0]

    @property
    def deep(self) -> tuple[Tap, ...]:
        """Plain: the last block. Pyramid: the two deepest stages, the finer first."""
        return self.taps[-1:] if self.is_plain else self.taps[-2:]

    @property
    def quarters(self) -> tuple[Tap, ...]:
        """Plain: the last blocks of the four quarters of the depth. Pyramid: every stage."""
        if not self.is_plain:
            return self.taps
        depth = len(self.taps)
        return tuple(self.taps[max(0, round(depth * quarter / 4) - 1)] for quarter in (1, 2, 3, 4))


def inspect_backbone(name: str, options: Mapping[str, Any] | None = None) -> BackboneLayout:
    """Finds where a timm backbone can be tapped, by building it without memory (on torch's meta device).

    Args:
        name: timm's name, with or without a tag for its weights.
        options: Arguments for `timm.create_model`.

    Raises:
        ValueError: timm has no such model or weights, or it gives no intermediate features.
    """
    with torch.device("meta"):
        body = _create(name, {**(options or {})})
    if not (hasattr(body, "forward_intermediates") and hasattr(body, "prune_intermediate_layers")):
        raise ValueError(f"Backbone {name!r} gives no intermediate features. Backbones that do: {FAMILIES}.")
    parameters = inspect.signature(type(body).__init__).parameters
    taps = (Tap(index, info["num_chs"], info["reduction"]) for index, info in enumerate(_feature_info(body)))
    return BackboneLayout(
        name=name,
        taps=tuple(tap for tap in taps if tap.stride >= _FINEST_STRIDE),
        fixed_image_size="img_size" in parameters,
        takes_drop_path="drop_path_rate" in parameters,
    )


class Backbone(nn.Module):
    """A timm backbone that returns the feature maps at given taps.

    Layers, norms and heads that no tap needs are removed, and what cannot be removed takes no gradient: they would cost
    memory, and distributed training complains about parameters without a gradient.

    Args:
        layout: What `inspect_backbone` said.
        taps: Where to take features, in the order they are returned.
        image_size: (height, width) in pixels.
        options: Arguments for `timm.create_model`.
        pretrained: True for timm's weights, or a file, URL or hub id; False for random ones. rssnet.pretrained says
            how to normalise images otherwise than the backbone's name implies.
        drop_path: Largest rate of stochastic depth.
        frozen: Keep weights and statistics in training.
        gradient_checkpointing: Recompute activations in backward.

    Attributes:
        body: The timm model, without what nothing reads.
        taps: As given.
        image_size: As given.
        divisor: What the sides of an image must be multiples of, in pixels.
        weights_report: What the pre-trained weights filled, missed and left over; None for random ones.
        pixel_mean, pixel_std: What images are normalised with, per channel, for values from 0 to 1.

    Raises:
        ValueError: an image size, option or weights that the backbone cannot take.
    """

    body: Any

    def __init__(
        self,
        *,
        layout: BackboneLayout,
        taps: Sequence[Tap],
        image_size: tuple[int, int],
        options: Mapping[str, Any] | None = None,
        pretrained: bool | str = False,
        drop_path: float = 0.0,
        frozen: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.taps = tuple(taps)
        self.image_size = image_size
        self.divisor = max(tap.stride for tap in layout.taps)
        self.frozen = frozen
        self._indices = sorted({tap.index for tap in taps})
        self._check_size(image_size)

        arguments = dict(options or {})
        if layout.takes_drop_path:
            arguments["drop_path_rate"] = drop_path  # even if zero: some families have another default
        elif drop_path > 0:
            raise ValueError(f"Backbone {layout.name!r} has no stochastic depth; set drop_path to 0, not {drop_path}.")
        # With gradients whatever the caller's mode: what is left out of the rehearsal's is what nothing reads.
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            rehearsal = self._build(arguments, image_size)
            unread = self._rehearse(rehearsal)

        self.weights_report: WeightsReport | None = None
        if pretrained:
            required = _read_tensors(rehearsal, unread)
            self.body, self.weights_report = self._build_pretrained(arguments, pretrained, required)
        else:
            self.body = self._build(arguments, image_size)
        for name in unread:
            self.body.get_parameter(name).requires_grad_(False)
        if gradient_checkpointing:
            self._set_gradient_checkpointing()
        if frozen:
            self.requires_grad_(False)
            self.train(False)

        # timm knows the name, a hub the weights, and the user both.
        normalisation = dict(self.body.pretrained_cfg)
        if self.weights_report is not None:
            normalisation.update(self.weights_report.normalisation)
        normalisation.update(arguments.get("pretrained_cfg_overlay") or {})
        self.pixel_mean: tuple[float, ...] = tuple(normalisation["mean"])
        self.pixel_std: tuple[float, ...] = tuple(normalisation["std"])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of normalised images.

        Args:
            images: (B, 3, H, W).

        Returns:
            One map (B, channels, H / stride, W / stride) per tap, without class and register tokens.

        Raises:
            ValueError: images of a size that the backbone was not built for.
        """
        self._check_size((images.shape[-2], images.shape[-1]))
        maps = self._maps(self.body, images)
        return [maps[self._indices.index(tap.index)] for tap in self.taps]

    def load_resized(self, other: Backbone) -> None:
        """Takes the weights of the same backbone built for another image size, resizing what depends on it.

        What images are normalised with belongs to the weights and comes with them.

        Args:
            other: That backbone.
        """
        self._load_resized(self.body, copy.deepcopy(other.body), other.image_size)
        self.pixel_mean, self.pixel_std = other.pixel_mean, other.pixel_std

    def train(self, mode: bool = True) -> Backbone:
        """As in torch, but a frozen backbone stays in evaluation mode, its statistics and dropout fixed."""
        return super().train(mode and not self.frozen)

    def _build(self, arguments: dict[str, Any], image_size: tuple[int, ...], prune: bool = True) -> Any:
        size = {"img_size": image_size} if self.layout.fixed_image_size else {}
        body = _create(self.layout.name, {**arguments, **size})
        if prune:
            self._prune(body)
        return body

    def _build_pretrained(
        self, arguments: dict[str, Any], weights: bool | str, required: Collection[str]
    ) -> tuple[Any, WeightsReport]:
        # At the size asked for, so that weights of that size stay as they are and timm resizes others once. Families
        # that timm doesn't resize are filled at its own size, and resized here.
        sizes: list[tuple[int, ...]] = [self.image_size]
        if self.layout.fixed_image_size:
            with torch.device("meta"):
                native_size = tuple(_create(self.layout.name, arguments).pretrained_cfg["input_size"][-2:])
            if native_size != self.image_size:
                sizes.append(native_size)
        body, size, report = load_backbone_weights(
            lambda size: self._build(arguments, size, prune=False), sizes, weights, required=required
        )
        self._prune(body)
        if size == self.image_size:
            return body, report
        resized = self._build(arguments, self.image_size)
        self._load_resized(resized, body, size)
        return resized, report

    def _prune(self, body: Any) -> None:
        body.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)

    def _maps(self, body: Any, images: Tensor) -> list[Tensor]:
        return body.forward_intermediates(images, indices=self._indices, stop_early=True, intermediates_only=True)

    def _rehearse(self, body: Any) -> list[str]:
        """Runs a model of the meta device once, which costs no memory, and names the parameters that nothing read.

        Raises:
            ValueError: the model cannot run at its image size, or its maps are not what timm says of them.
        """
        name, (height, width) = self.layout.name, self.image_size
        body.eval()  # batch norm would refuse one image
        try:
            maps = self._maps(body, torch.empty(1, 3, height, width, device="meta"))
        except Exception as error:
            raise ValueError(
                f"Backbone {name!r} cannot run on images of {self.image_size} (height, width): {error} "
                f"Backbones that take most sizes: {FAMILIES}."
            ) from error
        for tap in self.taps:
            expected = (1, tap.channels, height // tap.stride, width // tap.stride)
            found = tuple(maps[self._indices.index(tap.index)].shape)
            if found != expected:
                raise ValueError(
                    f"Backbone {name!r} gives a map of {found} at {tap.index} where {expected} was due. "
                    f"Backbones that serve: {FAMILIES}."
                )
        torch.stack([feature.sum() for feature in maps]).sum().backward()
        return [name for name, parameter in body.named_parameters() if parameter.grad is None]

    def _load_resized(self, body: Any, source: Any, source_size: tuple[int, ...]) -> None:
        stride = self.layout.taps[0].stride
        load_resized(
            body,
            source,
            target_grid=(self.image_size[0] // stride, self.image_size[1] // stride),
            source_grid=(source_size[0] // stride, source_size[1] // stride),
        )

    def _set_gradient_checkpointing(self) -> None:
        try:
            self.body.set_grad_checkpointing(True)
        except AssertionError as error:
            raise ValueError(
                f"Backbone {self.layout.name!r} cannot recompute its activations; set gradient_checkpointing to false."
            ) from error

    def _check_size(self, size: tuple[int, int]) -> None:
        name = self.layout.name
        if self.layout.fixed_image_size and size != self.image_size:
            raise ValueError(
                f"{name} was built for images of {self.image_size} (height, width), not {size}. Resize or crop them, "
                "or make the model for another size with model.resized((height, width))."
            )
        if size[0] % self.divisor or size[1] % self.divisor:
            down = tuple(max(side // self.divisor, 1) * self.divisor for side in size)
            up = tuple(-(-side // self.divisor) * self.divisor for side in size)
            raise ValueError(
                f"Images of {size} (height, width) cannot be cut into the patches of {name}: each side must be a "
                f"multiple of {self.divisor}, such as {down} or {up}."
            )


def _create(name: str, arguments: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except RuntimeError as error:
        if "Invalid pretrained tag" in str(error):
            architecture, _, tag = name.partition(".")
            known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
            raise ValueError(f"timm has no weights {tag!r} of {architecture}; choose one of {known}.") from error
        if "Unknown model" not in str(error):
            raise
        alike = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f" Names like it: {', '.join(alike)}." if alike else ""
        raise ValueError(f"timm has no model {name!r}.{hint} Families that serve: {FAMILIES}.") from error
    except (TypeError, AssertionError) as error:
        # mvitv2, for one, asserts without a word that images are square.
        raise ValueError(
            f"Backbone {name!r} cannot be built with {arguments}: {error or type(error).__name__}."
        ) from error


def _read_tensors(body: Any, unread: Collection[str]) -> set[str]:
    """Names of the parameters that something reads, and of the statistics that belong to them."""
    layers = {name.rpartition(".")[0] for name in unread}
    parameters = dict(body.named_parameters())
    return {
        name
        for name in body.state_dict()
        if name not in unread and (name in parameters or name.rpartition(".")[0] not in layers)
    }


def _feature_info(body: Any) -> list[dict[str, Any]]:
    info = body.feature_info
    return list(info) if isinstance(info, list) else list(info.info)
