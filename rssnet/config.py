"""What a model is made of: frozen dataclasses of plain values, so that YAML, JSON and the command line can hold them.

Nothing here imports torch or timm. Defaults are those of the specification; presets say what they change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_type_hints

from .field_types import require_types

_LOSS_WEIGHTS = (
    "auxiliary",
    "attention_bce",
    "attention_dice",
    "region_classification",
    "region_separation",
    "separation_supervision",
)

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_weight(name: str, value: float) -> None:
    _require(value >= 0, f"{name} must not be below 0, as {value} is; 0 is off.")


def _require_odd(name: str, value: int) -> None:
    _require(
        value >= 1 and value % 2 == 1, f"{name} must be an odd number from 1, not {value}: it is centred on a patch."
    )


@dataclass(frozen=True)
class LocalPathwayConfig:
    """The second pathway, which keeps what sets a patch apart from its surroundings (rssnet.local_pathway).

    Attributes:
        enabled: Whether the model has a local pathway; off is an ablation.
        depth: Number of residual blocks, n.
        width: Channels of the pathway; the decoder's width when not given.
        kernel_size: Side of the neighbourhood whose mean is subtracted, k; odd.
        tap: Index of the backbone's block (plain) or stage (pyramid) that the pathway starts from; when not given, the
            block at a quarter of the depth, or the first stage.
        layer_scale: Initial factor of each block's branch, gamma.
    """

    enabled: bool = True
    depth: int = 4
    width: int | None = None
    kernel_size: int = 3
    tap: int | None = None
    layer_scale: float = 0.1

    def __post_init__(self) -> None:
        require_types(self, "local_pathway.")
        _require(self.depth >= 0, f"local_pathway.depth must be 0 or more, not {self.depth}.")
        _require(
            self.width is None or self.width >= 8, f"local_pathway.width must be 8 channels or more, not {self.width}."
        )
        _require_odd("local_pathway.kernel_size", self.kernel_size)


@dataclass(frozen=True)
class SeparationConfig:
    """The spatially adaptive separation module, SASM (rssnet.separation).

    Attributes:
        enabled: Whether the deep map is upsampled by the module; off means bilinear, an ablation.
        kernel_size: Side of the window of tokens that a fine location is composed of, k; odd, 3 or more.
        groups: Channel groups with weights of their own, g; must divide the decoder's width.
        max_gate: Largest strength of attraction and repulsion, a_max.
        gate_bias: Initial bias of the gate before its sigmoid; -3 starts it nearly closed.
        form: How weights are made. "conv": by a small conv net; "affinity": by similarity of local and deep features;
            "plain": bilinear attraction from which the local mean is repelled, only the gate being learned.
    """

    enabled: bool = True
    kernel_size: int = 3
    groups: int = 1
    max_gate: float = 1.0
    gate_bias: float = -3.0
    form: Literal["conv", "affinity", "plain"] = "conv"

    def __post_init__(self) -> None:
        require_types(self, "separation.")
        _require_odd("separation.kernel_size", self.kernel_size)
        _require(
            self.kernel_size >= 3, "separation.kernel_size must be 3 or more: bilinear weights need 2 tokens a side."
        )
        _require(self.groups >= 1, f"separation.groups must be 1 or more, not {self.groups}.")
        _require(
            self.max_gate > 0, f"separation.max_gate must be above 0, not {self.max_gate}; disable the module instead."
        )


@dataclass(frozen=True)
class CrossAttentionConfig:
    """The discriminative cross-attention, DCA (rssnet.cross_attention).

    Attributes:
        enabled: Whether classes are regions that attend to pixels; off means a 1x1 classifier, an ablation.
        layers: Number of layers, m.
        heads: Attention heads; when not given, as many of 32 channels or more as divide the decoder's width.
        mlp_ratio: Hidden width of a layer's feed-forward part, as a multiple of the decoder's.
        null_token: Whether pixels compete with a learned token for each region's attention, so that an absent class
            has somewhere else to look.
    """

    enabled: bool = True
    layers: int = 3
    heads: int | None = None
    mlp_ratio: float = 4.0
    null_token: bool = False

    def __post_init__(self) -> None:
        require_types(self, "cross_attention.")
        _require(self.layers >= 1, f"cross_attention.layers must be 1 or more, not {self.layers}; disable it instead.")
        _require(self.heads is None or self.heads >= 1, f"cross_attention.heads must be 1 or more, not {self.heads}.")
        _require(self.mlp_ratio > 0, f"cross_attention.mlp_ratio must be above 0, not {self.mlp_ratio}.")


@dataclass(frozen=True)
class LossConfig:
    """Weights and options of every loss (rssnet.losses).

    Attributes:
        auxiliary: Weight of the cross-entropy on the deep map's own prediction.
        attention_bce: Weight of the binary cross-entropy on attention maps read as class masks.
        attention_dice: Weight of their Dice loss.
        region_classification: Weight of the loss on which classes each region says are present.
        region_separation: Weight of the contrast between regions of different classes.
        separation_supervision: Weight of the loss that tells SASM which tokens share a location's class.
        temperature: Temperature of the contrast between regions, tau.
        detach_prototypes: Whether only regions move in that contrast, and the pixels they are compared with stay.
        label_smoothing: Share of the target spread evenly over all classes, from 0 to 1.
        hardest_fraction: Online hard example mining: the share of valid pixels, hardest first, that count; 1 is off.
        class_weights: Weight of each class in the cross-entropy; all equal when not given.
        ignore_index: Label of pixels that count nowhere.
    """

    auxiliary: float = 0.4
    attention_bce: float = 4.0
    attention_dice: float = 0.4
    region_classification: float = 0.1
    region_separation: float = 0.2
    separation_supervision: float = 0.0
    temperature: float = 0.1
    detach_prototypes: bool = False
    label_smoothing: float = 0.0
    hardest_fraction: float = 1.0
    class_weights: list[float] | None = None
    ignore_index: int = 255

    def __post_init__(self) -> None:
        require_types(self)
        for name in _LOSS_WEIGHTS:
            _require_weight(name, getattr(self, name))
        for weight in self.class_weights or ():
            _require_weight("class_weights", weight)
        _require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}.")
        _require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), not {self.label_smoothing}.")
        _require(0 < self.hardest_fraction <= 1, f"hardest_fraction must be in (0, 1], not {self.hardest_fraction}.")


@dataclass(frozen=True)
class RSSNetConfig:
    """A whole model.

    Attributes:
        backbone: Name of a timm model, such as vit_small_patch16_224.augreg_in21k or swin_tiny_patch4_window7_224.
        num_classes: Number of classes; a training job takes it from its dataset.
        image_size: Side, or height and width, in pixels, of the images that the model is fed (the crop, in training).
        pretrained: Weights the backbone starts from: true for timm's own, or a file, URL or hub id (hf-hub:owner/name).
        backbone_options: Arguments for timm.create_model that JSON can hold, such as {"depth": 6}; tuples become lists.
        head: What makes classes of features: "rssnet", or the baselines "linear" and "upernet".
        decoder_width: Channels of the decoder, d; by the backbone's width when not given.
        drop_path: Largest rate of stochastic depth in the backbone.
        freeze_backbone: Whether the backbone keeps its weights and statistics in training.
        gradient_checkpointing: Whether the backbone recomputes activations in backward, to save memory.
        local_pathway: The local pathway.
        separation: The spatially adaptive separation module.
        cross_attention: The discriminative cross-attention.
    """

    backbone: str = "vit_small_patch16_224"
    num_classes: int | None = None
    image_size: int | tuple[int, int] = 512
    pretrained: bool | str = False
    backbone_options: dict[str, Any] = field(default_factory=dict)
    head: Literal["rssnet", "linear", "upernet"] = "rssnet"
    decoder_width: int | None = None
    drop_path: float = 0.0
    freeze_backbone: bool = False
    gradient_checkpointing: bool = False
    local_pathway: LocalPathwayConfig = field(default_factory=LocalPathwayConfig)
    separation: SeparationConfig = field(default_factory=SeparationConfig)
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)

    def __post_init__(self) -> None:
        require_types(self)
        _require(min(self.image_hw) >= 1, f"image_size must be positive, not {self.image_size}.")
        _require(
            self.num_classes is None or self.num_classes >= 2,
            f"num_classes must be 2 or more, not {self.num_classes}: for one kind of object, name the background too.",
        )
        _require(
            self.decoder_width is None or self.decoder_width >= 8,
            f"decoder_width must be 8 channels or more, not {self.decoder_width}.",
        )
        for option, name in (("img_size", "image_size"), ("drop_path_rate", "drop_path"), ("pretrained", "pretrained")):
            _require(option not in self.backbone_options, f"Set {name} instead of {option} in backbone_options.")
        _require(0 <= self.drop_path < 1, f"drop_path must be in [0, 1), not {self.drop_path}.")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dicts of JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RSSNetConfig:
        """Reads what `to_dict` made.

        Raises:
            ValueError: a key that no field has, or a value that its field refuses.
        """
        return _from_dict(cls, values)


def _from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    assert is_dataclass(cls)
    known = [item.name for item in fields(cls)]
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(known)}.")
    types = get_type_hints(cls)
    return cls(
        **{
            name: _from_dict(types[name], value) if is_dataclass(types[name]) and isinstance(value, Mapping) else value
            for name, value in values.items()
        }
    )
