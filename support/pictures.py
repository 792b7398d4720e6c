"""Draws maps as pictures, arranges pictures on a sheet, and saves them over none but our own.

Shapes: H x W pixels, R x C patches.
"""

import contextlib
import functools
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from support.errors import UserError
from support.files import replacing
from support.video import ENCODERS, comment_of


def has_mark(path: str | Path, mark: str) -> bool:
    """Whether the file is a picture, or a video, whose metadata names this program."""
    if Path(path).suffix[1:] in ENCODERS:
        return comment_of(path) == mark
    with contextlib.suppress(Exception), Image.open(path) as image:  # a broken file can raise nearly anything
        return image.info.get("Software") == mark
    return False


def check_free(
    path: Path, mark: str, inputs: Collection[Path] = (), fix: str = "give another --output_dir"
) -> None:
    """Raise UserError if an input, or a file without the script's mark, is at this path."""
    if path.resolve() in inputs or (path.exists() and not has_mark(path, mark)):
        raise UserError("would overwrite a file that this script did not write", str(path), fix)


def save_picture(
    picture: Image.Image, path: Path, mark: str, inputs: Collection[Path] = (), optimize: bool = False
) -> None:
    """Save a PNG with a script's mark, whole or not at all. Raises UserError as `check_free` does."""
    check_free(path, mark, inputs)
    text = PngInfo()
    text.add_text("Software", mark)
    with replacing(path) as file:
        picture.save(file, "PNG", pnginfo=text, optimize=optimize)


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat each patch as a block of pixels: (..., R, C) -> (..., H, W)."""
    # In integers: interpolate computes the places in float32, and some blocks start a pixel late.
    row, column = (
        torch.arange(length, device=maps.device) * patches // length
        for length, patches in zip(size, maps.shape[-2:], strict=True)
    )
    return maps[..., row[:, None], column]


def as_picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) as RGB of the first three channels; of one or two channels, the first in grey."""
    return to_pil_image(pixels[:3] if len(pixels) >= 3 else pixels[:1])


# Evenly spaced colours of inferno (matplotlib), which is perceptually uniform; we interpolate them.
INFERNO = ((0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
           (250, 193, 39), (252, 255, 164))  # fmt: skip


@functools.cache
def _palette() -> np.ndarray:
    """Colour map of 256 levels, (256, 3) uint8."""
    places, levels = np.linspace(0, 1, len(INFERNO)), np.linspace(0, 1, 256)
    channels = [np.interp(levels, places, channel) for channel in zip(*INFERNO, strict=True)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def heat_map(values: Tensor, top: float | None = None) -> Image.Image:
    """Draw one map (H, W) in colours from 0 to `top`, by default its largest value."""
    top = max(float(values.max()) if top is None else top, 1e-12)
    levels = (values / top * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(_palette()[levels.cpu().numpy()])


def glow(image: Image.Image, attention: Tensor) -> Image.Image:
    """Lay attention (R, C) over an image, darkened and grey: smooth, and brighter where there is more of it.

    The colours reach from 0 to eight times the mean attention. They follow the square root, so that weak
    attention is visible.
    """
    shares = (attention / attention.mean() / 8).float().clamp(0, 1).sqrt()[None, None]
    smooth = F.interpolate(shares, image.size[::-1], mode="bicubic")[0].clamp(0, 1)
    grey = image.convert("L").point(lambda level: 0.6 * level).convert("RGB")
    return Image.composite(heat_map(smooth[0], 1.0), grey, to_pil_image(smooth))


def titled_rows(title: str, rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Arrange rows of pictures of one size on white, below a title, each below a title of its own."""
    width, height = rows[0][1][0].size
    gap, line = max(4, width // 20), width // 6
    large, small = ImageFont.load_default(0.8 * line), ImageFont.load_default(0.7 * line)
    columns = len(rows[0][1])
    top = 2 * line
    sheet = (columns * (width + gap) + gap, top + len(rows) * (line + height + 2 * gap))
    picture = Image.new("RGB", sheet, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((gap, line), title, "black", large, anchor="lm")
    for name, row in rows:
        pen.text((gap, top + line // 2), name, (90, 90, 90), small, anchor="lm")
        for column, tile in enumerate(row):
            picture.paste(tile, (gap + column * (width + gap), top + line))
        top += line + height + 2 * gap
    return picture


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
