import copy
import re
import sys

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from support import backbones
from support.errors import UserError
from support.pixels import height_and_width
from utils import DINOHead, MultiCropWrapper
from vision_transformer import VisionTransformer


@pytest.mark.parametrize(
    ("arch", "dim", "sizes"),
    [
        ("vit_nano", 128, (224, 96)),
        ("vit_nano", 128, ((64, 32), (16, 32))),
        ("resnet18", 512, (64, 32)),
        ("resnet18", 512, ((64, 32), (32, 48))),
        ("convnext_tiny", 768, (64, 32)),
        ("mobilenet_v3_small", 1024, (64, 32)),
        ("xcit_nano_12_p16_224", 128, (64, 32)),
        ("vit_tiny_patch16_224", 192, (224, 96)),
        ("vit_tiny_patch16_224", 192, ((96, 64), (32, 48))),
        ("resnet10t", 512, (64, 32)),
        ("regnety_002", 368, (64, 32)),  # pools in what it calls its head
        ("mobilenetv3_small_050", 1024, (64, 32)),  # has a layer behind the pooling
    ],
)
def test_backbones_by_name_take_both_crop_sizes(arch, dim, sizes):
    model, embed_dim = backbones.build_backbone(arch, 16, sizes[0], drop_path_rate=0.1)
    backbones.check_crop_sizes(model, arch, embed_dim, sizes)
    assert embed_dim == dim and model.training
    wrapper = MultiCropWrapper(model, DINOHead(dim, 32, hidden_dim=16, bottleneck_dim=8))
    wrapper([torch.randn(2, 3, *height_and_width(size)) for size in sizes]).sum().backward()
    unused = [n for n, p in wrapper.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # else DistributedDataParallel would wait for ever


def test_batch_norms_over_all_ranks_keep_timms_activations(monkeypatch):
    model = backbones.convert_batchnorms(backbones.build_backbone("tf_efficientnet_b0")[0])
    norms = [type(m).__name__ for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert set(norms) == {"SyncBatchNormAct"}
    model = backbones.convert_batchnorms(backbones.build_backbone("resnet18")[0])
    assert isinstance(model.bn1, nn.SyncBatchNorm)
    monkeypatch.delitem(sys.modules, "timm")  # as in a run that does not need it
    model = backbones.build_backbone("resnet18")[0]
    assert backbones.has_batchnorms(model)
    assert isinstance(backbones.convert_batchnorms(model).bn1, nn.SyncBatchNorm)


def test_models_that_cannot_checkpoint_are_named():
    for arch in ("pit_ti_224", "resnet18"):
        with pytest.raises(UserError, match=f"{arch} cannot recompute activations"):
            backbones.checkpoint_activations(backbones.build_backbone(arch)[0], arch)


def test_unknown_and_unfit_backbones_are_named():
    with pytest.raises(UserError, match="did you mean .*resnet50"):
        backbones.build_backbone("resnet5o")
    with pytest.raises(UserError, match="did you mean vit_large_patch.*, vit_large_patch.*"):
        backbones.build_backbone("vit_large")
    for name in ("dino_vits16", "ViT-S/16", "vit_s16", "vit_small_16"):
        with pytest.raises(UserError, match="did you mean --arch vit_small --patch_size 16\\?"):
            backbones.build_backbone(name)
    with pytest.raises(UserError, match="no linear classifier"):
        backbones.build_backbone("squeezenet1_0")
    model, dim = backbones.build_backbone("vit_b_32")
    with pytest.raises(UserError, match="vit_b_32 takes no images of 96 pixels: .*choose another image size"):
        backbones.check_crop_sizes(model, "vit_b_32", dim, [224, 96])
    with pytest.raises(UserError, match=r"takes no images of 224 x 96 \(H x W\) pixels"):
        backbones.check_crop_sizes(model, "vit_b_32", dim, [(224, 96)])
    with pytest.raises(UserError, match=r"flat gives \(48,\) per image, not \(7,\) \(--arch\)"):
        backbones.check_crop_sizes(nn.Flatten(), "flat", 7, [4])
    with pytest.raises(UserError, match="lstm gives a tuple .*return features .* in evaluation mode"):
        backbones.check_crop_sizes(nn.Sequential(nn.Flatten(), nn.LSTM(48, 7)), "lstm", 7, [4])


def test_a_network_of_ones_own_may_have_any_name(monkeypatch):
    monkeypatch.setitem(backbones.VITS, "mine", lambda patch_size=16, **kwargs: VisionTransformer(depth=1))
    assert backbones.canonical("mine") == "mine" and backbones.canonical("deit_small") == "vit_small"
    assert backbones.canonical("xcit_small_12_p16") == "xcit_small_12_p16_224"  # of the published weights
    assert len(backbones.build_backbone("mine")[0].blocks) == 1


def test_drop_path_that_a_network_lacks_is_said(capsys):
    for rate in (0.0, 0.1):
        backbones.build_backbone("dla46_c", drop_path_rate=rate)
    assert capsys.readouterr().out == "note: --drop_path_rate has no effect on dla46_c\n"


@pytest.mark.parametrize("arch", ["vit_nano", "vit_tiny_patch16_224"])
def test_the_last_block_drops_at_the_rate_of_the_flag(arch):
    last = backbones.build_backbone(arch, 16, 224, drop_path_rate=0.25)[0].blocks[-1]
    found = [m.p for m in last.modules() if isinstance(m, StochasticDepth)]  # ours
    found += [m.drop_prob for m in last.modules() if isinstance(m, DropPath)]  # timm's
    assert set(found) == {0.25}


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny"])
def test_a_first_convolution_for_other_channels_is_otherwise_the_same(arch):
    networks = (backbones.build_backbone(arch, in_chans=channels)[0] for channels in (3, 5))
    usual, other = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in networks)
    assert repr(other) == repr(usual).replace("Conv2d(3,", "Conv2d(5,")
    assert other.bias is None or not other.bias.any()  # torchvision's begins at 0


def test_both_sides_have_to_divide():
    backbones.check_divides("size", [48, 32], 16)
    for size, words in (
        ([60, 32], "--size 60 32): try 48 32 or 64 32"),
        ([32, 5], "--size 32 5): try 32 16"),
        (60, "--size 60): try 48 or 64"),
    ):
        with pytest.raises(UserError, match=re.escape(f"not a multiple of --patch_size 16 ({words}")):
            backbones.check_divides("size", size, 16)


@pytest.mark.parametrize(
    ("arch", "padded"), [("inception_v3", True), ("resnet18", False), ("vit_nano", False)]
)
def test_average_pools_with_padding_are_found(arch, padded):
    backbone, _ = backbones.build_backbone(arch, 16, 96)
    before = copy.deepcopy(backbone.state_dict())
    assert backbones.pads_average_pools(backbone, 96) == padded and backbone.training
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    assert backbones.pads_average_pools(nn.AvgPool2d(3, 2, padding=1), 96)
    assert not backbones.pads_average_pools(nn.AvgPool2d(3, 2), 96)
    pools = nn.Sequential(nn.AvgPool2d(3, 2, padding=1), nn.AvgPool2d(3, 2, ceil_mode=True))
    assert backbones.pads_average_pools(pools, 96)
