"""The stage between decoding and encoding: from a batch of images to their class maps, on a worker with the model."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import masks
from pipeline.attempts import Watch
from pipeline.errors import PipelineError
from pipeline.inference_config import InferenceConfig
from pipeline.mask_products import ProductsConfig
from pipeline.prediction import PredictorActor, model_versions
from pipeline.prediction_rows import CRASHED, INFERENCE_ERROR, NUMBER, PIXELS, class_maps_schema
from rssnet.inference import Prediction, Predictor


class Segmenter(PredictorActor):
    """Rows of `PIXELS` to rows of `class_maps_schema(products)`.

    An image that the model fails on stays a row, with the reason.

    Args:
        model_url: of the saved model.
        inference: how it is applied.
        products: what is made beside the mask.
        expected: `model_versions` of when the run began; None not to look.
        attempts: handle of the actor of `pipeline.attempts`.
    """

    def __init__(
        self,
        model_url: str,
        inference: InferenceConfig,
        products: ProductsConfig | None = None,
        expected: tuple[str, ...] | None = None,
        attempts: Any = None,
    ) -> None:
        self.products, self.expected = products or ProductsConfig(), expected
        self.watch = Watch("segment", attempts)
        super().__init__(model_url, inference, top_k=max(1, self.products.top_k))

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.drop_columns("pixels").to_pylist()
        readable = [index for index, row in enumerate(rows) if row["status"] == masks.OK]
        for positions, wanted in self.watch.groups([rows[index][NUMBER] for index in readable]):
            some = [readable[position] for position in positions]
            if wanted:
                self._require_expected()
                self._segment(rows, some, batch["pixels"])
            else:
                for index in some:
                    rows[index] |= {"status": CRASHED, "error": self.watch.reason}
        schema = class_maps_schema(self.products)
        if "pixels" not in schema.names:
            return pa.Table.from_pylist(rows, schema=schema)
        photographs = batch.schema.get_field_index("pixels")
        without = schema.remove(schema.get_field_index("pixels"))
        table = pa.Table.from_pylist(rows, schema=without)
        return table.append_column(PIXELS.field("pixels"), batch.column(photographs))  # not copied

    def _require_expected(self) -> None:
        """Refuse a model that was overwritten since the run began: its rows would bear the id of the other."""
        self.predictor  # noqa: B018 - loaded first: what is read afterwards has not been older
        if self.expected is not None and self.expected != model_versions(self.model_url):
            raise PipelineError(f"The model at {self.model_url} was overwritten while it was in use: run again.")
        self.expected = None

    def _segment(self, rows: list[dict[str, Any]], readable: list[int], pixels: pa.ChunkedArray) -> None:
        """Add what the model says, or why it says nothing, to the rows that have pixels."""
        images = [
            torch.frombuffer(bytearray(pixels[index].as_buffer()), dtype=torch.uint8)
            .view(rows[index]["height"], rows[index]["width"], 3)
            .permute(2, 0, 1)  # (3, H, W)
            for index in readable
        ]
        for index, prediction in zip(readable, _predictions(self.predictor, images), strict=True):
            if isinstance(prediction, str):
                rows[index] |= {"status": INFERENCE_ERROR, "error": prediction}
            else:
                rows[index] |= self._columns(prediction)

    def _columns(self, prediction: Prediction) -> dict[str, Any]:
        """A prediction as the columns that the products need."""
        dtype = masks.dtype(self.predictor.model.config.num_classes)
        columns: dict[str, Any] = {
            "class_map": _bytes(prediction.class_map, dtype),
            "confidence": prediction.confidence.mean().item(),
        }
        if self.products.needs_probabilities:
            columns["probabilities"] = _bytes_of_probabilities(prediction.confidence)
        if self.products.top_k:
            columns["top_classes"] = [_bytes(ids, dtype) for ids in prediction.top_classes]
            columns["top_probabilities"] = [_bytes_of_probabilities(rank) for rank in prediction.top_probabilities]
        return columns


def _bytes(class_ids: torch.Tensor, dtype: np.dtype) -> bytes:
    return class_ids.numpy().astype(dtype, copy=False).tobytes()


def _bytes_of_probabilities(probabilities: torch.Tensor) -> bytes:
    return (probabilities * 255).round_().to(torch.uint8).numpy().tobytes()


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
