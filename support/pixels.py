"""The views of an image (paper, Section 3.2; colour and blur are those of BYOL).

First everything random is drawn, as numbers; then it is done. So a view depends on its random source
alone, and its colours can be changed where that is fastest: by the worker that loads the image, or for
whole batches on the device.

Pixels are changed as PIL changes them, up to rounding (tests/test_pixels.py says how far), but by
tensor operations, several times as fast.

Shapes: B images of one size, V views, H x W pixels.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.cache
def _pixel_statistics(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation in grey levels, (3, 1, 1) each, copied to the device once."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (mean, std))
    return mean.to(device), std.to(device)


def normalize(images: Tensor, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD) -> Tensor:
    """Grey levels (..., 3, H, W) -> float32, less the mean and divided by the deviation."""
    mean, std = _pixel_statistics(tuple(mean), tuple(std), images.device)
    return (images.float() - mean) / std


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image -> uint8 (3, H, W) that shares its memory order, which resizing likes best."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eval_transform(
    size: int = 224, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD
) -> Callable[[Image.Image], Tensor]:
    """Resize to 8/7 of `size`, crop the centre, normalise: an image -> float32 (3, size, size)."""
    return transforms.Compose(
        [
            transforms.Resize(round(size * 256 / 224), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
            functools.partial(normalize, mean=mean, std=std),
        ]
    )


class View(NamedTuple):
    """All that is random in one view."""

    size: int  # pixels per side
    box: tuple[int, int, int, int]  # of the image: top, left, height, width
    flip: bool
    colour: list[float]  # COLOUR_NUMBERS of them, for `recolour`


# In `View.colour`: four times an adjustment and its amount; grey; blur radius; solarise.
COLOUR_NUMBERS = 11
GREY, BLUR, SOLARIZE = 8, 9, 10


def cut(pixels: Tensor, view: View) -> Tensor:
    """Crop, resize (bicubic, antialiased) and flip: uint8 (3, H, W) -> uint8 (3, size, size)."""
    top, left, height, width = view.box
    crop = pixels[None, :, top : top + height, left : left + width]
    crop = F.interpolate(crop, size=(view.size, view.size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if view.flip else crop


@torch.inference_mode()
def recolour(images: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """Jitter, drop, blur and solarise colours, each image's its own way: uint8 (B, 3, H, W) -> float32.

    There is a `View.colour` for each image. The result has whole grey levels.
    """
    images = images.float()
    for place in range(0, 8, 2):
        for which in sorted({row[place] for row in rows} - {-1.0}):
            amounts = [row[place + 1] if row[place] == which else None for row in rows]
            _change(images, amounts, ADJUSTMENTS[int(which)])
    _change(images, [row[GREY] or None for row in rows], drop_colour)
    _change(images, [row[BLUR] or None for row in rows], gaussian_blur)
    images.round_()
    _change(images, [row[SOLARIZE] or None for row in rows], solarize)
    return images


def normalized_views(views: list[Tensor], colours: Tensor) -> list[Tensor]:
    """V batches of uint8 views (B, 3, H, W), on the device -> normalised, float32.

    `colours` (B, V, 11), on the CPU, says what loading has left to do to them; (B, V, 0) for nothing.
    """
    if not colours.shape[-1]:
        return [normalize(view) for view in views]
    done = []
    for _, group in itertools.groupby(range(len(views)), key=lambda v: views[v].shape):
        group = list(group)  # views of one size together
        rows = torch.cat([colours[:, v] for v in group]).tolist()
        batch = recolour(torch.cat([views[v] for v in group]), rows)
        done += normalize(batch).chunk(len(group))
    return done


def _change(images: Tensor, amounts: Sequence[float | None], change: Callable) -> None:
    """`change` images in place, each by its amount; None leaves it as it is."""
    rows = [i for i, amount in enumerate(amounts) if amount is not None]
    if len(rows) == len(images):
        change(images, amounts)
    elif rows:
        index = torch.tensor(rows).to(images.device, non_blocking=True)
        part = images[index]
        change(part, [amounts[i] for i in rows])
        images[index] = part


def _each(amounts: Sequence[float], images: Tensor) -> Tensor | float:
    """One number per image, to be combined with images; a plain number, which is faster, if one."""
    if len(amounts) == 1:
        return amounts[0]
    return torch.tensor(amounts).to(images.device, non_blocking=True).view(-1, 1, 1, 1)


LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


@functools.cache
def _luma_weights(device: torch.device) -> Tensor:
    """`LUMA`, copied to the device once."""
    return torch.tensor(LUMA).to(device)


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness(images: Tensor, factors: Sequence[float]) -> None:
    """Scale the levels."""
    images.mul_(_each(factors, images)).clamp_(max=255)


def adjust_contrast(images: Tensor, factors: Sequence[float]) -> None:
    """Scale the distance from the mean luma."""
    mean = (images.mean(dim=(2, 3)) @ _luma_weights(images.device)).round_()
    torch.lerp(mean.view(-1, 1, 1, 1), images, _each(factors, images), out=images).clamp_(0, 255)


def adjust_saturation(images: Tensor, factors: Sequence[float]) -> None:
    """Scale the distance from each pixel's luma."""
    torch.lerp(luma(images), images, _each(factors, images), out=images).clamp_(0, 255)


def adjust_hue(images: Tensor, shifts: Sequence[float]) -> None:
    """Turn the hue by a share of the circle, at most 1/6 either way, keeping each pixel's extremes.

    On the hue circle each channel goes through max, a linear slope, min, and a slope back. Extended
    beyond the plateaus, its slope is at 2 x - middle (the middle channel at itself); turned by s it falls
    or rises by 6 s (max - min), against the sign of the difference of the two other channels; clamping
    gives back the plateaus. No division, no cases.
    """
    red, green, blue = images.split(1, dim=1)
    less, more = torch.minimum(red, green), torch.maximum(red, green)
    low, middle = torch.minimum(less, blue), torch.maximum(less, torch.minimum(more, blue))
    high = torch.maximum(more, blue)
    step = (high - low).mul_(6 * _each(shifts, images))
    falls = torch.cat([green - blue, blue - red, red - green], dim=1).sign_()
    slope = images.mul_(2).sub_(torch.addcmul(middle, falls, step, out=falls))
    torch.clamp(slope, low, high, out=images)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def drop_colour(images: Tensor, _) -> None:
    """Luma in all channels."""
    images.copy_(luma(images).expand_as(images))


def solarize(images: Tensor, _) -> None:
    """From 128 on, 255 - x; below, x."""
    images.sub_(127.5).abs_().neg_().add_(127.5)


def gaussian_blur(images: Tensor, radii: Sequence[float]) -> None:
    """PIL's Gaussian blur with these standard deviations (in pixels); edges are continued."""
    kernels = [_blur_kernel(radius) for radius in radii]
    for length in {len(kernel) for kernel in kernels}:
        _change(images, [kernel if len(kernel) == length else None for kernel in kernels], _convolve)


def _blur_kernel(radius: float) -> list[float]:
    """What three box filters in a row make, which PIL takes for a Gaussian: Gwosdek et al. (2011),
    "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering".
    """
    variance = radius * radius / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([edge, *[1.0] * (2 * whole + 1), edge])
    box /= box.sum()
    kernel = np.convolve(np.convolve(box, box), box)
    while kernel[0] < 1e-3 and len(kernel) > 3:  # less than half a grey level in all
        kernel = kernel[1:-1]
    return (kernel / kernel.sum()).tolist()


def _convolve(images: Tensor, kernels: Sequence[list[float]]) -> None:
    """Filter along both sides, image by image: (B, 3, H, W), kernels of one odd length."""
    reach = len(kernels[0]) // 2
    taps = [_each(weights, images) for weights in zip(*kernels, strict=True)]
    padded = F.pad(images, [reach] * 4, mode="replicate")
    for dim in (3, 2):
        size, stride = list(padded.shape), list(padded.stride())
        size[dim] -= 2 * reach
        size.insert(2, len(taps))
        stride.insert(2, stride[dim])
        shifted = padded.as_strided(size, stride).unbind(2)  # one view of the images for each tap
        total = shifted[reach] * taps[reach]
        for i, tap in enumerate(taps):
            if i == reach:
                continue
            if isinstance(tap, float):
                total.add_(shifted[i], alpha=tap)
            else:
                total.addcmul_(shifted[i], tap)
        padded = total
    images.copy_(total)
