"""The most probable classes of every pixel, beside the winner: the same as by sorting all probabilities."""

import pytest
import torch
from torch.nn import functional as F

from rssnet.inference import Predictor
from rssnet.sliding_window import most_probable
from tests.rssnet.test_inference import (
    CellByCell,
    image_of,
    normalized,
    real_model,
    reference_probabilities,
    upsampled_probabilities,
)


def assert_ranks(prediction, probabilities, top_k, tolerance=2e-5):
    """Probabilities agree at each rank, and classes wherever their neighbours in rank aren't tied."""
    ordered, classes = probabilities.sort(dim=0, descending=True, stable=True)
    assert prediction.top_classes.shape == prediction.top_probabilities.shape == (top_k, *probabilities.shape[1:])
    assert torch.allclose(prediction.top_probabilities.double(), ordered[:top_k].double(), atol=tolerance)
    one_row = torch.ones_like(ordered[:1])
    steps = -torch.cat([2 * one_row, ordered, -one_row]).diff(dim=0)
    clear = torch.minimum(steps[:-1], steps[1:])[:top_k] > 2 * tolerance
    assert clear.float().mean() > 0.98
    assert torch.equal(prediction.top_classes[clear].long(), classes[:top_k][clear])


@pytest.mark.parametrize("size", [(64, 96), (33, 70)])
def test_of_one_look_they_are_those_of_the_models_logits(size):
    model = real_model(depth=2)
    image = image_of(*size)
    padded = F.pad(normalized(model, image), (0, 96 - size[1], 0, 64 - size[0]))
    probabilities = upsampled_probabilities(model, padded, (64, 96))[:, : size[0], : size[1]]
    (prediction,) = Predictor(model, top_k=3)([image])
    assert_ranks(prediction, probabilities, 3)


@pytest.mark.parametrize(
    ("size", "crop", "stride", "scales", "flip"),
    [
        ((70, 93), (32, 48), (20, 31), (1.0,), False),
        ((40, 40), (64, 64), (42, 42), (1.0,), True),
        ((61, 50), (32, 32), (16, 21), (0.5, 1.0, 1.75), True),
    ],
)
def test_of_windows_scales_and_flips_they_are_those_of_the_averaged_probabilities(size, crop, stride, scales, flip):
    model = CellByCell().double()
    with torch.no_grad():
        model.classify.weight[:, :, :, :2] *= 2  # not the same mirrored
        image = image_of(*size)
        grid = reference_probabilities(model, image, crop, stride, scales, flip)
    scores = F.interpolate(grid.log()[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    (prediction,) = Predictor(model.float(), crop, stride, scales=scales, flip=flip, top_k=3)([image])
    assert_ranks(prediction, scores.softmax(0)[:, : size[0], : size[1]], 3)


@pytest.mark.parametrize("size", [(64, 64), (100, 150)])
def test_the_winner_is_the_same_however_many_are_asked_for(size):
    model = CellByCell(classes=6)
    image = image_of(*size)
    (alone,), (all_of_them,) = Predictor(model)([image]), Predictor(model, top_k=6)([image])
    assert alone.top_classes.shape == (1, *size)
    assert torch.equal(alone.class_map, all_of_them.class_map)
    assert torch.equal(alone.confidence, all_of_them.confidence)
    assert torch.allclose(all_of_them.top_probabilities.sum(0), torch.ones(size), atol=1e-5)
    assert torch.equal(all_of_them.top_classes.sort(dim=0).values.unique(dim=1).unique(), torch.arange(6).byte())


def test_of_equal_probabilities_the_lower_class_comes_first_and_none_comes_twice():
    scores = torch.tensor([0.0, 2.0, -200.0, 2.0, 0.0, -300.0])[:, None, None].expand(6, 2, 3)
    classes, probabilities = most_probable(scores, 6)
    assert classes.dtype == torch.uint8
    assert (classes == torch.tensor([1, 3, 0, 4, 2, 5])[:, None, None]).all()
    assert torch.allclose(probabilities, scores.softmax(0)[classes[:, 0, 0].long()], atol=1e-7)
    assert torch.equal(scores[:, 0, 0], torch.tensor([0.0, 2.0, -200.0, 2.0, 0.0, -300.0]))


def test_of_many_classes_they_have_more_than_eight_bits():
    (prediction,) = Predictor(CellByCell(classes=300), top_k=2)([image_of(64, 100)])
    assert prediction.top_classes.dtype == torch.int16
    assert prediction.top_classes.max() > 255


def test_more_than_the_model_has_or_none_are_refused():
    with pytest.raises(ValueError, match="top_k is 6, but the model has only 5 classes"):
        Predictor(CellByCell(), top_k=6)([image_of(64, 64)])
    with pytest.raises(ValueError, match="top_k must be at least 1, which is the most probable class, got 0"):
        Predictor(CellByCell(), top_k=0)
