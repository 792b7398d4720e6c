import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import backbones
from support.attention import attention_map, keep_mass
from support.errors import UserError
from support.features import last_cls_tokens


def test_rows_of_patches_come_out_as_rows_of_the_image():
    torch.manual_seed(0)
    vit = backbones.build_backbone("vit_nano", 8, 32)[0].eval()
    images = torch.randn(2, 3, 16, 40)
    with torch.no_grad():
        whole = vit.get_last_selfattention(images)
    attention = attention_map(vit, images)
    assert attention.shape == (2, 4, 2, 5)
    from_cls = whole[1, 2, 0, 1 + 5 + 3]  # to row 1, column 3
    torch.testing.assert_close(attention[1, 2, 1, 3], from_cls, rtol=1e-5, atol=0)
    assert (attention - from_cls).abs().lt(1e-6).sum() == 1  # no other patch has this value


@pytest.mark.parametrize("fused", [True, False])
def test_ours_and_timms_give_the_same_map(fused):
    theirs = backbones.build_backbone("vit_tiny_patch16_224")[0].eval()
    ours = backbones.build_backbone("vit_tiny", 16, 224)[0].eval()
    ours.load_state_dict(theirs.state_dict())
    for module in theirs.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(
        attention_map(theirs, images), attention_map(ours, images), rtol=1e-3, atol=1e-5
    )
    assert {block.attn.fused_attn for block in theirs.blocks} == {fused}


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16_224", "vit_small_patch14_reg4_dinov2", "cait_xxs24_224"])
def test_other_vits_of_timm(arch):
    patch = 14 if "14" in arch else 16
    size = timm.get_pretrained_cfg(arch).input_size[-1]
    backbone = backbones.build_backbone(arch)[0].eval()
    attention = attention_map(backbone, torch.randn(1, 3, size, size))
    assert attention.shape[-2:] == (size // patch, size // patch)
    assert (attention >= 0).all() and (attention.sum((-2, -1)) <= 1.0001).all()


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "cait_xxs24_224"])
def test_hooks_of_timms_networks_are_removed_again(arch):
    backbone = backbones.build_backbone(arch)[0].eval()

    def state():
        return [(len(m._forward_hooks), getattr(m, "fused_attn", None)) for m in backbone.modules()]

    before = state()
    first, second = (attention_map(backbone, torch.ones(1, 3, 224, 224)) for _ in range(2))
    assert state() == before and torch.equal(first, second)
    if arch.startswith("cait"):
        with pytest.raises(UserError, match="Cait: Input"):
            attention_map(backbone, torch.ones(1, 3, 256, 256))
        assert state() == before


@pytest.mark.parametrize("arch", ["resnet18", "swin_tiny_patch4_window7_224", "vit_base_patch16_siglip_224"])
def test_networks_without_such_attention_are_named(arch):
    backbone = backbones.build_backbone(arch)[0].eval()
    with pytest.raises(UserError, match="has no CLS attention over patches"):
        attention_map(backbone, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("arch", "words"), [("cait_xxs24_224", "Cait: Input"), ("volo_d1_224", "VOLO: The size")]
)
def test_a_size_that_a_network_cannot_take_is_named(arch, words):
    backbone = backbones.build_backbone(arch)[0].eval()
    with pytest.raises(UserError, match=rf"{words} .*\(--image_size\): try 224 224"):
        attention_map(backbone, torch.randn(1, 3, 256, 256))


def test_all_of_the_mass_is_all_of_the_patches():
    attention = torch.rand(4, 60, 60, generator=torch.Generator().manual_seed(0)) + 1e-6
    assert keep_mass(attention, 1.0).all()
    assert (keep_mass(attention, 1e-9).sum((-2, -1)) == 1).all()


def test_mask_by_hand():
    attention = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    assert keep_mass(attention, 0.4).tolist() == [[False, True], [False, False]]
    assert keep_mass(attention, 0.6).tolist() == [[False, True], [True, False]]
    assert keep_mass(torch.tensor([[0.5, 0.25, 0.25]]), 0.5).tolist() == [[True, False, False]]
    assert keep_mass(10 * attention, 0.75).tolist() == [[False, True], [True, True]]
    assert keep_mass(attention, 1.0).all()


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), share=st.floats(0.01, 0.99), seed=st.integers(0)
)
def test_mask_is_the_smallest_that_holds_the_share(shape, share, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    attention = torch.rand(2, *shape, generator=generator).double() + 0.01
    attention /= attention.sum((-2, -1), keepdim=True)
    kept = keep_mass(attention, share)
    mass = (attention * kept).sum((-2, -1))
    assert (mass >= share - 1e-9).all()
    weakest = torch.where(kept, attention, 2.0).amin((-2, -1))
    assert (mass - weakest < share + 1e-9).all()  # one patch fewer would not do
    assert (torch.where(kept, 0.0, attention).amax((-2, -1)) <= weakest).all()


# ---- other layers and queries


def test_the_row_of_a_patch_in_any_layer():
    torch.manual_seed(0)
    vit = backbones.build_backbone("vit_nano", 8, 32)[0].eval()
    images = torch.randn(2, 3, 16, 40)  # 2 x 5 patches
    with torch.no_grad():
        third = vit.get_attention(images, layer=3)
    row = attention_map(vit, images, layer=3, patch=(1, 2))
    torch.testing.assert_close(row, third[:, :, 1 + 5 + 2, 1:].unflatten(-1, (2, 5)))
    cls = attention_map(vit, images, layer=3)
    torch.testing.assert_close(cls, third[:, :, 0, 1:].unflatten(-1, (2, 5)))


@pytest.mark.parametrize(("layer", "patch"), [(1, (0, 0)), (2, None), (12, (1, 2))])
def test_ours_and_timms_give_the_same_row(layer, patch):
    theirs = backbones.build_backbone("vit_tiny_patch16_224")[0].eval()
    ours = backbones.build_backbone("vit_tiny", 16, 224)[0].eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    rows = (attention_map(network, images, layer, patch) for network in (theirs, ours))
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-5)


def test_the_row_of_a_patch_behind_registers_of_ones_own():
    vit = backbones.build_backbone("vit_nano", 8, 32)[0].eval()
    tokens = torch.randn(2, 1 + 4 + 10, 128)
    vit.prepare_tokens = lambda x: tokens
    images = torch.randn(2, 3, 16, 40)
    row = attention_map(vit, images, patch=(1, 2))
    torch.testing.assert_close(row.flatten(-2), vit.get_attention(images)[:, :, 5 + 5 + 2, 5:])


def test_registers_are_not_taken_for_patches():
    backbone = backbones.build_backbone("vit_small_patch14_reg4_dinov2")[0].eval()
    images, maps = torch.randn(1, 3, 56, 56), []  # 4 x 4 patches, after CLS and 4 registers
    attention = backbone.blocks[-2].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, inputs, softmax: maps.append(softmax))
    row = attention_map(backbone, images, layer=2, patch=(1, 3))
    torch.testing.assert_close(row.flatten(-2), maps[0][:, :, 5 + 4 + 3, 5:])


def test_a_register_is_not_taken_for_the_cls_token():
    """Some of timm's ViTs have registers and average the patches."""
    backbone = backbones.build_backbone("vit_little_patch16_reg1_gap_256")[0].eval()
    images = torch.randn(1, 3, 256, 256)
    with pytest.raises(UserError, match="has no CLS attention over patches"):
        attention_map(backbone, images)
    with pytest.raises(UserError, match="has no CLS token in its blocks"):
        last_cls_tokens(backbone, images, 2)
    assert attention_map(backbone, images, patch=(1, 2)).shape[-2:] == (16, 16)


def test_a_layer_without_cls_still_has_patches():
    backbone = backbones.build_backbone("cait_xxs24_224")[0].eval()
    images = torch.randn(1, 3, 224, 224)
    row = attention_map(backbone, images, layer=3, patch=(13, 12))  # before the two layers of the CLS token
    maps = []
    last = backbone.blocks[-1].attn
    last.attn_drop.register_forward_hook(lambda module, inputs, softmax: maps.append(softmax))
    backbone(images)
    assert torch.equal(row.flatten(-2), maps[0][:, :, 14 * 14 - 2])
    with pytest.raises(UserError, match=r"Cait has no CLS attention over patches in layer 3 from the end"):
        attention_map(backbone, images, layer=3)
    with pytest.raises(UserError, match="Cait has no attention of patches over patches"):
        attention_map(backbone, images, patch=(0, 0))


def test_attention_among_channels_is_not_taken_for_patches():
    backbone = backbones.build_backbone("xcit_nano_12_p16_224")[0].eval()
    images = torch.randn(1, 3, 64, 128)  # as many patches as channels of a head
    with pytest.raises(UserError, match="2 layers with attention .*--layer 3"):
        attention_map(backbone, images, layer=3, patch=(0, 0))
    with pytest.raises(UserError, match="no attention of patches"):
        attention_map(backbone, images, layer=2, patch=(0, 0))
    assert attention_map(backbone, images, layer=2).shape[-2:] == (4, 8)


@pytest.mark.parametrize("arch", ["vit_nano", "vit_tiny_patch16_224"])
def test_a_layer_that_is_not_there_is_named(arch):
    backbone = backbones.build_backbone(arch, 16, 224)[0].eval()
    with pytest.raises(
        UserError, match=r"network has (6|12) layers with attention \(--layer 13\): give 1 to (6|12)"
    ):
        attention_map(backbone, torch.randn(1, 3, 224, 224), layer=13)
    for layer in (0, -1):  # would count from the other end
        with pytest.raises(UserError, match="layers with attention"):
            attention_map(backbone, torch.randn(1, 3, 224, 224), layer=layer)


@pytest.mark.parametrize("patch", [(-1, 0), (0, 4), (2, 0)])
def test_a_patch_that_is_not_there_is_an_error(patch):
    backbone = backbones.build_backbone("vit_nano", 8, 32)[0].eval()
    with pytest.raises(IndexError, match="of 2 x 4"):
        attention_map(backbone, torch.randn(1, 3, 16, 32), patch=patch)
