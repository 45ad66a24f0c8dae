"""Scores of a segmentation: confusion matrix, boundary IoU, and the band of pixels near a boundary.

Every metric here is a sum of integer counts, so parts computed anywhere (other images, other workers) merge to exactly
what the whole would have given. This module knows tensors only: no files, no workers, no model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentationScores:
    """Scores between 0 and 1 that a confusion matrix gives.

    A score without a denominator is nan and doesn't enter a mean: the IoU and Dice of a class that neither the labels
    nor the predictions hold, and the accuracy of a class that the labels don't hold.

    Attributes:
        miou: mean of `iou`.
        macc: mean of `acc`.
        aacc: share of all valid pixels that are right.
        fwiou: mean of `iou` weighted by how many pixels each class has in the labels.
        mdice: mean of `dice`.
        iou: per class, TP / (TP + FP + FN).
        acc: per class, TP / (TP + FN), the recall.
        dice: per class, 2 TP / (2 TP + FP + FN).
    """

    miou: float
    macc: float
    aacc: float
    fwiou: float
    mdice: float
    iou: tuple[float, ...]
    acc: tuple[float, ...]
    dice: tuple[float, ...]

    def to_dict(self) -> dict[str, float | list[float | None] | None]:
        """The scores as JSON can hold them: tuples as lists, nan as None."""
        return {
            name: [_none_if_nan(v) for v in value] if isinstance(value, tuple) else _none_if_nan(value)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class BoundaryScores:
    """Boundary IoU between 0 and 1.

    Attributes:
        miou: mean of `iou` over the classes where it isn't nan.
        iou: per class; nan where neither the labels nor the predictions hold a boundary of the class.
    """

    miou: float
    iou: tuple[float, ...]

    def to_dict(self) -> dict[str, float | list[float | None] | None]:
        """The scores as JSON can hold them: tuples as lists, nan as None."""
        return {"miou": _none_if_nan(self.miou), "iou": [_none_if_nan(v) for v in self.iou]}


class ConfusionMatrix:
    """Counts of pixels by true class and predicted class, and the scores that follow from them.

    Args:
        num_classes: number of classes K, at least 2.
        ignore_index: label of the pixels that don't count. It must not be a class.
        counts: (K, K) integers to start from, rows the true class; zeros when not given.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, counts: Tensor | None = None) -> None:
        _check_classes(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        if counts is not None:
            if counts.shape != self.counts.shape:
                raise ValueError(
                    f"counts of {num_classes} classes have the shape {tuple(self.counts.shape)}, "
                    f"got {tuple(counts.shape)}; give the num_classes they were made with."
                )
            self.counts += counts.to("cpu", torch.int64)

    def update(self, prediction: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Counts the pixels of one or more images.

        Args:
            prediction: (..., H, W) class ids, integers of any width, on any device.
            label: (..., H, W) class ids or `ignore_index`.
            mask: (..., H, W) bool, the pixels to count; all that aren't ignored when not given. With
                `boundary_band` this makes the scores near boundaries.

        Raises:
            ValueError: the shapes differ, a tensor isn't of integers, or a value is no class.
        """
        prediction, label, valid = _valid_pixels(prediction, label, self.num_classes, self.ignore_index)
        if mask is not None:
            if mask.shape != label.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask must be a bool tensor of the label's shape {tuple(label.shape)}, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}."
                )
            valid &= mask.to(valid.device)
        pairs = label[valid] * self.num_classes + prediction[valid]
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.counts += counts.cpu().view(self.num_classes, self.num_classes)

    def merge(self, other: ConfusionMatrix) -> Self:
        """Adds the counts of another matrix of the same classes to this one, and returns this one."""
        _check_mergeable(self, other, ("num_classes", "ignore_index"))
        self.counts += other.counts
        return self

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        return ConfusionMatrix(self.num_classes, self.ignore_index, self.counts).merge(other)

    def to_list(self) -> list[list[int]]:
        """The counts as plain integers, K lists of K: what crosses a process boundary or stands in a JSON file."""
        return self.counts.tolist()

    @classmethod
    def from_list(cls, counts: list[list[int]], ignore_index: int = 255) -> Self:
        """The matrix of which `to_list` gave the counts."""
        return cls(len(counts), ignore_index, torch.tensor(counts, dtype=torch.int64))

    def scores(self) -> SegmentationScores:
        """The scores of everything counted so far; all nan while nothing is."""
        counts = self.counts.double()
        hits, truth, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        # 0 / 0 is nan in IEEE arithmetic, which is just what a class without pixels shall have.
        iou = hits / (truth + predicted - hits)
        acc = hits / truth
        dice = 2 * hits / (truth + predicted)
        return SegmentationScores(
            miou=iou.nanmean().item(),
            macc=acc.nanmean().item(),
            aacc=(hits.sum() / counts.sum()).item(),
            fwiou=((truth * iou.nan_to_num()).sum() / truth.sum()).item(),
            mdice=dice.nanmean().item(),
            iou=tuple(iou.tolist()),
            acc=tuple(acc.tolist()),
            dice=tuple(dice.tolist()),
        )

    def __repr__(self) -> str:
        return f"ConfusionMatrix(num_classes={self.num_classes}, pixels={int(self.counts.sum())})"


class BoundaryIoU:
    """IoU of the thin bands inside the boundaries of the true and of the predicted regions, per class.

    Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021 (arXiv 2103.16562):
    with G_d the pixels of the true region that are within d of its contour, and P_d those of the predicted region,
    |G_d & P_d| / |G_d | P_d|. As in the authors' code d is counted in steps of a 3x3 erosion and the border of the
    image is part of the contour. Counts are summed over images before dividing, as usual for semantic segmentation.

    The paper knows no ignored pixels. Here they count nowhere and are no contour either: where a region touches them
    nobody knows where it ends (ours).

    Args:
        num_classes: number of classes K, at least 2.
        ignore_index: label of the pixels that don't count.
        dilation_ratio: d as a share of the image's diagonal, rounded to at least one pixel; 0.02 in the paper.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, dilation_ratio: float = 0.02) -> None:
        _check_classes(num_classes, ignore_index)
        if not 0 < dilation_ratio < 1:
            raise ValueError(
                f"dilation_ratio is a share of the image's diagonal between 0 and 1, got {dilation_ratio}; "
                "the paper takes 0.02."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.dilation_ratio = dilation_ratio
        self.intersection = torch.zeros(num_classes, dtype=torch.int64)
        self.union = torch.zeros(num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Counts the pixels of one image, or of a batch of images of one size.

        Args:
            prediction: (..., H, W) class ids, integers of any width, on any device.
            label: (..., H, W) class ids or `ignore_index`.

        Raises:
            ValueError: the shapes differ, a tensor isn't of integers, or a value is no class.
        """
        prediction, label, valid = _valid_pixels(prediction, label, self.num_classes, self.ignore_index)
        distance = max(1, round(self.dilation_ratio * math.hypot(*label.shape[-2:])))
        prediction = torch.where(valid, prediction, self.ignore_index)
        in_prediction = valid & _near_other_class(prediction, distance, self.ignore_index, border_differs=True)
        in_label = valid & _near_other_class(label, distance, self.ignore_index, border_differs=True)

        def pixels_per_class(classes: Tensor) -> Tensor:
            return torch.bincount(classes, minlength=self.num_classes).cpu()

        intersection = pixels_per_class(label[in_label & in_prediction & (label == prediction)])
        self.intersection += intersection
        self.union += pixels_per_class(label[in_label]) + pixels_per_class(prediction[in_prediction]) - intersection

    def merge(self, other: BoundaryIoU) -> Self:
        """Adds the counts of another metric of the same classes and ratio to this one, and returns this one."""
        _check_mergeable(self, other, ("num_classes", "ignore_index", "dilation_ratio"))
        self.intersection += other.intersection
        self.union += other.union
        return self

    def __add__(self, other: BoundaryIoU) -> BoundaryIoU:
        return BoundaryIoU(self.num_classes, self.ignore_index, self.dilation_ratio).merge(self).merge(other)

    def to_list(self) -> list[list[int]]:
        """Intersection and union per class as plain integers, two lists of K."""
        return [self.intersection.tolist(), self.union.tolist()]

    @classmethod
    def from_list(cls, counts: list[list[int]], ignore_index: int = 255, dilation_ratio: float = 0.02) -> Self:
        """The metric of which `to_list` gave the counts."""
        intersection, union = counts
        metric = cls(len(union), ignore_index, dilation_ratio)
        metric.intersection += torch.tensor(intersection)
        metric.union += torch.tensor(union)
        return metric

    def scores(self) -> BoundaryScores:
        """The scores of everything counted so far; all nan while nothing is."""
        iou = self.intersection.double() / self.union.double()
        return BoundaryScores(miou=iou.nanmean().item(), iou=tuple(iou.tolist()))


def boundary_band(label: Tensor, radius: int, ignore_index: int = 255) -> Tensor:
    """The pixels near a boundary between two classes, on both sides of it.

    Given to `ConfusionMatrix.update` as its mask it makes mIoU within `radius` pixels of a boundary, the "trimap" score
    of Kohli et al. (IJCV 2009) and DeepLab. Ignored pixels make no boundary and aren't in the band; neither does the
    border of the image.

    Args:
        label: (..., H, W) class ids or `ignore_index`, integers.
        radius: in pixels, counted along rows, columns and diagonals alike (Chebyshev distance); 1 takes the two
            pixels that touch the boundary.
        ignore_index: label of the pixels that don't count.

    Returns:
        (..., H, W) bool.

    Raises:
        ValueError: `radius` is below 1 or `label` isn't of integers.
    """
    if radius < 1:
        raise ValueError(f"radius must be at least 1 pixel, got {radius}.")
    _check_integers("label", label)
    label = label.long()
    return (label != ignore_index) & _near_other_class(label, radius, ignore_index, border_differs=False)


def _near_other_class(classes: Tensor, distance: int, ignore_index: int, border_differs: bool) -> Tensor:
    """Whether another class stands within `distance` of a pixel: (..., H, W) int64 to bool.

    That is what is left of each region after taking away its erosion by a square, for all regions at once: a pixel is
    in the erosion of its own region exactly if minimum and maximum over the window around it are its own class. So the
    cost doesn't grow with the number of classes.
    """
    ignored = classes == ignore_index
    near = torch.zeros_like(ignored)
    # The maximum of the negated classes is the minimum of the classes.
    for signed in (classes, -classes):
        lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
        reachable = signed.masked_fill(ignored, lowest)
        border = highest if border_differs else lowest
        near |= _window_maximum(_window_maximum(reachable, distance, -1, border), distance, -2, border) != signed
    return near


def _window_maximum(x: Tensor, radius: int, dim: int, border: int) -> Tensor:
    """Maximum over the 2 radius + 1 neighbours along `dim`, with `border` outside.

    The window is doubled until it is wide enough, which takes log2(radius) passes where max-pooling takes `radius`.
    """
    shape = list(x.shape)
    shape[dim] = radius
    outside = x.new_full(shape, border)
    x = torch.cat([outside, x, outside], dim)
    width, final_width = 1, 2 * radius + 1
    while width < final_width:
        step = min(width, final_width - width)
        length = x.shape[dim] - step
        x = torch.maximum(x.narrow(dim, 0, length), x.narrow(dim, step, length))
        width += step
    return x


def _valid_pixels(
    prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction and label as int64 on the label's device, and the pixels whose label isn't ignored: classes, all."""
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction and label must have one shape, got {tuple(prediction.shape)} and {tuple(label.shape)}; "
            "resize the prediction to the label, never the label to the prediction."
        )
    _check_integers("prediction", prediction)
    _check_integers("label", label)
    # In uint8, an ignored 300 would be 44; and torch has no minimum of uint16.
    prediction, label = prediction.to(label.device, torch.int64), label.long()
    valid = label != ignore_index
    for name, values in (("label", label[valid]), ("prediction", prediction[valid])):
        if values.numel() and not 0 <= (low := int(values.min())) <= (high := int(values.max())) < num_classes:
            raise ValueError(
                f"{name} holds the value {low if low < 0 else high}; classes are 0 to {num_classes - 1} and "
                f"{ignore_index} in a label is ignored: convert the ids or give the right num_classes."
            )
    return prediction, label, valid


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must hold integer class ids, got {tensor.dtype}; take the argmax over classes first.")


def _check_classes(num_classes: int, ignore_index: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}; for one class count the background too.")
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes; choose one outside.")


def _check_mergeable(first: object, second: object, names: tuple[str, ...]) -> None:
    for name in names:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise ValueError(f"cannot merge metrics of {name} {ours} and {theirs}; make both with the same one.")


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
