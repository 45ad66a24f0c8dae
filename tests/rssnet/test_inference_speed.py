"""What makes inference faster leaves the answer as it is."""

import functools
import shutil

import pytest
import torch

from rssnet.inference import Predictor
from tests.rssnet.test_inference import CellByCell, image_of, real_model

SIZES = ((64, 96), (40, 30), (150, 101))  # one window, another, and six that no batch of four divides


def predictions(predictor):
    return predictor([image_of(*size, seed) for seed, size in enumerate(SIZES)])


def assert_same(ours, others):
    for one, other in zip(ours, others, strict=True):
        assert torch.allclose(one.confidence, other.confidence, atol=1e-5)
        assert (one.class_map == other.class_map).float().mean() > 0.999


def test_a_compiled_model_is_compiled_once_and_gives_the_same(monkeypatch):
    graphs = []

    def backend(graph, examples):
        graphs.append(examples)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    model = real_model(depth=1)
    compiled = Predictor(model, window_batch=4, compile=True)
    assert_same(predictions(compiled), predictions(Predictor(model, window_batch=4)))
    once = len(graphs)
    assert once >= 1
    compiled([image_of(64, 96)])  # a batch of one, alone
    compiled([image_of(70, 300)])
    model.train()
    compiled([image_of(30, 30)])
    assert len(graphs) == once
    torch.compiler.reset()


def test_a_batch_that_is_not_full_is_filled_up_for_a_compiled_model(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    model = CellByCell(crop=32)
    images = [image_of(32, 32), image_of(40, 90)]
    plain = Predictor(model, window_batch=4)(images)
    seen = sum(shape[0] for shape in model.batches)
    assert seen % 4  # else nothing would have to be filled up
    model.batches.clear()
    assert_same(Predictor(model, window_batch=4, compile=True)(images), plain)
    assert {shape[0] for shape in model.batches} == {4}
    assert 0 < sum(shape[0] for shape in model.batches) - seen < 4


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_native_code_gives_the_same():
    torch.compiler.reset()
    model = CellByCell()
    assert_same(predictions(Predictor(model, compile=True)), predictions(Predictor(model)))
    torch.compiler.reset()
