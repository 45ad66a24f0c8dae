"""How a model lies in a folder: config.json, model.safetensors, classes.json and README.md, the model card.

Folders are paths, fsspec URLs or, to read, ids on the Hugging Face hub. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import safetensors.torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from .classes import Classes
from .config import RSSNetConfig
from .model_card import model_card

ParsedT = TypeVar("ParsedT")

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CLASSES, CARD = "config.json", "model.safetensors", "classes.json", "README.md"


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Attributes:
        config: The model's config.
        classes: Its classes.
        weights: Its state dict.
        pixel_mean, pixel_std: What its images are normalised with, per channel, for values from 0 to 1; None in models
            saved before it was written.
    """

    config: RSSNetConfig
    classes: Classes
    weights: dict[str, Tensor]
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None


def write_model(folder: str, saved: Saved, *, parameters: Collection[str]) -> None:
    """Writes a model in place of any that is there.

    Everything is made before the folder is touched: a model that cannot be saved leaves the one that is there. Then
    `config.json`, without which nothing is read, goes first and comes last: what a crash leaves is no model.

    Args:
        folder: A path or fsspec URL; made if it is missing.
        saved: The model.
        parameters: Names of the weights that are parameters; the others, such as batch norm's statistics, are not
            counted on the model card.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.weights.items()}
    header = {
        "format": "rssnet",
        "version": FORMAT_VERSION,
        "pixel_mean": saved.pixel_mean,
        "pixel_std": saved.pixel_std,
        **saved.config.to_dict(),
    }
    counted = {name: saved.weights[name] for name in parameters}
    contents = {
        WEIGHTS: safetensors.torch.save(weights, metadata={"format": "pt"}),
        CLASSES: saved.classes.to_json().encode(),
        CARD: model_card(saved.config, saved.classes, counted).encode(),
        CONFIG: (json.dumps(header, indent=2) + "\n").encode(),
    }
    files, root = url_to_fs(folder)
    files.makedirs(root, exist_ok=True)
    if files.exists(f"{root}/{CONFIG}"):
        files.rm_file(f"{root}/{CONFIG}")
    for name, content in contents.items():
        files.pipe_file(f"{root}/{name}", content)


def read_model(source: str) -> Saved:
    """Reads what `write_model` wrote.

    Args:
        source: A folder, an fsspec URL of one, or a hub id, owner/name.

    Raises:
        ValueError: no such model, or files that cannot be read as one.
    """
    files, root = _locate(source)

    def read(name: str, parse: Callable[[bytes], ParsedT]) -> ParsedT:
        try:
            content = files.cat_file(f"{root}/{name}")
            assert isinstance(content, bytes)
            return parse(content)
        except FileNotFoundError as error:
            raise ValueError(
                f"There is no model at {source!r}: it needs {CONFIG}, {WEIGHTS} and {CLASSES}, as save_pretrained "
                f"writes, and {name} is missing."
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"The {name} at {source!r} cannot be read: {str(error).rstrip('.')}. Save or copy it again."
            ) from error

    header = read(CONFIG, json.loads)
    classes = read(CLASSES, lambda content: Classes.from_json(content.decode()))
    weights = read(WEIGHTS, safetensors.torch.load)
    if (
        not isinstance(header, dict)
        or header.pop("format", None) != "rssnet"
        or header.pop("version", None) != FORMAT_VERSION
    ):
        raise ValueError(
            f"The {CONFIG} at {source!r} is of no model of format rssnet, version {FORMAT_VERSION}; save the model "
            "with this version."
        )
    mean, std = (_pixel_values(source, name, header.pop(name, None)) for name in ("pixel_mean", "pixel_std"))
    try:
        config = RSSNetConfig.from_dict(header)
    except ValueError as error:
        raise ValueError(f"The {CONFIG} at {source!r} is of no model that can be built: {error}") from error
    return Saved(config=config, classes=classes, weights=weights, pixel_mean=mean, pixel_std=std)


def _pixel_values(source: str, name: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
        or (name == "pixel_std" and min(values) <= 0)
    ):
        kind = "numbers above 0" if name == "pixel_std" else "numbers"
        raise ValueError(
            f"{name} in the {CONFIG} at {source!r} must be three {kind}, one per channel, not {values!r}; correct it "
            "or save the model again."
        )
    return tuple(float(value) for value in values)


def _locate(source: str) -> tuple[AbstractFileSystem, str]:
    is_url = "://" in source
    if is_url or Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        files, root = url_to_fs(source)
        return files, root
    try:
        return fsspec.filesystem("file"), snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS, CLASSES])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is no folder here, and the Hugging Face hub did not give it: "
            f"{error}. Give a folder, a URL or owner/name."
        ) from error
