"""A model as a whole: what it refuses, what it costs, how it is saved, compiled and exported."""

import json
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from rssnet import Classes, LossConfig, RSSNet, RSSNetConfig, RSSNetLoss
from rssnet.local_pathway import DiscrepancyBlock
from rssnet.separation import SpatiallyAdaptiveSeparation
from tests.benchmarks.model import peak_memory_ratio

CONFIG = RSSNetConfig(
    backbone="vit_tiny_patch16_224",
    backbone_options={"depth": 2, "embed_dim": 48, "num_heads": 3},
    num_classes=5,
    image_size=(64, 96),
    decoder_width=32,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RSSNet(CONFIG).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


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
    with pytest.raises(ValueError, match=r"Images must be \(B, 3, H, W\), not"):
        model(torch.zeros(shape))


# Saving and loading.


def test_a_folder_holds_config_weights_classes_and_a_card(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "classes.json",
        "config.json",
        "model.safetensors",
    ]


def test_config_classes_and_weights_come_back(tmp_path, images):
    names = ("sky", "building", "pole", "road", "car | van")
    model = RSSNet(CONFIG, Classes(names=names, palette=Classes.default(5).palette)).eval()
    model.save_pretrained(tmp_path)
    loaded = RSSNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.classes == model.classes
    assert torch.equal(loaded(images).logits, model(images).logits)
    card = (tmp_path / "README.md").read_text()
    assert "car &#124; van" in card
    assert "vit_tiny_patch16_224" in card


def test_a_url_serves_as_a_folder(model, images):
    model.save_pretrained("memory://bucket/models/first")
    assert fsspec.filesystem("memory").exists("/bucket/models/first/model.safetensors")
    loaded = RSSNet.from_pretrained("memory://bucket/models/first")
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_loading_never_fetches_backbone_weights(model, images, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, "pretrained": True}))

    def refuse(*_arguments, **_options):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("rssnet.backbone.load_backbone_weights", refuse)
    loaded = RSSNet.from_pretrained(tmp_path)
    assert loaded.config.pretrained is True  # what it once started from is still known
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_it_can_be_loaded_for_another_image_size(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = RSSNet.from_pretrained(tmp_path, image_size=(96, 48))
    assert loaded.config.image_size == (96, 48)
    assert not loaded.training
    assert loaded(torch.zeros(1, 3, 96, 48)).logits.shape == (1, 5, 24, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_classes": 4},
            r"not of the model .* 4 classes\).*decoder.class_bias is \(5, 1, 1\) instead of \(4, 1, 1\)",
        ),
        ({"head": "linear"}, r"linear on vit_tiny_patch16_224.*is missing"),
        ({"backbone_options": {"depth": 3, "embed_dim": 48, "num_heads": 3}}, r"backbone.body.blocks.2.* is missing"),
        ({"colour": "red"}, r"RSSNetConfig has no field colour"),
        ({"format": "other"}, r"holds no model of format rssnet"),
        ({"version": 99}, r"holds no model of format rssnet, version 1"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, **change}))
    if "num_classes" in change:
        (tmp_path / "classes.json").write_text(Classes.default(4).to_json())
    with pytest.raises(ValueError, match=message):
        RSSNet.from_pretrained(tmp_path)


def test_left_over_weights_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "decoder.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.extra is left over"):
        RSSNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "classes.json"])
def test_a_missing_file_is_named(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"There is no model at .*{name}.* is missing"):
        RSSNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "classes.json"])
def test_a_damaged_file_is_refused(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\x00 damaged")
    with pytest.raises(ValueError, match=r"damaged|Classes must be JSON"):
        RSSNet.from_pretrained(tmp_path)


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="There is no model at"):
        RSSNet.from_pretrained(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' is no folder here, and the Hugging Face hub did not give it"
    ):
        RSSNet.from_pretrained("nobody/nothing")


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


def test_a_model_built_without_memory_and_then_filled_is_the_same(model, images):
    with torch.device("meta"):
        other = RSSNet(CONFIG)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(images).logits, model(images).logits)


def test_a_model_for_another_size_keeps_dtype_and_what_is_trained():
    model = RSSNet(CONFIG).to(torch.bfloat16)
    model.backbone.requires_grad_(False)
    larger = model.resized((96, 96))
    assert {parameter.dtype for parameter in larger.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in larger.backbone.parameters())
    assert all(parameter.requires_grad for parameter in larger.decoder.parameters())


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
    torch.manual_seed(0)
    model, criterion = RSSNet(CONFIG).train(training), RSSNetLoss(LossConfig(separation_supervision=0.1), 5)
    labels = torch.randint(0, 5, (2, 64, 96))

    def loss(images, labels):
        return criterion(model(images), labels)["loss"]

    torch.testing.assert_close(
        torch.compile(loss, backend="eager", fullgraph=True)(images, labels), loss(images, labels)
    )


def test_the_compiled_decoder_gives_the_same_logits_and_gradients(images):
    torch.manual_seed(0)
    model = RSSNet(CONFIG).train()
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


def test_onnx_runtime_gives_the_same_logits_for_any_batch(model, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

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


# What is saved beside the weights, and what a save that breaks off leaves.


@pytest.fixture
def normalised():
    """A model whose weights were trained with another normalisation than timm's for its backbone."""
    overlay = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    return RSSNet(replace(CONFIG, backbone_options={**CONFIG.backbone_options, "pretrained_cfg_overlay": overlay}))


def forget_overlay(folder):
    """Makes timm's normalisation for the backbone of a saved model another, as a new release of timm could."""
    header = json.loads((folder / "config.json").read_text())
    del header["backbone_options"]["pretrained_cfg_overlay"]
    (folder / "config.json").write_text(json.dumps(header))


@pytest.mark.parametrize("image_size", [None, (96, 48)])
def test_a_saved_model_keeps_its_normalisation_whatever_timm_says_later(normalised, tmp_path, image_size):
    normalised.save_pretrained(tmp_path)
    forget_overlay(tmp_path)
    loaded = RSSNet.from_pretrained(tmp_path, image_size)
    assert (loaded.pixel_mean, loaded.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    resized = loaded.resized(64)
    assert (resized.pixel_mean, resized.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_model_saved_without_its_normalisation_takes_that_of_its_backbone(model, tmp_path):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    del header["pixel_mean"], header["pixel_std"]
    (tmp_path / "config.json").write_text(json.dumps(header))
    loaded = RSSNet.from_pretrained(tmp_path)
    assert (loaded.pixel_mean, loaded.pixel_std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pixel_mean": 0.5},
            r"pixel_mean in the config.json at .* must be three numbers, one per channel, not 0.5; corr",
        ),
        ({"pixel_mean": [0.5, 0.5]}, r"three numbers, one per channel, not \[0.5, 0.5\]"),
        ({"pixel_mean": ["a", 0, 0]}, r"three numbers, one per channel, not \['a', 0, 0\]"),
        ({"pixel_std": [0.5, 0, 0.5]}, r"three numbers above 0, one per channel, not \[0.5, 0, 0.5\]"),
    ],
)
def test_a_normalisation_that_is_none_is_refused(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, **change}))
    with pytest.raises(ValueError, match=message):
        RSSNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_save_that_breaks_off_leaves_no_model_rather_than_a_mixture(model, tmp_path, monkeypatch, scheme):
    folder = f"{scheme}{tmp_path}"
    model.save_pretrained(folder)

    def break_off(*_arguments):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("rssnet.serialization.model_card", break_off)
        with pytest.raises(OSError, match="disk is full"):
            model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"There is no model at .*config.json.* is missing"):
        RSSNet.from_pretrained(folder)
    model.save_pretrained(folder)
    RSSNet.from_pretrained(folder)


def test_the_card_counts_parameters_and_not_statistics(tmp_path):
    model = RSSNet(CONFIG)
    model.decoder.register_buffer("statistics", torch.zeros(1_000_000))
    model.save_pretrained(tmp_path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters / 1e6:.1f} M\nparameters" in (tmp_path / "README.md").read_text()
