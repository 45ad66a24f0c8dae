"""How a model is applied: what its settings do, what its id follows, and which pools of workers there can be."""

from pathlib import Path

import pytest
import ray.data
import torch

from pipeline import cluster, prediction, storage
from pipeline.errors import PipelineError
from pipeline.inference_config import InferenceConfig, inference_of, write_inference
from pipeline.mask_products import ProductsConfig
from pipeline.prediction import load_predictor, model_id, predictor_pool


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_what_is_faster_only_leaves_the_masks_and_the_id(tiny_model, image, monkeypatch):
    plain = load_predictor(tiny_model, InferenceConfig())
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    settings = InferenceConfig(channels_last=True, compile=True)
    fast = load_predictor(tiny_model, settings)
    layouts = [
        parameter.is_contiguous(memory_format=torch.channels_last) and not parameter.is_contiguous()
        for parameter in fast.model.parameters()
        if parameter.ndim == 4
    ]
    assert any(layouts)
    (expected,), (found,) = plain([image]), fast([image])
    assert torch.allclose(found.confidence, expected.confidence, atol=1e-5)
    assert (found.class_map == expected.class_map).float().mean() > 0.999
    assert model_id(tiny_model, settings) == model_id(tiny_model, InferenceConfig())


def test_bf16_is_another_answer_and_another_id(tiny_model, image):
    half = InferenceConfig(precision="bf16")
    assert load_predictor(tiny_model, half).dtype == torch.bfloat16
    (exact,), (rounded,) = (load_predictor(tiny_model, settings)([image]) for settings in (InferenceConfig(), half))
    assert not torch.equal(exact.confidence, rounded.confidence)
    assert torch.allclose(exact.confidence, rounded.confidence, atol=0.1)
    assert model_id(tiny_model, half) != model_id(tiny_model, InferenceConfig())
    with pytest.raises(PipelineError, match="precision is 'fp8': give one of fp32, bf16"):
        load_predictor(tiny_model, InferenceConfig(precision="fp8"))  # pyright: ignore[reportArgumentType]


def test_a_precision_that_is_not_given_is_that_of_the_validation(tiny_model, tmp_path):
    model = tmp_path / "model"
    storage.upload_folder(Path(tiny_model), str(model))
    write_inference(model, InferenceConfig(precision="bf16"))
    assert inference_of(str(model), InferenceConfig(compile=True)) == InferenceConfig(precision="bf16", compile=True)
    assert load_predictor(str(model), InferenceConfig()).dtype == torch.bfloat16
    assert load_predictor(str(model), InferenceConfig(precision="fp32")).dtype is None


def test_to_say_what_holds_anyway_makes_no_other_id(tiny_model):
    said = InferenceConfig(scales=(1.0,), flip=False, precision="fp32")
    assert model_id(tiny_model, said, ProductsConfig()) == model_id(tiny_model, InferenceConfig())


@pytest.mark.parametrize(
    "products",
    [
        ProductsConfig(classes=("class_1",)),
        ProductsConfig(min_region=4),
        ProductsConfig(polygons=True),
        ProductsConfig(confidence_map=True),
        ProductsConfig(top_k=2),
    ],
)
def test_the_id_follows_what_rows_hold(tiny_model, products):
    assert model_id(tiny_model, InferenceConfig(), products) != model_id(tiny_model, InferenceConfig())


def test_the_id_does_not_follow_where_overlays_go(tiny_model):
    assert model_id(tiny_model, InferenceConfig(), ProductsConfig(overlays="s3://elsewhere")) == model_id(
        tiny_model, InferenceConfig()
    )


def test_more_classes_than_the_model_has_cannot_be_ranked(tiny_model, image):
    with pytest.raises(ValueError, match="top_k is 7, but the model has only 6 classes"):
        load_predictor(tiny_model, InferenceConfig(), top_k=7)([image])


@pytest.fixture
def needed(monkeypatch) -> dict[str, float]:
    """What a pool asks of the cluster."""
    found: dict[str, float] = {}
    monkeypatch.setattr(prediction, "require_capacity", lambda cpus, gpus, **_: found.update(cpus=cpus, gpus=gpus))
    return found


def test_a_pool_is_of_fixed_size_or_between_two(needed):
    fixed = predictor_pool(3, 2, use_gpu=False, batch_size=4)
    assert fixed["compute"] == ray.data.ActorPoolStrategy(size=3)
    assert (fixed["num_cpus"], fixed["num_gpus"], fixed["batch_size"]) == (2, 0, 4)
    assert needed == {"cpus": 3 * 2 + cluster.IO_TASK_CPUS, "gpus": 0}
    elastic = predictor_pool(3, 2, use_gpu=False, batch_size=4, min_workers=1)
    assert elastic["compute"] == ray.data.ActorPoolStrategy(min_size=1, max_size=3)
    assert needed == {"cpus": 2 + cluster.IO_TASK_CPUS, "gpus": 0}  # what is more comes if there is room
    assert predictor_pool(3, 2, False, 4, min_workers=3)["compute"] == fixed["compute"]


@pytest.mark.parametrize(
    ("workers", "each", "gpus"), [(3, 1.0, 3), (4, 0.5, 2), (3, 0.5, 2), (3, 0.6, 3), (3, 1 / 3, 1), (2, 2.0, 4)]
)
def test_workers_share_gpus_but_none_lies_across_two(needed, workers, each, gpus):
    pool = predictor_pool(workers, 1, use_gpu=True, batch_size=4, gpus_per_worker=each)
    assert pool["num_gpus"] == each
    assert needed["gpus"] == gpus


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_workers": 0}, "min_workers is 0: give 1 or more, and at most the 3 of workers"),
        ({"min_workers": 4}, "min_workers is 4"),
        ({"gpus_per_worker": 0}, "gpus_per_worker is 0: give a part of a GPU, such as 0.5, or a whole number"),
        ({"gpus_per_worker": 1.5}, "gpus_per_worker is 1.5"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(options, said):
    with pytest.raises(PipelineError, match=said):
        predictor_pool(3, 1, use_gpu=True, batch_size=4, **options)


def test_settings_that_are_not_given_are_those_that_the_model_was_validated_with(tiny_model, tmp_path):
    model = tmp_path / "model"
    storage.upload_folder(Path(tiny_model), str(model))
    write_inference(model, InferenceConfig(scales=(0.5,), flip=True))
    settings = inference_of(str(model), InferenceConfig(flip=False, window_batch=2))
    assert settings == InferenceConfig(scales=(0.5,), flip=False, window_batch=2)
    assert load_predictor(str(model), settings).scales == (0.5,)
    assert model_id(str(model), InferenceConfig()) == model_id(str(model), InferenceConfig(scales=(0.5,), flip=True))
    assert model_id(str(model), InferenceConfig()) != model_id(tiny_model, InferenceConfig())
    (model / "inference.json").write_text('{"zoom": 2}')
    with pytest.raises(PipelineError, match=r"broken inference.json: it must have no fields but crop_size"):
        load_predictor(str(model), InferenceConfig())


def test_a_models_id_follows_what_the_masks_depend_on(tiny_model, tmp_path):
    storage.upload_folder(Path(tiny_model), str(tmp_path / "copy"))
    usual = model_id(tiny_model, InferenceConfig())
    assert model_id(str(tmp_path / "copy"), InferenceConfig(window_batch=2)) == usual
    assert model_id(tiny_model, InferenceConfig(stride=(32, 32))) != usual
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert model_id(str(tmp_path / "copy"), InferenceConfig()) != usual
