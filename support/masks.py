"""Masks in image files, one whole number for each pixel: read, checked for likely mistakes, compared.

Shapes: H x W pixels.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from support.errors import UserError, reading
from support.files import evenly_spread
from support.logger import log

VOID = 255  # pixels that are not scored, e.g. the outlines of VOC's objects


def read_mask(path: str | Path) -> np.ndarray:
    """Read the numbers of a mask, uint8 (H, W): 0 is the background. Raises UserError."""
    return read_mask_and_palette(path)[0]


def read_mask_and_palette(path: str | Path) -> tuple[np.ndarray, list[int] | None]:
    """`read_mask`, and the red, green and blue of each number; None without a palette. Raises UserError."""
    with reading("mask", path), Image.open(path) as mask:
        require_numbers(mask, path)
        return np.array(mask).astype(np.uint8), mask.getpalette()


def require_numbers(mask: Image.Image, path: str | Path) -> None:
    """Raise UserError if an opened mask, by its header, does not hold 8-bit numbers."""
    if mask.format == "JPEG":
        what = "mask is a JPEG, which changes numbers at edges"
    elif mask.mode not in ("P", "L", "1"):
        what = f"mask has Pillow's mode {mask.mode}, not 8-bit numbers"
    else:
        return
    raise UserError(what, str(path), "save it as a palette or grey PNG")


def compare_palettes(masks: Sequence[str | Path]) -> None:
    """Warn if a number has another colour in another of up to 200 masks: programs that reduce colours
    number them differently in each image. Raises UserError for one that cannot be read.
    """
    first: dict[int, tuple[list[int], str | Path]] = {}
    for path in (masks[index] for index in evenly_spread(len(masks), 200)):
        mask, palette = read_mask_and_palette(path)
        for number in np.unique(mask).tolist():
            colour = (palette or [])[3 * number : 3 * number + 3]
            before, where = first.setdefault(number, (colour, path))
            if colour != before:
                what = (
                    f"{number} has the colour {before or 'none'} in {where} and {colour or 'none'} in {path}"
                )
                log(f"warning: masks have different palettes, but only the numbers count: {what}")
                return


def warn_of_turned(images: Sequence[str | Path]) -> None:
    """Warn if viewers show some of up to 200 images turned or mirrored: masks that were drawn there do not
    fit.
    """
    checked = [images[index] for index in evenly_spread(len(images), 200)]
    if turned := [path for path in checked if _is_turned(path)]:
        what = f"{len(turned)} of {len(checked)} checked images are stored turned or mirrored"
        log(f"warning: {what} (EXIF orientation): masks must fit them as stored; e.g. {turned[0]}")


def _is_turned(path: str | Path) -> bool:
    """Whether an image's EXIF orientation is not the usual one; False if it cannot be read."""
    with contextlib.suppress(Exception), Image.open(path) as image:  # a broken file can raise nearly anything
        return image.getexif().get(Base.Orientation, 1) > 1
    return False


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole of counts; 1 where there is no whole."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0)


def jaccard(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks, bool (..., H, W) -> (...); 1 where both are empty."""
    return share((masks & truth).sum(dim=(-2, -1)), (masks | truth).sum(dim=(-2, -1)))
