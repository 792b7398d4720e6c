"""Reads the attention of our ViTs and timm's: what the CLS token, or a patch, attends to.

Shapes: B images, h heads, N tokens, H x W pixels, R x C patches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from support.errors import UserError, first_line
from support.features import has_cls, patch_size_of
from vision_transformer import VisionTransformer


@torch.inference_mode()
def attention_map(
    backbone: nn.Module, images: Tensor, layer: int = 1, patch: tuple[int, int] | None = None
) -> Tensor:
    """Attention over the patches in a block, counted from the end: (B, channels, H, W) -> (B, h, R, C).

    It is the CLS token's, or that of a patch (row, column). Works for our ViTs and for timm's, including
    XCiT, whose last two blocks have such attention. Raises UserError for networks and blocks without it, and
    for image sizes that the network cannot take; IndexError for a patch that is not there.
    """
    rows, cols = (side // patch_size_of(backbone) for side in images.shape[-2:])
    if patch and not (0 <= patch[0] < rows and 0 <= patch[1] < cols):
        raise IndexError(f"patch {patch} of {rows} x {cols}")
    number = None if patch is None else patch[0] * cols + patch[1]
    if isinstance(backbone, VisionTransformer):
        check_layer(layer, len(backbone.blocks))
        token = 0 if number is None else number - rows * cols  # from the end: registers may precede them
        attention = backbone.get_attention(images, layer, token)[:, :, 0]  # (B, h, N), CLS first
    else:
        attention = _timm_attention(backbone, images, layer, rows * cols, number)
    first = attention.shape[-1] - rows * cols  # CLS, registers and other tokens precede the patches
    if attention.ndim != 3 or not (patch or (first > 0 and has_cls(backbone))):
        what = "CLS attention" if patch is None else "attention of patches"
        where = f" in layer {layer} from the end" if layer > 1 else ""
        lacks = f"{type(backbone).__name__} has no {what} over patches{where}"
        raise UserError(lacks, fix="use a ViT" + ", or another --layer" * (layer > 1))
    return attention[..., first:].unflatten(-1, (rows, cols))


def check_layer(layer: int, depth: int) -> None:
    """Raise UserError for a layer, counted from the end, that is not there."""
    if not 1 <= layer <= depth:
        what = f"network has {depth} layers with attention"
        raise UserError(what, f"--layer {layer}", f"give 1 to {depth}")


def _timm_attention(backbone: Any, images: Tensor, layer: int, patches: int, patch: int | None) -> Tensor:
    """The row of the CLS token, or of a patch by its number, in an attention map: (B, h, N).

    (B, 0) for networks and layers without such a row. timm's attention layers pass their softmax through a
    module `attn_drop`, unless they use a fused kernel, which is turned off in this layer.
    """
    layers: list[Any] = [
        m for m in backbone.modules()
        if isinstance(getattr(m, "attn_drop", None), nn.Module)
        and type(m).__name__ != "XCA"  # which is attention among channels
    ]  # fmt: skip
    found = [images.new_zeros(len(images), 0)]
    if not layers:
        return found[0]
    check_layer(layer, len(layers))

    def keep_row(module, inputs, softmax: Tensor) -> None:  # (B, h, N, N), or (B, h, 1, N) of the CLS token
        queries, keys = softmax.shape[-2:]
        complete = len(softmax) == len(images) and keys >= patches  # not so in windows
        if complete and (patch is None or queries == keys):
            found.append(softmax[..., 0 if patch is None else keys - patches + patch, :].clone())

    chosen = layers[-layer]
    handle = chosen.attn_drop.register_forward_hook(keep_row)
    fused = getattr(chosen, "fused_attn", False)
    chosen.fused_attn = False
    try:
        backbone(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = backbone.default_cfg["input_size"][1:]
        what = f"{type(backbone).__name__}: {first_line(error)}"
        raise UserError(what, "--image_size", f"try {height} {width}") from None
    finally:
        handle.remove()
        chosen.fused_attn = fused
    return found[-1]


def keep_mass(attention: Tensor, share: float) -> Tensor:
    """Mark the fewest patches that hold this share of each map's sum: (..., R, C) -> bool (..., R, C)."""
    if share >= 1:  # rounding could make the sum reach 1 before the last patch
        return torch.ones_like(attention, dtype=torch.bool)
    # MPS sorts a slice wrongly (https://github.com/pytorch/pytorch/issues/175187).
    values, order = attention.flatten(-2).contiguous().sort(dim=-1, descending=True)
    values = values / values.sum(dim=-1, keepdim=True)
    before = values.cumsum(dim=-1) - values
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < share)
    return kept.unflatten(-1, attention.shape[-2:])
