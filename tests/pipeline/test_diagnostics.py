"""Which pixels the separation diagnostics of a saved model look at, and that any model and any table can be told."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.diagnostics import diagnosed, diagnostics_document, diagnostics_picture, diagnostics_text
from pipeline.images import encode_png
from pipeline.inference_config import InferenceConfig
from pipeline.prediction import load_predictor
from rssnet import RSSNet, RSSNetConfig
from rssnet.diagnostics import LayerDiagnostics, diagnose
from rssnet.inference import Predictor

SIDE = 64  # of the window


def _row(photograph: np.ndarray, label: np.ndarray) -> dict[str, bytes]:
    return {"image": encode_png(photograph), "label": encode_png(label)}


@pytest.fixture(scope="module")
def predictor(tiny_model: str) -> Predictor:
    return load_predictor(tiny_model, InferenceConfig())


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    """A window's pixels and their classes."""
    random = np.random.default_rng(0)
    label = np.kron(random.integers(0, 6, (8, 8)), np.ones((8, 8))).astype(np.uint8)
    label[:3] = 255
    return (label[..., None] % 7 * 30 + random.integers(0, 40, (SIDE, SIDE, 3))).astype(np.uint8), label


def _expected(predictor: Predictor, photograph: np.ndarray, label: np.ndarray) -> list[LayerDiagnostics]:
    pixels = predictor.normalize(torch.from_numpy(photograph).permute(2, 0, 1))
    return diagnose(predictor.model, [(pixels[None], torch.from_numpy(label)[None])])


def test_the_middle_of_a_photograph_is_diagnosed(predictor, scene):
    photograph, label = scene
    wide = np.pad(photograph, ((10, 10), (30, 30), (0, 0)), constant_values=9), np.pad(label, ((10, 10), (30, 30)))
    found, expected = diagnosed(predictor, [_row(*wide)]), _expected(predictor, *scene)
    assert diagnostics_document(found) == diagnostics_document(expected)


def test_a_photograph_smaller_than_the_window_is_enlarged_not_padded(predictor, scene):
    photograph, label = scene
    small = photograph[::2, ::2].copy(), label[::2, ::2].copy()
    enlarged = Image.fromarray(small[0]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    found = diagnosed(predictor, [_row(*small)])
    expected = _expected(predictor, np.array(enlarged), small[1].repeat(2, 0).repeat(2, 1))
    assert [row.token_cosine for row in found] == pytest.approx(
        [row.token_cosine for row in expected], abs=0.01, nan_ok=True
    )
    assert [row.class_scatter for row in found] == pytest.approx(
        [row.class_scatter for row in expected], rel=0.05, nan_ok=True
    )


def test_the_image_is_seen_at_the_scale_at_which_the_model_is_applied(tiny_model, predictor, scene):
    doubled = tuple(values.repeat(2, 0).repeat(2, 1) for values in scene)
    halved = load_predictor(tiny_model, InferenceConfig(scales=(0.5, 0.25)))
    expected = _expected(predictor, *scene)[0].class_scatter
    assert diagnosed(halved, [_row(*doubled)])[0].class_scatter == pytest.approx(expected, rel=0.1)
    assert diagnosed(predictor, [_row(*doubled)])[0].class_scatter != pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_a_baseline_has_the_layers_of_its_backbone(head, scene, tmp_path):
    config = RSSNetConfig(
        backbone="vit_tiny_patch16_224",
        backbone_options={"depth": 4, "embed_dim": 48, "num_heads": 3},
        num_classes=6,
        image_size=SIDE,
        head=head,
    )
    RSSNet(config).save_pretrained(str(tmp_path))
    table = diagnosed(load_predictor(str(tmp_path), InferenceConfig()), [_row(*scene)])
    assert [row.layer for row in table] == ["backbone 0", "backbone 1", "backbone 2", "backbone 3"]
    assert diagnostics_text(table).endswith("there")


def test_the_table_is_told_in_three_ways(predictor, scene):
    table = diagnosed(predictor, [_row(*scene)])
    document = diagnostics_document(table)
    assert [row["layer"] for row in document] == [row.layer for row in table]
    regions = document[-1]
    assert (regions["stride"], regions["token_cosine"]) == (None, None)
    assert regions["region_cosine"] == table[-1].region_cosine
    assert f"token cosine {table[0].token_cosine:.3f} in backbone 0, {table[1].token_cosine:.3f} in backbone 1" in (
        diagnostics_text(table)
    )
    picture = np.asarray(Image.open(io.BytesIO(diagnostics_picture(table, "a $title$"))).convert("RGB"))
    assert picture.shape[:2] == (1100, 800)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_images_without_a_labelled_pixel_have_no_classes_to_be_apart(predictor, scene):
    table = diagnosed(predictor, [_row(scene[0], np.full((SIDE, SIDE), 255, np.uint8))])
    document = diagnostics_document(table)
    assert {row["class_scatter"] for row in document} == {row["region_cosine"] for row in document} == {None}
    assert "nan" not in str(document)
    diagnostics_picture(table, "nothing")
