"""What every model keeps, whatever its backbone and head: test classes inherit it and name a backbone.

Backbones are random, tiny and shallow, so that the whole matrix runs in minutes on two cores.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from rssnet import LossConfig, RSSNet, RSSNetConfig, RSSNetLoss

NUM_CLASSES = 3


class ModelContract:
    """Attributes are set by the test classes that inherit it."""

    backbone: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    image_size: ClassVar[tuple[int, int]] = (64, 96)
    # An odd number of patches a side, where the family allows it.
    other_size: ClassVar[tuple[int, int]] = (96, 32)
    # Families with batch norm give other features in training than in evaluation.
    has_batch_norm: ClassVar[bool] = False
    # Variants of a family, and families too slow to build thrice, are tried with one head.
    heads: ClassVar[tuple[str, ...]] = ("rssnet", "linear", "upernet")
    traced_heads: ClassVar[tuple[str, ...]] = ("rssnet",)

    def pytest_generate_tests(self, metafunc):
        if "model" in metafunc.fixturenames:
            traced = any(word in metafunc.definition.name for word in ("exported", "compiled", "without_memory"))
            heads = self.traced_heads if traced else self.heads
            metafunc.parametrize("model", heads, indirect=True, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, request):
        torch.manual_seed(0)
        return RSSNet(
            RSSNetConfig(
                backbone=cls.backbone,
                backbone_options=cls.options,
                num_classes=NUM_CLASSES,
                image_size=cls.image_size,
                head=request.param,
                decoder_width=32,
            )
        )

    @pytest.fixture
    def images(self):
        return torch.randn(2, 3, *self.image_size, generator=torch.Generator().manual_seed(0))

    def test_logits_are_at_a_quarter_of_the_image(self, model, images):
        output = model.eval()(images)
        assert output.logits.shape == (2, NUM_CLASSES, self.image_size[0] // 4, self.image_size[1] // 4)
        assert output.logits.isfinite().all()
        assert output.auxiliary is None

    def test_feature_maps_are_what_the_layout_says(self, model, images):
        for tap, features in zip(model.backbone.taps, model.eval().backbone(images), strict=True):
            height, width = self.image_size
            assert features.shape == (2, tap.channels, height // tap.stride, width // tap.stride)

    def test_every_trainable_parameter_gets_a_finite_gradient(self, model, images):
        model.train().zero_grad()
        labels = torch.randint(0, NUM_CLASSES, (2, *self.image_size), generator=torch.Generator().manual_seed(0))
        RSSNetLoss(LossConfig(), NUM_CLASSES)(model(images), labels)["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)

    def test_a_batch_of_one_is_that_image_of_a_larger_batch(self, model, images):
        torch.testing.assert_close(model.eval()(images[1:]).logits, model(images).logits[1:], rtol=1e-3, atol=1e-4)

    def test_a_batch_of_one_trains(self, model, images):
        labels = torch.zeros(1, *self.image_size, dtype=torch.long)
        loss = RSSNetLoss(LossConfig(), NUM_CLASSES)(model.train()(images[:1]), labels)["loss"]
        loss.backward()
        assert loss.isfinite()

    def test_it_can_be_made_for_another_size(self, model):
        images = torch.randn(1, 3, *self.other_size)
        logits = model.eval().resized(self.other_size)(images).logits
        assert logits.shape == (1, NUM_CLASSES, self.other_size[0] // 4, self.other_size[1] // 4)
        assert logits.isfinite().all()

    def test_training_changes_no_logits_beyond_batch_statistics(self, model, images):
        expected = model.eval()(images).logits
        model.train()
        if self.has_batch_norm:
            model.backbone.eval()
        torch.testing.assert_close(model(images).logits, expected)

    def test_it_comes_back_from_a_folder(self, model, images, tmp_path):
        model.eval().save_pretrained(tmp_path)
        loaded = RSSNet.from_pretrained(tmp_path)
        assert not loaded.training
        assert torch.equal(loaded(images).logits, model(images).logits)

    def test_built_without_memory_and_then_filled_it_is_the_same(self, model, images):
        with torch.device("meta"):
            other = RSSNet(model.config)
        torch.use_deterministic_algorithms(True)  # new memory then holds nan, not what happens to be there
        try:
            other.fill(model.state_dict())
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(other.eval()(images).logits, model.eval()(images).logits)

    def test_half_precision_stays_close(self, model, images):
        model.eval()
        with torch.no_grad():
            expected = model(images).logits
            with torch.autocast("cpu", torch.bfloat16):
                found = model(images).logits.float()
        scale = (expected - expected.mean()).abs().mean()
        assert (found - expected).abs().mean() < 0.1 * scale

    def test_half_precision_trains(self, model, images):
        model.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        labels = torch.zeros(2, *self.image_size, dtype=torch.long)
        RSSNetLoss(LossConfig(), NUM_CLASSES)(output, labels)["loss"].backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_an_exported_program_gives_the_same_for_any_batch(self, model, images):
        model.eval()
        batch = torch.export.Dim("batch", min=1, max=16)
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
            more = torch.cat([images, images[:1]])
            torch.testing.assert_close(program.module()(more).logits, model(more).logits, rtol=1e-4, atol=1e-4)

    def test_a_graph_compiled_whole_gives_the_same(self, model, images):
        model.eval()
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(images).logits, model(images).logits)
