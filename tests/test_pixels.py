import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch.utils.data import default_collate
from torchvision import transforms

from support import pixels as px
from support.errors import UserError
from support.pixels import to_pixels
from tests.conftest import picture, ramps, slopes
from utils import DataAugmentationDINO

# ---- images in, normalised pixels out


def test_normalisation_and_evaluation_transform_equal_torchvisions():
    image = picture(size=(80, 60))
    reference = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(px.IMAGENET_MEAN, px.IMAGENET_STD),
        ]
    )
    torch.testing.assert_close(px.eval_transform(224)(image), reference(image), rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_become_the_same_input_as_their_image(mode):
    """torchvision resizes tensors to other levels, at hard edges by tens of them."""
    bits = np.random.default_rng(0).integers(0, 2, (61, 97, 3), dtype=np.uint8)
    image = Image.fromarray(255 * bits).convert(mode)
    channels = len(image.getbands())
    transform = px.eval_transform((24, 40), (0.5,) * channels, (0.25,) * channels)
    assert torch.equal(transform(TF.pil_to_tensor(image)), transform(image))


def test_the_transform_refuses_pixels_that_are_no_levels():
    """In [0, 1], all images would look black to the network."""
    with pytest.raises(ValueError, match=r"takes uint8 \(3, H, W\), not torch.float32 \(3, 8, 8\)"):
        px.eval_transform(8)(torch.rand(3, 8, 8))


def test_the_transform_names_what_it_does_not_take():
    for channels, shape in (3, (3, 3, 8, 8)), (4, (4, 8)), (1, (1, 8)):
        words = re.escape(f"takes uint8 ({channels}, H, W), not torch.uint8 {shape}")
        with pytest.raises(ValueError, match=words):
            px.eval_transform(8, (0.5,) * channels, (0.3,) * channels)(torch.zeros(shape, dtype=torch.uint8))
    for transform in px.eval_transform(8), to_pixels:
        with pytest.raises(ValueError, match="takes a PIL image or uint8 .C, H, W., not ndarray"):
            transform(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="takes uint8 .4, H, W., not ndarray"):
        px.eval_transform(8, (0.5,) * 4, (0.3,) * 4)(np.zeros((8, 8, 4), np.uint8))


@pytest.mark.parametrize("shape", [(80, 60), (61, 97), (50, 50), (37, 200)])
def test_a_square_is_cut_as_by_torchvision(shape):
    image = picture(size=shape)
    theirs = transforms.Compose(
        [transforms.Resize(37, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32), to_pixels]
    )
    for size in (32, (32, 32)):
        assert torch.equal(px.eval_transform(size)(image), px.normalize(theirs(image)))


@pytest.mark.parametrize("size", [(64, 32), (32, 64)])
@pytest.mark.parametrize("shape", [(120, 100), (30, 110), (110, 30)])
def test_a_rectangle_is_cut_from_the_centre_without_distortion(size, shape):
    """7/8 of the image along one side, as for a square; less along the other."""
    view = px.denormalize(px.eval_transform(size)(ramps(shape)))
    assert view.shape == (3, *size)
    (_, red), (green, _) = slopes(view)
    assert red == pytest.approx(green, rel=0.03)
    shares = red * size[1] / 2 / shape[0], green * size[0] / 2 / shape[1]
    assert max(shares) == pytest.approx(7 / 8, abs=0.03)
    assert view[:2].float().mean((1, 2)).tolist() == pytest.approx([side - 1 for side in shape], abs=2)


def test_denormalisation_is_the_inverse():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(3, 16, 16)
    for statistics in ((), ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))):
        assert torch.equal(px.denormalize(px.normalize(levels, *statistics), *statistics), levels)


def test_levels_out_of_range_are_clipped():
    assert px.denormalize(torch.tensor([-9.0, 9.0]).expand(3, 1, 2)).unique().tolist() == [0, 255]


def test_normalisation_takes_other_statistics():
    mean, std = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]
    pixels = to_pixels(picture())
    reference = transforms.Normalize(mean, std)
    expected = reference(pixels / 255)
    torch.testing.assert_close(px.normalize(pixels, mean, std), expected, rtol=0, atol=2e-6)
    (view,) = px.normalized_views([pixels[None, None]], (), mean, std)
    torch.testing.assert_close(view[0], expected, rtol=0, atol=2e-6)
    square = picture(size=(37, 37))  # 8/7 of 32
    expected = reference(TF.center_crop(to_pixels(square) / 255, [32, 32]))
    torch.testing.assert_close(px.eval_transform(32, mean, std)(square), expected, rtol=0, atol=2e-6)


def test_images_of_any_mode_are_read_as_their_colours():
    image = picture(size=(40, 40))
    transform = px.eval_transform(32)
    grey, palette = image.convert("L"), image.quantize(200)
    alpha = image.copy()
    alpha.putalpha(3)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)
    for other, rgb in (
        (grey, grey.convert("RGB")),
        (palette, palette.convert("RGB")),
        (alpha, image),
        (grey.convert("LA"), grey.convert("RGB")),
        (deep, grey.convert("RGB")),
        (deep.convert("I"), grey.convert("RGB")),
    ):
        assert torch.equal(to_pixels(other), to_pixels(rgb)), other.mode
        assert torch.equal(transform(other), transform(rgb)), other.mode


@pytest.mark.parametrize("value", [70_000, -1])
def test_values_without_an_agreed_range_are_refused(value):
    with pytest.raises(ValueError, match="32-bit"):
        px.to_rgb(Image.new("I", (4, 4), value))
    with pytest.raises(ValueError, match="floating-point"):
        px.to_rgb(Image.new("F", (4, 4), 0.5))


def test_wide_values_and_other_channels_never_become_wrong_levels():
    values = Image.fromarray(np.array([[0, 4095, 5000]], np.uint16))  # a checked sample used 12 bits
    assert to_pixels(px.to_rgb(values, bits=12))[0].tolist() == [[0, 255, 255]]
    for image in (values, Image.new("F", (4, 4), 0.5)):
        with pytest.raises(ValueError, match="the network needs 8-bit levels"):
            px.require_levels(image)
    with pytest.raises(ValueError, match=r"takes uint8 \(4, H, W\), not a RGB image"):
        px.in_channels(picture(), 4)


# ---- each operation against PIL's, on a photograph's worth of colours and on noise


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    return [picture(), Image.fromarray(noise)]


PLAIN = px.Colour(order=[-1] * 4, amounts=[0.0] * 4, grey=False, blur=0.0, solarize=False)


def jitters(adjust: Callable, *amounts: float) -> list[px.Colour]:
    order = [px.ADJUSTMENTS.index(adjust), -1, -1, -1]
    return [PLAIN._replace(order=order, amounts=[amount, 0, 0, 0]) for amount in amounts]


OPERATIONS = {  # colours, torchvision's operation with their amount, largest and mean difference
    "brightness": (jitters(px.adjust_brightness, 0.6, 0.93, 1.4), TF.adjust_brightness, 1, 0.55),
    "contrast": (jitters(px.adjust_contrast, 0.6, 0.93, 1.4), TF.adjust_contrast, 1, 0.55),
    "saturation": (jitters(px.adjust_saturation, 0.8, 0.97, 1.2), TF.adjust_saturation, 1, 0.55),
    # PIL's hue goes through 8-bit HSV, which is coarse: the next test compares with the exact one.
    "hue": (jitters(px.adjust_hue, -0.1, -0.004, 0.05, 0.1), TF.adjust_hue, 15, 1.6),
    "grey": ([PLAIN._replace(grey=True)], lambda image, _: TF.rgb_to_grayscale(image, 3), 1, 0.01),
    # PIL rounds down in each of six passes, and continues the edges in each: corners of noise differ.
    "blur": (
        [PLAIN._replace(blur=radius) for radius in (0.1, 0.5, 1.0, 1.41, 1.42, 2.0)],
        lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
        40,
        1.1,
    ),
    "solarisation": ([PLAIN._replace(solarize=True)], lambda image, _: TF.solarize(image, 128), 0, 0.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pils_up_to_rounding(name):
    colours, reference, largest, mean = OPERATIONS[name]
    for colour in colours:
        amount = colour.blur or colour.amounts[0]
        for image in pictures():
            ours = px.apply_colours(to_pixels(image)[None], [colour])
            theirs = to_pixels(reference(image, amount)).float()
            difference = (ours[0] - theirs).abs()
            print(f"{name} {amount}: largest {difference.max():.0f}, mean {difference.mean():.3f}")
            assert difference.max() <= largest and difference.mean() <= mean
            if name == "blur":
                assert difference[:, 6:-6, 6:-6].max() <= 3  # away from the edges


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-0.5, 0.5), seed=st.integers(0, 2**31))
def test_hue_equals_the_exact_one(shift, seed):
    levels = torch.tensor([0.0, 1.0, 100.0, 254.0, 255.0])  # ties and greys among them
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.cat(
        [
            torch.randint(256, (1, 3, 8, 20), generator=generator).float(),
            levels[torch.randint(5, (1, 3, 8, 20), generator=generator)],
        ]
    )
    expected = TF.adjust_hue(pixels / 255, shift) * 255
    px.adjust_hue(pixels, [shift, shift])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (96, 64)])
@pytest.mark.parametrize("box", [(3, 5, 200, 260), (20, 0, 150, 120), (0, 9, 40, 31)])
def test_cutting_equals_pils(size, box):
    """Up to two levels; PIL also clips between its two passes, which shows in noise."""
    noise = pictures()[1].resize((300, 220), Image.Resampling.NEAREST)
    for image, largest in ((picture(size=(300, 220)), 2), (noise, 10)):
        top, left, height, width = box
        upright = image.crop((left, top, left + width, top + height))
        for flip, vflip, quarters in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 3)):
            view = px.View(size, box, bool(flip), PLAIN, bool(vflip), quarters)
            ours, before = px.crop_and_resize(to_pixels(image), view), size if quarters else size[::-1]
            theirs = upright.resize(before, Image.Resampling.BICUBIC).rotate(90 * quarters, expand=True)
            theirs = TF.hflip(theirs) if flip else theirs
            theirs = TF.vflip(theirs) if vflip else theirs
            difference = (ours.int() - to_pixels(theirs).int()).abs()
            print(f"crop {box} to {size}: largest {difference.max()}, mean {difference.float().mean():.3f}")
            assert difference.max() <= largest and difference.float().mean() < 0.3


def test_a_batch_changes_its_colours_image_by_image():
    views = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 30, 32, 32).draw(60, 45, random.Random(1))
    crops, colours = [px.crop_and_resize(to_pixels(picture()), v) for v in views], [v.colour for v in views]
    together = px.apply_colours(torch.stack(crops), colours)
    apart = [px.apply_colours(crop[None], [colour])[0] for crop, colour in zip(crops, colours, strict=True)]
    difference = (together - torch.stack(apart)).abs()
    assert difference.max() <= 1 and difference.mean() < 1e-3
    assert together.min() >= 0 and together.max() <= 255 and torch.equal(together, together.round())
    assert sum(colour.order[0] >= 0 for colour in colours) > 15


def test_views_of_a_batch_come_in_their_order_with_their_own_colours():
    """As a loader makes the batch: 2 images, views of two sizes."""
    augment, images = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 3, 24, 16), (picture(1), picture(2))
    samples = [augment.crops(to_pixels(image), random.Random(seed)) for seed, image in enumerate(images)]
    views, colours = default_collate(samples)
    fields = dict(zip(px.Colour._fields, colours, strict=True))
    assert fields["order"].shape == (2, 5, 4)
    assert fields["amounts"].dtype == torch.float64  # as they were drawn
    done = px.normalized_views(views, colours)
    assert [tuple(view.shape) for view in done] == [(2, 3, 24, 24)] * 2 + [(2, 3, 16, 16)] * 3
    for seed, image in enumerate(images):
        for ours, expected in zip(done, augment(image, random.Random(seed)), strict=True):
            difference = (ours[seed] - expected).abs() * 255 * 0.229
            assert difference.max() < 1.2 and difference.mean() < 0.01


def test_levels_other_than_uint8_are_refused():
    """Levels in [0, 1] would become black views."""
    levels = torch.zeros(20, 20, 3, dtype=torch.uint8)  # channels last, which would be 20 channels
    for pixels in (torch.rand(3, 8, 8), levels[..., 0], levels):
        with pytest.raises(ValueError, match=r"takes a PIL image or uint8 .C, H, W., not torch\."):
            to_pixels(pixels)


def test_gradients_flow_through_a_normalisation_that_inference_used_first():
    scale = ((0.123,) * 3, (0.456,) * 3)  # of no other test
    with torch.inference_mode():
        px.normalize(torch.zeros(3, 1, 1), *scale)
    pixels = torch.zeros(3, 1, 1, requires_grad=True)
    px.normalize(pixels, *scale).square().sum().backward()
    assert pixels.grad is not None


def test_views_of_other_channels_than_the_networks_are_refused():
    views = [torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8)]
    with pytest.raises(UserError, match="images have 3 channels, the network takes 4 .--in_chans"):
        px.normalized_views(views, (), [0.5] * 4, [0.2] * 4)
