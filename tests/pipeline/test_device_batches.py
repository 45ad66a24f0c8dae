"""Batches for the model: normalised, in order, each with its own names, and asked for one ahead."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.device_batches import device_batches

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def batch_of(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "image": rng.integers(0, 256, (2, 3, 4, 6), dtype=np.uint8),
        "label": rng.integers(0, 256, (2, 4, 6), dtype=np.uint8),
        "image_id": np.asarray([f"{number}a", f"{number}b"]),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_batch_is_normalised_and_keeps_its_names(device: str, layout: torch.memory_format) -> None:
    sources = [batch_of(number) for number in range(5)]
    found = list(device_batches(iter(sources), torch.device(device), MEAN, STD, layout))
    assert len(found) == 5
    for source, batch in zip(sources, found, strict=True):
        assert batch.image_ids == source["image_id"].tolist()
        assert batch.images.device.type == batch.labels.device.type == device
        assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)
        assert batch.images.is_contiguous(memory_format=layout)
        expected = (source["image"] / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        np.testing.assert_allclose(batch.images.cpu().numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(batch.labels.cpu().numpy(), source["label"])


def test_the_next_batch_is_asked_for_before_one_is_given() -> None:
    asked: list[int] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for number in range(3):
            asked.append(number)
            yield batch_of(number)

    given = device_batches(batches(), torch.device("cpu"), MEAN, STD, torch.contiguous_format)
    for expected in ([0, 1], [0, 1, 2], [0, 1, 2]):
        next(given)
        assert asked == expected
    assert next(given, None) is None
