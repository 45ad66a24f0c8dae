"""A timm model's weights for one image size, taken over by the same model built for another.

timm resizes position embeddings when it loads a checkpoint, but not in every family, and it takes the old grid to be
square. Here both sizes are known. What depends on the image size is told by its kind, not by the family: tables of
relative positions (BEiT, Swin, MaxViT), one-dimensional relative positions (MViT v2, SAM), absolute embeddings (ViT,
EVA-02, Hiera). Rotary embeddings hold no weights and are made for their size by the model itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import Tensor, nn

Grid = tuple[int, int]


@torch.no_grad()
def load_resized(target: nn.Module, source: nn.Module, *, target_grid: Grid, source_grid: Grid) -> None:
    """Fills a model with the weights of the same model built for another image size.

    Args:
        target: The model to fill.
        source: The model to take from. It is resized on the way and of no further use: a copy would double its memory.
        target_grid: (height, width) of the target's patches.
        source_grid: (height, width) of the source's.

    Raises:
        ValueError: a weight that depends on the image size in a way that is not known here.
    """
    for name, module in source.named_modules():
        if hasattr(module, "set_window_size") and getattr(module, "window_size", None) is not None:
            resizable: Any = module
            resizable.set_window_size(target.get_submodule(name).window_size)
    expected = target.state_dict()
    weights = {
        name: _resize(name, tensor, expected[name].shape, source_grid, target_grid) if name in expected else tensor
        for name, tensor in source.state_dict().items()
    }
    try:
        target.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{type(target).__name__} cannot change its patches from {source_grid} to {target_grid}: {error}. "
            "Build it for one image size."
        ) from error


def _resize(name: str, tensor: Tensor, shape: torch.Size, source_grid: Grid, target_grid: Grid) -> Tensor:
    kind = name.rsplit(".", 1)[-1]
    if kind == "pos_embed" and tensor.ndim == 3 and source_grid != target_grid:
        prefix_tokens = tensor.shape[1] - source_grid[0] * source_grid[1]
        return resample_abs_pos_embed(
            tensor, new_size=list(target_grid), old_size=list(source_grid), num_prefix_tokens=prefix_tokens
        )
    if kind == "pos_embed" and tensor.ndim == 4 and tensor.shape != shape:
        return resample_abs_pos_embed_nhwc(tensor, new_size=list(target_grid))
    if kind in ("rel_pos_h", "rel_pos_w") and tensor.shape != shape:
        # (positions, channels): interpolated along positions, as MViT v2 and SAM do.
        return F.interpolate(tensor.T[None], size=shape[0], mode="linear")[0].T.contiguous()
    return tensor
