"""The stage between decoding and encoding: from a batch of images to their class maps, on a worker with the model."""

from typing import Any

import pyarrow as pa
import torch

from pipeline import masks
from pipeline.prediction import PredictorActor
from pipeline.prediction_rows import CLASS_MAPS, INFERENCE_ERROR
from rssnet.inference import Prediction, Predictor


class Segmenter(PredictorActor):
    """Rows of `PIXELS` to rows of `CLASS_MAPS`; an image that the model fails on stays a row, with the reason."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.drop_columns("pixels").to_pylist()
        readable = [index for index, row in enumerate(rows) if row["status"] == masks.OK]
        if readable:
            self._segment(rows, readable, batch["pixels"])
        return pa.Table.from_pylist(rows, schema=CLASS_MAPS)

    def _segment(self, rows: list[dict[str, Any]], readable: list[int], pixels: pa.ChunkedArray) -> None:
        """Add class map and confidence, or why there are none, to the rows that have pixels."""
        images = [
            torch.frombuffer(bytearray(pixels[index].as_buffer()), dtype=torch.uint8)
            .view(rows[index]["height"], rows[index]["width"], 3)
            .permute(2, 0, 1)  # (3, H, W)
            for index in readable
        ]
        dtype = masks.dtype(self.predictor.model.config.num_classes)
        for index, prediction in zip(readable, _predictions(self.predictor, images), strict=True):
            if isinstance(prediction, str):
                rows[index] |= {"status": INFERENCE_ERROR, "error": prediction}
            else:
                rows[index]["class_map"] = prediction.class_map.numpy().astype(dtype).tobytes()
                rows[index]["confidence"] = prediction.confidence.mean().item()


def _predictions(predictor: Predictor, images: list[torch.Tensor]) -> list[Prediction | str]:
    """The prediction of each image, or why there is none; if the model fails on several together, one by one."""
    try:
        return list(predictor(images))
    except torch.AcceleratorError:
        raise  # the device is of no use to this process any more: no image's fault
    except (ValueError, RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    # Only here, after the error and with it the tensors of the failed attempt are gone.
    return [reason] if len(images) == 1 else [_predictions(predictor, [image])[0] for image in images]
