"""From pixels to prediction rows, without Ray: the model's worker and the encoder after it."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline import masks, storage
from pipeline.errors import PipelineError
from pipeline.inference_config import InferenceConfig
from pipeline.mask_products import ProductsConfig, overlay_url, prediction_schema, simplified
from pipeline.prediction import load_predictor, model_classes, model_versions
from pipeline.prediction_rows import CLASS_MAPS, NUMBER, PIXELS, MaskEncoder, class_maps_schema
from pipeline.segmenter import Segmenter

SIZES = ((64, 64), (40, 90), (100, 130))


def photographs() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for number, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), np.uint8))
        found[f"s3://photos/{number} ä.jpg"] = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return found


def batch_of(images: dict[str, np.ndarray]) -> pa.Table:
    """Rows of `PIXELS`: all these images and one that is damaged."""
    rows = [
        {
            "image_uri": uri,
            "version": "1",
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "pixels": pixels.tobytes(),
            "status": masks.OK,
        }
        for uri, pixels in images.items()
    ]
    rows.insert(1, {"image_uri": "s3://photos/cut.jpg", "version": "1", "status": "damaged", "error": "truncated"})
    return pa.Table.from_pylist(rows, schema=PIXELS)


def rows_of(model: str, products: ProductsConfig) -> dict[str, dict]:
    """The rows that a worker and the encoder make of `photographs`, by image."""
    classes = model_classes(model)
    class_maps = Segmenter(model, InferenceConfig(window_batch=2), products)(batch_of(photographs()))
    assert class_maps.schema == class_maps_schema(products)
    table = MaskEncoder("m", classes.palette, classes.names, products)(class_maps)
    assert table.drop_columns(NUMBER).schema == prediction_schema(products)
    return {row["image_uri"]: row for row in table.to_pylist()}


def test_without_products_rows_hold_what_the_predictor_says(tiny_model):
    rows = rows_of(tiny_model, ProductsConfig())
    predictor = load_predictor(tiny_model, InferenceConfig(window_batch=2))
    images = [torch.from_numpy(pixels.copy()).permute(2, 0, 1) for pixels in photographs().values()]
    for uri, prediction in zip(photographs(), predictor(images), strict=True):
        row, class_map = rows[uri], prediction.class_map.numpy()
        np.testing.assert_array_equal(masks.decode(row), class_map)
        ids, counts = np.unique(class_map, return_counts=True)
        assert (row["class_ids"], row["class_pixels"]) == (ids.tolist(), counts.tolist())
        assert row["confidence"] == pytest.approx(prediction.confidence.mean().item())
        assert (row["model_id"], row["status"], row["error"]) == ("m", masks.OK, None)
    damaged = rows["s3://photos/cut.jpg"]
    assert (damaged["status"], damaged["error"], damaged["mask"]) == ("damaged", "truncated", None)


def test_every_product_is_made_of_the_same_prediction(tiny_model, tmp_path):
    products = ProductsConfig(polygons=True, confidence_map=True, top_k=3, overlays=str(tmp_path))
    rows, classes = rows_of(tiny_model, products), model_classes(tiny_model)
    plain = rows_of(tiny_model, ProductsConfig())
    predictor = load_predictor(tiny_model, InferenceConfig(window_batch=2), top_k=3)
    predictions = predictor([torch.from_numpy(pixels.copy()).permute(2, 0, 1) for pixels in photographs().values()])
    for (uri, pixels), prediction in zip(photographs().items(), predictions, strict=True):
        row, class_map = rows[uri], masks.decode(rows[uri])
        assert row["mask"] == plain[uri]["mask"]
        confidence = masks.decode_confidence(row)
        assert confidence.shape == class_map.shape
        assert confidence.mean() == pytest.approx(row["confidence"], abs=1 / 510)
        top_classes, top_probabilities = masks.decode_top(row)
        assert top_classes.shape == top_probabilities.shape == (3, *class_map.shape)
        np.testing.assert_array_equal(top_classes, prediction.top_classes)
        np.testing.assert_allclose(top_probabilities, prediction.top_probabilities, atol=1 / 510 + 1e-6)
        np.testing.assert_array_equal(top_classes[0], class_map)
        np.testing.assert_array_equal(top_probabilities[0], confidence)
        assert (np.diff(top_probabilities, axis=0) <= 0).all()
        assert (top_classes[0] != top_classes[1]).all()
        features = json.loads(row["polygons"])["features"]
        assert {feature["properties"]["class_id"] for feature in features} == set(row["class_ids"])
        assert row["overlay_uri"] == overlay_url(str(tmp_path), uri)
        with Image.open(io.BytesIO(storage.read_bytes(row["overlay_uri"]))) as picture:
            shown = np.asarray(picture).astype(int)
        assert np.abs(shown - masks.overlay(pixels, class_map, classes.palette)).mean() < 12  # JPEG blurs borders
    damaged = rows["s3://photos/cut.jpg"]
    assert [damaged[name] for name in products.columns] == [None] * 5
    assert len(list(tmp_path.iterdir())) == len(SIZES)


def test_what_is_counted_is_the_final_mask(tiny_model):
    names = model_classes(tiny_model).names
    plain = rows_of(tiny_model, ProductsConfig(confidence_map=True))
    common = max(plain.values(), key=lambda row: len(row["class_ids"] or []))["class_ids"]
    assert len(common) > 1  # else there is nothing to choose from
    products = ProductsConfig(classes=(names[common[0]],), min_region=30)
    for uri, row in rows_of(tiny_model, products).items():
        if row["status"] != masks.OK:
            continue
        expected = simplified(masks.decode(plain[uri]), products, names)
        np.testing.assert_array_equal(masks.decode(row), expected)
        kept = expected == common[0]
        assert row["class_ids"] == ([common[0]] if kept.any() else [])
        assert row["class_pixels"] == ([int(kept.sum())] if kept.any() else [])
        if kept.any():
            mean = masks.decode_confidence(plain[uri])[kept].mean()
            assert row["confidence"] == pytest.approx(float(mean), abs=1e-5)
        else:
            assert row["confidence"] is None


def test_what_no_product_needs_is_not_carried_from_the_model_to_the_encoder():
    assert class_maps_schema(ProductsConfig(polygons=True, min_region=5)) == CLASS_MAPS

    def carried(products: ProductsConfig) -> list[str]:
        return class_maps_schema(products).names[len(CLASS_MAPS) :]

    assert carried(ProductsConfig(overlays="here")) == ["pixels"]
    assert carried(ProductsConfig(classes=("car",))) == ["probabilities"]
    assert carried(ProductsConfig(top_k=2, confidence_map=True)) == [
        "probabilities",
        "top_classes",
        "top_probabilities",
    ]


def test_an_encoder_that_needs_names_refuses_to_be_without():
    palette = ((0, 0, 0), (1, 1, 1))
    assert MaskEncoder("m", palette).names == ()
    with pytest.raises(ValueError, match="0 class names but 2 colours"):
        MaskEncoder("m", palette, products=ProductsConfig(polygons=True))
    with pytest.raises(ValueError, match="1 class names but 2 colours"):
        MaskEncoder("m", palette, ("sky",))


def test_a_model_that_was_overwritten_since_the_run_began_is_refused(tiny_model, tmp_path):
    """Its rows would bear the id of the other."""
    model = tmp_path / "model"
    storage.upload_folder(Path(tiny_model), str(model))
    versions = model_versions(str(model))
    batch = batch_of(photographs())
    Segmenter(str(model), InferenceConfig(), expected=versions)(batch)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(PipelineError, match="was overwritten while it was in use: run again"):
        Segmenter(str(model), InferenceConfig(), expected=versions)(batch)
