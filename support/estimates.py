"""Estimates the range, the mean and the deviation of a set's values from a fixed sample of its images.

Shapes: C channels, H x W pixels, P sampled pixels.
"""

import math
from collections.abc import Sequence

import numpy as np

from support.data import ImageFiles, Images, pixels_of, sample_name
from support.errors import UserError, WrongFormat, lacks_resources
from support.files import evenly_spread
from support.formats import ImageFormat, levels_of, load_values, range_words

SAMPLE, SIDE = 256, 64  # images of a sample, and rows and columns of each of them, at most
PERCENTILES = (0.1, 99.9)


def sample_values(images: Images, channels: int) -> list[np.ndarray]:
    """Values of evenly spaced pixels in evenly spaced images: (C, P) for each, of the files' type.

    For one channel, RGB files give three, which become grey after their values became levels. Leaves out
    images that cannot be read. Raises UserError if none can, WrongFormat for another number of channels.
    """
    parts = []
    for index in evenly_spread(len(images), SAMPLE):
        try:
            values = _values(images, index, channels)
        except Exception as error:  # a broken file can raise nearly anything
            if isinstance(error, WrongFormat) or lacks_resources(error):
                raise
            continue
        rows, columns = (math.ceil(side / SIDE) for side in values.shape[1:])
        part = values[:, ::rows, ::columns]
        if np.isfinite(part).all():  # NaN counts as unreadable
            parts.append(part.reshape(len(part), -1))
    if not parts:
        raise UserError("no image of the sample can be read", sample_name(images, 0), "check the data")
    return parts


def _values(images: Images, index: int, channels: int) -> np.ndarray:
    """The stored values if a range maps them to grey levels, else the levels: (C, H, W)."""
    if isinstance(images, ImageFiles) and images.form.value_range is not None:
        return load_values(*images.paths.file(index), channels)
    return pixels_of(images, index).numpy()


def estimate_range(values: Sequence[np.ndarray], channels: int) -> list[float]:
    """Percentiles 0.1 and 99.9 of a sample's values: LOW HIGH for each channel. Raises UserError."""
    together = np.concatenate([part.reshape(channels, -1) for part in values], axis=1)
    found = np.percentile(together.astype(np.float64), PERCENTILES, axis=1).T
    numbers = [float(f"{number:.6g}") for number in found.flatten()]
    for channel, (low, high) in enumerate(zip(numbers[::2], numbers[1::2], strict=True), 1):
        if low >= high:
            what = f"channel {channel} is {low:g} in nearly all of the sample"
            raise UserError(what, "--value_range auto", "give LOW and HIGH, or leave the channel out")
    return numbers


def estimate_normalization(
    values: Sequence[np.ndarray], form: ImageFormat
) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel in [0, 1], of a sample's values as levels. Raises UserError."""
    parts = [levels_of(part[:, None], form, "the sample")[:, 0].numpy() for part in values]
    levels = np.concatenate(parts, axis=1)
    if form.value_range and levels.min() == levels.max():
        where = f"--value_range {range_words(form.value_range)}"
        raise UserError("no value of the sample lies within the range", where, "give another range, or auto")
    levels = levels / 255
    mean, std = levels.mean(axis=1), levels.std(axis=1)
    for channel, deviation in enumerate(std, 1):
        if deviation < 1e-4:
            what = f"channel {channel} is the same in all of the sample"
            fix = "give numbers, another --value_range, or leave the channel out"
            raise UserError(what, "--std auto", fix)
    return [float(f"{x:.4g}") for x in mean], [float(f"{x:.4g}") for x in std]
