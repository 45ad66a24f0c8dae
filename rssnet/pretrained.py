"""Pre-trained backbone weights from timm's registry, a hub, a URL or a file, with a report of what fitted.

Never runs code from a checkpoint: safetensors, or pickles read with `weights_only=True`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from timm.models import load_pretrained
from torch import nn

logger = logging.getLogger(__name__)

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")


@dataclass(frozen=True)
class WeightsReport:
    """What became of pre-trained weights.

    Attributes:
        source: Where they came from.
        missing: Parameters of the backbone that the weights don't have; they stay random.
        unexpected: Weights that the backbone has no place for, such as a classifier's.
    """

    source: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_backbone_weights(body: Any, source: bool | str) -> WeightsReport:
    """Fills a timm model, resizing position embeddings and biases to its image size.

    Args:
        body: A timm model.
        source: True for the weights that timm names, a hub id with prefix `hf-hub:`, or a file or URL of
            `.safetensors`, `.pth`, `.pt`, `.bin` or, where timm can read it, `.npz`.

    Returns:
        What was missing and what was left over.

    Raises:
        ValueError: no such weights, or weights of another architecture.
    """
    if source is True:
        return _load(body, {}, f"timm's weights of {body.pretrained_cfg.get('architecture')}")
    assert isinstance(source, str)
    if source.startswith(_HUB_PREFIXES):
        return _load(body, {"hf_hub_id": source.split(":", 1)[1], "file": None, "url": None}, source)
    with tempfile.TemporaryDirectory() as folder:
        # timm tells formats apart by a file's ending, so the name is kept.
        local = Path(folder) / Path(source.rsplit("?", 1)[0]).name
        try:
            fsspec.filesystem("file")
            with fsspec.open(source, "rb") as stream:
                local.write_bytes(stream.read())  # pyright: ignore[reportAttributeAccessIssue]
        except FileNotFoundError as error:
            raise ValueError(
                f"There are no pre-trained weights at {source!r}; give a file, a URL or hf-hub:owner/name."
            ) from error
        return _load(body, {"file": str(local)}, source)


def _load(body: Any, overlay: dict[str, Any], source: str) -> WeightsReport:
    missing: list[str] = []
    unexpected: list[str] = []

    def note(_module: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        unexpected.extend(keys.unexpected_keys)

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
    except RuntimeError as error:
        raise ValueError(
            f"The pre-trained weights from {source} do not fit {body.pretrained_cfg.get('architecture')}: {error}"
        ) from error
    finally:
        handle.remove()
    if len(missing) > expected / 2:
        raise ValueError(
            f"The pre-trained weights from {source} are of another architecture than "
            f"{body.pretrained_cfg.get('architecture')}: {len(missing)} of its {expected} tensors are missing "
            f"({', '.join(missing[:3])}, ...) and {len(unexpected)} are left over ({', '.join(unexpected[:3])}, ...)."
        )
    report = WeightsReport(source=source, missing=tuple(missing), unexpected=tuple(unexpected))
    logger.info("Weights from %s: missing %s; unexpected %s", source, missing or "none", unexpected or "none")
    return report
