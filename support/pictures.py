"""Draws maps as pictures, and arranges pictures on a sheet.

Shapes: H x W pixels, R x C patches.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from support.errors import UserError


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat each patch as a block of pixels: (..., R, C) -> (..., H, W)."""
    single = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    return F.interpolate(single, size=size, mode="nearest").reshape(*maps.shape[:-2], *size).to(maps.dtype)


def as_picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) as RGB of the first three channels; of one or two channels, the first in grey."""
    return to_pil_image(pixels[:3] if len(pixels) >= 3 else pixels[:1])


@functools.cache
def _palette() -> np.ndarray:
    """Colour map of 256 levels, (256, 3) uint8. Raises UserError."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("colours need matplotlib", "not installed", "pip install matplotlib") from None
    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heat_map(values: Tensor, top: float | None = None) -> Image.Image:
    """Draw one map (H, W) in colours from 0 to `top`, by default its largest value."""
    top = max(float(values.max()) if top is None else top, 1e-12)
    levels = (values / top * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(_palette()[levels.cpu().numpy()])


def mark_patch(picture: Image.Image, row: int, column: int, patch_size: int) -> Image.Image:
    """Return a copy with a red frame around one patch."""
    marked = picture.copy()
    left, top, last = column * patch_size, row * patch_size, patch_size - 1
    width = max(1, patch_size // 8)
    ImageDraw.Draw(marked).rectangle((left, top, left + last, top + last), outline="red", width=width)
    return marked


def bands(columns: Sequence[Sequence[Image.Image]], most: int = 8) -> list[list[Image.Image]]:
    """Break columns of pictures into rows of at most `most`, the last ones filled up with white."""
    length = min(most, len(columns))
    white = [Image.new("RGB", picture.size, "white") for picture in columns[0]]
    rows: list[list[Image.Image]] = []
    for first in range(0, len(columns), length):
        part = list(columns[first : first + length])
        part += [white] * (length - len(part))
        rows += [list(row) for row in zip(*part, strict=True)]
    return rows


def contact_sheet(rows: list[list[Image.Image]], side: int = 160) -> Image.Image:
    """Arrange rows of pictures on white, each centred in a square of `side` pixels.

    One factor scales all pictures, so that the largest fills its square.
    """
    factor = side / max(max(picture.size) for row in rows for picture in row)
    resample = Image.Resampling.BICUBIC if factor < 1 else Image.Resampling.NEAREST
    tiles = []
    for picture in (picture.convert("RGB") for row in rows for picture in row):
        small = picture.resize([max(1, round(factor * length)) for length in picture.size], resample)
        tile = Image.new("RGB", (side, side), "white")
        tile.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
        tiles.append(pil_to_tensor(tile))
    return to_pil_image(make_grid(tiles, len(rows[0]), padding=4, pad_value=255))


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Join pictures of one height, from left to right."""
    return Image.fromarray(np.hstack([np.asarray(picture.convert("RGB")) for picture in pictures]))
