"""One optimizer step: what it changes, what it leaves, and that it can be taken up again by another process."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from pipeline.augmentation_config import AugmentationConfig
from pipeline.images import decode_label, decode_photograph
from pipeline.train_step import TrainStep
from pipeline.transforms import Augmentation
from rssnet import LossConfig, RSSNet, RSSNetConfig, RSSNetLoss

CLASSES = 4
CONFIG = RSSNetConfig(
    backbone="vit_tiny_patch16_224",
    backbone_options={"depth": 2, "embed_dim": 48, "num_heads": 3},
    num_classes=CLASSES,
    image_size=64,
    decoder_width=16,
)


def step_of(
    seed: int = 0,
    lr: float = 1e-3,
    precision: str = "fp32",
    accumulation: int = 1,
    clip_grad_norm: float = 0.0,
    ema_decay: float = 0.0,
    plain: bool = False,
) -> TrainStep:
    torch.manual_seed(seed)
    model = RSSNet(CONFIG)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr)
    if plain:
        optimizer = torch.optim.SGD(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1 / (1 + iteration))
    criterion = RSSNetLoss(LossConfig(), CLASSES)
    average = ModelEmaV3(model, ema_decay, use_warmup=True) if ema_decay else None
    return TrainStep(model, model, criterion, optimizer, schedule, precision, accumulation, clip_grad_norm, average)


def batch_of(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 64, 64, generator=generator)
    # All classes in each image, each in its quarter: so parts of a batch hold as much of each as the whole.
    labels = torch.arange(CLASSES).reshape(2, 2).repeat_interleave(32, 0).repeat_interleave(32, 1)
    return images, labels.expand(size, -1, -1).clone()


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def test_a_step_moves_the_weights_and_its_loss_falls_on_the_same_batch() -> None:
    step, (images, labels) = step_of(), batch_of(0)
    before = weights(step.model)
    losses = [float(step(images, labels)) for _ in range(4)]
    assert not torch.equal(weights(step.model), before)
    assert losses == sorted(losses, reverse=True)
    assert (step.iteration, step.skipped) == (4, 0)


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(accumulation: int) -> None:
    whole, parts = step_of(plain=True, lr=0.1), step_of(plain=True, lr=0.1, accumulation=accumulation)
    images, labels = batch_of(0)
    start = weights(whole.model)
    losses = [float(step(images, labels)) for step in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    moved = weights(whole.model) - start
    torch.testing.assert_close(weights(parts.model) - start, moved, rtol=1e-3, atol=1e-6)
    assert moved.abs().max() > 1e-3


def test_a_step_that_has_only_skipped_can_be_taken_up_again() -> None:
    images, labels = batch_of(0)
    step, again = step_of(), step_of(seed=1)
    step(images * 1e30, labels)  # finite, but its variance is not
    again.load_state_dict(step.state_dict())
    assert (again.iteration, again.skipped) == (1, 1)
    for one in (step, again):
        one(images, labels)
    assert torch.equal(weights(step.model), weights(again.model))


def test_a_gradient_beyond_the_limit_is_scaled_to_it() -> None:
    images, labels = batch_of(0)
    moved = []
    for clip in (0.0, 0.25):
        step = step_of(plain=True, lr=1.0, clip_grad_norm=clip)
        before = weights(step.model)
        step(images, labels)
        moved.append(weights(step.model) - before)
    assert moved[0].norm() > 0.5
    assert float(moved[1].norm()) == pytest.approx(0.25, rel=1e-3)
    torch.testing.assert_close(moved[1] / 0.25, moved[0] / moved[0].norm(), rtol=1e-3, atol=1e-5)


def test_a_step_without_a_finite_gradient_changes_nothing_but_the_schedule() -> None:
    step = step_of(ema_decay=0.9)
    images, labels = batch_of(0)
    step(images, labels)
    before, moments = weights(step.model), copy.deepcopy(step.optimizer.state_dict()["state"])
    average = weights(step.evaluated)
    lr = step.schedule.get_last_lr()
    broken = images * 1e30  # finite, but its variance is not
    for skipped in (1, 2):
        assert not torch.isfinite(step(broken, labels))
        assert (step.skipped, step.skipped_in_a_row, step.iteration) == (skipped, skipped, 1 + skipped)
    assert torch.equal(weights(step.model), before)
    assert torch.equal(weights(step.evaluated), average)
    after = step.optimizer.state_dict()["state"]
    assert all(torch.equal(after[key][name], moments[key][name]) for key in moments for name in moments[key])
    assert step.schedule.get_last_lr() < lr
    step(images, labels)
    assert (step.skipped, step.skipped_in_a_row) == (2, 0)
    assert not torch.equal(weights(step.model), before)


def test_the_average_follows_the_weights_and_is_what_is_evaluated() -> None:
    step = step_of(ema_decay=0.5)
    expected = weights(step.model)
    for iteration in range(1, 6):
        step(*batch_of(iteration))
        assert step.average is not None
        decay = step.average.get_decay(iteration)
        expected = decay * expected + (1 - decay) * weights(step.model)
    torch.testing.assert_close(weights(step.evaluated), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(step.evaluated), weights(step.model))
    assert step_of().evaluated is not None
    assert (plain := step_of()).evaluated is plain.model


def test_another_process_goes_on_bit_for_bit() -> None:
    undisturbed = step_of(ema_decay=0.9)
    for number in range(2):
        undisturbed(*batch_of(number))
    state = copy.deepcopy(undisturbed.state_dict())
    resumed = step_of(seed=1, ema_decay=0.9)
    resumed.load_state_dict(state)
    for step in (undisturbed, resumed):
        for number in range(2, 4):
            torch.manual_seed(number)
            step(*batch_of(number))
    assert torch.equal(weights(resumed.model), weights(undisturbed.model))
    assert torch.equal(weights(resumed.evaluated), weights(undisturbed.evaluated))
    assert resumed.iteration == undisturbed.iteration == 4


def test_another_setting_can_go_on_with_the_weights_and_moments_but_its_own_learning_rate() -> None:
    donor = step_of(lr=1e-3)
    for number in range(3):
        donor(*batch_of(number))
    taken = step_of(seed=1, lr=1e-4)
    taken.load_state_dict(copy.deepcopy(donor.state_dict()), settings=False)
    assert torch.equal(weights(taken.model), weights(donor.model))
    assert taken.iteration == 3
    (group,), (theirs,) = taken.optimizer.param_groups, donor.optimizer.param_groups
    assert group["lr"] == pytest.approx(1e-4 / 4)
    assert theirs["lr"] == pytest.approx(1e-3 / 4)
    assert taken.schedule.get_last_lr() == [group["lr"]]
    before = weights(taken.model)
    for step in (donor, taken):
        step(*batch_of(3))
    moved, far = (weights(taken.model) - before).norm(), (weights(donor.model) - before).norm()
    assert float(moved / far) == pytest.approx(0.1, rel=0.02), "the same direction, a tenth as far"
    assert group["lr"] == pytest.approx(1e-4 / 5)


def test_bfloat16_computes_nearly_the_same_with_weights_that_stay_float32() -> None:
    images, labels = batch_of(0)
    full, half = step_of(), step_of(precision="bf16")
    losses = [float(full(images, labels)), float(half(images, labels))]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


def test_one_batch_can_be_learned_by_heart() -> None:
    step, (images, labels) = step_of(lr=3e-3), batch_of(0, size=2)
    step.schedule.lr_lambdas[0] = lambda _: 1.0  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(60):
        step(images, labels)
    logits = step.model.eval()(images).logits
    found = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").argmax(1)
    assert (found == labels).float().mean() >= 0.95


@pytest.mark.camvid
def test_the_loss_falls_on_real_photographs(camvid: Path) -> None:
    step = step_of(lr=3e-3)
    step.schedule.lr_lambdas[0] = lambda _: 1.0  # pyright: ignore[reportAttributeAccessIssue]
    augment = Augmentation(AugmentationConfig(scale=(0.2, 0.3)), (64, 64), (0, 0, 0))
    losses = []
    for photograph in sorted((camvid / "train").iterdir())[:120:4]:
        image = decode_photograph(photograph.read_bytes())
        label = decode_label((camvid / "trainannot" / f"{photograph.stem}.png").read_bytes()).copy()
        label[label >= CLASSES] = 255  # sky, building, pole and road are enough
        pairs = [augment(image, label, seed) for seed in range(4)]
        images = torch.from_numpy(np.stack([image for image, _ in pairs])).float() / 127.5 - 1
        losses.append(float(step(images, torch.from_numpy(np.stack([label for _, label in pairs])).long())))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
