"""Every loss against its definition in float64, and where it must be zero, finite or refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rssnet import LossConfig, RSSNet, RSSNetConfig, RSSNetLoss, RSSNetOutput, check_batch
from rssnet.losses import (
    attention_losses,
    class_prototypes,
    class_shares,
    cross_entropy,
    presence_loss,
    region_separation_loss,
    separation_supervision_loss,
)
from rssnet.separation import SeparationWeights, bilinear_weights

K = 4


def labels_of(batch=2, height=12, width=8, ignored=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (batch, height, width), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < ignored, 255)


# Each definition goes pixel by pixel and class by class.


def cross_entropy_by_loops(logits, labels, class_weights=None, label_smoothing=0.0):
    class_weights = torch.ones(K, dtype=torch.float64) if class_weights is None else class_weights
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
    total, weight = 0.0, 0.0
    for b, y, x in (labels != 255).nonzero().tolist():
        log_probabilities = logits[b, :, y, x] - logits[b, :, y, x].exp().sum().log()
        true = labels[b, y, x]
        smooth = (class_weights * log_probabilities).sum() / K
        total -= (1 - label_smoothing) * class_weights[true] * log_probabilities[true] + label_smoothing * smooth
        weight += class_weights[true]
    return total / weight


def shares_by_loops(labels, size):
    batch, height, width = labels.shape
    counts = torch.zeros(batch, K, *size, dtype=torch.float64)
    pixels = torch.zeros(*size, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            cell = y * size[0] // height, x * size[1] // width
            pixels[cell] += 1
            for b in range(batch):
                if labels[b, y, x] != 255:
                    counts[b, labels[b, y, x], cell[0], cell[1]] += 1
    return counts / pixels


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_its_definition(class_weights, label_smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, K, 3, 2), labels_of()
    weights = None if class_weights is None else torch.tensor(class_weights)
    found = cross_entropy(logits, labels, class_weights=weights, label_smoothing=label_smoothing)
    expected = cross_entropy_by_loops(
        logits.double(), labels, None if weights is None else weights.double(), label_smoothing
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_mining_averages_the_hardest_valid_pixels(fraction):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, K, 12, 8), labels_of()
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")[labels != 255]
    count = math.ceil(fraction * len(losses))
    expected = losses.sort(descending=True).values[:count].mean()
    torch.testing.assert_close(cross_entropy(logits, labels, hardest_fraction=fraction), expected)


@pytest.mark.parametrize("size", [(3, 2), (12, 8), (5, 3), (1, 1)])
def test_class_shares_are_average_pooled_one_hot_labels(size):
    labels = labels_of()
    torch.testing.assert_close(class_shares(labels, K, size).double(), shares_by_loops(labels, size))


def test_a_grid_finer_than_the_labels_has_no_shares_where_no_pixel_is():
    shares = class_shares(labels_of(1, 4, 6, ignored=0), K, (16, 24))
    assert shares.sum() == 4 * 6
    assert set(shares.unique().tolist()) == {0, 1}


def test_labels_coarser_than_every_map_give_a_finite_loss():
    config = RSSNetConfig(
        backbone="vit_tiny_patch16_224", backbone_options={"depth": 1}, num_classes=K, image_size=(64, 96)
    )
    output = RSSNet(config).train()(torch.randn(1, 3, 64, 96))
    losses = RSSNetLoss(LossConfig(separation_supervision=0.1), K)(output, labels_of(1, 4, 6))
    assert all(loss.isfinite() for loss in losses.values())


def test_attention_losses_are_their_definition():
    torch.manual_seed(0)
    attention = torch.randn(2, K, 3, 2)
    labels = labels_of(ignored=0.3)
    labels[1][labels[1] == 2] = 0  # a class that one image lacks
    shares = shares_by_loops(labels, (3, 2))
    valid = shares.sum(1)
    bce, dices = 0.0, []
    for b in range(2):
        for k in range(K):
            probability = attention[b, k].double().sigmoid()
            target = shares[b, k] / valid[b].clamp(min=1e-12)
            bce -= (valid[b] * (target * probability.log() + (1 - target) * (1 - probability).log())).sum()
            if shares[b, k].sum() > 0:
                overlap = (valid[b] * probability * shares[b, k]).sum()
                dices.append(1 - 2 * overlap / ((valid[b] * probability).sum() + shares[b, k].sum()))
    assert len(dices) == 2 * K - 1
    found_bce, found_dice = attention_losses(attention, class_shares(labels, K, (3, 2)))
    torch.testing.assert_close(found_bce.double(), bce / (valid.sum() * K), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_dice.double(), torch.stack(dices).mean(), rtol=1e-5, atol=1e-6)


def test_presence_loss_counts_images_that_have_labels():
    presence = torch.tensor([[2.0, -1.0, 0.5, 0.0], [9.0, 9.0, 9.0, 9.0]])
    present = torch.tensor([[True, False, True, False], [False] * 4])
    probability = presence[0].double().sigmoid()
    expected = -(probability[0].log() + (1 - probability[1]).log() + probability[2].log() + (1 - probability[3]).log())
    torch.testing.assert_close(presence_loss(presence, present).double(), expected / 4, rtol=1e-5, atol=1e-6)


def test_prototypes_are_means_over_each_class():
    torch.manual_seed(0)
    pixels, labels = torch.randn(2, 5, 6, 4), labels_of(height=6, width=4)
    labels[0][labels[0] == 3] = 0
    means, present = class_prototypes(pixels, labels, K)
    for b in range(2):
        for k in range(K):
            members = pixels[b, :, labels[b] == k]
            assert present[b, k] == (members.shape[1] > 0)
            expected = members.double().mean(1) if present[b, k] else torch.zeros(5, dtype=torch.float64)
            torch.testing.assert_close(means[b, k].double(), expected, rtol=1e-5, atol=1e-6)


def test_prototypes_read_labels_of_the_nearest_pixel():
    labels = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 1]]])  # the middles are those of the second and fourth column
    means, _ = class_prototypes(torch.tensor([[[[3.0, 7.0]]]]), labels, 2)
    torch.testing.assert_close(means[0, :, 0], torch.tensor([3.0, 7.0]))


def test_region_separation_is_its_definition():
    torch.manual_seed(0)
    regions, prototypes = torch.randn(2, K, 5), torch.randn(2, K, 5)
    present = torch.tensor([[True, True, False, True], [False, True, False, False]])
    losses = []
    for b in range(2):
        classes = present[b].nonzero().flatten().tolist()
        for k in classes:
            cosines = {
                j: F.cosine_similarity(regions[b, k].double(), prototypes[b, j].double(), dim=0) / 0.1 for j in classes
            }
            losses.append(-(cosines[k] - torch.stack(list(cosines.values())).exp().sum().log()))
    found = region_separation_loss(regions, prototypes, present, temperature=0.1)
    torch.testing.assert_close(found.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_separation_supervision_is_its_definition():
    torch.manual_seed(0)
    ratio, grid = 2, (3, 2)
    labels = labels_of(height=12, width=8, ignored=0.05)
    labels[0, :, :5], labels[0, :, 5:] = 1, 2  # a token that is of two classes, one of them by more than half
    attraction, repulsion = torch.randn(2, 2, 6, 4, 2, 9).mul(3).softmax(-1)
    weights = SeparationWeights(attraction, repulsion, 2 * torch.rand(2, 6, 4, 2, 1), bilinear_weights(ratio, 3))
    composition = weights.composition
    shares = shares_by_loops(labels, grid)
    losses = []
    for b in range(2):
        for y in range(6):
            for x in range(4):
                own = labels[b, y * 2 + 1, x * 2 + 1]  # the nearest pixel to the middle of a fine location of 2 x 2
                cells = [
                    (min(max(y // ratio + dy, 0), 2), min(max(x // ratio + dx, 0), 1))
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                ]
                if own == 255:
                    continue
                same = torch.stack([shares[b, own, row, column] for row, column in cells])
                other = torch.stack([shares[b, :, row, column].sum() for row, column in cells]) - same
                if same.max() > 0.5 and other.max() > 0.5:
                    for group in range(2):
                        on_own = (composition[b, y, x, group].double() * same).sum()
                        losses.append(max(1 - on_own, torch.zeros_like(on_own)))
    assert len(losses) > 10
    assert any(loss == 0 for loss in losses)
    assert any(loss > 1 for loss in losses)
    found = separation_supervision_loss(weights, labels, K, ratio)
    torch.testing.assert_close(found.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


# The whole loss, on a model.


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RSSNet(
        RSSNetConfig(
            backbone="vit_tiny_patch16_224",
            backbone_options={"depth": 2},
            num_classes=K,
            image_size=64,
            decoder_width=32,
        )
    ).train()


@pytest.fixture
def output(model):
    torch.manual_seed(1)
    return model(torch.randn(2, 3, 64, 64))


PARTS = (
    "segmentation",
    "auxiliary",
    "attention_bce",
    "attention_dice",
    "region_classification",
    "region_separation",
    "separation_supervision",
)


def test_the_total_is_the_weighted_sum_of_its_parts(output):
    weights = dict(zip(PARTS[1:], (0.3, 2.0, 0.7, 0.2, 0.9, 0.05), strict=True))
    losses = RSSNetLoss(LossConfig(**weights), K)(output, labels_of(height=64, width=64))
    assert set(losses) == {"loss", *PARTS}
    expected = losses["segmentation"] + sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(losses["loss"], expected)


def test_without_an_auxiliary_output_it_is_the_cross_entropy(output):
    labels = labels_of(height=64, width=64)
    losses = RSSNetLoss(LossConfig(), K)(RSSNetOutput(output.logits), labels)
    assert set(losses) == {"loss", "segmentation"}
    torch.testing.assert_close(losses["loss"], cross_entropy(output.logits, labels))


def test_supervision_is_averaged_over_layers(output):
    labels = labels_of(height=64, width=64)
    shares = class_shares(labels, K, output.auxiliary.attention[0].shape[-2:])
    per_layer = [attention_losses(attention, shares)[0] for attention in output.auxiliary.attention]
    assert len(per_layer) == 3
    losses = RSSNetLoss(LossConfig(), K)(output, labels)
    torch.testing.assert_close(losses["attention_bce"], torch.stack(per_layer).mean())


def test_labels_that_are_all_ignored_give_zero_and_no_gradient(model, output):
    losses = RSSNetLoss(LossConfig(separation_supervision=0.1), K)(output, torch.full((2, 64, 64), 255))
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)
    model.zero_grad()
    losses["loss"].backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_a_batch_of_classes_without_weight_has_no_gradient_however_the_loss_is_scaled(model, output):
    criterion = RSSNetLoss(LossConfig(class_weights=[0.0, *[1.0] * (K - 1)]), K)
    model.zero_grad()
    (criterion(output, torch.zeros(2, 64, 64, dtype=torch.int64))["segmentation"] * 2**16).backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_labels_may_be_of_any_integers(output):
    labels = torch.randint(0, K, (2, 64, 64))
    criterion = RSSNetLoss(LossConfig(), K)
    torch.testing.assert_close(criterion(output, labels.to(torch.uint8)), criterion(output, labels))


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 64, 64), torch.zeros(2, 1, 64, 64).long(), torch.zeros(3, 64, 64).long()]
)
def test_labels_of_another_type_or_shape_are_refused(output, labels):
    with pytest.raises(
        ValueError, match=r"Labels must be integers of shape \(2, height, width\), not torch.*: give one class id"
    ):
        RSSNetLoss(LossConfig(), K)(output, labels)


@pytest.mark.parametrize("num_classes", [K - 1, K + 1])
def test_logits_of_another_number_of_classes_are_refused(output, num_classes):
    criterion = RSSNetLoss(LossConfig(), num_classes)
    with pytest.raises(
        ValueError, match=f"was made for {num_classes} classes and the logits are of {K}: make RSSNetLoss"
    ):
        criterion(RSSNetOutput(output.logits), torch.zeros(2, 64, 64, dtype=torch.long))


@pytest.mark.parametrize("size", [(32, 64), (64, 128), (7, 301)])
def test_labels_of_other_proportions_are_refused(output, size):
    with pytest.raises(ValueError, match=rf"Labels are {size[0]} x {size[1]} pixels, the images about 64 x 64: give"):
        RSSNetLoss(LossConfig(), K)(output, torch.zeros(2, *size, dtype=torch.int64))


def test_one_image_all_ignored_changes_nothing_for_the_other(model):
    torch.manual_seed(1)
    images, labels = torch.randn(2, 3, 64, 64), labels_of(height=64, width=64)
    alone = RSSNetLoss(LossConfig(), K)(model(images[:1]), labels[:1])
    labels[1] = 255
    both = RSSNetLoss(LossConfig(), K)(model(images), labels)
    for name, loss in alone.items():
        torch.testing.assert_close(both[name], loss, rtol=1e-4, atol=1e-5)


def test_one_class_has_nothing_to_be_separated_from(output):
    losses = RSSNetLoss(LossConfig(separation_supervision=0.1), K)(output, torch.full((2, 64, 64), 2))
    assert losses["region_separation"].item() == 0
    assert losses["separation_supervision"].item() == 0
    assert losses["loss"].isfinite()


def test_a_region_smaller_than_a_cell_is_finite(model, output):
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[0, 0, 1] = 3  # one pixel, which no cell at stride 4 reads
    losses = RSSNetLoss(LossConfig(separation_supervision=0.1), K)(output, labels)
    model.zero_grad()
    losses["loss"].backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_very_large_outputs_stay_finite(output, scale):
    def enlarge(part):
        return part.detach().mul(scale).requires_grad_()

    auxiliary = output.auxiliary
    logits, deep_logits = enlarge(output.logits), enlarge(auxiliary.deep_logits)
    attention, presence, regions = (
        tuple(enlarge(part) for part in parts) for parts in (auxiliary.attention, auxiliary.presence, auxiliary.regions)
    )
    large = replace(auxiliary, deep_logits=deep_logits, attention=attention, presence=presence, regions=regions)
    losses = RSSNetLoss(LossConfig(), K)(RSSNetOutput(logits, large), labels_of(height=64, width=64))
    assert all(loss.isfinite() for loss in losses.values())
    enlarged = (logits, deep_logits, *attention, *presence, *regions)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses["loss"], enlarged))


def test_detached_prototypes_leave_pixels_alone(output):
    labels = labels_of(height=64, width=64)
    pixels = output.auxiliary.pixels
    for detach in (False, True):
        losses = RSSNetLoss(LossConfig(detach_prototypes=detach), K)(output, labels)
        (gradient,) = torch.autograd.grad(losses["region_separation"], [pixels], allow_unused=True, retain_graph=True)
        assert (gradient is None) == detach


def test_losses_under_autocast_keep_full_precision(output):
    labels = labels_of(height=64, width=64)
    expected = RSSNetLoss(LossConfig(), K)(output, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = RSSNetLoss(LossConfig(), K)(output, labels)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=0, atol=0)


def test_a_label_out_of_range_is_named(output):
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[1, 3, 4], labels[0, 0, 0] = 4, -1
    with pytest.raises(ValueError, match=r"Labels -1, 4 are out of range: they must be 0 to 3, or 255"):
        RSSNetLoss(LossConfig(), K)(output, labels)


def test_where_labels_cannot_be_read_a_wrong_one_makes_the_loss_nan(output):
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[1, 3, 4] = 77
    compiled = torch.compile(RSSNetLoss(LossConfig(), K), backend="eager", fullgraph=True)
    assert compiled(RSSNetOutput(output.logits), labels)["loss"].isnan()


def test_check_batch_says_which_image_is_broken():
    images, labels = torch.zeros(3, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.long)
    check_batch(images, labels, K)
    images[2, 0, 1, 1] = math.nan
    with pytest.raises(ValueError, match=r"Images \[2\] of the batch have NaN or infinite values"):
        check_batch(images, labels, K)


def test_class_weights_must_be_one_per_class():
    with pytest.raises(ValueError, match="2 class_weights for 4 classes"):
        RSSNetLoss(LossConfig(class_weights=[1.0, 2.0]), K)


def test_the_ignored_label_must_not_be_a_class():
    with pytest.raises(ValueError, match="ignore_index 255 is also a class of 300"):
        RSSNetLoss(LossConfig(), 300)
