"""Scores agree with torchmetrics and with a loop over pixels, and parts merge to the whole."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_jaccard_index,
    multiclass_recall,
)

from rssnet.metrics import BoundaryIoU, ConfusionMatrix, boundary_band

IGNORE = 255


def random_pair(seed, classes=5, shape=(2, 17, 23), ignored=0.1):
    """A prediction and a label with regions (not noise), which agree in about two thirds of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (shape[0], 1, shape[1] // 4 + 1, shape[2] // 4 + 1), generator=generator)
    label = torch.nn.functional.interpolate(coarse.float(), size=shape[1:], mode="nearest")[:, 0].long()
    noise = torch.rand(shape, generator=generator)
    prediction = torch.where(noise < 0.3, torch.randint(0, classes, shape, generator=generator), label.roll(1, 2))
    label[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return prediction, label


def counted(prediction, label, classes=5):
    matrix = ConfusionMatrix(classes)
    matrix.update(prediction, label)
    return matrix


def same_numbers(first, second):
    return np.allclose(np.array(first, dtype=float), np.array(second, dtype=float), equal_nan=True, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_torchmetrics(seed):
    prediction, label = random_pair(seed)
    matrix = counted(prediction, label)
    scores = matrix.scores()
    options: dict[str, Any] = {"num_classes": 5, "ignore_index": IGNORE}
    assert torch.equal(matrix.counts, multiclass_confusion_matrix(prediction, label, **options))
    for ours, theirs in (
        (scores.iou, multiclass_jaccard_index),
        (scores.dice, multiclass_f1_score),
        (scores.acc, multiclass_recall),
    ):
        assert ours == pytest.approx(theirs(prediction, label, average="none", **options).tolist(), abs=1e-6)
    means: list[tuple[float, Callable[..., torch.Tensor], str]] = [
        (scores.miou, multiclass_jaccard_index, "macro"),
        (scores.fwiou, multiclass_jaccard_index, "weighted"),
        (scores.mdice, multiclass_f1_score, "macro"),
        (scores.macc, multiclass_recall, "macro"),
        (scores.aacc, multiclass_recall, "micro"),
    ]
    for ours, theirs, average in means:
        assert ours == pytest.approx(theirs(prediction, label, average=average, **options).item(), abs=1e-6)


def test_scores_are_those_of_a_loop_over_pixels():
    classes = 4
    prediction, label = random_pair(7, classes=classes)
    prediction[prediction == 2] = 0
    label[label == 2] = 0  # class 2 is absent
    pairs = [
        (p, y) for p, y in zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True) if y != IGNORE
    ]
    iou, acc, dice, frequency = [], [], [], []
    for k in range(classes):
        both = sum(p == k and y == k for p, y in pairs)
        predicted = sum(p == k for p, _ in pairs)
        true = sum(y == k for _, y in pairs)
        iou.append(both / (predicted + true - both) if predicted + true else math.nan)
        dice.append(2 * both / (predicted + true) if predicted + true else math.nan)
        acc.append(both / true if true else math.nan)
        frequency.append(true / len(pairs))
    scores = counted(prediction, label, classes).scores()
    assert math.isnan(scores.iou[2])
    assert same_numbers(scores.iou, iou)
    assert same_numbers(scores.acc, acc)
    assert same_numbers(scores.dice, dice)
    assert scores.miou == pytest.approx(np.nanmean(iou))
    assert scores.macc == pytest.approx(np.nanmean(acc))
    assert scores.mdice == pytest.approx(np.nanmean(dice))
    assert scores.aacc == pytest.approx(sum(p == y for p, y in pairs) / len(pairs))
    assert scores.fwiou == pytest.approx(sum(f * i for f, i in zip(frequency, iou, strict=True) if f))


def test_a_class_that_is_only_predicted_counts_as_missed_but_has_no_accuracy():
    scores = counted(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]), 4).scores()
    assert scores.iou[:3] == (1.0, 0.5, 0.0)
    assert scores.miou == pytest.approx(0.5)
    assert scores.acc[:2] == (1.0, 0.5)
    assert math.isnan(scores.acc[2])
    assert scores.macc == pytest.approx(0.75)


def test_without_pixels_every_score_is_nan_and_json_has_null():
    matrix = counted(torch.tensor([[0, 9]]), torch.tensor([[IGNORE, IGNORE]]))
    scores = matrix.scores()
    assert all(math.isnan(value) for value in (scores.miou, scores.macc, scores.aacc, scores.fwiou, *scores.iou))
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["iou"] == [None] * 5


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 12), min_size=0, max_size=4),
    st.sampled_from([ConfusionMatrix, BoundaryIoU]),
)
@settings(max_examples=30, deadline=None)
def test_merged_parts_are_the_whole(seed, cuts, metric):
    prediction, label = random_pair(seed, shape=(12, 9, 11))
    whole = metric(5)
    whole.update(prediction, label)
    merged = metric(5)
    bounds = [0, *sorted(cuts), 12]
    for start, stop in pairwise(bounds):
        part = metric(5)
        part.update(prediction[start:stop], label[start:stop])
        sent = metric.from_list(json.loads(json.dumps(part.to_list())))  # as it travels from a worker
        merged = merged + sent if start % 2 else merged.merge(sent)
    assert merged.to_list() == whole.to_list()
    assert same_numbers(merged.scores().iou, whole.scores().iou)


def test_adding_leaves_both_matrices_as_they_were():
    first, second = counted(*random_pair(1)), counted(*random_pair(2))
    before = first.to_list(), second.to_list()
    both = first + second
    assert (first.to_list(), second.to_list()) == before
    assert torch.equal(both.counts, first.counts + second.counts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32])
def test_narrow_integers_dont_overflow(dtype):
    prediction, label = random_pair(3, classes=200)
    narrow = prediction.to(dtype), label.to(dtype)
    assert torch.equal(counted(*narrow, 200).counts, counted(prediction, label, 200).counts)
    boundaries, same = BoundaryIoU(200), BoundaryIoU(200)
    boundaries.update(*narrow)
    same.update(prediction, label)
    assert boundaries.to_list() == same.to_list()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("metric", [ConfusionMatrix, BoundaryIoU])
def test_a_prediction_may_be_on_another_device_than_the_label(metric):
    prediction, label = random_pair(3)
    elsewhere, here = metric(5), metric(5)
    elsewhere.update(prediction.cuda(), label)
    here.update(prediction, label)
    assert elsewhere.to_list() == here.to_list()


def test_an_ignore_index_that_the_label_s_type_cannot_hold_ignores_nothing():
    matrix = ConfusionMatrix(150, ignore_index=300)
    matrix.update(torch.tensor([44]), torch.tensor([44], dtype=torch.uint8))
    assert matrix.counts[44, 44] == 1


def test_ids_of_thousands_of_classes_count_with_a_wider_ignore_index():
    matrix = ConfusionMatrix(1000, ignore_index=65535)
    matrix.update(torch.tensor([255, 999, 3]), torch.tensor([255, 999, 65535]))
    assert matrix.counts.sum() == 2
    assert matrix.counts[255, 255] == matrix.counts[999, 999] == 1


def eroded(mask, steps):
    """Repeated erosion by a 3x3 square with nothing outside the image, as in the authors' code (there by OpenCV)."""
    padded = np.pad(mask, 1)
    for _ in range(steps):
        smaller = padded.copy()
        for row in range(1, padded.shape[0] - 1):
            for column in range(1, padded.shape[1] - 1):
                smaller[row, column] = padded[row - 1 : row + 2, column - 1 : column + 2].all()
        padded = smaller
    return padded[1:-1, 1:-1]


@pytest.mark.parametrize(("ratio", "shape"), [(0.02, (18, 25)), (0.1, (24, 20)), (0.4, (12, 9))])
def test_boundary_iou_is_the_published_one(ratio, shape):
    prediction, label = random_pair(5, shape=(1, *shape), classes=3, ignored=0)
    metric = BoundaryIoU(3, dilation_ratio=ratio)
    metric.update(prediction, label)
    distance = max(1, round(ratio * math.hypot(*shape)))
    for k in range(3):
        true, predicted = ((t[0] == k).numpy() for t in (label, prediction))
        true_band, predicted_band = true & ~eroded(true, distance), predicted & ~eroded(predicted, distance)
        expected = (true_band & predicted_band).sum() / (true_band | predicted_band).sum()
        assert metric.scores().iou[k] == pytest.approx(expected)


def test_boundary_iou_looks_at_boundaries_only():
    label = torch.zeros(60, 60, dtype=torch.long)
    label[:, 30:] = 1
    thick = label.clone()
    thick[25:35, 13:17] = 1  # far from any boundary but its own
    shifted = label.roll(2, dims=1)
    shifted[:, :2] = 0
    boundary, region = {}, {}
    for name, prediction in (("same", label), ("shifted", shifted), ("hole", thick)):
        metric = BoundaryIoU(2)
        metric.update(prediction, label)
        boundary[name], region[name] = metric.scores().miou, counted(prediction, label, 2).scores().miou
    assert boundary["same"] == 1
    # Both mistakes cost the regions about the same; the boundaries they cost far more.
    assert region["shifted"] > 0.9
    assert boundary["shifted"] < 0.75
    assert boundary["hole"] < region["hole"]


def test_ignored_pixels_count_for_no_boundary_and_make_none():
    label = torch.zeros(40, 40, dtype=torch.long)
    label[:, 20:] = IGNORE
    prediction = torch.zeros(40, 40, dtype=torch.long)
    prediction[:, 20:] = 1  # other only where nobody knows
    metric = BoundaryIoU(2)
    metric.update(prediction, label)
    assert metric.scores().iou[0] == 1
    assert math.isnan(metric.scores().iou[1])
    # What is left of the contour is the image's border: three sides of the half that counts, one pixel deep.
    assert metric.union[0] == 40 + 2 * 19


@pytest.mark.parametrize("radius", [1, 2, 3, 7])
def test_boundary_band_is_where_another_class_is_near(radius):
    _, label = random_pair(11, shape=(1, 21, 19), classes=3)
    label = label[0]
    expected = torch.zeros_like(label, dtype=torch.bool)
    for row in range(21):
        for column in range(19):
            around = label[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1]
            other = (around != label[row, column]) & (around != IGNORE)
            expected[row, column] = label[row, column] != IGNORE and other.any()
    assert torch.equal(boundary_band(label, radius), expected)
    assert torch.equal(boundary_band(label[None].expand(2, -1, -1), radius), expected.expand(2, -1, -1))


def test_a_mask_restricts_the_matrix_to_the_band():
    label = torch.zeros(20, 20, dtype=torch.long)
    label[:, 10:] = 1
    prediction = label.clone()
    prediction[:, 0] = 1  # far from the boundary
    prediction[:, 9] = 1  # at it
    matrix = ConfusionMatrix(2)
    matrix.update(prediction, label, boundary_band(label, 3))
    assert matrix.to_list() == [[40, 20], [0, 60]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ConfusionMatrix(1), "num_classes must be at least 2, got 1"),
        (lambda: ConfusionMatrix(300), "ignore_index 255 is one of the 300 classes"),
        (lambda: counted(torch.tensor([5]), torch.tensor([0])), "prediction holds the value 5; classes are 0 to 4"),
        (lambda: counted(torch.tensor([0]), torch.tensor([77])), "label holds the value 77"),
        (
            lambda: ConfusionMatrix(5, -100).update(torch.tensor([0]), torch.tensor([156], dtype=torch.uint8)),
            "label holds the value 156",
        ),
        (lambda: counted(torch.tensor([0]), torch.tensor([-3])), "label holds the value -3"),
        (lambda: counted(torch.zeros(1, 2).long(), torch.zeros(2, 1).long()), r"got \(1, 2\) and \(2, 1\)"),
        (
            lambda: counted(torch.zeros(2), torch.zeros(2).long()),
            "integer class ids, got torch.float32",
        ),
        (lambda: ConfusionMatrix(2).merge(ConfusionMatrix(3)), "num_classes 2 and 3"),
        (lambda: BoundaryIoU(2).merge(BoundaryIoU(2, dilation_ratio=0.1)), "dilation_ratio 0.02 and 0.1"),
        (lambda: BoundaryIoU(2, dilation_ratio=2), "between 0 and 1, got 2"),
        (lambda: boundary_band(torch.zeros(2, 2).long(), 0), "at least 1 pixel, got 0"),
        (
            lambda: ConfusionMatrix(2).update(torch.zeros(2).long(), torch.zeros(2).long(), torch.ones(2)),
            "mask must be a bool tensor",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
