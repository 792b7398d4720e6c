"""Checks images before they are used, and warns of likely mistakes in how they were prepared."""

import os
import random
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from support.data import ImageFiles, Images, Source, digest, on_all_ranks, open_train_and_val, sample_name
from support.distributed import is_main_process, same_error_on_all_ranks
from support.errors import UserError, WrongFormat, first_line
from support.files import ARRAYS, Paths, evenly_spread, extension, open_file
from support.formats import is_reduced, levels_of, load_values, range_words, sample_bits, share_within
from support.logger import log
from support.pixels import to_pixels
from support.shapes import Shapes

CONSTANT = 2.0  # standard deviation, in grey levels, below which an image shows nothing
CLIPPED = 0.1  # share of values within the stated range, below which that is likely to be wrong
DARK = 32  # highest of 256 levels of all images, below which the range is likely to be wrong
SEVERAL = 8  # images, of which one may well be dark
IDENTICAL = 1.0  # mean difference of thumbnails, in grey levels


def check_on_first_rank(images: Images, alike: bool = True) -> None:
    """`check_images` on the first rank. Raises its error on all ranks."""
    with same_error_on_all_ranks():
        if is_main_process():
            check_images(images, alike=alike)


def open_checked(source: Source) -> tuple[Images, Images]:
    """`open_train_and_val` on all ranks, and `check_images` for both parts. Raises UserError."""
    train, val = on_all_ranks(open_train_and_val, source)
    with same_error_on_all_ranks():
        if is_main_process():
            warn_of_shared(train, val)
    for images in (train, val):
        check_on_first_rank(images, alike=False)
    return train, val


def warn_of_shared(train: Images, val: Images) -> None:
    """Log a warning if images of val are in train too: the same files, or copies under other names."""
    if digest(train) == digest(val):
        log("warning: train and val are the same images: the accuracy says nothing about other images")
    elif not (isinstance(train, ImageFiles) and isinstance(val, ImageFiles)):
        return
    elif shared := shared_files(train.paths, val.paths):
        log(f"warning: {len(shared)} of {len(val)} images of val are in train too, e.g. {shared[0]}")
    elif copies := copied_files(train.paths, val.paths):
        first, second = copies[0]
        what = f"at least {len(copies)} of {len(val)} images of val are copies of images of train"
        log(f"warning: {what}: the accuracy may be too high; e.g. {first} and {second}")


def shared_files(train: Paths, val: Paths) -> list[str]:
    """The paths of val that are in train too, also by a relative path or a link to a folder."""
    folders = [{os.path.dirname(path) for path in paths} for paths in (train, val)]
    both = set().union(*folders)
    resolve = os.path.realpath if len(both) <= 10_000 else os.path.abspath  # links take calls to the system
    real = {folder: resolve(folder) for folder in both}
    if {real[folder] for folder in folders[0]}.isdisjoint(real[folder] for folder in folders[1]):
        return []

    def place(path: str) -> str:
        return os.path.join(real[os.path.dirname(path)], os.path.basename(path))

    known = set(map(place, train))
    return [os.path.normpath(path) for path in val if place(path) in known]


def copied_files(train: Paths, val: Paths, most: int = 10_000, seconds: float = 5.0) -> list[tuple[str, str]]:
    """Pairs of files of val and of train with the same bytes, among at most so many files of each.

    Reads files for about `seconds`.
    """
    end = time.monotonic() + seconds
    by_size: dict[int, list[int]] = {}
    for index in evenly_spread(len(train), most):
        by_size.setdefault(train.size(index), []).append(index)
    sizes = {index: val.size(index) for index in evenly_spread(len(val), most)}
    alike = [index for index, size in sizes.items() if size in by_size]
    middles: dict[tuple[int, bytes], int] = {}  # of train: the size, and bytes from the middle
    copies = []
    for index in [alike[i] for i in evenly_spread(len(alike), 1_000)]:
        if time.monotonic() > end:
            break
        size = sizes[index]
        for number in by_size.pop(size, []):  # once for all files of val that have this size
            if time.monotonic() < end:
                middles[size, train.middle(number, 4096)] = number
        other = middles.get((size, val.middle(index, 4096)))
        if other is None:
            continue
        content = val.middle(index, size)
        if content and content == train.middle(other, size):
            copies.append((val[index], train[other]))
    return copies


def check_images(images: Images, most: int = 200, seconds: float = 5.0, alike: bool = True) -> None:
    """Read up to `most` images, evenly spread, for about `seconds`; log a warning for each kind of fault.

    The faults: images that cannot be read, 16-bit values that use few bits or different numbers of bits,
    bands, transparency or pages that are dropped, images that are nearly constant, and, if `alike`, images
    that are nearly identical. Raises WrongFormat for an image of another format, UserError if no image has a
    value within the range that its format states.
    """
    if isinstance(images, Shapes):
        return
    spread = evenly_spread(len(images), most)
    random.Random(0).shuffle(spread)  # so that the images read in time are evenly spread too
    faults: dict[str, list[int]] = {}
    reasons: dict[int, str] = {}
    depths: dict[int, list[int]] = {}  # images by the bits that their 16-bit values use, as TIFFs state
    thumbnails, deepest, begun, checked = {}, 0, time.monotonic(), 0
    within = np.zeros(1)  # for each channel, the sum over images of the share of values within the range
    levels: set[int] = set()  # the lowest and the highest ones of the images
    for index in spread:
        if time.monotonic() - begun > seconds:
            break
        checked += 1
        try:
            stored, image = _stored_and_read(images, index)
        except WrongFormat:
            raise
        except Exception as error:  # a broken file can raise nearly anything
            faults.setdefault("cannot be read", []).append(index)
            reasons[index] = f" ({first_line(error)})"
            continue
        if stored.dropped:
            words = f"lose {stored.dropped}: the network sees red, green and blue"
            faults.setdefault(words, []).append(index)
        if stored.pages:
            faults.setdefault("have several pages or frames: only the first is read", []).append(index)
        if stored.largest is not None:
            depths.setdefault(stored.bits, []).append(index)
            if stored.bits == 16:
                deepest = max(deepest, stored.largest)
        within = within + stored.within
        levels |= {int(image.min()), int(image.max())}
        deviation, pooled = 0.0, []
        for channel in image:  # one at a time: floats take four times the memory
            values = channel[None].float()
            deviation = max(deviation, float(values.std(correction=0)))
            pooled.append(F.adaptive_avg_pool2d(values, 16))
        if deviation < CONSTANT:
            faults.setdefault("are nearly constant: check how they were converted", []).append(index)
        else:
            thumbnails[index] = torch.cat(pooled).flatten()
    read = checked - len(reasons)
    _check_range(images, within / max(read, 1), levels, read)
    faults |= _faults_of_depth(depths, deepest)
    if alike and thumbnails and (same := _identical(thumbnails)):
        faults["are nearly identical to another one: training learns from differences between images"] = same
    for words, indices in faults.items():
        example = sample_name(images, min(indices)) + reasons.get(min(indices), "")
        log(f"warning: {len(indices)} of {checked} checked images {words}; e.g. {example}")


def _check_range(images: Images, within: np.ndarray, levels: set[int], read: int) -> None:
    """Check how much of the values of the images that were read lies within the range of the format: a share
    for each channel.

    Raises UserError if all values become one level, and warns of channels with few values within.
    """
    limits = images.form.value_range if isinstance(images, ImageFiles) else None
    if not limits or not read:
        return
    where = f"--value_range {range_words(limits)}"
    if len(levels) == 1 and (within < CLIPPED).all():
        what = f"no value of {read} checked images lies within the range"
        raise UserError(what, where, "give another range, or auto")
    few = [(channel, share) for channel, share in enumerate(within.tolist(), 1) if share < CLIPPED]
    if few:
        shares = ", ".join(f"{100 * share:.2g} % in channel {channel}" for channel, share in few)
        log(f"warning: few values of {read} checked images lie within {where}: {shares}; others are clipped")
    elif read >= SEVERAL and max(levels) < DARK:
        what = f"the values of {read} checked images fill the lowest {100 * (max(levels) + 1) / 256:.2g} %"
        advice = "train with a smaller HIGH, or convert them"
        log(f"warning: {what} of {where}, so the network sees them dark: {advice}")


def _faults_of_depth(depths: dict[int, list[int]], deepest: int) -> dict[str, list[int]]:
    """The faults of 16-bit images, given by the bits that they state: few, or different numbers, are used."""
    faults, used = {}, deepest.bit_length()
    if 16 in depths and 0 < used <= 14:
        words = f"have 16 bits but use {used} of them (largest value {deepest}), so the network sees them "
        faults[words + f"dark: train with --value_range 0 {2**used - 1}, or convert them"] = depths[16]
    if len(depths) > 1:
        words = f"have 16 bits and state that they use {' or '.join(map(str, sorted(depths)))} of them, so "
        words += "equal values become different levels: train with --value_range, or convert them"
        faults[words] = sum(depths.values(), [])
    return faults


class Stored(NamedTuple):
    """What Pillow reads of an image before it is converted."""

    dropped: str = ""  # what the conversion to RGB drops
    largest: int | None = None  # value of a 16-bit image
    bits: int = 16  # that its values use, as a TIFF may state
    pages: bool = False  # whether there are several, or several frames
    within: np.ndarray = np.ones(1)  # for each channel, the share of values within the format's range


def _stored_and_read(images: Images, index: int) -> tuple[Stored, Tensor]:
    """Read an image as it is stored, if Pillow converts it, and as training sees it, uint8 (C, H, W)."""
    if isinstance(images, ImageFiles):
        path, content = images.paths.file(index)
        if limits := images.form.value_range:
            values = load_values(path, content, images.form.channels)
            levels = levels_of(values, images.form, path)
            return Stored(within=share_within(values, limits)), levels
        pixels = images.pixels(index)
        if not images.form.by_pillow or extension(path) in ARRAYS:
            return Stored(), pixels
        with open_file(path, content) as opened, Image.open(opened) as file:
            return _stored(file), pixels
    image = images[index][0]
    return Stored() if isinstance(image, Tensor) else _stored(image), to_pixels(image)


def _stored(file: Image.Image) -> Stored:
    reduced, bits = is_reduced(file), sample_bits(file)  # before it is loaded
    pages = getattr(file, "is_animated", False) and file.format != "MPO"  # a photograph and its previews
    largest = None
    if reduced:  # to the upper 8 bits
        largest, bits = 256 * int(np.asarray(file).max()) + 255, 16
    elif file.mode.startswith("I"):
        largest = int(np.asarray(file).max())
    return Stored(_dropped(file), largest, bits, pages)


def _dropped(file: Image.Image) -> str:
    """Describe what the conversion to RGB drops; "" if nothing."""
    bands = getattr(file, "tag_v2", {}).get(277, len(file.getbands()))  # TIFF's SamplesPerPixel
    if file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info:
        alpha = file.convert("RGBA").getchannel("A")
        return "transparency" if np.asarray(alpha).min() < 255 else ""
    return f"{bands - 3} of {bands} bands" if bands > 3 and file.mode != "CMYK" else ""


def _identical(thumbnails: dict[int, Tensor]) -> list[int]:
    """Indices of images whose thumbnail is nearly identical to another image's."""
    values = torch.stack([*thumbnails.values()])
    alike = torch.cdist(values, values, p=1) < IDENTICAL * values.shape[1]  # each to itself too
    return [index for index, count in zip(thumbnails, alike.sum(dim=1), strict=True) if count > 1]
