"""Pre-trained backbone weights from timm's registry, a hub, a URL or a file, with a report of what fitted.

Never runs code from a checkpoint: safetensors, or pickles read with `weights_only=True`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from timm.models import load_pretrained
from torch import nn

logger = logging.getLogger(__name__)

_HUB_PREFIX = "hf-hub:"


@dataclass(frozen=True)
class WeightsReport:
    """What became of pre-trained weights.

    An `.npz` file is copied by timm tensor by tensor: there nothing is missing and what is left over is not told.

    Attributes:
        source: Where they came from; "timm" for those that timm names.
        missing: Parameters of the backbone that the weights don't have; they stay random.
        unexpected: Weights that the backbone has no place for, such as a classifier's.
    """

    source: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_backbone_weights(body: Any, source: bool | str) -> WeightsReport:
    """Fills a timm model, its names and shapes as in timm or, where timm can convert them, as first published.

    Args:
        body: A timm model, at the image size of the weights.
        source: True for the weights that timm names; or a hub id, `hf-hub:owner/name`; or a path or URL of a
            `.safetensors`, `.pth`, `.pt`, `.bin` or, where timm can read it, `.npz` file.

    Returns:
        What was missing and what was left over.

    Raises:
        ValueError: no such weights, weights that only unpickling could read, or weights of another architecture.
    """
    if source is True:
        return _load(body, {}, "timm")
    assert isinstance(source, str)
    if source.startswith(_HUB_PREFIX):
        return _load(body, {"hf_hub_id": source.removeprefix(_HUB_PREFIX), "hf_hub_filename": None}, source)
    files, path = url_to_fs(source)
    if not files.isfile(path):
        raise ValueError(
            f"There are no pre-trained weights at {source!r}; give a file, a URL or {_HUB_PREFIX}owner/name."
        )
    is_numpy = path.endswith(".npz")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(files, LocalFileSystem):
            local = path
        else:
            local = str(Path(folder) / PurePosixPath(path).name)  # timm tells formats apart by the ending
            files.get_file(path, local)
        return _load(body, {"file": local, "custom_load": is_numpy}, source)


def _load(body: Any, overlay: dict[str, Any], source: str) -> WeightsReport:
    missing: list[str] = []
    unexpected: list[str] = []

    def note(_module: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        unexpected.extend(keys.unexpected_keys)

    architecture = body.pretrained_cfg["architecture"]
    expected = len(body.state_dict())
    handle = body.register_load_state_dict_post_hook(note)
    family = sys.modules[type(body).__module__]
    try:
        load_pretrained(
            body,
            pretrained_cfg={**body.pretrained_cfg, **overlay},
            num_classes=0,
            filter_fn=getattr(family, "checkpoint_filter_fn", None),
            strict=False,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = "; ".join(line.strip(" \t.:") for line in str(error).splitlines()[:3])
        raise ValueError(
            f"Pre-trained weights of {architecture} could not be loaded from {source}: {reason}. Give a file, a URL or "
            f"{_HUB_PREFIX}owner/name that holds weights of {architecture}, or set pretrained to false."
        ) from error
    finally:
        handle.remove()
    if len(missing) > expected / 2:
        raise ValueError(
            f"The pre-trained weights from {source} are of another architecture than {architecture}: {len(missing)} of "
            f"its {expected} tensors are missing ({', '.join(missing[:3])}, ...) and {len(unexpected)} are left over "
            f"({', '.join(unexpected[:3])}, ...)."
        )
    report = WeightsReport(source=source, missing=tuple(missing), unexpected=tuple(unexpected))
    level = logging.WARNING if missing else logging.INFO
    logger.log(level, "%s from %s: missing %s; unexpected %s", architecture, source, missing or 0, unexpected or 0)
    return report
