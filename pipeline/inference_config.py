"""How a model is applied to whole images: as it was asked for, and as its training has validated with."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.run_record import identity

INFERENCE_FILE = "inference.json"


@dataclass(frozen=True)
class InferenceConfig:
    """How a model is applied to whole images. See `rssnet.inference.Predictor`.

    What is not given is as the model's training validated with, which lies beside the model in `inference.json`.

    Args:
        crop_size: height and width of the sliding window, in pixels; where training gave none, the model's image size.
        stride: from one window to the next, in pixels; where training gave none, two thirds of the crop.
        window_batch: windows in one forward pass. Changes speed and memory, not the masks.
        scales: the probabilities at these scales of the image are averaged; where training gave none, 1 alone.
        flip: average with the mirrored image too; where training did not say, no.
        precision: fp32, or bf16 for bfloat16 autocast, which is faster on GPUs and tips pixels between classes that are
            about as probable; where training did not say, fp32.
        compile: let torch.compile make the model faster, after minutes of compiling in each worker. Changes speed, and
            the masks no more than another `window_batch` does.
        channels_last: lay the model out as convolutions on GPUs like it. Changes speed, not the masks.
    """

    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    window_batch: int = field(default=8, metadata={"identity": False})
    scales: tuple[float, ...] | None = None
    flip: bool | None = None
    precision: Literal["fp32", "bf16"] | None = None
    compile: bool = field(default=False, metadata={"identity": False})
    channels_last: bool = field(default=False, metadata={"identity": False})


def write_inference(folder: Path, inference: InferenceConfig) -> None:
    """Keep the settings that a model was validated with in its folder."""
    (folder / INFERENCE_FILE).write_text(json.dumps(identity(inference), indent=2) + "\n")


def inference_of(model_url: str, inference: InferenceConfig) -> InferenceConfig:
    """The settings with those that are not given taken from the model's folder, where it has any.

    Raises:
        PipelineError: if what lies there is no such settings.
    """
    try:
        saved = storage.read_json(storage.join(model_url, INFERENCE_FILE))
    except FileNotFoundError:
        return inference
    except ValueError as error:
        raise PipelineError(f"The model at {model_url} has a broken {INFERENCE_FILE}: {error}") from error
    known = identity(InferenceConfig())
    if not isinstance(saved, dict) or not saved.keys() <= known.keys():
        raise PipelineError(
            f"The model at {model_url} has a broken {INFERENCE_FILE}: it must have no fields but {', '.join(known)}."
        )
    missing = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    given = {name: value for name in known if (value := getattr(inference, name)) is not None}
    return replace(inference, **{**missing, **given})
