"""RSSNet: any timm backbone, and the decoder that the config names.

Implements *Representation Separation for Semantic Segmentation with Vision Transformers* (Hong, Pan, Sun, Yu, Gao;
arXiv 2212.13764). No code was released: what the abstract fixes is marked in each module, the rest is our own reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, inspect_backbone
from .baselines import LinearHead, UPerNetHead
from .classes import Classes
from .config import RSSNetConfig
from .decoder import RSSNetDecoder, RSSNetOutput
from .serialization import Saved, read_model, write_model

_DECODERS = {"rssnet": RSSNetDecoder, "linear": LinearHead, "upernet": UPerNetHead}


class RSSNet(nn.Module):
    """A semantic segmentation model.

    Args:
        config: What it is made of; `num_classes` must be given.
        classes: Names and colours of the classes; neutral ones when not given.

    Attributes:
        config: As given.
        classes: Names and palette.
        backbone: The global pathway. With `decoder` it partitions the parameters.
        decoder: Everything after it.

    Raises:
        ValueError: a config that cannot be built; the message says what would be.
    """

    def __init__(self, config: RSSNetConfig, classes: Classes | None = None) -> None:
        super().__init__()
        if config.num_classes is None:
            raise ValueError("num_classes is not given: set it in RSSNetConfig to the number of classes of the labels.")
        self.config = config
        self.classes = Classes.default(config.num_classes) if classes is None else classes
        if len(self.classes) != config.num_classes:
            raise ValueError(
                f"{len(self.classes)} classes are named but num_classes is {config.num_classes}; make them agree."
            )
        layout = inspect_backbone(config.backbone, config.backbone_options)
        decoder = _DECODERS[config.head]
        self.backbone = Backbone(
            layout=layout,
            taps=decoder.taps(config, layout),
            image_size=config.image_hw,
            options=config.backbone_options,
            pretrained=config.pretrained,
            drop_path=config.drop_path,
            frozen=config.freeze_backbone,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.decoder = decoder(config=config, layout=layout)

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Mean that images are normalised with, per channel, for values from 0 to 1."""
        return self.backbone.pixel_mean

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Standard deviation that images are normalised with, per channel, for values from 0 to 1."""
        return self.backbone.pixel_std

    def forward(self, images: Tensor) -> RSSNetOutput:
        """Classifies pixels.

        Args:
            images: (B, 3, H, W), normalised with `pixel_mean` and `pixel_std`.

        Returns:
            Logits (B, K, H / 4, W / 4) and, in training, what the losses supervise beside them.

        Raises:
            ValueError: images of a shape or type that the model cannot take or, in eager mode on a CPU, with NaN or
                infinity. Elsewhere that check would stall the device: there a loss that is not finite is the sign, and
                `rssnet.losses.check_batch` then says what is wrong.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Images must be (B, 3, H, W), not {tuple(images.shape)}: make them RGB, and one image a batch of one."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"Images must be floating-point numbers, not {images.dtype}: scale them to 0 to 1 and normalise them "
                "with pixel_mean and pixel_std, as rssnet.Predictor does."
            )
        if images.device.type == "cpu" and not torch.compiler.is_compiling() and not images.isfinite().all():
            raise ValueError("An image has NaN or infinite values; check how it was decoded and normalised.")
        return self.decoder(images, self.backbone(images))

    def fill(self, weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> RSSNet:
        """Gives a model that was built on the meta device its memory, weights, and what it computes for itself.

        Args:
            weights: The state dict of such a model.
            device: Where to.

        Returns:
            The model itself.

        Raises:
            ValueError: a backbone that computes something in its constructor only.
        """
        computed = {name for name, _ in self.named_buffers()} - self.state_dict().keys()
        owners: dict[str, Any] = {name: self.get_submodule(name.rpartition(".")[0]) for name in sorted(computed)}
        for name, owner in owners.items():
            if not hasattr(owner, "init_non_persistent_buffers"):
                raise ValueError(f"{name} of {self.config.backbone} cannot be filled; build the model with memory.")
        self.to_empty(device=device).load_state_dict(weights)
        for owner in {id(owner): owner for owner in owners.values()}.values():
            owner.init_non_persistent_buffers()
        return self

    def resized(self, image_size: int | tuple[int, int]) -> RSSNet:
        """The same model for images of another size, position embeddings and biases resized.

        Weights are copied; dtype, device, and which parameters are trained stay.

        Args:
            image_size: Side, or (height, width), in pixels.

        Raises:
            ValueError: a size that the backbone cannot take.
        """
        config = replace(self.config, image_size=image_size)
        model = RSSNet(replace(config, pretrained=False), self.classes)
        # Before the weights come, so that none is rounded; one by one, for a backbone may have another dtype than its
        # decoder. A mask that only some sizes have goes with the backbone.
        first = next(self.parameters())
        model.to(first.device)
        dtypes = {name: tensor.dtype for name, tensor in _tensors(self) if tensor.is_floating_point()}
        for name, tensor in _tensors(model):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtypes.get(name, first.dtype))
        model.backbone.load_resized(self.backbone)
        model.decoder.load_state_dict(self.decoder.state_dict())
        model.config = config
        for own, others in zip(model.parameters(), self.parameters(), strict=True):
            own.requires_grad_(others.requires_grad)
        return model.train(self.training)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes `config.json`, `model.safetensors`, `classes.json` and a model card, `README.md`.

        Args:
            folder: A path or an fsspec URL; made if it is missing.
        """
        saved = Saved(
            config=self.config,
            classes=self.classes,
            weights=self.state_dict(),
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
        )
        write_model(str(folder), saved, parameters=[name for name, _ in self.named_parameters()])

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], image_size: int | tuple[int, int] | None = None) -> RSSNet:
        """Reads what `save_pretrained` wrote, in evaluation mode. Never downloads backbone weights, never unpickles.

        Args:
            source: A folder, an fsspec URL of one, or a hub id, owner/name.
            image_size: The size of images to make the model for; the saved one when not given.

        Raises:
            ValueError: no such model, or one that does not fit its own config.
        """
        saved = read_model(str(source))
        model = cls(replace(saved.config, pretrained=False), saved.classes)
        misfits = _misfits(model.state_dict(), saved.weights)
        if misfits:
            raise ValueError(
                f"The weights at {source} are not of the model that its config.json describes ({saved.config.head} on "
                f"{saved.config.backbone}, {saved.config.num_classes} classes): {'; '.join(misfits[:5])}"
                f"{'; ...' if len(misfits) > 5 else ''}. Save the model again, or restore the config.json that belongs "
                "to these weights."
            )
        model.load_state_dict(saved.weights)
        # As it was trained, whatever this release of timm says of the backbone's name.
        model.backbone.pixel_mean = saved.pixel_mean or model.pixel_mean
        model.backbone.pixel_std = saved.pixel_std or model.pixel_std
        model.config = saved.config
        model.eval()
        return model if image_size is None else model.resized(image_size)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are not saved included, by name."""
    return chain(model.named_parameters(), model.named_buffers())


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with found weights, a phrase for each."""
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is left over" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} is {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name].shape != found[name].shape
        ),
        *(
            f"{name} is of {found[name].dtype} instead of {expected[name].dtype}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name].is_floating_point() != found[name].is_floating_point()
        ),
    ]
