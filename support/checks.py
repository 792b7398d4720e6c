"""Checks images before training starts, and warns of likely mistakes in how they were prepared."""

import random
import time

import numpy as np
from PIL import Image

from support.data import ImageFiles, Images, load_image, open_file, reason, sample_bits, sample_name
from support.logger import log
from support.shapes import Shapes

CONSTANT = 2.0  # standard deviation, in grey levels, below which an image shows nothing
IDENTICAL = 1.0  # mean difference of thumbnails, in grey levels


def check_images(images: Images, most: int = 200, seconds: float = 5.0) -> None:
    """Read up to `most` images, evenly spread, for about `seconds`; log a warning for each kind of fault.

    The faults: images that cannot be read, 16-bit values that use few bits, bands or transparency that are
    dropped, images that are nearly constant, and images that are nearly identical.
    """
    if isinstance(images, Shapes):
        return
    spread = np.unique(np.linspace(0, len(images) - 1, most).astype(int)).tolist()
    random.Random(0).shuffle(spread)  # so that the images read in time are evenly spread too
    faults: dict[str, list[int]] = {}
    reasons: dict[int, str] = {}
    thumbnails, deepest, begun, checked = {}, 0, time.monotonic(), 0
    for index in spread:
        if time.monotonic() - begun > seconds:
            break
        checked += 1
        try:
            file, image = _stored_and_read(images, index)
        except Exception as error:  # a broken file can raise nearly anything
            faults.setdefault("cannot be read", []).append(index)
            reasons[index] = f" ({reason(error)})"
            continue
        dropped, value = _dropped(file), _largest(file)
        if dropped:
            faults.setdefault(f"lose {dropped}: training takes red, green and blue", []).append(index)
        if value is not None:
            faults.setdefault(DEEP, []).append(index)
            deepest = max(deepest, value)
        if np.asarray(image).std(axis=(0, 1)).max() < CONSTANT:
            faults.setdefault("are nearly constant: check how they were converted", []).append(index)
        else:
            thumbnails[index] = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
    _warn_of_bits(faults, deepest)
    if same := _identical(thumbnails):
        faults["are nearly identical to another one: training learns from differences between images"] = same
    for words, indices in faults.items():
        example = sample_name(images, min(indices)) + reasons.get(min(indices), "")
        log(f"warning: {len(indices)} of {checked} checked images {words}; e.g. {example}")


DEEP = "16 bits"


def _warn_of_bits(faults: dict[str, list[int]], deepest: int) -> None:
    """Turn the count of 16-bit images into a warning if they use few of their bits."""
    deep, bits = faults.pop(DEEP, []), deepest.bit_length()
    if deep and bits <= 14:
        words = f"have 16 bits but use {bits} of them (largest value {deepest}), so that training sees them "
        faults[words + f"dark: multiply their values by {2 ** (16 - bits)}"] = deep


def _stored_and_read(images: Images, index: int) -> tuple[Image.Image, Image.Image]:
    """Read an image as it is stored, and as training sees it."""
    if isinstance(images, ImageFiles):
        path, content = images.paths.file(index)
        with open_file(path, content) as stored, Image.open(stored) as file:
            file.load()
        return file, load_image(path, content)
    image = images[index][0]
    return image, image.convert("RGB")


def _largest(file: Image.Image) -> int | None:
    """The largest value of a 16-bit image; None for other images and for a TIFF that states fewer bits."""
    if not file.mode.startswith("I") or sample_bits(file) < 16:
        return None
    return int(np.asarray(file).max())


def _dropped(file: Image.Image) -> str:
    """Describe what the conversion to RGB drops; "" if nothing."""
    bands = getattr(file, "tag_v2", {}).get(277, len(file.getbands()))  # TIFF's SamplesPerPixel
    if file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info:
        alpha = file.convert("RGBA").getchannel("A")
        return "transparency" if np.asarray(alpha).min() < 255 else ""
    return f"{bands - 3} of {bands} bands" if bands > 3 and file.mode != "CMYK" else ""


def _identical(thumbnails: dict[int, np.ndarray]) -> list[int]:
    """Indices of images whose thumbnail is nearly identical to another image's."""
    indices = list(thumbnails)
    return [
        i for i in indices
        if any(i != j and np.abs(thumbnails[i] - thumbnails[j]).mean() < IDENTICAL for j in indices)
    ]  # fmt: skip
