"""A model as a whole: what it refuses, what it costs, how it is filled, resized, compiled and exported."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rssnet import Classes, LossConfig, RSSNet, RSSNetConfig, RSSNetLoss
from rssnet.local_pathway import DiscrepancyBlock
from rssnet.separation import SpatiallyAdaptiveSeparation
from tests.benchmarks.model import peak_memory_ratio
from tests.rssnet.tiny_model import CONFIG, build

SWIN = replace(
    CONFIG,
    backbone="swin_tiny_patch4_window7_224",
    backbone_options={"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 2, 3, 4]},
    head="linear",
)


def test_backbone_and_decoder_partition_the_parameters(model):
    parts = [*model.backbone.parameters(), *model.decoder.parameters()]
    assert [id(parameter) for parameter in parts] == [id(parameter) for parameter in model.parameters()]


# Refusals.


def test_the_number_of_classes_must_be_given():
    with pytest.raises(ValueError, match="num_classes is not given: set it"):
        RSSNet(replace(CONFIG, num_classes=None))


def test_named_classes_must_be_as_many_as_predicted():
    with pytest.raises(ValueError, match="3 classes are named but num_classes is 5"):
        RSSNet(CONFIG, Classes.default(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_refused(model, images, value):
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="An image has NaN or infinite values; check how it was decoded"):
        model(images)


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 4, 64, 96)])
def test_images_of_another_layout_are_refused(model, shape):
    with pytest.raises(
        ValueError, match=r"Images must be \(B, 3, H, W\), not .*: make them RGB, and one image a batch"
    ):
        model(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_that_are_not_normalised_are_refused(model, dtype):
    with pytest.raises(ValueError, match=rf"must be floating-point numbers, not {dtype}: scale them to 0 to 1"):
        model(torch.ones(2, 3, 64, 96, dtype=dtype))


# Size and cost, counted on the meta device as rssnet.md's section 8 asks.


def gigaflops(backbone, image_size, num_classes):
    with torch.device("meta"):
        model = RSSNet(RSSNetConfig(backbone=backbone, num_classes=num_classes, image_size=image_size)).eval()
        images = torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False, depth=2) as counter, torch.no_grad():
        model(images)
    counts = counter.get_flop_counts()
    parts = [sum(counts[f"RSSNet.{part}"].values()) / 1e9 for part in ("backbone", "decoder")]
    return model, *parts


def test_beit_large_stays_within_its_parameters_and_flops():
    model, backbone, decoder = gigaflops("beit_large_patch16_224", 640, 150)
    assert backbone == pytest.approx(1221, rel=0.01)
    assert decoder <= 0.06 * backbone
    assert sum(parameter.numel() for parameter in model.parameters()) <= 330e6


def test_vit_small_stays_within_its_flops():
    _, backbone, decoder = gigaflops("vit_small_patch16_224", 512, 150)
    assert 0.02 * backbone < decoder <= 0.12 * backbone


def test_inference_needs_at_most_a_quarter_more_memory_than_the_backbone():
    assert 0 < peak_memory_ratio("beit_large_patch16_224", 640, 8)["peak_memory_ratio"] <= 0.25


def test_a_model_that_could_not_be_filled_wholly_is_refused(model):
    with torch.device("meta"):
        other = RSSNet(CONFIG)
        other.backbone.body.blocks[0].register_buffer("table", torch.arange(3), persistent=False)
    with pytest.raises(ValueError, match=r"backbone\.body\.blocks\.0\.table of vit_tiny_patch16_224 cannot be filled"):
        other.fill(model.state_dict())


def test_a_model_for_another_size_keeps_dtype_and_what_is_trained():
    model = RSSNet(CONFIG).to(torch.bfloat16)
    model.backbone.requires_grad_(False)
    larger = model.resized((96, 96))
    assert {parameter.dtype for parameter in larger.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in larger.backbone.parameters())
    assert all(parameter.requires_grad for parameter in larger.decoder.parameters())


def test_a_model_for_another_size_keeps_the_dtype_of_every_part():
    model = RSSNet(CONFIG)
    model.backbone.to(torch.bfloat16)
    model.decoder.double()
    other = model.resized((96, 96)).resized((64, 96))
    assert {parameter.dtype for parameter in other.backbone.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in other.decoder.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(other.decoder.state_dict(), model.decoder.state_dict(), rtol=0, atol=0)


def test_any_width_has_heads_that_divide_it():
    for width in (8, 100, 150, 200):
        RSSNet(replace(CONFIG, decoder_width=width))


def test_upernet_is_as_large_as_published():
    with torch.device("meta"):
        config = RSSNetConfig("beit_large_patch16_224", 150, 640, head="upernet", decoder_width=1024)
        parameters = sum(parameter.numel() for parameter in RSSNet(config).parameters())
    assert parameters == pytest.approx(441e6, rel=0.01)


# Several processes, and leaving eager mode.


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "hrnet_w18_small"])
def test_distributed_training_finds_no_unused_parameter(backbone, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        options = CONFIG.backbone_options if backbone.startswith("vit") else {}
        config = replace(CONFIG, backbone=backbone, backbone_options=options)
        model = torch.nn.parallel.DistributedDataParallel(RSSNet(config).train())
        for _ in range(2):  # the second forward fails if the first left a parameter without a gradient
            output = model(torch.randn(2, 3, 64, 96))
            RSSNetLoss(LossConfig(), 5)(output, torch.zeros(2, 64, 96, dtype=torch.long))["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_the_whole_model_and_loss_compile_without_a_graph_break(images, training):
    model, criterion = build().train(training), RSSNetLoss(LossConfig(separation_supervision=0.1), 5)
    labels = torch.randint(0, 5, (2, 64, 96))

    def loss(images, labels):
        return criterion(model(images), labels)["loss"]

    torch.testing.assert_close(
        torch.compile(loss, backend="eager", fullgraph=True)(images, labels), loss(images, labels)
    )


def test_the_compiled_decoder_gives_the_same_logits_and_gradients(images):
    model = build().train()
    features = [feature.detach() for feature in model.backbone(images)]
    results = []
    for decoder in (model.decoder, torch.compile(model.decoder, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = decoder(images, features)
        RSSNetLoss(LossConfig(), 5)(output, torch.zeros(2, 64, 96, dtype=torch.long))["loss"].backward()
        results.append((output.logits, [parameter.grad for parameter in model.decoder.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_separation_compiled_to_native_code_gives_the_same_gradients():
    # Here compiled kernels and torch's promises about strides meet: maps with channels last, borders, and our backward.
    torch.manual_seed(0)
    block = DiscrepancyBlock(width=8, kernel_size=3, layer_scale=0.5)
    separation = SpatiallyAdaptiveSeparation(width=8, local_width=8, ratio=2)
    deep, fine = (
        torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
        for size in ((3, 4), (6, 8))
    )

    def separate(deep, fine):
        return separation(deep, block(fine))[0]

    gradients = []
    for function in (separate, torch.compile(separate, fullgraph=True)):
        gradients.append(torch.autograd.grad(function(deep, fine).square().sum(), (deep, fine)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_program_comes_back_from_a_file(images, training, tmp_path):
    model = build().train(training)
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
    found, expected = torch.export.load(tmp_path / "model.pt2").module()(images), model(images)
    torch.testing.assert_close(found.logits, expected.logits)
    if training:
        torch.testing.assert_close(found.auxiliary.deep_logits, expected.auxiliary.deep_logits)
        torch.testing.assert_close(found.auxiliary.separation.composition, expected.auxiliary.separation.composition)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, head="upernet"), SWIN], ids=["vit", "upernet", "swin"])
def test_onnx_runtime_gives_the_same_logits_for_any_batch(config, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(config).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images).logits

    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits().eval(),
        (images,),
        path,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},),
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.cat([images, images[:1].flip(-1)])
    (found,) = session.run(None, {"images": more.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(more).logits.numpy(), rtol=1e-3, atol=1e-4)


def test_a_model_in_bfloat16_runs(model, images):
    half = RSSNet(CONFIG)
    half.load_state_dict(model.state_dict())
    logits = half.eval().to(torch.bfloat16)(images.bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(images).logits).abs().mean() < 0.1
