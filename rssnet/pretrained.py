"""Pre-trained backbone weights from timm's registry, a hub, a URL or a file, with a report of what fitted.

Never runs code from a checkpoint: safetensors, or pickles read with `weights_only=True`.

How images are normalised is told by timm's name of the backbone or, for weights from a hub, by their repository. A file
or URL doesn't say it. If its weights were trained with other values than those of the timm name, give them:
`backbone_options={"pretrained_cfg_overlay": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}` goes before both.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from timm.models import load_model_config_from_hf, load_pretrained
from torch import nn

logger = logging.getLogger(__name__)

Size = tuple[int, ...]

_HUB_PREFIX = "hf-hub:"
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
# Left over in weights of the right architecture: what models compute for themselves, and layers that DLA published
# but never used.
_HARMLESS = re.compile(
    r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|attention_bias_idxs|num_batches_tracked)$"
    r"|^level\d.*\.project\."
)
_INPUTS = ("pos_embed", "cls_token", "dist_token", "reg_token")


@dataclass(frozen=True)
class WeightsReport:
    """What became of pre-trained weights.

    Attributes:
        source: Where they came from; "timm" for those that timm names.
        missing: Parameters of the backbone that the weights don't have; they stay random, and nothing reads them.
        unexpected: Weights that the backbone has no place for, such as a classifier's.
        normalisation: What images were normalised with, "mean" and "std" per channel, for values from 0 to 1; empty
            where the source doesn't say.
    """

    source: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    normalisation: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def load_backbone_weights(
    build: Callable[[Size], Any], sizes: Sequence[Size], source: bool | str, *, required: Collection[str]
) -> tuple[Any, Size, WeightsReport]:
    """Builds a timm model and fills it, its names and shapes as in timm or, where timm can convert them, as published.

    Position embeddings and biases of another image size are resized where timm does so for the family. timm takes as
    many positions as its own size has for that size, and a square number of others for a square.

    Args:
        build: Makes the timm model, with its head and norms, for an image size.
        sizes: Image sizes (height, width) to fill it at; the first whose shapes the weights fit counts.
        source: True for the weights that timm names; or a hub id, `hf-hub:owner/name`; or a path or URL of a
            `.safetensors`, `.pth`, `.pt` or `.bin` file.
        required: Names of the tensors that must be found, those that something reads.

    Returns:
        The model, the size it was built for, and what was missing and what was left over.

    Raises:
        ValueError: no such weights, weights that only unpickling could read, or weights of another architecture.
    """
    name = "timm" if source is True else str(source)
    misfit: Exception | None = None
    architecture = ""
    with _located(source) as overlay:
        for size in sizes:
            body = build(size)
            architecture = body.pretrained_cfg["architecture"]
            try:
                missing, unexpected = _fill(body, overlay)
                normalisation = _hub_normalisation(overlay)
            except (OSError, SafetensorError) as error:
                raise _unloadable(architecture, name, error) from error
            except (RuntimeError, ValueError, LookupError, AttributeError, AssertionError, TypeError) as error:
                misfit = error  # perhaps of another size: timm doesn't resize every family
                continue
            _check_architecture(architecture, name, required, missing, unexpected)
            level = logging.WARNING if missing else logging.INFO
            logger.log(
                level, "%s from %s: missing %s; unexpected %s", architecture, name, missing or 0, unexpected or 0
            )
            return body, size, WeightsReport(name, tuple(missing), tuple(unexpected), normalisation)
    assert misfit is not None
    raise _unloadable(architecture, name, misfit) from misfit


@contextmanager
def _located(source: bool | str) -> Iterator[dict[str, Any]]:
    """The entries of a timm config that say where weights are; a remote file is copied for as long as this lasts."""
    if source is True:
        yield {}
        return
    assert isinstance(source, str)
    if source.startswith(_HUB_PREFIX):
        yield {"hf_hub_id": source.removeprefix(_HUB_PREFIX), "hf_hub_filename": None}
        return
    files, path = url_to_fs(source)
    if not path.endswith(_ENDINGS):
        raise ValueError(
            f"Pre-trained weights are read from files that end in {', '.join(_ENDINGS)}; {source!r} does not. Give "
            f"such a file or URL, {_HUB_PREFIX}owner/name, or true for timm's own; the backbone's name says which."
        )
    if not files.isfile(path):
        raise ValueError(
            f"There are no pre-trained weights at {source!r}; give a file, a URL or {_HUB_PREFIX}owner/name."
        )
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(files, LocalFileSystem):
            local = path
        else:
            local = str(Path(folder) / PurePosixPath(path).name)  # timm tells formats apart by the ending
            files.get_file(path, local)
        yield {"file": local, "custom_load": False}


def _fill(body: Any, overlay: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Fills a timm model and names what was missing and what was left over."""
    missing: list[str] = []
    unexpected: list[str] = []

    def note(_module: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        unexpected.extend(keys.unexpected_keys)

    handle = body.register_load_state_dict_post_hook(note)
    try:
        load_pretrained(
            body,
            pretrained_cfg={**body.pretrained_cfg, **overlay},
            num_classes=0,
            filter_fn=_filter(body),
            strict=False,
        )
    finally:
        handle.remove()
    return missing, unexpected


def _filter(body: Any) -> Callable[..., Any] | None:
    """The function of the model's family that turns weights as published into timm's."""
    convert = getattr(sys.modules[type(body).__module__], "checkpoint_filter_fn", None)
    if convert is not None and "adapt_layer_scale" in inspect.signature(convert).parameters:
        return partial(convert, adapt_layer_scale=True)  # DeiT III is published with other names for its layer scales
    return convert


def _hub_normalisation(overlay: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """What a hub's repository says its weights were trained with, where it does."""
    if "hf_hub_id" not in overlay:
        return {}
    try:
        config = load_model_config_from_hf(overlay["hf_hub_id"])[0]
    except (RemoteEntryNotFoundError, KeyError):  # no config.json, or another library's
        return {}
    return {kind: tuple(config[kind]) for kind in ("mean", "std") if config.get(kind)}


def _check_architecture(
    architecture: str, source: str, required: Collection[str], missing: Sequence[str], unexpected: Sequence[str]
) -> None:
    """Allows heads, final norms and what training added to differ, and nothing that feature maps are made of."""
    trunk = {name.partition(".")[0] for name in required if "." in name}
    lacking = [name for name in missing if name in required and not _HARMLESS.search(name)]
    foreign = [
        name
        for name in unexpected
        if (name in _INPUTS or name.partition(".")[0] in trunk) and not _HARMLESS.search(name)
    ]
    if lacking or foreign:
        raise ValueError(
            f"The pre-trained weights from {source} are of another architecture than {architecture} with these "
            f"backbone_options: {len(lacking)} of its {len(required)} tensors are missing{_some(lacking)} and "
            f"{len(foreign)} of the weights have no place in it{_some(foreign)}; give weights of {architecture}, set "
            "backbone and backbone_options to what the weights are of, or set pretrained to false."
        )


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def _unloadable(architecture: str, source: str, error: Exception) -> ValueError:
    reason = "; ".join(line.strip(" \t.:") for line in str(error).splitlines()[:3])
    if isinstance(error, (LookupError, AttributeError, AssertionError, TypeError)):
        reason = f"they cannot be read as its own ({type(error).__name__}: {reason})"
    return ValueError(
        f"Pre-trained weights of {architecture} could not be loaded from {source}: {reason}. Give a file, a URL or "
        f"{_HUB_PREFIX}owner/name that holds weights of {architecture}, or set pretrained to false."
    )
