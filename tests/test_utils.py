"""One section per section of utils.py, in its order."""

import copy
import itertools
import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate
from torchvision import transforms

import utils
from support import backbones
from support import pixels as px
from support.pixels import to_pixels
from tests.conftest import is_close_share, picture, ramps, slopes
from utils import PAPER, DataAugmentationDINO, DINOHead, DINOLoss, MultiCropWrapper

# ---------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------


def test_views_have_the_published_number_order_and_sizes():
    views = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 8)(picture())
    assert [tuple(v.shape) for v in views] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
    assert all(v.dtype == torch.float32 for v in views)
    views = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 1, (32, 48), (32, 16))(picture())  # of one height
    assert [tuple(v.shape) for v in views] == [(3, 32, 48)] * 2 + [(3, 32, 16)]


def test_each_view_is_cut_at_its_own_scale():
    augment, rng = DataAugmentationDINO((0.5, 1), (0.05, 0.2), 3, 64, 32), random.Random(0)
    boxes = np.array([[view.box for view in augment.draw(500, 400, rng)] for _ in range(300)])
    shares = boxes[..., 2] * boxes[..., 3] / (500 * 400)
    assert 0.48 < shares[:, :2].min() < 0.55 and shares[:, :2].max() > 0.9
    assert 0.045 < shares[:, 2:].min() < 0.06 and 0.18 < shares[:, 2:].max() < 0.21


ADJUSTED = {  # the paper's ranges
    px.adjust_brightness: (0.6, 1.4),
    px.adjust_contrast: (0.6, 1.4),
    px.adjust_saturation: (0.8, 1.2),
    px.adjust_hue: (-0.1, 0.1),
}


def test_amounts_cover_their_ranges_and_adjustments_come_in_any_order():
    rng = random.Random(0)
    drawn = [utils.draw_jitter(1, rng, PAPER.jitter) for _ in range(4000)]
    orders, amounts = map(np.array, zip(*drawn, strict=True))
    assert len(np.unique(orders, axis=0)) == 24
    for adjust, ends in ADJUSTED.items():
        own = amounts[orders == px.ADJUSTMENTS.index(adjust)]
        assert (own.min(), own.max()) == pytest.approx(ends, abs=0.01)
    radii = [utils.draw_radius(1, rng, *PAPER.blur_sigma) for _ in range(4000)]
    assert (min(radii), max(radii)) == pytest.approx((0.1, 2), abs=0.01)


def test_a_crop_that_never_fits_is_the_largest_at_the_centre():
    for size, box in (((100, 10), (0, 43, 10, 13)), ((10, 100), (43, 0, 13, 10))):
        assert utils.draw_box(*size, (1, 1), random.Random(0), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_a_crop_of_a_line_has_a_pixel(size):
    for ratio in ((9 / 4, 4), (1 / 4, 4 / 9)):
        _, _, height, width = utils.draw_box(*size, (0.4, 1), random.Random(0), ratio)
        assert 1 <= width <= size[0] and 1 <= height <= size[1]


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_crops_are_distributed_as_torchvisions(scale):
    width, height, draws = 500, 375, 3000
    box = width, height, scale, random.Random(0), PAPER.crop_aspect
    ours = torch.tensor([utils.draw_box(*box) for _ in range(draws)]).double()
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    draw = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, scale, (3 / 4, 4 / 3)) for _ in range(draws)]).double()
    shares = ours[:, 2] * ours[:, 3] / (width * height)
    assert scale[0] * 0.98 <= shares.min() and shares.max() <= min(1, scale[1] * 1.02)
    assert two_sample_z(ours, theirs) < 4  # top, left, height, width
    assert two_sample_z(ours**2, theirs**2) < 4
    other = torch.tensor([utils.draw_box(*box) for _ in range(draws)]).double() * 1.1
    assert two_sample_z(other, theirs) > 4  # the test would see a scale that is 10 % off


def two_sample_z(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of column means, in standard errors."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return ((a.mean(0) - b.mean(0)).abs() / error.clamp(min=1e-12)).max().item()


def test_the_order_of_the_draws_is_kept():
    """A change of order would change the views of a run that goes on with a newer version."""
    kind = utils.Kind((32, 32), (0.4, 1), blur_p=1.0, solarize_p=0.2)
    size, box, flip, colour, *_ = utils.draw_view(500, 375, kind, random.Random(1))
    assert (size, box, flip) == ((32, 32), (97, 16, 272, 332), True)
    assert list(colour.order) == [3, 1, 2, 0]
    assert colour.amounts == pytest.approx([-0.0812281, 0.6226780, 1.1343060, 0.9462137], abs=1e-7)
    assert colour[2:] == (False, pytest.approx(0.9462357, abs=1e-7), False)
    again = utils.draw_view(500, 375, kind, random.Random(11)).colour  # without jitter
    assert again == ((-1,) * 4, (0.0,) * 4, True, pytest.approx(1.0039501, abs=1e-7), False)


# ---- flags of the recipe


def test_the_default_recipe_is_the_papers():
    assert PAPER._asdict() == {
        "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray_p": 0.2, "blur_p": (1.0, 0.1, 0.5),
        "blur_sigma": (0.1, 2.0), "solarize_p": (0.0, 0.2, 0.0), "hflip_p": 0.5, "vflip_p": 0.0,
        "quarter_turns": False, "crop_aspect": (3 / 4, 4 / 3),
    }  # fmt: skip


PLAIN = utils.Recipe(
    jitter_p=0, gray_p=0, blur_p=(0, 0, 0), solarize_p=(0, 0, 0), hflip_p=0, crop_aspect=(1, 1)
)
SCENE = picture(size=(16, 16))


def in_worker(augment: DataAugmentationDINO, image: Image.Image, seed: int) -> list[torch.Tensor]:
    return [view for part in augment.views(to_pixels(image), random.Random(seed))[0] for view in part]


def on_device(augment: DataAugmentationDINO, image: Image.Image, seed: int) -> list[torch.Tensor]:
    views, colours = default_collate([augment.crops(to_pixels(image), random.Random(seed))])
    return [px.denormalize(view[0]) for view in px.normalized_views(views, colours)]


@pytest.fixture(params=[in_worker, on_device])
def views_of(request):
    """A function: what to change in a recipe that leaves the image as it is -> the views of seeds 0, 1, ...:
    (seeds, 3 kinds, 3, H, W).
    """

    def views(image: Image.Image = SCENE, seeds: int = 30, **changes) -> torch.Tensor:
        crops = dict(global_crops_size=image.width, local_crops_size=image.width)
        augment = DataAugmentationDINO((1, 1), (1, 1), 1, **crops, recipe=PLAIN._replace(**changes))
        return torch.stack([torch.stack(request.param(augment, image, seed)) for seed in range(seeds)])

    return views


def equal_shares(views: torch.Tensor, *pictures: torch.Tensor) -> list[float]:
    """For each picture, the share of the views (seeds, kinds, 3, H, W) that equal it."""
    return [(views == shown).flatten(2).all(-1).float().mean().item() for shown in pictures]


def test_a_recipe_can_leave_the_image_as_it_is(views_of):
    assert equal_shares(views_of(), to_pixels(SCENE)) == [1]


def test_flips_and_turns(views_of):
    scene = to_pixels(SCENE)
    assert equal_shares(views_of(hflip_p=1), scene.flip(2)) == [1]
    assert equal_shares(views_of(vflip_p=1), scene.flip(1)) == [1]
    assert is_close_share(equal_shares(views_of(vflip_p=0.3, seeds=200), scene.flip(1))[0], 0.3, 600)
    turned = [scene.rot90(quarters, (1, 2)) for quarters in range(4)]
    shares = equal_shares(views_of(quarter_turns=True, seeds=200), *turned)
    assert sum(shares) == pytest.approx(1) and all(is_close_share(share, 0.25, 600) for share in shares)
    eight = [*turned, *(view.flip(2) for view in turned)]
    shares = equal_shares(views_of(quarter_turns=True, hflip_p=0.5, seeds=400), *eight)
    assert sum(shares) == pytest.approx(1) and all(is_close_share(share, 1 / 8, 1200) for share in shares)


def test_probabilities_of_grey_and_jitter(views_of):
    views = views_of(gray_p=0.7, seeds=200)
    grey = (views == views[:, :, :1]).flatten(2).all(-1)
    assert is_close_share(grey.float().mean().item(), 0.7, 600)
    same = equal_shares(views_of(jitter_p=0.4, jitter=(0.9, 0, 0, 0), seeds=200), to_pixels(SCENE))
    assert is_close_share(1 - same[0], 0.4, 600)


@pytest.mark.parametrize("kind", range(3))
def test_blur_and_solarisation_of_each_kind_of_view(views_of, kind):
    chances = [float(i == kind) for i in range(3)]
    blurred = views_of(blur_p=chances, blur_sigma=(1.5, 1.5))
    blurred_scene = px.apply_colours(
        to_pixels(SCENE)[None], [px.Colour((-1,) * 4, (0.0,) * 4, False, 1.5, False)]
    )[0]
    for i in range(3):
        expected = blurred_scene if i == kind else to_pixels(SCENE)
        assert equal_shares(blurred[:, i : i + 1], expected) == [1]
    white = Image.new("RGB", (4, 4), "white")
    levels = views_of(white, solarize_p=chances).float().mean((0, 2, 3, 4))
    assert levels.tolist() == [255 * (1 - chance) for chance in chances]


def test_the_blur_is_as_strong_as_its_range(views_of):
    """Neighbours of noise differ less, the more it is blurred."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    always = dict(image=noise, blur_p=(1, 1, 1), seeds=10)
    ranges = [(0, 0), (0.5, 0.8), (0.8, 2), (3, 4)]
    roughness = [
        views_of(**always, blur_sigma=sigma).float().diff(dim=4).abs().mean((2, 3, 4)) for sigma in ranges
    ]
    assert all(less.max() < more.min() for more, less in itertools.pairwise(roughness))


@pytest.mark.parametrize("which", range(4))
def test_each_strength_of_the_jitter_changes_its_property_only(views_of, which):
    image = Image.new("RGB", (4, 4), (150, 90, 60))
    image.paste((60, 40, 30), (0, 0, 4, 2))
    strengths = [0.0] * 4
    strengths[which] = 0.3
    views = views_of(image, jitter_p=1, jitter=strengths, seeds=100).flatten(0, 1).float()
    factors = torch.linspace(0.7, 1.3, 61) if which < 3 else torch.linspace(-0.3, 0.3, 241)
    adjust = ADJUSTED_BY_TORCHVISION[which]
    reachable = torch.stack([adjust(to_pixels(image) / 255, factor.item()) * 255 for factor in factors])
    distance, nearest = (views[:, None] - reachable).abs().flatten(2).amax(2).min(dim=1)
    assert distance.max() <= 3
    assert nearest.min() <= 0.1 * len(factors) and nearest.max() >= 0.9 * len(factors)


ADJUSTED_BY_TORCHVISION = (
    TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue,
)  # fmt: skip


def test_a_jitter_above_one_does_not_invert():
    amounts = [utils.draw_jitter(1, random.Random(i), (2, 0, 0, 0)) for i in range(400)]
    factors = [given[order.index(0)] for order, given in amounts]
    assert (min(factors), max(factors)) == pytest.approx((0, 3), abs=0.05)


def test_the_aspect_of_crops(views_of):
    boxes = [
        utils.draw_view(400, 300, utils.Kind((32, 32), (0.1, 0.2), 0, 0), random.Random(i), recipe).box
        for recipe in (PLAIN, PLAIN._replace(crop_aspect=(0.5, 2)))
        for i in range(300)
    ]
    aspects = np.array([width / height for _, _, height, width in boxes]).reshape(2, 300)
    assert np.abs(aspects[0] - 1).max() < 0.02
    assert aspects[1].min() == pytest.approx(0.5, rel=0.05) and aspects[1].max() == pytest.approx(2, rel=0.05)
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (16, 8))).convert("RGB")  # of one pixel
    narrow = views_of(stripes, crop_aspect=(0.125, 0.125))  # two of the image's columns fill the view
    assert narrow.float().diff(dim=4).abs().mean() < 30


def test_the_aspect_of_crops_follows_the_view():
    kind, turned = utils.Kind((64, 32), (0.1, 0.2), 0, 0), PAPER._replace(quarter_turns=True)
    for recipe in (PAPER, turned):
        views = [utils.draw_view(400, 300, kind, random.Random(i), recipe) for i in range(600)]
        for odd, shape in ((0, 0.5), (1, 2)):
            boxes = [view.box for view in views if view.quarters % 2 == odd]
            aspects = np.array([width / height / shape for _, _, height, width in boxes])
            assert (len(aspects) > 200) == (recipe is turned or not odd)
            if len(aspects):
                assert aspects.min() == pytest.approx(3 / 4, rel=0.05)
                assert aspects.max() == pytest.approx(4 / 3, rel=0.05)


@pytest.mark.parametrize("make", [in_worker, on_device])
@pytest.mark.parametrize("turn", [False, True])
def test_rectangular_views_are_not_distorted(make, turn):
    image, seen = ramps((120, 90)), set()
    augment = DataAugmentationDINO(
        (0.2, 0.4), (0.1, 0.2), 2, (64, 32), (16, 32), PLAIN._replace(quarter_turns=turn)
    )
    for seed in range(40):
        views = make(augment, image, seed)
        assert [tuple(view.shape) for view in views] == [(3, 64, 32)] * 2 + [(3, 16, 32)] * 2
        for view in views:
            red, green = slopes(view)
            steepest = [max(slope, key=abs) for slope in (red, green)]
            assert abs(steepest[0]) == pytest.approx(abs(steepest[1]), rel=0.07)
            assert min(map(abs, red)) < 0.02 and min(map(abs, green)) < 0.02
            # counterclockwise turns that bring red, which grows to the right, where it grows now
            at, grows = red.index(steepest[0]), steepest[0] > 0
            quarters = {(1, True): 0, (0, False): 1, (1, False): 2, (0, True): 3}[at, grows]
            grows_down = quarters in (0, 3) if quarters % 2 == 0 else quarters == 1
            assert (steepest[1] > 0) == grows_down
            seen.add(quarters)
    assert seen == (set(range(4)) if turn else {0})


def test_only_what_is_on_draws():
    """So the views of the paper's recipe stay those that the test of the order knows."""
    kind = utils.Kind((32, 32), (0.4, 1), blur_p=1.0, solarize_p=0.2)

    def colours(**changes):
        recipe = PAPER._replace(**changes)
        return [utils.draw_view(500, 375, kind, random.Random(seed), recipe).colour for seed in range(9)]

    paper = colours()
    assert colours(vflip_p=0.0, quarter_turns=False, hflip_p=0.1) == paper
    assert colours(vflip_p=0.01) != paper and colours(quarter_turns=True) != paper


@pytest.mark.parametrize("scales", [((40, 100), (0.05, 0.4)), ((0.4, 1), (0, 0.4)), ((-1, 1), (0.05, 0.4))])
def test_scales_that_are_no_shares_are_refused(scales):
    """A scale in percent gave views of the whole image."""
    with pytest.raises(ValueError, match="scales are shares of the image's area, above 0 and at most 1"):
        DataAugmentationDINO(*scales, 8)


def test_a_published_attribute_that_has_no_effect_cannot_be_set():
    class Own(DataAugmentationDINO):
        pass

    augmentation = Own((0.4, 1), (0.05, 0.4), 8)
    augmentation.own = 1
    for name in ("global_transfo1", "local_crops_number"):
        with pytest.raises(AttributeError, match=f"setting {name} has no effect: give a Recipe"):
            setattr(augmentation, name, 2)


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
TRIED_IN = {"none": KINDS, "probability": ["global 2"], "range": ["local"], "order": ["global 1"]}


def test_views_are_distributed_as_torchvisions():
    """First and second moments of what is measured agree; an error in the recipe would be seen."""
    image, draws = picture(size=(64, 48)), 1500
    augment, pixels = DataAugmentationDINO((0.4, 1), (0.4, 1), 1, 32, 32), to_pixels(image)
    ours = torch.stack([augment.views(pixels, random.Random(seed))[0][0] for seed in range(draws)], dim=1)
    torch.manual_seed(0)
    for views, (kind, shares) in zip(ours, KINDS.items(), strict=True):
        measured = pixel_statistics(views)
        for error in (error for error, kinds in TRIED_IN.items() if kind in kinds):
            recipe = torchvision_recipe(*shares, **ERRORS[error])
            theirs = pixel_statistics(torch.stack([recipe(image) for _ in range(draws)]))
            z = max(two_sample_z(measured, theirs), two_sample_z(measured**2, theirs**2))
            assert (z < 4.5) == (error == "none"), (kind, error, z)


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def test_a_classifier_is_dropped_as_by_the_published_code():
    resnet, vit = torchvision.models.resnet18(num_classes=7), backbones.build_backbone("vit_nano", 8, 32)[0]
    vit.head = nn.Linear(128, 7)
    for model, width in ((resnet, 512), (vit, 128)):
        wrapper = MultiCropWrapper(model, DINOHead(width, 8, hidden_dim=5, bottleneck_dim=6))
        assert wrapper(torch.randn(2, 3, 32, 32)).shape == (2, 8)


def test_multicrop_equals_separate_passes():
    model = MultiCropWrapper(backbones.build_backbone("vit_nano", 8, 32)[0], DINOHead(128, 32)).eval()
    sizes = (32, 32), (32, 32), (32, 16), (16, 16), (16, 16)  # others of one height, and of one width
    views = [torch.randn(3, 3, *size) for size in sizes]
    with torch.no_grad():
        apart = torch.cat([model.head(model.backbone(view)) for view in views])
        torch.testing.assert_close(model(views), apart)
        torch.testing.assert_close(model(views[0]), apart[:3])


def test_head_has_unit_prototypes_and_can_be_copied():
    head = DINOHead(12, 40, hidden_dim=16, bottleneck_dim=8)
    with torch.no_grad():
        rows = head.last_layer(torch.eye(8)).T  # the effective weight, (K, bottleneck)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(40))
    assert not head.last_layer.weight_g.requires_grad
    assert DINOHead(12, 40, norm_last_layer=False).last_layer.weight_g.requires_grad
    again = copy.deepcopy(head)
    assert set(again.state_dict()) >= {"last_layer.weight_g", "last_layer.weight_v", "mlp.0.weight"}
    x = torch.randn(3, 12)
    torch.testing.assert_close(head(x), again(x))


@pytest.mark.parametrize("use_bn", [True, False])
@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_head_layers(use_bn, nlayers):
    head = DINOHead(12, 40, use_bn=use_bn, nlayers=nlayers, hidden_dim=16, bottleneck_dim=8)
    kinds = [type(m).__name__ for m in head.mlp.modules()]
    assert kinds.count("Linear") == nlayers and kinds.count("GELU") == nlayers - 1
    assert kinds.count("BatchNorm1d") == (nlayers - 1) * use_bn
    assert utils.has_batchnorms(head) == (use_bn and nlayers > 1)
    assert head(torch.randn(4, 12)).shape == (4, 40)


def test_the_head_begins_with_small_weights_and_no_bias():
    torch.manual_seed(0)
    layers = [m for m in DINOHead(128, 8, hidden_dim=64, bottleneck_dim=32).mlp if isinstance(m, nn.Linear)]
    assert all(layer.weight.std().item() == pytest.approx(0.02, rel=0.1) for layer in layers)
    assert not any(layer.bias.any() for layer in layers)


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    views=st.integers(2, 6), batch=st.integers(1, 5), k=st.integers(2, 40), seed=st.integers(0, 2**31),
    epoch=st.integers(0, 4),
)  # fmt: skip
def test_loss_is_the_mean_cross_entropy_over_pairs_of_different_views(views, batch, k, seed, epoch):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(views * batch, k, generator=generator, dtype=torch.float64).float().requires_grad_()
    teacher = torch.randn(2 * batch, k, generator=generator)
    loss_fn = DINOLoss(k, views, 0.02, 0.07, 3, 5, student_temp=0.2, center_momentum=0.7)
    loss_fn.center.copy_(torch.randn(1, k, generator=generator))
    center = loss_fn.center.clone()
    temp = [0.02, 0.045, 0.07, 0.07, 0.07][epoch]

    targets = ((teacher - center) / temp).softmax(-1).chunk(2)
    terms = [
        -(q * F.log_softmax(s / 0.2, -1)).sum(-1).mean()
        for i, q in enumerate(targets)
        for v, s in enumerate(student.chunk(views))
        if v != i
    ]
    expected = sum(terms) / len(terms)
    loss = loss_fn(student, teacher, epoch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss_fn.center, 0.7 * center + 0.3 * teacher.mean(0, keepdim=True))

    entropy = -(torch.cat(targets) * torch.cat(targets).clamp(min=1e-30).log()).sum(-1).mean()
    torch.testing.assert_close(loss_fn.stats["entropy"], entropy, rtol=1e-4, atol=1e-4)  # logits up to 300
    torch.testing.assert_close(loss_fn.stats["kl"], loss.detach() - entropy, rtol=1e-3, atol=1e-4)
    assert "temp" not in loss_fn.stats


def fused_and_plain(views, batch, k, norm_last_layer, dtype, seed, chunk):
    """Loss, stats, centre and gradients with the last layer in the loss, and with it in the head."""
    torch.manual_seed(seed)
    head = DINOHead(6, k, norm_last_layer=norm_last_layer, hidden_dim=16, bottleneck_dim=8)
    with torch.no_grad():
        for param in head.mlp.parameters():  # far from zero also in half precision
            param.normal_(std=0.5)
        if not norm_last_layer:
            head.last_layer.weight_g.uniform_(0.5, 2)
    x, teacher, center = torch.randn(views * batch, 6), torch.randn(2 * batch, k), torch.randn(1, k)
    results = []
    for deferred in (True, False):
        head.defer_last_layer = deferred
        head.zero_grad()
        inputs = x.clone().requires_grad_()
        loss_fn = DINOLoss(k, views, 0.04, 0.07, 1, 2, student_temp=0.2)
        loss_fn.center.copy_(center)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            student = head(inputs)
        assert isinstance(student, utils.Prototypes) == deferred
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils._FusedCrossEntropy, "CHUNK", chunk)
            loss = loss_fn(student, teacher, 1)
        (3 * loss).backward()
        gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        results.append((loss.detach(), loss_fn.stats, loss_fn.center, inputs.grad, gradients))
    return results


@settings(max_examples=40, deadline=None)
@given(
    views=st.integers(2, 6), batch=st.integers(1, 5), k=st.integers(2, 70), norm_last_layer=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 2**31),
    chunk=st.integers(1, 200),
)  # fmt: skip
def test_fused_loss_is_the_plain_loss(views, batch, k, norm_last_layer, dtype, seed, chunk):
    if dtype != torch.float32:  # else gradients can cancel to little more than its rounding
        k = max(k, 6)
    fused, plain = fused_and_plain(views, batch, k, norm_last_layer, dtype, seed, chunk)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}[dtype]
    torch.testing.assert_close(fused[:3], plain[:3], rtol=1e-5, atol=1e-5)
    assert fused[4].keys() == plain[4].keys() and ("last_layer.weight_g" in fused[4]) != norm_last_layer
    for a, b in ((fused[3], plain[3]), *((fused[4][name], plain[4][name]) for name in plain[4])):
        # Gradients of few prototypes can cancel to the rounding of their terms, which are up to 3 / 0.2.
        assert (a - b).norm() <= tolerance * b.norm() + 3 / 0.2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # of the weight; float32 in trainings
def test_half_precision_does_not_overflow_with_few_prototypes(dtype):
    """Rows that are alike, as at the start, add up."""
    features = F.normalize(torch.randn(1, 128), dim=1).expand(4 * 768, -1).half()
    weight = F.normalize(torch.randn(64, 128), dim=1).half()
    targets, gradients = F.one_hot(torch.zeros(2, 768, dtype=torch.long), 64), []
    for kinds in ((torch.float64,) * 3, (torch.float16, dtype, torch.float32)):
        x, w, q = (each.to(kind) for each, kind in zip((features, weight, targets), kinds, strict=True))
        utils._FusedCrossEntropy.apply(x, w.requires_grad_(), q, 0.1).backward()
        gradients.append(w.grad.double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=1e-3)


def test_half_precision_keeps_the_gradients_of_small_probabilities():
    angles = torch.linspace(0, math.pi, 16)
    weight = torch.stack([angles.cos(), angles.sin()], dim=1)  # from the features' direction to its opposite
    features, targets = torch.tensor([[1.0, 0.0]] * 2), F.one_hot(torch.zeros(2, 1, dtype=torch.long), 16)
    gradients = []
    for dtype in (torch.float64, torch.float16):
        w = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        utils._FusedCrossEntropy.apply(features.to(dtype), w, targets.to(w.dtype), 0.1).backward()
        gradients.append(w.grad[1:, 0].double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=0)


def test_the_spread_counts_prototypes_of_few_images():
    k = 1024  # half of the images have one prototype, each of the others its own
    teacher = torch.full((k, k), -1.0).fill_diagonal_(1.0)
    teacher[::2] = teacher[0]
    loss_fn = DINOLoss(k, 2, 0.04, 0.04, 0, 1)
    loss_fn(torch.zeros(2 * k, k), torch.cat([teacher, teacher]), 0)
    p = torch.softmax(teacher / 0.04, -1).mean(0)
    assert loss_fn.stats["spread"].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1, 100])  # 100: the exponential of a score would overflow
def test_fused_loss_has_the_gradients_of_autograd_and_gives_them_once(scale):
    torch.manual_seed(0)
    inputs = [(scale * torch.randn(size).double()).requires_grad_() for size in ((4 * 3, 5), (7, 5))]
    targets = torch.randn(2, 3, 7).double().softmax(-1)
    logp = (inputs[0] @ inputs[1].T / 0.2).log_softmax(dim=-1).unflatten(0, (4, 3))
    plain = -(targets * (logp.sum(dim=0) - logp[:2])).sum(dim=-1).mean() / 3
    fused = utils._FusedCrossEntropy.apply(*inputs, targets, 0.2)
    expected = torch.autograd.grad(5 * plain, inputs)
    gradients = torch.autograd.grad(5 * fused, inputs, retain_graph=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # not the gradients times 5
        torch.autograd.grad(fused, inputs)


def test_the_whole_of_the_students_scores_is_never_there(monkeypatch):
    """Every tensor that the loss makes is smaller than the (V*B, K) it would otherwise need."""
    monkeypatch.setattr(utils._FusedCrossEntropy, "CHUNK", 10_000)  # two of the eight images
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    views, batch, k = 10, 8, 512
    head = DINOHead(6, k, hidden_dim=8, bottleneck_dim=4)
    for deferred in (True, False):
        head.defer_last_layer, largest = deferred, 0
        student = head(torch.randn(views * batch, 6))
        with Watch():
            DINOLoss(k, views, 0.04, 0.04, 0, 1)(student, torch.randn(2 * batch, k), 0).backward()
        assert (largest >= views * batch * k) != deferred


@pytest.mark.parametrize("deferred", [False, True])
def test_a_batch_in_parts_is_the_batch(deferred):
    torch.manual_seed(0)
    head = DINOHead(6, 20, hidden_dim=16, bottleneck_dim=8)
    head.defer_last_layer = deferred
    student, teacher = torch.randn(3, 8, 6), torch.randn(2, 8, 20)  # views, images
    results = []
    for parts in (1, 4):
        head.zero_grad()
        loss_fn = DINOLoss(20, 3, 0.04, 0.04, 0, 1, accum_steps=parts)
        centers = []
        for views, targets in zip(student.chunk(parts, 1), teacher.chunk(parts, 1), strict=True):
            centers.append(loss_fn.center)
            (loss_fn(head(views.flatten(0, 1)), targets.flatten(0, 1), 0) / parts).backward()
        assert not any(center.any() for center in centers) and loss_fn.center.any()  # moves at the end
        results.append(([p.grad for p in head.parameters() if p.grad is not None], loss_fn))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1][1].center, results[0][1].center)
    for which in ("loss", "entropy", "kl", "spread"):
        torch.testing.assert_close(results[1][1].stats[which], results[0][1].stats[which])


def test_without_centering_a_loaded_centre_is_neither_subtracted_nor_moved():
    """As after `--init_from` of a run that had one."""
    teacher, center = torch.randn(6, 5), torch.eye(5)[:1]
    loss_fn = DINOLoss(5, 2, 0.04, 0.04, 0, 1, centering="none")
    loss_fn.center.copy_(center)
    loss_fn(torch.randn(6, 5), teacher, 0)
    assert torch.equal(loss_fn.center, center)
    p = (teacher / 0.04).softmax(-1)
    torch.testing.assert_close(loss_fn.stats["entropy"], -(p * p.clamp(min=1e-30).log()).sum(-1).mean())


def test_a_warm_up_of_a_fraction_of_an_epoch_is_continuous():
    loss_fn = DINOLoss(4, 2, 0.02, 0.06, 0.5, 5)
    assert [loss_fn.teacher_temp(e) for e in (0, 0.25, 0.5, 3)] == pytest.approx([0.02, 0.04, 0.06, 0.06])


def test_sinkhorn_shares_the_prototypes():
    torch.manual_seed(0)
    logits = torch.randn(6, 4) * 3
    q = logits.exp()  # Sinkhorn-Knopp by the book
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True) / 4
        q = q / q.sum(dim=1, keepdim=True) / 6
    torch.testing.assert_close(utils.sinkhorn(logits).softmax(-1), 6 * q)
    shares = utils.sinkhorn(logits, iterations=50).softmax(-1).mean(0)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=1e-4, atol=1e-5)


def test_sinkhorn_replaces_the_centre():
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 5), torch.randn(6, 5)
    loss_fn = DINOLoss(5, 2, 0.04, 0.04, 0, 1, centering="sinkhorn")
    p = utils.sinkhorn(teacher / 0.04).softmax(-1)
    log_p = (student / 0.1).log_softmax(-1)
    expected = -(p[:3] * log_p[3:] + p[3:] * log_p[:3]).sum(-1).mean() / 2
    torch.testing.assert_close(loss_fn(student, teacher, 0), expected)
    assert torch.equal(loss_fn.center, torch.zeros(1, 5))


def test_the_temperature_follows_the_outputs_while_they_differ_little():
    torch.manual_seed(0)
    student, noise = torch.randn(8, 5), torch.randn(8, 5)
    plain, adapted = (DINOLoss(5, 2, 0.04, 0.04, 0, 1, adapt_teacher_temp=n) for n in (0, 0.5))
    for spread, temp in ((0.0025, 0.005), (0.02, 0.04), (3.0, 0.04)):  # the given one at most
        teacher = 0.5 + spread * noise / noise.var(dim=0, correction=0).mean().sqrt()
        loss = adapted(student, teacher, 0)
        torch.testing.assert_close(adapted.stats["temp"], torch.tensor(temp))
        plain.teacher_temps = temp, temp
        torch.testing.assert_close(plain(student, teacher, 0), loss, rtol=1e-4, atol=0)
    assert "temp" not in plain.stats


def test_an_adapted_temperature_stays_below_the_warm_up():
    loss_fn = DINOLoss(5, 2, 0.01, 0.04, 2, 9, adapt_teacher_temp=2)
    for epoch, temp in ((0, 0.01), (1, 0.04)):
        loss_fn(torch.randn(8, 5), torch.randn(8, 5), epoch)
        torch.testing.assert_close(loss_fn.stats["temp"], torch.tensor(temp))


def test_an_adapted_temperature_is_finite_for_equal_outputs():
    for value in (0.3, 0.9):  # by rounding, the variance is above and below zero
        loss_fn = DINOLoss(5, 2, 0.04, 0.04, 0, 1, adapt_teacher_temp=2)
        assert loss_fn(torch.randn(8, 5), torch.full((8, 5), value), 0).isfinite()
        assert loss_fn.stats["temp"].item() == pytest.approx(1e-4)


@pytest.mark.parametrize("centering", ["ema", "none", "sinkhorn"])
def test_outputs_in_half_precision_are_taken_as_float32(centering):
    """Also where the caller is in autocast."""
    torch.manual_seed(0)
    student, teacher, found = torch.randn(8, 50).half(), torch.randn(8, 50).half(), []
    for dtype, autocast in ((torch.float16, True), (torch.float32, False)):
        loss_fn = DINOLoss(50, 2, 0.04, 0.04, 0, 1, centering=centering)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_fn(student.to(dtype), teacher.to(dtype), 0)
        found.append((loss, loss_fn.center, loss_fn.stats))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(8, 8), (32, 32)])
@pytest.mark.parametrize("deferred", [False, True])
def test_outputs_of_other_views_are_refused(student_rows, teacher_rows, deferred):
    """Of 8 views, the student has the global ones alone, or the teacher has all."""
    student = torch.randn(student_rows, 5)
    if deferred:
        student = utils.Prototypes(student, torch.randn(5, 5))
    with pytest.raises(
        ValueError, match=f"{student_rows} and {teacher_rows} rows are not 8 and 2 views each"
    ):
        DINOLoss(5, 8, 0.04, 0.04, 0, 1)(student, torch.randn(teacher_rows, 5), 0)


def test_an_unknown_centering_is_refused():
    """It would train without any."""
    with pytest.raises(ValueError, match="centering is 'Sinkhorn', not 'ema', 'none' or 'sinkhorn'"):
        DINOLoss(5, 2, 0.04, 0.04, 0, 1, centering="Sinkhorn")


def test_loss_sends_no_gradient_to_the_teacher():
    teacher = torch.randn(4, 8, requires_grad=True)
    DINOLoss(8, 2, 0.04, 0.04, 0, 1)(torch.randn(4, 8, requires_grad=True), teacher, 0).backward()
    assert teacher.grad is None


# ---------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    base=st.floats(-10, 10), final=st.floats(-10, 10), epochs=st.integers(1, 20), steps=st.integers(1, 30),
    warmup=st.integers(0, 20),
)  # fmt: skip
def test_cosine_schedule_at_its_ends(base, final, epochs, steps, warmup):
    if warmup > epochs:
        with pytest.raises(ValueError, match="warm-up"):
            utils.cosine_scheduler(base, final, epochs, steps, warmup)
        return
    values = utils.cosine_scheduler(base, final, epochs, steps, warmup)
    assert len(values) == epochs * steps
    assert values.min() >= min(base, final, 0) - 1e-9 and values.max() <= max(base, final, 0) + 1e-9
    if 0 < warmup * steps < epochs * steps:
        assert values[0] == 0 or warmup * steps == 1
        assert values[warmup * steps] == pytest.approx(base)
    if warmup == 0:
        assert values[0] == pytest.approx(base)
        assert abs(values[-1] - final) <= abs(base - final) * (math.pi / (epochs * steps)) ** 2


def test_a_warm_up_of_half_an_epoch():
    values = utils.cosine_scheduler(1, 0, 2, 10, warmup_epochs=0.5, start_warmup_value=0.2)
    assert values[:6].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1]) and len(values) == 20


# ---------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), DINOHead(4, 8, hidden_dim=5, bottleneck_dim=6))
    model[1].bias = bias = nn.Parameter(torch.zeros(1, 4))
    decayed, plain = utils.get_params_groups(model)
    assert all(p.ndim > 1 and p is not bias for p in decayed["params"])
    assert all(p.ndim == 1 or p is bias for p in plain["params"])
    assert plain["weight_decay"] == 0 and "weight_decay" not in decayed
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)
    optimizer = torch.optim.AdamW([decayed, plain])
    utils.set_schedules(optimizer, 0.5, 0.3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]
    with pytest.raises(ValueError, match="without biases and norms first"):
        utils.set_schedules(create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1), 0.5, 0.3)
    of_layers = [{"params": [param], "lr": 0.1} for param in decayed["params"]]  # would lose their rates
    with pytest.raises(ValueError, match="takes the two groups"):
        utils.set_schedules(torch.optim.AdamW(of_layers), 0.5, 0.3)


def test_a_layer_that_is_left_out_is_named(capsys):
    """A network's own layer of this name would be in no checkpoint."""
    backbone = nn.Sequential(OrderedDict(flat=nn.Flatten(), fc=nn.Linear(12, 5)))
    assert MultiCropWrapper(backbone, nn.Identity())(torch.zeros(2, 3, 2, 2)).shape == (2, 12)
    assert capsys.readouterr().out == "note: MultiCropWrapper leaves out the backbone's fc, from 12 to 5\n"


def test_clipping_is_per_parameter():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), 5.0)  # norm 10
    model.bias.grad = torch.tensor([0.3, 0.4])  # norm 0.5
    norms = utils.clip_gradients(model, 2.0)
    torch.testing.assert_close(norms, torch.tensor([10.0, 0.5]))
    torch.testing.assert_close(model.weight.grad.norm(), torch.tensor(2.0))
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.3, 0.4]))


def test_last_layer_is_frozen_in_the_first_epochs():
    head = DINOHead(4, 8, norm_last_layer=False, hidden_dim=5, bottleneck_dim=6)
    for epoch, frozen in ((0, True), (1, True), (2, False)):
        head(torch.randn(3, 4)).sum().backward()
        utils.cancel_gradients_last_layer(epoch, head, freeze_last_layer=2)
        assert all((param.grad is None) == frozen for param in head.last_layer.parameters())
        assert head.mlp[0].weight.grad is not None


def test_teacher_is_the_average_of_students():
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = [0.75 * t + 0.25 * s for s, t in zip(student.parameters(), teacher.parameters(), strict=True)]
    utils.update_teacher(student, teacher, 0.75)
    for want, got in zip(expected, teacher.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_lars_adapts_weights_and_leaves_biases_alone():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    zero = nn.Parameter(torch.zeros(1, 2))
    optimizer = utils.LARS([weight, bias, zero], lr=0.1, weight_decay=0.5, momentum=0.6, eta=0.01)
    weight.grad, bias.grad, zero.grad = torch.tensor([[0.5, 0.0]]), torch.tensor([2.0]), torch.ones(1, 2)
    optimizer.step()
    update = torch.tensor([[0.5 + 1.5, 2.0]])  # gradient + decay
    ratio = 0.01 * 5.0 / update.norm()
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0]]) - 0.1 * ratio * update)
    torch.testing.assert_close(bias.detach(), torch.tensor([1.0 - 0.1 * 2.0]))
    torch.testing.assert_close(zero.detach(), torch.full((1, 2), -0.1))
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.tensor([1.0 - 0.1 * 2.0 - 0.1 * (0.6 * 2.0 + 2.0)]))
    assert torch.equal(weight.grad, torch.tensor([[0.5, 0.0]]))
    still = nn.Parameter(torch.ones(1, 2))
    still.grad = torch.zeros(1, 2)
    published = utils.LARS([still], lr=0.1)
    published.step()
    assert torch.equal(still.detach(), torch.ones(1, 2)) and published.defaults["eta"] == 0.001


def test_a_batch_that_does_not_divide_into_parts_is_an_error():
    """The centre would wait for parts that do not come."""
    views = [torch.zeros(6, 3), torch.zeros(6, 3)]
    assert [len(part[0]) for part in utils.in_parts(views, 3, nn.Identity())] == [2, 2, 2]
    with pytest.raises(ValueError, match="6 images do not divide into 4 parts"):
        next(utils.in_parts(views, 4, nn.Identity()))


def test_a_backbone_may_return_a_tuple_as_xcits_repository_does():
    class Pair(nn.Flatten):
        def forward(self, x):
            return super().forward(x), None

    views = [torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)]
    wrapped = [MultiCropWrapper(backbone, nn.Identity())(views) for backbone in (Pair(), nn.Flatten())]
    assert torch.equal(*wrapped)


def test_the_published_calls_work_on_a_teachers_output_and_without_gradients():
    loss, output = DINOLoss(8, 2, 0.04, 0.04, 0, 1), torch.randn(4, 8)
    loss.update_center(output)
    torch.testing.assert_close(loss.center, 0.1 * output.mean(dim=0, keepdim=True))
    loss.update_center(output.half())
    torch.testing.assert_close(loss.center, 0.19 * output.mean(dim=0, keepdim=True), rtol=1e-2, atol=1e-3)
    assert len(utils.clip_gradients(nn.Linear(2, 2), 3.0)) == 0


def test_lars_steps_by_the_gradients_of_a_closure():
    bias = nn.Parameter(torch.tensor([1.0]))
    optimizer = utils.LARS([bias], lr=0.1)

    def loss() -> torch.Tensor:
        value = (3 * bias).sum()
        value.backward()
        return value

    assert optimizer.step(loss).item() == 3
    torch.testing.assert_close(bias.detach(), torch.tensor([1.0 - 0.1 * 3]))
