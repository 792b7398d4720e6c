"""Operations on pixels: reading modes, crop and resize, colours, blur, normalisation.

`utils.DataAugmentationDINO` first draws the random numbers of a view (`View`); the functions here then make
the view from them. So colours can change where that is fastest: in the worker that loads the image, or on
the device, in batches.

Colours change as in PIL, up to rounding (tests/test_pixels.py states the differences), but with tensor
operations, which are several times as fast.

Shapes: B images of one size, V views of one size, H x W pixels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import get_dimensions, pil_to_tensor, resize, to_pil_image

from support.errors import UserError, counted

T = TypeVar("T")

AnyImage = Image.Image | Tensor  # a tensor is uint8 (C, H, W)
Size = int | Sequence[int]  # of an image in pixels: the side of a square, or height and width

# ---------------------------------------------------------------------------------------------
# Images in, normalised pixels out
# ---------------------------------------------------------------------------------------------

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _kind_of(image) -> str:
    """What an image is, for a message."""
    if isinstance(image, Tensor):
        return f"{image.dtype} {tuple(image.shape)}"
    return f"a {image.mode} image" if isinstance(image, Image.Image) else type(image).__name__


def to_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
    """Convert an image of any mode to RGB, 8 bits. Transparency is dropped; the pixels below it are kept.

    16-bit grey values that use `bits` bits keep the upper 8 of them; PIL would clip nearly all values to
    white. Raises ValueError for values without an agreed range: floating point, or outside 0..65535; also for
    what is no PIL image.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"takes a PIL image or uint8 (C, H, W), not {_kind_of(image)}")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("32-bit values have no agreed range")
        levels = np.minimum(values.astype(np.int64) >> (bits - 8), 255)
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point values have no agreed range")
    if "transparency" in image.info:  # PIL warns of it in a palette
        image = image.convert("RGBA")
    return image.convert("RGB")


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, on CUDA without waiting for the copy.

    Without waiting, MPS may read the memory of a tensor that is gone
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


MOST_CHANNELS = 16  # of an image


def to_pixels(image: AnyImage) -> Tensor:
    """An image of any mode -> uint8 (3, H, W), channels last in memory, which is fastest to resize.

    A uint8 tensor (C, H, W) is returned unchanged. Raises ValueError for others, e.g. of levels in [0, 1], or
    (H, W, C) of more than 16 rows.
    """
    if not isinstance(image, Tensor):
        return pil_to_tensor(to_rgb(image))
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) > MOST_CHANNELS:
        raise ValueError(f"takes a PIL image or uint8 (C, H, W), not {_kind_of(image)}")
    return image


def as_tensor(image: AnyImage) -> Tensor:
    """A PIL image -> uint8 (C, H, W); a tensor is returned unchanged."""
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def in_channels(image: AnyImage, channels: int) -> AnyImage:
    """An image of any mode as a PIL image: RGB, or grey for one channel.

    For other numbers of channels, takes and returns a uint8 tensor (C, H, W). Raises ValueError for a tensor
    of another type or number of channels.
    """
    if (
        isinstance(image, Tensor)
        and image.ndim == 3
        and len(image) == channels
        and image.dtype == torch.uint8
    ):
        # torchvision would resize the tensor to other levels than the same pixels as a PIL image
        return to_pil_image(image) if channels in (1, 3) else image
    if isinstance(image, Tensor) or channels not in (1, 3):
        raise ValueError(f"the network takes uint8 ({channels}, H, W), not {_kind_of(image)}")
    return to_rgb(image) if channels == 3 else to_rgb(image).convert("L")


def require_levels(image: AnyImage) -> AnyImage:
    """Return an image of 8 bits, or a tensor, unchanged. Raises ValueError for wider values."""
    if isinstance(image, Image.Image) and image.mode.startswith(("I", "F")):
        what = f"the network needs 8-bit levels, and this image ({image.mode}) has other values"
        raise ValueError(f"{what}: read the file by load_pixels(path, form=frozen.form)")
    return image


@functools.cache
def _grey_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Scale values per channel from [0, 1] to [0, 255]; (C, 1, 1), copied to the device once."""
    with torch.inference_mode(False):  # the first call may be in it, a later one need gradients
        return (torch.tensor(values).view(-1, 1, 1) * 255).to(device)


def normalize(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Grey levels (..., C, H, W) -> float32 (x / 255 - mean) / std, on the images' device."""
    center, scale = (_grey_levels(tuple(values), images.device) for values in (mean, std))
    return (images.float() - center) / scale


def denormalize(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Normalised float32 (..., C, H, W) -> uint8 grey levels, the inverse of `normalize`."""
    center, scale = (_grey_levels(tuple(values), images.device) for values in (mean, std))
    return (images * scale + center).round().clamp(0, 255).to(torch.uint8)


def height_and_width(size: Size) -> tuple[int, int]:
    """The two sides of an image of this size."""
    return (size[0], size[-1]) if isinstance(size, Sequence) else (size, size)


def size_words(size: Size) -> str:
    """A size for a message: "224", or "64 x 32 (H x W)"."""
    return "{} x {} (H x W)".format(*size) if isinstance(size, Sequence) else str(size)


def resize_to_cover(image: AnyImage, height: int, width: int) -> AnyImage:
    """Resize an image, keeping its shape, to the smallest one that covers height x width pixels."""
    _, own_height, own_width = get_dimensions(image)
    if own_height * width <= own_width * height:
        size = [height, height * own_width // own_height]
    else:
        size = [width * own_height // own_width, width]
    return resize(image, size, transforms.InterpolationMode.BICUBIC)


def eval_transform(
    size: Size = 224, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Callable[[AnyImage], Tensor]:
    """Resize to cover 8/7 of `size`, crop the centre, normalise: an image -> float32 (C, H, W).

    C is the length of `mean`. Takes images of any mode that `to_rgb` takes, and uint8 pixels (C, H, W).
    """
    height, width = (round(side * 256 / 224) for side in height_and_width(size))
    return transforms.Compose(
        [
            functools.partial(in_channels, channels=len(mean)),
            functools.partial(resize_to_cover, height=height, width=width),
            transforms.CenterCrop(height_and_width(size)),
            as_tensor,
            functools.partial(normalize, mean=tuple(mean), std=tuple(std)),
        ]
    )


def rgb_transform(resize: Callable, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """`resize`, then normalise: an RGB image -> float32 (3, H, W)."""
    steps = [resize, transforms.PILToTensor(), functools.partial(normalize, mean=mean, std=std)]
    return transforms.Compose(steps)


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------


class Colour(NamedTuple):
    """How the colours of a view change, in this order."""

    order: Sequence[int]  # the jitter, first to fourth: indices into ADJUSTMENTS, or -1 for none
    amounts: Sequence[float]  # the argument of each of the four
    grey: bool  # drop the colour
    blur: float  # standard deviation in pixels; 0 for none
    solarize: bool


class View(NamedTuple):
    """The random numbers of one view."""

    size: tuple[int, int]  # height and width in pixels
    box: tuple[int, int, int, int]  # of the image: top, left, height, width
    flip: bool  # left and right
    colour: Colour
    vflip: bool = False  # top and bottom
    quarters: int = 0  # quarter turns, counterclockwise, before the flips


def stack_colours(colours: Sequence[Colour]) -> list[Tensor]:
    """V `Colour`s -> one tensor (V, ...) for each field."""
    # NumPy keeps the amounts in float64, as they were drawn.
    return [torch.from_numpy(np.array(field)) for field in zip(*colours, strict=True)]


def crop_and_resize(pixels: Tensor, view: View) -> Tensor:
    """Crop, resize (bicubic, antialiased), turn and flip: uint8 (C, H, W) -> uint8 (C, *view.size)."""
    top, left, height, width = view.box
    crop = pixels[None, :, top : top + height, left : left + width]
    size = view.size[::-1] if view.quarters % 2 else view.size  # before the turn
    crop = F.interpolate(crop, size=size, mode="bicubic", antialias=True)[0]
    crop = crop.rot90(view.quarters, (-2, -1)) if view.quarters else crop
    sides = [-1] * view.flip + [-2] * view.vflip
    return crop.flip(sides) if sides else crop


@torch.inference_mode()
def apply_colours(images: Tensor, colours: Sequence[Colour]) -> Tensor:
    """Change each image by its `Colour`: uint8 (B, C, H, W) -> float32, whole grey levels from 0 to 255.

    What only RGB has is left out for other numbers of channels: hue, saturation and the loss of colour. Draws
    no random numbers, which a restart would not repeat: they are in `Colour`.
    """
    images = images.float()
    is_rgb = images.shape[1] == 3
    left_out = set() if is_rgb else {adjust_saturation, adjust_hue}
    for place in range(4):
        for which in sorted({colour.order[place] for colour in colours} - {-1}):
            amounts = [c.amounts[place] if c.order[place] == which else None for c in colours]
            if ADJUSTMENTS[which] not in left_out:
                _change(images, amounts, ADJUSTMENTS[which])
    if is_rgb:
        _change(images, [colour.grey or None for colour in colours], drop_colour)
    _change(images, [colour.blur or None for colour in colours], gaussian_blur)
    images.round_()
    _change(images, [colour.solarize or None for colour in colours], solarize)
    return images.clamp_(0, 255)


def normalized_views(
    views: Sequence[Tensor],
    colours: Sequence[Tensor] = (),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> list[Tensor]:
    """Apply the colours to uint8 views on the device and normalise: a list of all views, (B, C, H, W).

    `views` has one tensor (B, V, C, H, W) for each size. `colours`, on the CPU, are the changes still to
    make: one tensor (B, number of views, ...) for each field of `Colour`; empty if they are done.
    """
    done: list[Tensor] = []
    for part in views:
        count, first = part.shape[1], len(done)
        if part.shape[2] not in (1, len(mean)):  # images of one's own Dataset
            what = f"images have {counted(part.shape[2], 'channel')}, the network takes {len(mean)}"
            raise UserError(what, "--in_chans", "change the images or the flag")
        part = part.transpose(0, 1).flatten(0, 1)  # (V * B, C, H, W)
        if colours:
            fields = (field[:, first : first + count].transpose(0, 1).flatten(0, 1) for field in colours)
            rows = zip(*(field.tolist() for field in fields), strict=True)
            part = apply_colours(part, [Colour(*row) for row in rows])
        # The layout that a GPU's convolutions use; a ResNet-50 trains almost twice as fast (docs/gpu.md). On
        # MPS, gradients of pools and batch norms are then wrong (https://github.com/pytorch/pytorch/issues/175190).
        if part.device.type != "mps":
            part = part.contiguous(memory_format=torch.channels_last)
        done += normalize(part, mean, std).chunk(count)
    return done


def _change(
    images: Tensor, amounts: Sequence[T | None], change: Callable[[Tensor, Sequence[T]], None]
) -> None:
    """`change` images in place, each by its amount; None leaves it as it is."""
    rows = [i for i, amount in enumerate(amounts) if amount is not None]
    given = [amount for amount in amounts if amount is not None]
    if len(rows) == len(images):
        change(images, given)
    elif rows:
        index = copy_to(torch.tensor(rows), images.device)
        part = images[index]
        change(part, given)
        images[index] = part


def _each(amounts: Sequence[float], images: Tensor) -> Tensor | float:
    """One number per image, to be combined with images; for a single image a float, which is faster."""
    if len(amounts) == 1:
        return amounts[0]
    return copy_to(torch.tensor(amounts), images.device).view(-1, 1, 1, 1)


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
    """Scale the distance from the mean luma; without RGB, from the mean over the channels."""
    means = images.mean(dim=(2, 3))
    mean = (means @ _luma_weights(images.device) if means.shape[1] == 3 else means.mean(dim=1)).round_()
    torch.lerp(mean.view(-1, 1, 1, 1), images, _each(factors, images), out=images).clamp_(0, 255)


def adjust_saturation(images: Tensor, factors: Sequence[float]) -> None:
    """Scale the distance from each pixel's luma."""
    torch.lerp(luma(images), images, _each(factors, images), out=images).clamp_(0, 255)


def adjust_hue(images: Tensor, shifts: Sequence[float]) -> None:
    """Turn the hue by a share of the circle, keeping each pixel's extremes."""
    turns = math.ceil(6 * max(abs(shift) for shift in shifts))
    for _ in range(turns):
        _turn_hue(images, [shift / turns for shift in shifts])


def _turn_hue(images: Tensor, shifts: Sequence[float]) -> None:
    """`adjust_hue` by at most 1/6 either way.

    On the hue circle each channel goes through max, a linear slope, min, and a slope back. Extended
    beyond the plateaus, the slope has the value 2 x - middle (for the middle channel, x). A turn by s
    changes it by 6 s (max - min), against the sign of the difference of the two other channels. Clamping
    restores the plateaus. This needs neither divisions nor cases.
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
    """Set all channels to the luma."""
    images.copy_(luma(images).expand_as(images))


def solarize(images: Tensor, _) -> None:
    """Invert the levels from 128 on: x becomes 255 - x."""
    images.sub_(127.5).abs_().neg_().add_(127.5)


def gaussian_blur(images: Tensor, radii: Sequence[float]) -> None:
    """Blur as PIL's Gaussian blur, with these standard deviations in pixels; edges are replicated."""
    kernels = [_blur_kernel(radius) for radius in radii]
    for length in {len(kernel) for kernel in kernels}:
        _change(images, [kernel if len(kernel) == length else None for kernel in kernels], _convolve)


def _blur_kernel(radius: float) -> list[float]:
    """The kernel of three box filters in a row, PIL's approximation of a Gaussian: Gwosdek et al. (2011),
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
    """Filter along both sides, image by image: (B, C, H, W), kernels of one odd length."""
    reach = len(kernels[0]) // 2
    taps = [_each(weights, images) for weights in zip(*kernels, strict=True)]
    padded = F.pad(images, [reach] * 4, mode="replicate")
    for dim in (3, 2):
        shifted = padded.unfold(dim, len(taps), 1).unbind(-1)  # one view of the images for each tap
        total = shifted[reach] * taps[reach]
        for i, tap in enumerate(taps):
            if i == reach:
                continue
            if isinstance(tap, float):
                total.add_(shifted[i], alpha=tap)
            else:
                total.addcmul_(shifted[i], tap)
        padded = total
    images.copy_(padded)
