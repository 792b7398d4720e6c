import math
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision import transforms

import utils
from support import pixels as px
from support.pixels import to_pixels
from utils import DataAugmentationDINO


def picture(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    """A smooth colourful image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def draw_views(image: Image.Image, draws: int, **kwargs) -> list[torch.Tensor]:
    """For each kind of view (global 1, global 2, local), `draws` of them: (draws, 3, H, W)."""
    settings = dict(
        global_crops_scale=(1, 1),
        local_crops_scale=(1, 1),
        local_crops_number=1,
        global_crops_size=image.width,
        local_crops_size=image.width,
    )
    augment = DataAugmentationDINO(**(settings | kwargs))
    draws = [augment.uint8_views(to_pixels(image), random.Random(seed)) for seed in range(draws)]
    return [torch.stack(views) for views in zip(*draws, strict=True)]


def is_close_share(share: float, p: float, draws: int) -> bool:
    """Within four standard errors of a probability."""
    return abs(share - p) <= 4 * math.sqrt(p * (1 - p) / draws)


def test_views_have_the_published_number_order_and_sizes():
    views = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 8)(picture())
    assert [tuple(v.shape) for v in views] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
    assert all(v.dtype == torch.float32 for v in views)


def test_each_view_is_cut_at_its_own_scale():
    augment, rng = DataAugmentationDINO((0.5, 1), (0.05, 0.2), 3, 64, 32), random.Random(0)
    draws = [
        [box[2] * box[3] / (500 * 400) for _, box, *_ in augment.draw(500, 400, rng)] for _ in range(300)
    ]
    shares = np.array(draws)
    assert 0.48 < shares[:, :2].min() < 0.55 and shares[:, :2].max() > 0.9
    assert 0.045 < shares[:, 2:].min() < 0.06 and 0.18 < shares[:, 2:].max() < 0.21


def test_amounts_cover_their_ranges_and_adjustments_come_in_any_order():
    jitter, rng = utils.ColorJitter(p=1), random.Random(0)
    rows = np.array([jitter.draw(rng) for _ in range(4000)])
    assert len(np.unique(rows[:, ::2], axis=0)) == 24
    for which, ends in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        amounts = rows[:, 1::2][rows[:, ::2] == which]
        assert (amounts.min(), amounts.max()) == pytest.approx(ends, abs=0.01)
    radii = [utils.GaussianBlur(1).draw(rng) for _ in range(4000)]
    assert (min(radii), max(radii)) == pytest.approx((0.1, 2), abs=0.01)


def test_solarise_one_fifth_of_the_second_view_only():
    white = Image.new("RGB", (16, 16), "white")  # jitter leaves it above 128, solarising does not
    shares = [(v.float().mean((1, 2, 3)) < 128).float().mean().item() for v in draw_views(white, 600)]
    assert shares[0] == 0 and shares[2] == 0 and is_close_share(shares[1], 0.2, 600)


def test_blur_always_sometimes_half_the_time():
    noise = np.random.default_rng(0).choice([64, 192], (16, 16)).astype(np.uint8)
    image = Image.fromarray(noise).convert("RGB")  # two grey levels, more once blurred
    shares = []
    for views in draw_views(image, 600):
        blurred = [view.unique().numel() > 2 for view in views]
        shares.append(sum(blurred) / 600)
    # A radius below about 0.3 pixels, a tenth of the range, leaves no trace in 8 bits.
    seen = shares[0]
    assert seen > 0.8
    assert is_close_share(shares[1], 0.1 * seen, 600) and is_close_share(shares[2], 0.5 * seen, 600)


def test_flip_half_the_views():
    halves = Image.fromarray(np.repeat([[0] * 8 + [200] * 8], 16, axis=0).astype(np.uint8)).convert("RGB")
    for views in draw_views(halves, 400, local_crops_number=1)[::2]:  # unsolarised
        flipped = views[..., :4].float().mean((1, 2, 3)) > views[..., -4:].float().mean((1, 2, 3))
        assert is_close_share(flipped.float().mean().item(), 0.5, 400)


def test_grey_one_view_in_five():
    for views in draw_views(Image.new("RGB", (8, 8), (200, 60, 40)), 600):
        grey = (views[:, 0] == views[:, 1]).flatten(1).all(1) & (views[:, 1] == views[:, 2]).flatten(1).all(1)
        assert is_close_share(grey.float().mean().item(), 0.2, 600)


def test_jitter_four_views_in_five_within_its_ranges():
    grey = Image.new("RGB", (8, 8), (120, 120, 120))  # only brightness moves a grey image
    levels = draw_views(grey, 800)[0].float().mean((1, 2, 3))
    assert is_close_share((levels != 120).float().mean().item(), 0.8, 800)
    assert 0.6 * 120 - 1 <= levels.min() <= 80 and 160 <= levels.max() <= 1.4 * 120 + 1


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_crops_are_distributed_as_torchvisions(scale):
    width, height, draws = 500, 375, 3000
    crop, rng = utils.RandomResizedCrop(224, scale), random.Random(0)
    ours = torch.tensor([crop.draw(width, height, rng) for _ in range(draws)]).double()
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    draw = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, scale, (3 / 4, 4 / 3)) for _ in range(draws)]).double()
    shares = ours[:, 2] * ours[:, 3] / (width * height)
    assert scale[0] * 0.98 <= shares.min() and shares.max() <= min(1, scale[1] * 1.02)
    assert two_sample_z(ours, theirs) < 4  # top, left, height, width
    assert two_sample_z(ours**2, theirs**2) < 4
    other = torch.tensor([crop.draw(width, height, rng) for _ in range(draws)]).double() * 1.1
    assert two_sample_z(other, theirs) > 4  # the test would see a scale that is 10 % off


def two_sample_z(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of column means, in standard errors."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return ((a.mean(0) - b.mean(0)).abs() / error.clamp(min=1e-12)).max().item()


# ---- each operation against PIL's, on a photograph's worth of colours and on noise


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    return [picture(), Image.fromarray(noise)]


def jitter(which: int, amount: float) -> list[float]:
    return [which, amount, *[-1, 0.0] * 3, 0, 0, 0]


NO_JITTER = [-1, 0.0] * 4
OPERATIONS = {  # what `recolour` is told, what torchvision does to PIL's image, largest and mean difference
    "brightness": ([jitter(0, f) for f in (0.6, 0.93, 1.4)], TF.adjust_brightness, 1, 0.55),
    "contrast": ([jitter(1, f) for f in (0.6, 0.93, 1.4)], TF.adjust_contrast, 1, 0.55),
    "saturation": ([jitter(2, f) for f in (0.8, 0.97, 1.2)], TF.adjust_saturation, 1, 0.55),
    # PIL's hue goes through 8-bit HSV, which is coarse: the next test compares with the exact one.
    "hue": ([jitter(3, h) for h in (-0.1, -0.004, 0.05, 0.1)], TF.adjust_hue, 15, 1.6),
    "grey": ([[*NO_JITTER, 1, 0, 0]], lambda image, _: TF.rgb_to_grayscale(image, 3), 1, 0.01),
    # PIL rounds down in each of six passes, and continues the edges in each: corners of noise differ.
    "blur": (
        [[*NO_JITTER, 0, radius, 0] for radius in (0.1, 0.5, 1.0, 1.41, 1.42, 2.0)],
        lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
        40,
        1.1,
    ),
    "solarisation": ([[*NO_JITTER, 0, 0, 1]], lambda image, _: TF.solarize(image, 128), 0, 0.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pils_up_to_rounding(name):
    colours, reference, largest, mean = OPERATIONS[name]
    for colour in colours:
        amount = colour[px.BLUR] or colour[1]
        for image in pictures():
            ours = px.recolour(to_pixels(image)[None], [colour])
            theirs = to_pixels(reference(image, amount)).float()
            difference = (ours[0] - theirs).abs()
            print(f"{name} {amount}: largest {difference.max():.0f}, mean {difference.mean():.3f}")
            assert difference.max() <= largest and difference.mean() <= mean
            if name == "blur":
                assert difference[:, 6:-6, 6:-6].max() <= 3  # away from the edges


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-0.16, 0.16), seed=st.integers(0, 2**31))
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


@pytest.mark.parametrize("size", [224, 96])
@pytest.mark.parametrize("box", [(3, 5, 200, 260), (20, 0, 150, 120), (0, 9, 40, 31)])
def test_cutting_equals_pils(size, box):
    """Up to two levels; PIL also clips between its two passes, which shows in noise."""
    noise = pictures()[1].resize((300, 220), Image.Resampling.NEAREST)
    for image, largest in ((picture(size=(300, 220)), 2), (noise, 10)):
        top, left, height, width = box
        theirs = image.crop((left, top, left + width, top + height))
        theirs = theirs.resize((size, size), Image.Resampling.BICUBIC)
        for flip in (False, True):
            ours = px.cut(to_pixels(image), px.View(size, box, flip, []))
            difference = (ours.int() - to_pixels(TF.hflip(theirs) if flip else theirs).int()).abs()
            print(f"cut {box} to {size}: largest {difference.max()}, mean {difference.float().mean():.3f}")
            assert difference.max() <= largest and difference.float().mean() < 0.3


def test_a_batch_is_recoloured_image_by_image():
    augment = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 30, 32, 32)
    crops, colours = augment.crops(to_pixels(picture()), random.Random(1))
    rows = colours.tolist()
    together = px.recolour(torch.stack(crops), rows)
    apart = [px.recolour(crop[None], [row])[0] for crop, row in zip(crops, rows, strict=True)]
    difference = (together - torch.stack(apart)).abs()
    assert difference.max() <= 1 and difference.mean() < 1e-3
    assert together.min() >= 0 and together.max() <= 255 and torch.equal(together, together.round())
    assert (colours[:, :8] != torch.tensor(NO_JITTER)).any(1).sum() > 15


# ---- all of it against torchvision's transforms


def torchvision_recipe(blur_p: float, solarize_p: float, grey_p=0.2, brightness=0.4, blur_first=False):
    """One kind of view, composed from torchvision's transforms as the paper says, or with an error."""

    def blur(image):
        if torch.rand(()) >= blur_p:
            return image
        radius = torch.empty(()).uniform_(0.1, 2).item()
        return image.filter(ImageFilter.GaussianBlur(radius))

    steps = [
        transforms.RandomResizedCrop(32, (0.4, 1), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(brightness, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(grey_p),
        transforms.RandomSolarize(128, solarize_p),
        transforms.PILToTensor(),
    ]
    steps.insert(0 if blur_first else 4, blur)
    return transforms.Compose(steps)


def pixel_statistics(views: torch.Tensor) -> torch.Tensor:
    """Per view: mean and deviation of each channel, colourfulness, sharpness, left - right."""
    x = views.float()
    return torch.cat(
        [
            x.mean((2, 3)),
            x.std((2, 3)),
            (x[:, 0] - x[:, 2]).abs().mean((1, 2))[:, None],
            x.diff(dim=3).abs().mean((1, 2, 3))[:, None],
            (x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3)))[:, None],
        ],
        dim=1,
    )


KINDS = {"global 1": (1.0, 0.0), "global 2": (0.1, 0.2), "local": (0.5, 0.0)}  # blur, solarisation
ERRORS = {
    "none": {},
    "probability": {"grey_p": 0.4},
    "range": {"brightness": 0.8},
    "order": {"blur_first": True},
}
SEEN_IN = {"probability": KINDS, "range": KINDS, "order": ["global 1"]}


def test_views_are_distributed_as_torchvisions():
    """First and second moments of what is measured agree; an error in the recipe would be seen."""
    image, draws = picture(size=(64, 48)), 1500
    ours = draw_views(
        image, draws, global_crops_scale=(0.4, 1), global_crops_size=32, local_crops_scale=(0.4, 1),
        local_crops_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    for views, (kind, shares) in zip(ours, KINDS.items(), strict=True):
        measured = pixel_statistics(views)
        for error, change in ERRORS.items():
            recipe = torchvision_recipe(*shares, **change)
            theirs = pixel_statistics(torch.stack([recipe(image) for _ in range(draws)]))
            z = max(two_sample_z(measured, theirs), two_sample_z(measured**2, theirs**2))
            if error == "none":
                assert z < 4.5, kind
            elif kind in SEEN_IN[error]:
                assert z > 4.5, (kind, error)


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
