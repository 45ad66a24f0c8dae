"""How separate representations are: layer by layer in the backbone, before and after each module of RSSNet.

The claim of the paper (arXiv 2212.13764, abstract) is that plain ViTs over-smooth and that two levels of separation
undo it. It gives no way to measure that; the four measures here are ours or, where named, their authors'. Knows tensors
and the model, no files and no pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .decoder import RSSNetDecoder
from .inference import evaluation_mode
from .losses import check_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .model import RSSNet

_BACKBONE = "backbone"
# Name in the table, module of the decoder whose output it is, and the module that made it at its native stride.
_MAPS = (
    ("local map, before its blocks", "local_pathway.norm", "local_pathway.norm"),
    ("local map L, after its blocks", "local_pathway.blocks", "local_pathway.blocks"),
    ("deep map G, before SASM", "deep", "deep"),
    ("deep map G, upsampled bilinearly", "bilinear", "deep"),
    ("deep map S, after SASM", "separation", "deep"),
    ("fused map M, before DCA", "fuse", "fuse"),
    ("pixel embeddings E(M)", "embed", "fuse"),
)


@dataclass(frozen=True)
class LayerDiagnostics:
    """One row of the table. A measure that a layer has no tokens, or the images no classes for, is nan.

    Attributes:
        layer: where in the model.
        stride: pixels of the image per token; nan for regions, which are no map.
        token_cosine: see `token_cosine`, mean over images. Towards one: over-smoothed.
        high_frequency_share: see `high_frequency_share`, mean over images. Towards zero: over-smoothed.
        class_scatter: see `ClassScatter`, over all images. The larger, the more separate the classes.
        region_cosine: see `region_cosine`, over all images. The smaller, the more separate the regions.
    """

    layer: str
    stride: float
    token_cosine: float
    high_frequency_share: float
    class_scatter: float
    region_cosine: float


def token_cosine(features: Tensor) -> Tensor:
    """Mean cosine similarity of all pairs of tokens of an image: how alike they have become.

    Args:
        features: (B, C, h, w).

    Returns:
        (B,), -1 to 1; nan for a single token.
    """
    tokens = F.normalize(features.flatten(2).double(), dim=1)  # (B, C, N)
    count = tokens.shape[2]
    # The square of the sum is the sum over all ordered pairs, those of a token with itself included.
    pairs = tokens.sum(2).square().sum(1) - tokens.square().sum((1, 2))
    return pairs / (count * (count - 1)) if count > 1 else torch.full_like(pairs, torch.nan)


def high_frequency_share(features: Tensor) -> Tensor:
    """Share of a map's energy that a map of half the resolution could not hold.

    That is at spatial frequencies above half Nyquist, 1/4 cycle per token, along rows or columns. The energy is that of
    what varies: the mean of each channel, which `token_cosine` is sensitive to, is left out. White noise on a large map
    has 3/4.

    Args:
        features: (B, C, h, w) at the stride where they were made; upsampled maps read near zero whatever they hold.

    Returns:
        (B,), 0 to 1; nan where nothing varies.
    """
    spectrum = torch.fft.fft2(features.float() - features.float().mean((2, 3), keepdim=True))
    energy = spectrum.abs().double().square().sum(1)  # (B, h, w)
    rows, columns = (torch.fft.fftfreq(size, device=features.device).abs() for size in features.shape[2:])
    high = torch.maximum(rows[:, None], columns) > 0.25
    return energy[:, high].sum(1) / energy.sum((1, 2))


class ClassScatter:
    """Scatter between classes over scatter within classes, tr(S_B) / tr(S_W), as in Fisher's discriminant analysis.

    Args:
        num_classes: number of classes K.
        channels: channels C of a representation.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        self._counts = torch.zeros(num_classes, dtype=torch.float64)
        self._sums = torch.zeros(num_classes, channels, dtype=torch.float64)
        self._squares = 0.0

    def update(self, vectors: Tensor, counts: Tensor) -> None:
        """Adds representations (N, C), each standing for `counts` (N, K) pixels of the classes."""
        vectors, counts = vectors.double(), counts.double()
        self._counts += counts.sum(0).cpu()
        self._sums += (counts.T @ vectors).cpu()
        self._squares += (counts.sum(1) @ vectors.square().sum(1)).item()

    def ratio(self) -> float:
        """The ratio over everything added; nan where no two representations differ."""
        present = self._counts > 0
        counts, sums = self._counts[present], self._sums[present]
        about_classes = (sums.square().sum(1) / counts).sum()
        about_mean = sums.sum(0).square().sum() / counts.sum()
        return ((about_classes - about_mean) / (self._squares - about_classes).clamp_min(0)).item()


def region_cosine(regions: Tensor, classes: Tensor) -> float:
    """Mean cosine similarity of all pairs of regions of different classes, after taking away the mean of all regions.

    K classes whose regions stand as far apart as they can have -1 / (K - 1), and so have random ones; regions that
    follow the image more than the class are near zero.

    Args:
        regions: (N, C) representations, of as many images as there are.
        classes: (N,) class ids.

    Returns:
        -1 to 1; nan where there are no two classes.
    """
    counts = classes.bincount().double()
    if (counts > 0).sum() < 2:
        return math.nan
    regions = F.normalize(regions.double() - regions.double().mean(0), dim=1)
    sums = regions.new_zeros(len(counts), regions.shape[1]).index_add_(0, classes, regions)
    # All ordered pairs less those of one class: neither ever stands in memory.
    pairs = counts.sum().square() - counts.square().sum()
    return ((regions.sum(0).square().sum() - sums.square().sum()) / pairs).item()


def class_counts(labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int = 255) -> Tensor:
    """How many pixels of each class a token covers: what tokens, spread over the pixels they stand for, are grouped by.

    Args:
        labels: (B, H, W) class ids or `ignore_index`.
        size: (h, w) of the token map.
        num_classes: number of classes K.
        ignore_index: label of the pixels that don't count.

    Returns:
        (B, h, w, K) int64.
    """
    batch, height, width = labels.shape
    images, rows, columns = (torch.arange(length, device=labels.device) for length in labels.shape)
    # The token that a pixel's centre is in.
    rows, columns = (2 * rows + 1) * size[0] // (2 * height), (2 * columns + 1) * size[1] // (2 * width)
    tokens = (images[:, None, None] * size[0] + rows[:, None]) * size[1] + columns
    labels = labels.long()
    valid = labels != ignore_index
    pairs = tokens[valid] * num_classes + labels[valid]
    return pairs.bincount(minlength=batch * size[0] * size[1] * num_classes).view(batch, *size, num_classes)


@torch.no_grad()
def diagnose(
    model: RSSNet, batches: Iterable[tuple[Tensor, Tensor]], ignore_index: int = 255
) -> list[LayerDiagnostics]:
    """The table: every layer of the backbone, then every map and every region representation of the decoder.

    A map's pixels are grouped by the labels at full resolution, each token standing for the pixels it covers. Its
    regions are its means over each class of an image. Of the cross-attention's regions those of classes that the image
    has are taken. The spectrum of an upsampled map is taken at the stride it came from, by average pooling, which
    blurs: compare SASM's output with the row above it, its input upsampled bilinearly.

    Args:
        model: an RSSNet with any head, trained or not; evaluated as in inference.
        batches: pairs of normalised images (B, 3, H, W) and labels (B, H, W), on any device.
        ignore_index: label of the pixels that don't count.

    Raises:
        ValueError: no batches, or labels that are no classes of the model.
    """
    num_classes = model.config.num_classes
    assert num_classes is not None
    device = next(model.parameters()).device
    layers: dict[str, _Layer] = {}
    with evaluation_mode(model):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            _check_labels(images, labels, num_classes, ignore_index)
            counts_by_size: dict[tuple[int, int], Tensor] = {}
            for name, (features, native_size) in _representations(model, images).items():
                is_map = native_size is not None
                if name not in layers:
                    stride = images.shape[-1] / features.shape[-1] if is_map else math.nan
                    layers[name] = _Layer(name, stride, features.shape[1 if is_map else 2], num_classes)
                if is_map:
                    size = _size(features)
                    if size not in counts_by_size:
                        counts_by_size[size] = class_counts(labels, size, num_classes, ignore_index)
                    layers[name].add_map(features.float(), native_size, counts_by_size[size])
                else:
                    counts = class_counts(labels, (1, 1), num_classes, ignore_index)
                    layers[name].add_regions(features.double(), counts[:, 0, 0] > 0)
    if not layers:
        raise ValueError("there are no batches to diagnose the model on; give at least one of images and labels.")
    return [layer.diagnostics() for layer in layers.values()]


def format_diagnostics(table: Sequence[LayerDiagnostics]) -> str:
    """A table that `diagnose` made as text of aligned columns, for a terminal.

    Args:
        table: The rows, from the top.

    Returns:
        A line of headings, the names of the measures, and a line per row; what is nan is "-".
    """
    lines = [[field.name for field in fields(LayerDiagnostics)]]
    for row in table:
        layer, stride, *measures = astuple(row)
        numbers = [f"{stride:g}", *(f"{measure:.3f}" for measure in measures)]
        lines.append([layer, *("-" if number == "nan" else number for number in numbers)])
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(number.rjust(width) for number, width in zip(numbers, others, strict=True))])
        for name, *numbers in lines
    )


def draw_diagnostics(tables: Mapping[str, Sequence[LayerDiagnostics]]) -> Figure:
    """Draws tables that `diagnose` made, a panel per measure and a line per model.

    Args:
        tables: by the name that the legend shall show. Models may have different layers.

    Returns:
        A matplotlib figure; `savefig` writes it.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure  # only drawing needs it, and rssnet alone doesn't install it
    except ImportError as error:
        raise ImportError(
            "drawing diagnostics needs matplotlib, which is not installed: pip install matplotlib."
        ) from error
    # One position per layer that any of the models has, in the order of the tables.
    names = list(dict.fromkeys(row.layer for table in tables.values() for row in table))
    measures = {
        "token_cosine": "mean cosine of token pairs",
        "high_frequency_share": "energy above half Nyquist",
        "class_scatter": "scatter between / within classes",
        "region_cosine": "mean cosine of region pairs",
    }
    figure = Figure(figsize=(max(8.0, 0.32 * len(names) + 3), 11), layout="constrained")
    panels = figure.subplots(len(measures), sharex=True)
    for panel, (measure, label) in zip(panels, measures.items(), strict=True):
        for title, table in tables.items():
            points = [(names.index(row.layer), getattr(row, measure)) for row in table]
            dots = panel.plot(*zip(*points, strict=True), "o", markersize=3, label=title)
            # Only the backbone's layers follow one another; the rest are branches.
            depth = sum(row.layer.startswith(_BACKBONE) for row in table)
            panel.plot(*zip(*points[:depth], strict=True), color=dots[0].get_color())
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    panels[-1].set_xticks(range(len(names)), names, rotation=60, ha="right")
    return figure


class _Representation(NamedTuple):
    """A feature map (B, C, h, w) and the size to take its spectrum at, or regions (B, K, C), one of every class."""

    features: Tensor
    native_size: tuple[int, int] | None


class _Layer:
    """What is measured of one layer, over all batches."""

    def __init__(self, name: str, stride: float, channels: int, num_classes: int) -> None:
        self._name = name
        self._stride = stride
        self._cosines: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._scatter = ClassScatter(num_classes, channels)
        self._regions: list[Tensor] = []
        self._region_classes: list[Tensor] = []

    def add_map(self, features: Tensor, native_size: tuple[int, int], counts: Tensor) -> None:
        """Adds a map (B, C, h, w) with the pixels of each class that its tokens cover, (B, h, w, K)."""
        self._cosines.append(token_cosine(features).cpu())
        self._shares.append(high_frequency_share(F.adaptive_avg_pool2d(features, native_size)).cpu())
        tokens = features.flatten(2).transpose(1, 2).double()  # (B, N, C)
        counts = counts.flatten(1, 2).double()  # (B, N, K)
        self._scatter.update(tokens.flatten(0, 1), counts.flatten(0, 1))
        pixels = counts.sum(1)  # (B, K)
        # An absent class gets a mean of zeros, which isn't taken.
        self.add_regions(counts.transpose(1, 2) @ tokens / pixels.clamp_min(1)[..., None], pixels > 0)

    def add_regions(self, regions: Tensor, present: Tensor) -> None:
        """Adds regions (B, K, C) of the classes that are present (B, K)."""
        self._regions.append(regions[present].cpu())
        self._region_classes.append(present.nonzero()[:, 1].cpu())

    def diagnostics(self) -> LayerDiagnostics:
        """The row of the table."""
        return LayerDiagnostics(
            layer=self._name,
            stride=self._stride,
            token_cosine=_mean(self._cosines),
            high_frequency_share=_mean(self._shares),
            class_scatter=self._scatter.ratio(),
            region_cosine=region_cosine(torch.cat(self._regions), torch.cat(self._region_classes)),
        )


def _representations(model: RSSNet, images: Tensor) -> dict[str, _Representation]:
    """Everything that is looked at in one batch, in the order of the table."""
    found: dict[str, _Representation] = {}
    body = model.backbone.body
    for index, features in enumerate(body.forward_intermediates(images, intermediates_only=True)):
        found[f"{_BACKBONE} {index}"] = _Representation(features, _size(features))
    if not isinstance(model.decoder, RSSNetDecoder):
        return found
    with _outputs(model.decoder, [path for _, path, _ in _MAPS] + ["cross_attention"]) as outputs:
        model(images)
    deep, separated = outputs["deep"], outputs["separation"][0]
    outputs["separation"] = separated
    # What SASM is to be compared with at its own stride; in the table right before it.
    outputs["bilinear"] = F.interpolate(deep, size=separated.shape[2:], mode="bilinear")
    for name, path, native in _MAPS:
        if path in outputs:
            found[name] = _Representation(outputs[path], _size(outputs[native]))
    if "cross_attention" in outputs:
        queries = model.decoder.get_parameter("cross_attention.queries")
        found["queries Q, before DCA"] = _Representation(queries.expand(len(images), -1, -1), None)
        for index, state in enumerate(outputs["cross_attention"]):
            found[f"regions R, DCA layer {index}"] = _Representation(state.regions, None)
    return found


@contextmanager
def _outputs(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Fills the dict with what the submodules at these paths, as far as they exist, give in a forward pass."""
    outputs: dict[str, Any] = {}
    submodules = dict(module.named_modules())

    def remember(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: outputs.update({path: output})

    hooks = [submodules[path].register_forward_hook(remember(path)) for path in paths if path in submodules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _size(features: Tensor) -> tuple[int, int]:
    return features.shape[-2], features.shape[-1]


def _mean(values: list[Tensor]) -> float:
    return torch.cat(values).mean().item() if values else math.nan


def _check_labels(images: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    if labels.shape != (len(images), *images.shape[-2:]):
        raise ValueError(
            f"labels of images {tuple(images.shape)} must be {(len(images), *images.shape[-2:])}, "
            f"got {tuple(labels.shape)}; give them at full resolution."
        )
    check_labels(labels.long(), num_classes, ignore_index)
