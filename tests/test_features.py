import multiprocessing

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

from support.backbones import build_backbone
from support.data import Source, open_labelled_images, pixels_of
from support.errors import UserError
from support.features import (
    all_finite,
    cls_and_patches,
    compute,
    extract_features,
    frozen_features,
    patch_tokens,
    with_mean,
)
from support.pixels import eval_transform
from support.weights import load_backbone


def test_features_are_in_the_order_of_the_images_and_as_the_network_gives_them(labelled):
    images = open_labelled_images(Source(str(labelled)), "train")
    transform = eval_transform(16)
    for workers in (0, 2):
        features, labels = extract_features(
            nn.Flatten(), images, transform, torch.device("cpu"), batch_size=4, num_workers=workers
        )
        assert labels.tolist() == [images[i][1] for i in range(15)]
        torch.testing.assert_close(features[7], transform(images[7][0]).flatten(), rtol=0, atol=0)
    half = extract_features(lambda batch: batch.flatten(1).half(), images, transform, torch.device("cpu"))[0]
    assert torch.equal(half, features.half().float()) and half.dtype == torch.float32


def test_features_that_were_computed_in_half_precision_are_float32():
    network, x = nn.Linear(4, 4), torch.rand(2, 4)  # whose output autocast leaves in bfloat16
    found = compute(lambda model, images: model(images), network, x, torch.bfloat16)
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())


def test_features_do_not_move_the_global_random_stream(labelled):
    images = open_labelled_images(Source(str(labelled)), "val")
    before = torch.get_rng_state()
    extract_features(nn.Flatten(), images, eval_transform(8), torch.device("cpu"), num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(labelled, value):
    images = open_labelled_images(Source(str(labelled)), "val")

    def diverged(batch):
        return batch.flatten(1).index_fill(1, torch.tensor(3), value)

    with pytest.raises(UserError, match="not finite"):
        extract_features(diverged, images, eval_transform(8), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_not_finite_are_found_without_a_copy_of_the_features(dtype):
    features = torch.randn(50_000, 8).to(dtype)
    with torch.profiler.profile(profile_memory=True) as seen:
        assert all_finite(features)
    assert max(each.cpu_memory_usage for each in seen.events()) < features.nbytes / 4
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(features.index_fill(0, torch.tensor(500), value))
    assert all_finite(torch.arange(9).view(3, 3)) and all_finite(torch.zeros(0, 3))  # also integers, or none


def test_features_that_are_nearly_equal_are_named(labelled, capsys):
    """As of a collapsed network."""
    images, cpu = open_labelled_images(Source(str(labelled)), "train"), torch.device("cpu")
    for spread, named in ((1e-6, True), (0.01, False), (1.0, False)):
        extract_features(lambda x, s=spread: 1 + s * x.flatten(1)[:, :8], images, eval_transform(32), cpu)
        assert ("images are nearly equal" in capsys.readouterr().out) == named
    extract_features(nn.Flatten(), [images[0]], eval_transform(8), cpu)
    assert "nearly equal" not in capsys.readouterr().out  # one image has none that it could equal


def test_a_network_in_training_mode_is_said(labelled, capsys):
    images, cpu = open_labelled_images(Source(str(labelled)), "train"), torch.device("cpu")
    for network, said in ((nn.Flatten(), True), (nn.Flatten().eval(), False)):
        extract_features(network, images, eval_transform(8), cpu)
        assert ("warning: the network is in training mode" in capsys.readouterr().out) == said


def test_no_worker_outlives_an_error_of_the_network(labelled):
    """Workers ignore SIGTERM, by which Python would end them at its exit."""
    images = open_labelled_images(Source(str(labelled)), "train")

    def fails(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        extract_features(fails, images, eval_transform(8), torch.device("cpu"), batch_size=1, num_workers=1)
    assert error.tb and multiprocessing.active_children() == []  # its traceback keeps the frames


def test_patch_tokens_stand_where_the_patches_are():
    network = build_backbone("vit_nano", 8, 32)[0].eval()
    images = torch.randn(2, 3, 24, 32)
    cls, patches = cls_and_patches(network, images)
    tokens = network.get_intermediate_layers(images, 1)[0]
    assert patches.shape == (2, 3, 4, 128)
    assert torch.equal(cls, tokens[:, 0]) and torch.equal(patches[:, 1, 2], tokens[:, 1 + 1 * 4 + 2])
    third = network.get_intermediate_layers(images, 3)[0]
    assert torch.equal(patch_tokens(network, images, layer=3)[:, 2, 3], third[:, 1 + 2 * 4 + 3])
    with_registers = torch.randn(2, 1 + 4 + 12, 128)  # of someone's own, after the CLS token
    network.prepare_tokens = lambda x: with_registers
    last = network.get_intermediate_layers(images, 1)[0]
    assert torch.equal(patch_tokens(network, images).flatten(1, 2), last[:, 5:])
    assert patch_tokens(network, images, layer=6).shape == (2, 3, 4, 128)
    with pytest.raises(UserError, match="6 blocks"):
        patch_tokens(network, images, layer=7)


def test_the_mean_of_the_patches_stands_beside_the_last_blocks_cls_token():
    network, images = build_backbone("vit_nano", 8, 32)[0].eval(), torch.randn(2, 3, 32, 32)
    before, last = network.get_intermediate_layers(images, 2)
    expected = torch.cat([before[:, 0], with_mean(last[:, 0], last[:, 1:])], dim=1)
    assert torch.equal(frozen_features(network, images, 2, avgpool_patchtokens=True), expected)
    with_registers = torch.randn(2, 1 + 4 + 16, 128)
    network.prepare_tokens = lambda x: with_registers
    last = network.get_intermediate_layers(images, 1)[0]
    both = frozen_features(network, images, 1, avgpool_patchtokens=True)
    assert torch.equal(both, with_mean(last[:, 0], last[:, 5:]))


def test_tokens_of_timms_networks_with_registers_and_the_order_of_their_mean():
    network = timm.create_model("vit_tiny_patch16_224", reg_tokens=2, img_size=(32, 64), num_classes=0).eval()
    images = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        tokens = network.forward_features(images)  # CLS, two registers, 2 x 4 patches
        cls, patches = cls_and_patches(network, images)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 3:].unflatten(1, (2, 4)))
    cls, patches = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0], [5.0, 6.0]]])
    assert with_mean(cls, patches).tolist() == [[1, 4, 2, 5]]


@pytest.mark.parametrize(
    "arch", ["vit_tiny_patch16_224", "xcit_nano_12_p16_224", "deit_tiny_distilled_patch16_224"]
)
def test_patch_tokens_of_timms_networks_leave_out_the_other_tokens(arch):
    network = build_backbone(arch)[0].eval()
    images = torch.randn(1, 3, 64, 96)
    patches = patch_tokens(network, images)
    assert patches.shape[:3] == (1, 4, 6)
    if arch.startswith("vit"):
        torch.testing.assert_close(patches, network.forward_features(images)[:, 1:].unflatten(1, (4, 6)))


def test_networks_without_patch_tokens_are_refused():
    with pytest.raises(UserError, match="no patch tokens"):
        patch_tokens(build_backbone("resnet18")[0], torch.zeros(1, 3, 32, 32))


def test_a_datasets_wide_images_are_reduced_as_in_training():
    """Pillow would clip nearly all values to white."""
    values = np.random.default_rng(0).integers(0, 65_536, (3, 20, 20)).astype(np.uint16)
    images = [(Image.fromarray(each), 0) for each in values]
    transform = eval_transform(16)
    features, _ = extract_features(nn.Flatten(), images, transform, torch.device("cpu"))
    seen = [to_pil_image(pixels_of(images, i)) for i in range(3)]
    assert torch.equal(features, torch.stack([transform(image).flatten() for image in seen]))
    frozen = load_backbone("pixels", image_size=16, value_range=[0, 65_535])
    for mode, dtype in (("I;16", np.uint16), ("F", np.float32)):
        images = [(Image.fromarray(values[0].astype(dtype)), 0)]
        with pytest.raises(UserError, match=f"needs 8-bit levels, and this image .{mode}. .*.image 0."):
            extract_features(nn.Flatten(), images, frozen.transform, torch.device("cpu"))
