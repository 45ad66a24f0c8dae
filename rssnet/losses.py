"""Every loss and supervision.

The paper (arXiv 2212.13764, abstract) says that auxiliary supervisions make regions more discriminative; which ones,
and their weights, are ours.

Shapes: B images of (H, W) pixels, K classes, d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .composition import window_shifts
from .config import LossConfig
from .decoder import RSSNetOutput
from .separation import SeparationWeights

Normalizer = Callable[[Tensor], Tensor]


def alone(count: Tensor) -> Tensor:
    """The normaliser of a batch that no other worker has a part of: what there is to average over is what is here."""
    return count


class RSSNetLoss(nn.Module):
    """The training loss: cross-entropy, and every supervision that the model's output has something for.

    Args:
        config: Weights and options.
        num_classes: K.
        normalizer: What to divide sums by, given a worker's own count of pixels, classes or regions: where workers
            share a batch and average their gradients, the mean count over workers makes that the gradient of the whole
            batch. (`hardest_fraction` still takes the hardest of each worker's part.)

    Raises:
        ValueError: class weights that are not one per class, or an ignored label that is a class.
    """

    def __init__(self, config: LossConfig, num_classes: int, normalizer: Normalizer = alone) -> None:
        super().__init__()
        if config.class_weights is not None and len(config.class_weights) != num_classes:
            raise ValueError(
                f"{len(config.class_weights)} class_weights for {num_classes} classes; give one per class."
            )
        if 0 <= config.ignore_index < num_classes:
            raise ValueError(
                f"ignore_index {config.ignore_index} is also a class of {num_classes}; choose one that no class has."
            )
        self.config = config
        self.num_classes = num_classes
        self.normalizer = normalizer
        weights = None if config.class_weights is None else torch.tensor(config.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    class_weights: Tensor | None

    def forward(self, output: RSSNetOutput, labels: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            output: What the model returned, in training with its auxiliary part.
            labels: (B, H, W) class ids, integers, or `ignore_index`.

        Returns:
            "loss", the weighted total to minimise, and its parts as they are before weighting, averaged over layers:
            "segmentation" and, where the output has something for them, "auxiliary", "attention_bce", "attention_dice",
            "region_classification", "region_separation" and "separation_supervision". With no valid pixel all are zero.

        Raises:
            ValueError: logits of another number of classes; labels that have not the images' proportions, or are no
                integers; on a CPU also labels that are neither a class nor ignored. On other devices reading them would
                stall the queue: there the loss comes out as NaN, and `check_batch` says why.
        """
        config = self.config
        if output.logits.shape[1] != self.num_classes:
            raise ValueError(
                f"The loss was made for {self.num_classes} classes and the logits are of {output.logits.shape[1]}: "
                "make RSSNetLoss with the model's num_classes."
            )
        if labels.ndim != 3 or len(labels) != len(output.logits) or labels.is_floating_point():
            raise ValueError(
                f"Labels must be integers of shape ({len(output.logits)}, height, width), not {labels.dtype} of shape "
                f"{tuple(labels.shape)}: give one class id per pixel."
            )
        (height, width), (rows, columns) = labels.shape[-2:], output.logits.shape[-2:]
        # Logits have a quarter of the image's sides, rounded; labels of a transposed image would otherwise train, too.
        if abs(height * columns - width * rows) > 4 * max(rows, columns):
            raise ValueError(
                f"Labels are {height} x {width} pixels, the images about {4 * rows} x {4 * columns}: give each image "
                "the labels of its own pixels."
            )
        labels = labels.long()
        invalid = (labels != config.ignore_index) & ((labels < 0) | (labels >= self.num_classes))
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and invalid.any():
            check_labels(labels, self.num_classes, config.ignore_index)
        labels = labels.masked_fill(invalid, config.ignore_index)
        with _full_precision(labels.device):
            parts, scales = self._parts(output, labels)
            # A weight of zero still touches its part: distributed training wants a gradient for every parameter.
            total = torch.stack([scales[name] * part for name, part in parts.items()]).sum()
        return {"loss": total.masked_fill(invalid.any(), torch.nan), **parts}

    def _parts(self, output: RSSNetOutput, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The losses, and the weight of each."""
        config = self.config
        parts = {"segmentation": self._cross_entropy(output.logits, labels)}
        scales = {"segmentation": 1.0}
        auxiliary = output.auxiliary
        if auxiliary is not None:
            parts["auxiliary"] = self._cross_entropy(auxiliary.deep_logits, labels)
            scales["auxiliary"] = config.auxiliary
            if auxiliary.attention:
                shares = class_shares(labels, self.num_classes, auxiliary.attention[0].shape[-2:])
                masks = [attention_losses(attention, shares, self.normalizer) for attention in auxiliary.attention]
                parts["attention_bce"] = torch.stack([bce for bce, _ in masks]).mean()
                parts["attention_dice"] = torch.stack([dice for _, dice in masks]).mean()
                scales["attention_bce"], scales["attention_dice"] = config.attention_bce, config.attention_dice
                present = shares.sum(dim=(2, 3)) > 0  # (B, K)
                parts["region_classification"] = torch.stack(
                    [presence_loss(presence, present, self.normalizer) for presence in auxiliary.presence]
                ).mean()
                scales["region_classification"] = config.region_classification
            if auxiliary.pixels is not None:
                pixels = auxiliary.pixels.detach() if config.detach_prototypes else auxiliary.pixels
                prototypes, present = class_prototypes(pixels, labels, self.num_classes)
                parts["region_separation"] = torch.stack(
                    [
                        region_separation_loss(regions, prototypes, present, config.temperature, self.normalizer)
                        for regions in auxiliary.regions
                    ]
                ).mean()
                scales["region_separation"] = config.region_separation
            if auxiliary.separation is not None and config.separation_supervision > 0:
                ratio = auxiliary.separation.gate.shape[1] // auxiliary.deep_logits.shape[-2]
                parts["separation_supervision"] = separation_supervision_loss(
                    auxiliary.separation, labels, self.num_classes, ratio, self.normalizer
                )
                scales["separation_supervision"] = config.separation_supervision
        return parts, scales

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(
            logits,
            labels,
            ignore_index=self.config.ignore_index,
            class_weights=self.class_weights,
            label_smoothing=self.config.label_smoothing,
            hardest_fraction=self.config.hardest_fraction,
            normalizer=self.normalizer,
        )


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Cosines over a small temperature, and sums over images, need more than half precision."""
    # The meta device has no autocast; to ask which do would break the graph of torch 2.11's compiler.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _average(total: Tensor, count: Tensor, normalizer: Normalizer) -> Tensor:
    """A sum divided by what it is averaged over; zero where there is nothing."""
    count = normalizer(count.to(total.dtype))
    # Dividing by a tiny number instead would make the gradient of a scaled loss infinite times zero.
    return total / torch.where(count > 0, count, 1)


def check_labels(labels: Tensor, num_classes: int, ignore_index: int = 255) -> None:
    """Says what is wrong with labels, if anything is.

    Raises:
        ValueError: a label that is neither a class nor ignored.
    """
    invalid = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if invalid.any():
        values = labels[invalid].unique()
        listed = ", ".join(str(value) for value in values[:5].tolist()) + (", ..." if len(values) > 5 else "")
        raise ValueError(
            f"Labels {listed} are out of range: they must be 0 to {num_classes - 1}, or {ignore_index} for pixels to "
            "ignore. Convert the labels, or set num_classes to what they hold."
        )


def check_batch(images: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> None:
    """Says what is wrong with a batch, to be asked when a loss is not finite; it waits for the device.

    Args:
        images: (B, 3, H, W).
        labels: (B, H, W).
        num_classes: K.
        ignore_index: Label of pixels that count nowhere.

    Raises:
        ValueError: an image with NaN or infinite values, or a label that is neither a class nor ignored.
    """
    broken = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"Images {broken} of the batch have NaN or infinite values; check how they were decoded and normalised."
        )
    check_labels(labels, num_classes, ignore_index)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    hardest_fraction: float = 1.0,
    normalizer: Normalizer = alone,
) -> Tensor:
    """Cross-entropy at the labels' resolution, averaged over valid pixels; zero when there is none.

    Args:
        logits: (B, K, h, w), upsampled here to the labels' size.
        labels: (B, H, W).
        ignore_index: Label of pixels that count nowhere.
        class_weights: (K,); the average is then weighted too.
        label_smoothing: Share of the target spread evenly over classes.
        hardest_fraction: Share of the valid pixels, those with the largest loss, that count.
        normalizer: As for `RSSNetLoss`, here and below.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear")
    losses = F.cross_entropy(
        logits,
        labels,
        weight=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    valid = labels != ignore_index
    weights = valid.to(losses.dtype)
    if class_weights is not None:
        weights = weights * class_weights[labels.masked_fill(~valid, 0)]
    if hardest_fraction < 1:
        kept = _hardest(losses.detach().masked_fill(~valid, -1.0).flatten(), valid.sum() * hardest_fraction)
        kept = kept.reshape(losses.shape)
        losses, weights = losses * kept, weights * kept
    return _average(losses.sum(), weights.sum(), normalizer)


def _hardest(losses: Tensor, count: Tensor) -> Tensor:
    """Which of the flat losses are among the `count` largest, without asking the device how many that is."""
    ranks = losses.argsort(descending=True).argsort()
    return ranks < count


def class_shares(labels: Tensor, num_classes: int, size: torch.Size | tuple[int, int]) -> Tensor:
    """The share of each cell of a coarse grid that each class covers: one-hot labels, average-pooled.

    Labels that are no class, such as the ignored one, count as nothing: where they lie, shares sum to less than one.

    Args:
        labels: (B, H, W).
        num_classes: K.
        size: (h, w) of the grid.

    Returns:
        (B, K, h, w).
    """
    batch, height, width = labels.shape
    rows, columns = size
    cell_row = torch.arange(height, device=labels.device) * rows // height
    cell_column = torch.arange(width, device=labels.device) * columns // width
    cell = cell_row[:, None] * columns + cell_column  # (H, W)
    image = torch.arange(batch, device=labels.device)[:, None, None]
    valid = (labels >= 0) & (labels < num_classes)
    index = (image * num_classes + labels.masked_fill(~valid, 0)) * (rows * columns) + cell
    # Counting at the labels' resolution holds no one-hot volume of (B, K, H, W).
    counts = torch.zeros(batch * num_classes * rows * columns, device=labels.device)
    counts = counts.scatter_add(0, index.flatten(), valid.flatten().to(counts.dtype))
    area = torch.zeros(rows * columns, device=labels.device)
    area = area.scatter_add(0, cell.flatten(), torch.ones(height * width, device=labels.device))
    # A grid finer than the labels has cells without a pixel.
    shares = counts.reshape(batch, num_classes, rows * columns) / area.clamp(min=1)
    return shares.reshape(batch, num_classes, rows, columns)


def attention_losses(attention: Tensor, shares: Tensor, normalizer: Normalizer = alone) -> tuple[Tensor, Tensor]:
    """How far attention, read as masks of classes, is from the classes.

    Args:
        attention: (B, K, h, w), before a sigmoid.
        shares: (B, K, h, w), from `class_shares`.

    Returns:
        Binary cross-entropy over all classes, per valid pixel and class; and one less Dice, over the classes present in
        each image. Zero when nothing is valid.
    """
    attention = attention.float()
    valid = shares.sum(dim=1, keepdim=True)  # (B, 1, h, w), from 0 to 1
    # valid * bce(attention, shares / valid), without the division.
    bce = (valid * F.softplus(attention) - shares * attention).sum()
    bce = _average(bce, valid.sum() * attention.shape[1], normalizer)

    masks = valid * attention.sigmoid()
    overlap = (masks * shares).sum(dim=(2, 3))
    total = masks.sum(dim=(2, 3)) + shares.sum(dim=(2, 3))
    present = (shares.sum(dim=(2, 3)) > 0).to(overlap.dtype)
    dice = 1 - 2 * overlap / total.clamp(min=torch.finfo(total.dtype).eps)
    return bce, _average((dice * present).sum(), present.sum(), normalizer)


def presence_loss(presence: Tensor, present: Tensor, normalizer: Normalizer = alone) -> Tensor:
    """Binary cross-entropy of which classes are in each image; images without a valid pixel don't count.

    Args:
        presence: (B, K), before a sigmoid.
        present: (B, K), boolean.
    """
    labelled = present.any(dim=1, keepdim=True).expand_as(present).float()
    losses = F.binary_cross_entropy_with_logits(presence.float(), present.float(), reduction="none")
    return _average((losses * labelled).sum(), labelled.sum(), normalizer)


def class_prototypes(pixels: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The mean pixel embedding of each class over its own ground-truth region, per image.

    Args:
        pixels: (B, d, h, w).
        labels: (B, H, W), read at the nearest pixel.
        num_classes: K.

    Returns:
        (B, K, d) means, zero for absent classes, and (B, K) which are present.
    """
    nearest = _nearest(labels, pixels.shape[-2:])[:, 0]
    ids = torch.arange(num_classes, device=labels.device)[:, None]
    members = (nearest.flatten(1)[:, None] == ids).float()  # (B, K, h * w)
    counts = members.sum(dim=2)
    means = members @ pixels.float().flatten(2).transpose(1, 2) / counts.clamp(min=1)[..., None]
    return means, counts > 0


def _nearest(labels: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Labels (B, H, W) at the pixels nearest to the cells of a grid: (B, 1, h, w)."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact").long()


def region_separation_loss(
    regions: Tensor, prototypes: Tensor, present: Tensor, temperature: float, normalizer: Normalizer = alone
) -> Tensor:
    """InfoNCE on cosines: each region is pulled to its own class's pixels and pushed from those of other classes.

    Args:
        regions: (B, K, d).
        prototypes: (B, K, d).
        present: (B, K); other classes count neither as regions nor as others.
        temperature: tau.
    """
    cosine = F.normalize(regions.float(), dim=-1) @ F.normalize(prototypes.float(), dim=-1).transpose(1, 2)
    similarity = (cosine / temperature).masked_fill(~present[:, None, :], torch.finfo(cosine.dtype).min)
    own = -similarity.log_softmax(dim=-1).diagonal(dim1=1, dim2=2)  # (B, K)
    return _average(own.masked_fill(~present, 0).sum(), present.sum(), normalizer)


def separation_supervision_loss(
    weights: SeparationWeights, labels: Tensor, num_classes: int, ratio: int, normalizer: Normalizer = alone
) -> Tensor:
    """Tells SASM what to compose fine locations of: tokens of their own class.

    The share of the composition that is not on the location's class, averaged over the fine locations whose window
    holds both tokens of its class and of others; linear, so that a location with nothing of its class learns too.

    Args:
        weights: From the separation module.
        labels: (B, H, W).
        num_classes: K.
        ratio: Fine locations per token and axis, r.
    """
    batch, height, width, groups, window = weights.composition.shape
    grid = (height // ratio, width // ratio)
    inside = F.pixel_unshuffle(_nearest(labels, (height, width)), ratio)
    own = inside.permute(0, 2, 3, 1)  # (B, h, w, r*r): the classes inside a token
    valid = (own >= 0) & (own < num_classes)

    # The share of each token around a fine location that is of the location's class, and that is of others.
    shares = class_shares(labels, num_classes, grid)
    shifts = list(window_shifts(shares, round(window**0.5)))  # (B, h, w, K) each
    same = torch.stack([shift.gather(-1, own.masked_fill(~valid, 0)) for shift in shifts], dim=-1)
    other = torch.stack([shift.sum(dim=-1, keepdim=True) for shift in shifts], dim=-1) - same  # (B, h, w, r*r, k*k)
    mixed = (valid & (same.amax(dim=-1) > 0.5) & (other.amax(dim=-1) > 0.5)).float()

    composition = weights.composition.float().reshape(batch, grid[0], ratio, grid[1], ratio, groups, window)
    composition = composition.transpose(2, 3).reshape(batch, *grid, ratio**2, groups, window)
    shares_of_own = (composition * same[..., None, :]).sum(dim=-1)  # (B, h, w, r*r, g)
    losses = (1 - shares_of_own).clamp(min=0).mean(dim=-1)
    return _average((losses * mixed).sum(), mixed.sum(), normalizer)
