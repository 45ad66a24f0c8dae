"""What the sliding window owes: the model's own answer where one window suffices, no seams, bounded memory."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rssnet import RSSNet, RSSNetConfig
from rssnet.inference import Predictor
from rssnet.sliding_window import Axis, window_starts


@dataclass
class Config:
    """What a predictor reads of a model's config."""

    image_size: int | tuple[int, int]


class CellByCell(nn.Module):
    """A model whose every logit sees only its own cell of stride x stride pixels, so that windows cannot disagree."""

    pixel_mean = (0.485, 0.456, 0.406)
    pixel_std = (0.229, 0.224, 0.225)

    def __init__(self, crop=64, classes=5, stride=4):
        super().__init__()
        torch.manual_seed(0)
        self.config = Config(image_size=crop)
        self.classify = nn.Conv2d(3, classes, stride, stride)
        self.batches = []

    def forward(self, images):
        self.batches.append(tuple(images.shape))
        return SimpleNamespace(logits=self.classify(images) * 3)


class PlaceInWindow(CellByCell):
    """A model that also minds where in the window it looks, as position embeddings and padding make real ones do."""

    def __init__(self, crop=64, classes=5, stride=4):
        super().__init__(crop, classes, stride)
        side = crop // stride
        ramp = torch.linspace(-1.5, 1.5, side)
        self.place = nn.Parameter(torch.randn(classes, side, side) * 0.0 + ramp * torch.randn(classes, 1, 1))

    def forward(self, images):
        return SimpleNamespace(logits=super().forward(images).logits + self.place)


def image_of(height, width, seed=0):
    """Smooth colours with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    noise = torch.rand(3, height, width, generator=generator)
    return ((0.8 * smooth + 0.2 * noise) * 255).to(torch.uint8)


def normalized(model, image):
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (model.pixel_mean, model.pixel_std))
    return (image.double() / 255 - mean) / std


def upsampled_probabilities(model, pixels, size):
    """The whole-image answer: softmax of bilinearly upsampled logits of normalised pixels (3, h, w)."""
    with torch.no_grad():
        logits = model(pixels[None].to(next(model.parameters()).dtype)).logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].softmax(0)


def assert_predicts(prediction, probabilities, tolerance=2e-5):
    """Confidence agrees everywhere and classes wherever the two best aren't tied."""
    best, classes = probabilities.max(0)
    assert torch.allclose(prediction.confidence.double(), best.double(), atol=tolerance)
    second = probabilities.scatter(0, classes[None], -1).amax(0)
    clear = best - second > 2 * tolerance
    assert clear.float().mean() > 0.99
    assert torch.equal(prediction.class_map[clear].long(), classes[clear])


def real_model(backbone="vit_tiny_patch16_224", size: int | tuple[int, int] = (64, 96), **options):
    torch.manual_seed(0)
    return RSSNet(
        RSSNetConfig(backbone=backbone, backbone_options=options, num_classes=6, image_size=size, decoder_width=32)
    ).eval()


@pytest.mark.parametrize("size", [(64, 96), (64, 50), (33, 96), (7, 5), (1, 1)])
def test_one_window_is_exactly_the_models_answer(size):
    model = real_model(depth=2)
    image = image_of(*size)
    padded = F.pad(normalized(model, image), (0, 96 - size[1], 0, 64 - size[0]))  # zero is the mean colour
    probabilities = upsampled_probabilities(model, padded, (64, 96))[:, : size[0], : size[1]]
    (prediction,) = Predictor(model)([image])
    assert prediction.class_map.shape == prediction.confidence.shape == size
    assert torch.equal(prediction.class_map.long(), probabilities.argmax(0))
    assert torch.allclose(prediction.confidence, probabilities.amax(0), atol=1e-6)


@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    crop=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    stride=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
)
@settings(max_examples=40, deadline=None)
def test_a_model_that_sees_cells_alone_gives_the_whole_image_answer(height, width, crop, stride):
    model = CellByCell()
    crop = (crop[0] * 4, crop[1] * 4)
    steps = (max(4, int(crop[0] * stride[0])), max(4, int(crop[1] * stride[1])))
    image = image_of(height, width)
    padded = normalized(model, image)
    one_window = height <= crop[0] and width <= crop[1]
    for dim, size, side in ((1, height, crop[0]), (0, width, crop[1])):
        missing = side - size if one_window else -size % 4
        mode = "replicate" if size > side else "constant"
        padded = F.pad(padded, (0, missing) if dim == 0 else (0, 0, 0, missing), mode=mode)
    probabilities = upsampled_probabilities(model.double(), padded, tuple(padded.shape[1:]))[:, :height, :width]
    (prediction,) = Predictor(model.float(), crop, steps)([image])
    assert_predicts(prediction, probabilities)


@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    crop=st.tuples(st.integers(2, 16), st.integers(2, 16)),
    stride=st.floats(0.2, 1),
    scales=st.sampled_from([(1.0,), (0.5, 1.25), (0.77,)]),
)
@settings(max_examples=25, deadline=None)
def test_a_constant_image_has_no_seams(height, width, crop, stride, scales):
    model = CellByCell()
    crop = (crop[0] * 4, crop[1] * 4)
    # Large enough that nothing is padded with another colour than the image's.
    height, width = (max(size, math.ceil(side / min(scales))) for size, side in zip((height, width), crop, strict=True))
    image = torch.tensor([200, 30, 90], dtype=torch.uint8)[:, None, None].expand(3, height, width)
    steps = (max(1, int(crop[0] * stride)), max(1, int(crop[1] * stride)))
    (prediction,) = Predictor(model, crop, steps, scales=scales, flip=True)([image])
    whole = upsampled_probabilities(model, normalized(model, image[:, : crop[0], : crop[1]]), crop)[:, 0, 0]
    assert (prediction.class_map == whole.argmax()).all()
    assert torch.allclose(prediction.confidence, whole.max().expand(height, width), atol=1e-6)


def test_windows_that_disagree_blend_without_a_jump():
    model = PlaceInWindow()
    image = torch.full((3, 200, 280), 128, dtype=torch.uint8)
    (one,) = Predictor(model)([image[:, :64, :64]])
    (all_over,) = Predictor(model)([image])

    def largest_step(prediction):
        return max(prediction.confidence.diff(dim=dim).abs().max().item() for dim in (0, 1))

    # A window's own slope is the measure; averaging with equal weights jumps by several times as much at each edge.
    assert all_over.class_map.unique().numel() > 1
    assert largest_step(all_over) < 2 * largest_step(one)


def reference_probabilities(model, image, crop, stride, scales, flip):
    """Blended probabilities of one image on a grid of cells of 4 pixels, cell by cell, in float64."""
    height, width = image.shape[1:]
    rows, columns = -(-height // 4), -(-width // 4)
    grid = torch.zeros(5, rows, columns, dtype=torch.float64)
    views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
    for scale, mirrored in views:
        size = (round(height * scale), round(width * scale))
        scaled = F.interpolate(normalized(model, image)[None], size=size, mode="bilinear", antialias=True)[0]
        windows = []
        for top in window_starts(size[0], crop[0], stride[0]):
            for left in window_starts(size[1], crop[1], stride[1]):
                pixels = scaled[:, top : top + crop[0], left : left + crop[1]]
                for dim, length in ((2, crop[1]), (1, crop[0])):
                    missing = length - pixels.shape[dim]
                    pad = (0, missing) if dim == 2 else (0, 0, 0, missing)
                    mode = "replicate" if size[dim - 1] > length else "constant"
                    pixels = F.pad(pixels, pad, mode=mode) if missing else pixels
                logits = model(pixels[None].flip(-1) if mirrored else pixels[None]).logits[0]
                windows.append((top, left, (logits.flip(-1) if mirrored else logits).softmax(0)))
        for row in range(rows):
            for column in range(columns):
                total, weight_sum = torch.zeros(5, dtype=torch.float64), 0.0
                for top, left, probabilities in windows:
                    value, weight = torch.ones(()), 1.0
                    for center, start, length, whole, scaled_whole, axis in (
                        (row, top, crop[0], height, size[0], 1),
                        (column, left, crop[1], width, size[1], 2),
                    ):
                        last = window_starts(scaled_whole, length, stride[axis - 1])[-1] + length
                        position = min((center + 0.5) * 4, last * whole / scaled_whole) * scaled_whole / whole - start
                        share = min(position, length - position) / length
                        weight *= 0.0 if position < 0 or position > length else max(share, 1e-3)
                        cells = (torch.arange(length // 4) + 0.5 - position / 4).abs()
                        kernel = (1 - cells / max(1.0, scaled_whole / whole)).clamp_min(0).double()
                        value = value * (kernel / kernel.sum()).view((-1, 1) if axis == 1 else (1, -1))
                    if weight:
                        total += weight * (probabilities * value).sum((1, 2))
                        weight_sum += weight
                grid[:, row, column] += total / weight_sum / len(views)
    return grid


@pytest.mark.parametrize(
    ("size", "crop", "stride", "scales", "flip"),
    [
        ((70, 93), (32, 48), (20, 31), (1.0,), False),
        ((70, 93), (32, 48), (32, 48), (1.0,), True),
        ((61, 50), (32, 32), (16, 21), (0.5, 1.0, 1.75), True),
        ((45, 66), (64, 64), (42, 42), (0.75, 1.5), False),  # smaller than the crop at one scale only
        ((40, 40), (64, 64), (42, 42), (1.0,), True),
        ((90, 70), (64, 64), (42, 42), (0.5,), False),  # one window, but of a scaled image
        ((20, 30), (64, 64), (42, 42), (2.0,), False),
        ((22, 31), (16, 16), (3, 5), (1.3,), False),
    ],
)
def test_scales_flips_and_overlaps_are_averaged_as_by_a_loop_over_cells(size, crop, stride, scales, flip):
    model = CellByCell().double()
    with torch.no_grad():
        model.classify.weight[:, :, :, :2] *= 2  # not the same mirrored
        image = image_of(*size)
        grid = reference_probabilities(model, image, crop, stride, scales, flip)
    # Between cells: the softmax of interpolated log probabilities.
    scores = F.interpolate(grid.log()[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    (prediction,) = Predictor(model.float(), crop, stride, scales=scales, flip=flip)([image])
    assert_predicts(prediction, scores.softmax(0)[:, : size[0], : size[1]])


def test_a_scaled_window_is_a_part_of_the_scaled_image():
    image = image_of(83, 120).double()
    for scale in (0.3, 0.5, 0.9, 1.4, 2.0):
        axis = Axis.of(120, scale, crop=32, stride=20)
        whole = F.interpolate(image[None], size=(83, axis.scaled_size), mode="bilinear", antialias=True)[0]
        for start in axis.starts:
            pixels, weights = axis.pixels(start)
            assert weights is not None
            window = image[:, :, pixels] @ weights.double().T
            assert torch.allclose(window, whole[:, :, start : start + 32], atol=1e-3)  # of 255


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
def test_windows_cover_everything_and_end_with_the_image(size, crop, stride):
    stride = min(stride, crop)
    starts = window_starts(size, crop, stride)
    assert starts[0] == 0
    assert all(0 < b - a <= max(stride, 4) for a, b in pairwise(starts))
    assert all(b <= a + crop for a, b in pairwise(starts))
    assert size <= starts[-1] + crop
    if size > crop:
        assert starts[-1] + crop < size + 4


def test_windows_of_different_images_share_batches():
    model = CellByCell(crop=32)
    images = [image_of(32, 32), image_of(40, 90, 1), image_of(20, 10, 2), image_of(75, 33, 3)]
    predictor = Predictor(model, window_batch=4)
    together = predictor(images)
    counts = [shape[0] for shape in model.batches]
    assert counts[:-1] == [4] * (len(counts) - 1)
    assert counts[-1] <= 4
    assert all(shape[1:] == (3, 32, 32) for shape in model.batches)
    for image, prediction in zip(images, together, strict=True):
        for alone in (predictor([image])[0], Predictor(model, window_batch=1)([image])[0]):
            assert prediction.class_map.shape == image.shape[1:]
            assert torch.allclose(alone.confidence, prediction.confidence, atol=1e-6)
            assert (alone.class_map == prediction.class_map).float().mean() > 0.999


def test_flip_makes_the_answer_to_a_mirrored_image_the_mirrored_answer():
    model = real_model(depth=2, size=64)
    image = image_of(64, 64)
    (plain,), (flipped,) = Predictor(model, flip=True)([image]), Predictor(model, flip=True)([image.flip(2)])
    assert torch.allclose(plain.confidence, flipped.confidence.flip(1), atol=1e-5)
    (unaveraged,) = Predictor(model)([image])
    assert not torch.allclose(plain.confidence, unaveraged.confidence, atol=1e-3)


@pytest.mark.parametrize(
    ("backbone", "size", "options"),
    [
        ("vit_small_patch14_dinov2", 70, {"depth": 2}),
        ("swinv2_tiny_window8_256", 64, {"depths": (1, 1, 1, 1)}),
        ("convnext_atto", 64, {"depths": (1, 1, 1, 1)}),
    ],
)
def test_real_backbones_of_every_kind_slide(backbone, size, options):
    model = real_model(backbone, size, **options)
    images = [image_of(150, 101), image_of(40, 200, 1)]
    for image, prediction in zip(images, Predictor(model, scales=(1.0, 0.8), flip=True)(images), strict=True):
        assert prediction.class_map.shape == image.shape[1:]
        assert prediction.class_map.max() < 6
        assert ((prediction.confidence >= 1 / 6 - 1e-6) & (prediction.confidence <= 1)).all()


def test_many_classes_need_more_than_eight_bits():
    image = image_of(64, 100)
    assert Predictor(CellByCell(classes=255))([image])[0].class_map.dtype == torch.uint8
    model = CellByCell(classes=300)
    with torch.no_grad():
        assert model.classify.bias is not None
        model.classify.bias[299] += 100
    prediction = Predictor(model)([image])[0]
    assert prediction.class_map.dtype == torch.int16
    assert (prediction.class_map == 299).all()


def test_probabilities_too_small_for_a_float_do_no_harm():
    model = CellByCell()
    with torch.no_grad():
        model.classify.weight *= 1e3
    (prediction,) = Predictor(model)([image_of(100, 100)])
    assert prediction.confidence.isfinite().all()


class Spy(CellByCell):
    """Remembers what precision it was run in."""

    def forward(self, images):
        output = super().forward(images)
        self.seen = (images.dtype, self.classify(images).dtype, self.training, torch.is_grad_enabled())
        return output


@pytest.mark.parametrize(
    ("dtype", "inside"), [(None, torch.float32), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.filterwarnings("error")
def test_dtype_is_autocast_and_the_weights_stay(dtype, inside):
    model = Spy()
    image = image_of(90, 90)
    (prediction,) = Predictor(model, dtype=dtype)([image])
    assert model.seen == (torch.float32, inside, False, False)
    assert next(model.parameters()).dtype == torch.float32
    assert prediction.confidence.dtype == torch.float32
    assert torch.allclose(prediction.confidence, Predictor(model)([image])[0].confidence, atol=0.05)


def test_a_model_of_half_precision_is_fed_its_own():
    model = Spy().to(torch.bfloat16)
    Predictor(model, scales=(0.8,))([image_of(90, 90)])
    assert model.seen[:2] == (torch.bfloat16, torch.bfloat16)


def test_every_module_is_left_in_the_mode_it_was_in():
    model = real_model(depth=1).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    first, second = (Predictor(model)([image_of(64, 96)])[0] for _ in range(2))
    assert torch.equal(first.confidence, second.confidence)
    assert [module.training for module in model.modules()] == modes


def test_no_images_give_no_predictions():
    model = CellByCell()
    assert Predictor(model)([]) == []


MEASURE_MEMORY = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_inference import CellByCell
from pipeline.process_memory import peak_memory
from rssnet.inference import Predictor
torch.set_num_threads(1)
model = CellByCell(crop=128, classes=200)
image = torch.zeros(3, 6000, 128, dtype=torch.uint8)
for scales in (1.0,), (0.75, 1.25):
    predictor = Predictor(model, window_batch=2, scales=scales)
    predictor([image[:, :500]])  # what a small image needs
    before = peak_memory()
    predictor([image])
    print((peak_memory() - before) / 2**20)
"""


def test_memory_does_not_grow_with_the_image():
    code = MEASURE_MEMORY.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    # All probabilities would be 614 MB, and 38 MB at the resolution of the logits; the results are 4 MB.
    assert max(map(float, run.stdout.split())) < 15


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (
            torch.full((3, 8, 8), torch.nan),
            "image 0 must be a torch.uint8 tensor .* torch.float32 .* nan among them",
        ),
        (torch.zeros(3, 8, 8), "got torch.float32 values; the predictor itself normalises"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "got torch.int64 values"),
        ([[1]], "got a list"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"shape \(3, height, width\), got \(8, 8, 3\)"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "grey ones with three equal channels"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), r"got \(3, 0, 8\)"),
    ],
)
def test_images_that_cannot_be_segmented_are_named(image, words):
    with pytest.raises(ValueError, match=words):
        Predictor(CellByCell())([image])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"crop_size": (0, 64)}, r"crop_size must be two whole numbers .* got \(0, 64\)"),
        ({"crop_size": (64, 64, 64)}, "crop_size must be two whole numbers"),
        ({"stride": (65, 64)}, r"stride \(65, 64\) is larger than the crop \(64, 64\)"),
        ({"window_batch": 0}, "window_batch must be at least 1, got 0"),
        ({"scales": ()}, r"scales must be one or more factors above 0"),
        ({"scales": (1.0, -2)}, r"got \(1.0, -2\)"),
        ({"dtype": torch.int8}, "dtype must be .* got torch.int8"),
    ],
)
def test_settings_out_of_range_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Predictor(CellByCell(), **arguments)


def test_a_model_that_gives_no_numbers_is_refused():
    model = CellByCell()
    with torch.no_grad():
        model.classify.weight[0] = torch.nan
    for size in ((64, 64), (100, 100)):
        with pytest.raises(ValueError, match="its weights hold nan"):
            Predictor(model)([image_of(*size)])
