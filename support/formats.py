"""Reads image files, of any number of channels and any type of values, as 8-bit levels.

The values LOW to HIGH of `--value_range` become the levels 0 to 255. So everything that follows works on
uint8 (C, H, W). tifffile reads TIFFs; it is optional, and RGB and grey images of 8 bits do without it.

Shapes: C channels, H x W pixels.
"""

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from support.errors import UserError, WrongFormat, counted
from support.files import ARRAYS, all_extensions, extension, open_file, readable_extensions
from support.pixels import as_tensor, to_rgb

TIFFS = (".tif", ".tiff")

Range = tuple[tuple[float, float], ...]  # LOW and HIGH: one pair for all channels, or one for each


class ImageFormat(NamedTuple):
    """What the images of a run are; the default is 8-bit RGB, to which other images are converted."""

    channels: int = 3
    value_range: Range | None = None  # None: 8-bit values as they are; (): not known yet

    @property
    def is_default(self) -> bool:
        """Whether images are read as photographs are; otherwise `.npy` files are images too."""
        return self == ImageFormat()

    @property
    def by_pillow(self) -> bool:
        """Whether Pillow reads the images, and reduces 16-bit values to their upper 8 bits."""
        return self.value_range is None and self.channels in (1, 3)


RGB = ImageFormat()


def extensions_of(form: ImageFormat) -> frozenset[str]:
    """The extensions of image files of a format, in lower case."""
    return readable_extensions() if form.is_default else all_extensions()


def pairs(numbers: Sequence[float] | None, channels: int | None = None) -> Range | None:
    """The numbers LOW HIGH LOW HIGH ... of --value_range as pairs. Raises UserError."""
    if numbers is None:
        return None
    where = f"--value_range {' '.join(f'{number:g}' for number in numbers)}"
    if len(numbers) % 2 or (channels and len(numbers) not in (2, 2 * channels)):
        fix = f"give LOW HIGH{f', or {channels} pairs' if channels else ''}"
        raise UserError("takes one pair for all channels, or one for each", where, fix)
    found = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    if any(low >= high for low, high in found):
        raise UserError("LOW is not below HIGH", where, "give LOW < HIGH")
    return found


def range_words(value_range: Range | None) -> str:
    """The numbers of a range, as --value_range takes them; "" for none."""
    return " ".join(f"{number:g}" for pair in value_range or () for number in pair)


def load_image(path: str, content: bytes | None = None, channels: int = 3) -> Image.Image:
    """Read the first frame of an image file as RGB, or as grey for one channel; EXIF rotation is ignored.

    16-bit values keep the upper 8 of the bits that they use, which a TIFF may state. `content` is what the
    file contains, if it lies in an archive. A file that cannot be read may raise any exception.
    """
    with open_file(path, content) as file, _pillow(path, content, channels, file) as image:
        rgb = to_rgb(image, sample_bits(image))
        if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(262) == 0:
            rgb = ImageOps.invert(rgb)  # a TIFF whose 0 is white; Pillow inverts those of 8 bits itself
        return rgb if channels == 3 else rgb.convert("L")


def _pillow(path: str, content: bytes | None, channels: int, file: IO[bytes]) -> Image.Image:
    """Open an image with Pillow. Raises WrongFormat for a TIFF of more channels, if tifffile can tell."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if extension(path) in TIFFS and importlib.util.find_spec("tifffile"):
            load_values(path, content, channels)
        raise


def sample_bits(image: Image.Image) -> int:
    """How many bits the values of a 16-bit image use, 8 to 16, according to the tags of a TIFF."""
    tags = getattr(image, "tag_v2", {})
    bits, largest = tags.get(258, (16,)), tags.get(281, (65_535,))  # BitsPerSample, MaxSampleValue
    said = [int(np.max(bits)), int(np.max(largest)).bit_length()]
    return min(16, max(8, min(said)))


def load_pixels(path: str, content: bytes | None = None, form: ImageFormat = RGB) -> Tensor:
    """An image file as uint8 (C, H, W); of RGB files of 8 bits, `load_image`'s pixels.

    torchvision decodes JPEGs 1.5 times as fast as Pillow. Falls back to Pillow if torchvision has dropped
    the decoder (deprecated in 0.29) or the file is not a complete RGB JPEG. Raises WrongFormat if it is not
    of this format.
    """
    if not form.by_pillow or extension(path) in ARRAYS:
        return levels_of(load_values(path, content, form.channels), form, path)
    decode = getattr(torchvision.io, "decode_jpeg", None)
    if decode and form.channels == 3 and extension(path) in (".jpg", ".jpeg"):
        with open_file(path, content) as file:
            content = file.read()
        with Image.open(io.BytesIO(content)) as image:  # the header only; refuses decompression bombs
            is_colour_jpeg = image.format == "JPEG" and image.mode == "RGB"
        if is_colour_jpeg and content.endswith(b"\xff\xd9"):
            return decode(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return as_tensor(load_image(path, content, form.channels))


def levels_of(values: np.ndarray, form: ImageFormat, path: str) -> Tensor:
    """Map the values of `load_values` to uint8 levels."""
    levels = to_levels(values, form.value_range, path)
    if len(levels) != form.channels:  # RGB
        levels = np.asarray(Image.fromarray(levels.transpose(1, 2, 0)).convert("L"))[None]
    return torch.from_numpy(np.array(levels, order="C"))  # a copy: Pillow's arrays cannot be written to


def to_levels(values: np.ndarray, value_range: Range | None, path: str) -> np.ndarray:
    """Values (C, H, W) of any real type as uint8 levels. Raises WrongFormat if they need a range.

    Raises ValueError for values that are not finite.
    """
    if value_range is None:
        if values.dtype != np.uint8:
            fix = "train with --value_range LOW HIGH or auto, or convert them to 8 bits"
            raise WrongFormat(f"values of type {values.dtype} have no agreed range", path, fix)
        return values
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    exact = np.result_type(values.dtype, np.float32)  # float32 holds values of 16 bits
    low, high = np.array(value_range, exact).T[..., None, None]  # (1 or C, 1, 1)
    return np.rint(((values - low) * (255 / (high - low))).clip(0, 255)).astype(np.uint8)


def share_within(values: np.ndarray, value_range: Range) -> np.ndarray:
    """The share of values (C, ...) that lie within the range, for each channel (C,)."""
    low, high = (np.array(limits)[:, None] for limits in zip(*value_range, strict=True))  # (1 or C, 1)
    flat = values.reshape(len(values), -1)
    return ((flat >= low) & (flat <= high)).mean(axis=1)


def load_values(path: str, content: bytes | None, channels: int) -> np.ndarray:
    """The values in an image file, (C, H, W); three channels instead of one for RGB.

    A grey image is repeated for three channels. Raises WrongFormat for another number of channels, ValueError
    for an image without pixels and for values that are no real numbers.
    """
    try:
        with open_file(path, content) as file:
            if extension(path) in ARRAYS:
                values = channels_first(np.load(file, allow_pickle=False), channels, path)
                is_rgb = False
            elif extension(path) in TIFFS:
                values, is_rgb = _tiff_values(file, channels, path)
            else:
                values, is_rgb = _pillow_values(file, path)
    except MemoryError as error:  # perhaps a damaged header
        raise MemoryError(f"{path}: {error}") from None
    if not values.size:
        raise ValueError("has no pixels")
    if values.dtype.kind not in "buif":
        raise ValueError(f"values of type {values.dtype}")
    if len(values) == 1 and channels == 3:
        return values.repeat(3, axis=0)
    if len(values) != channels and not (is_rgb and channels == 1):
        fix = f"give images of {counted(channels, 'channel')}, or train with another --in_chans"
        raise WrongFormat(f"image has {len(values)} channels, not {channels}", path, fix)
    return values


def channels_first(array: np.ndarray, channels: int, path: str) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (C, H, W); the channels are the axis of that length.

    Raises WrongFormat.
    """
    where = f"{path}: shape {array.shape}"
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise WrongFormat("not an image", where, "save (H, W), (H, W, C) or (C, H, W)")
    fits = [axis for axis in (0, 2) if array.shape[axis] == channels]
    if len(fits) != 1:
        what = f"first and last axis both have {channels} entries, so either could be the channels"
        fix = f"give files with {channels} channels, first or last, or train with another --in_chans"
        raise WrongFormat(what if fits else f"image has no axis of {channels} channels", where, fix)
    return np.moveaxis(array, fits[0], 0)


def _tiff_values(file: IO[bytes], channels: int, path: str) -> tuple[np.ndarray, bool]:
    """The values in a TIFF, (C, H, W), and whether they are RGB. Raises WrongFormat.

    The channels are samples of a pixel, pages, or the one axis of the file's first series beside height and
    width.
    """
    with _tifffile(path).TiffFile(file) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        colours, compression = page.photometric.name, page.compression.name
        is_rgb = colours in ("RGB", "YCBCR")
        if colours in NOT_VALUES or (colours == "YCBCR" and "JPEG" not in compression):
            what = f"TIFF stores colours as {colours}, not as brightness"
            raise WrongFormat(what, path, "save it as grey values, 0 for black, or as RGB")
        if math.prod(series.shape) > max(channels, 3) * 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # as Pillow
            raise ValueError(f"image of shape {series.shape} is larger than Pillow's limit")
        if not series.dataoffset:  # else tifffile reads one block, as a whole
            stored = [size for each in series.pages if each for size in each.databytecounts]
            if 0 in stored or len(stored) < len(series.pages) * math.prod(page.chunked):
                raise ValueError("parts of the image are not in the file")  # tifffile would read zeros
        try:
            values = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            what = "its compression needs the package imagecodecs"
            raise WrongFormat(what, path, "pip install imagecodecs") from None
    long = [axis for axis, size in enumerate(values.shape) if size > 1 or series.axes[axis] in "YX"]
    axes = "".join(series.axes[axis] for axis in long)
    values = values.reshape([values.shape[axis] for axis in long])
    others = axes.replace("Y", "", 1).replace("X", "", 1)
    if len(others) != len(axes) - 2 or len(others) > 1:
        what = f"TIFF has the axes {series.axes} {series.shape}"
        raise WrongFormat(what, path, "save height, width and channels")
    if not others:
        return values[None], False
    if others == "Q":  # tifffile's name for an axis that the file does not name
        return channels_first(values, channels, path), False
    return np.moveaxis(values, axes.index(others), 0), is_rgb and values.shape[axes.index(others)] == 3


NOT_VALUES = ("MINISWHITE", "PALETTE", "CIELAB", "ICCLAB", "ITULAB")  # TIFF's kinds of colours


def _tifffile(path: str) -> Any:
    try:
        import tifffile
    except ImportError:
        what, fix = "TIFFs with --in_chans or --value_range need tifffile", "pip install tifffile"
        raise WrongFormat(what, path, fix) from None
    return tifffile


def is_reduced(image: Image.Image) -> bool:
    """Whether Pillow reads only the upper 8 of the 16 bits of an image that is not loaded yet."""
    return len(image.getbands()) > 1 and any("16" in str(part[-1]) for part in getattr(image, "tile", ()))


# Pillow's modes whose values are taken as they are; images of other modes become RGB.
MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def _pillow_values(file: IO[bytes], path: str) -> tuple[np.ndarray, bool]:
    """The values in an image that Pillow reads, (C, H, W), and whether they are RGB. Raises WrongFormat."""
    with Image.open(file) as image:
        if is_reduced(image):
            what = "Pillow reads only the upper 8 of its 16 bits"
            raise WrongFormat(what, path, "save it as a TIFF or as .npy")
        values = np.asarray(image if image.mode in MODES else image.convert("RGB"))
    return np.moveaxis(values.reshape(*values.shape[:2], -1), 2, 0), values.ndim == 3 and values.shape[2] == 3
