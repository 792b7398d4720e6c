import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import visualize_attention
from support import backbones
from support.errors import TrainingError, UserError
from tests.conftest import run, save_images
from visualize_attention import cls_attention, enlarge, keep_mass

RANDOM_VIT = "--pretrained_weights random --arch vit_nano --patch_size 8".split()


def look(*flags) -> None:
    visualize_attention.main(visualize_attention.parse_args([*map(str, flags)]))


def test_published_flags_and_defaults():
    args = vars(visualize_attention.parse_args([]))
    published = {
        "pretrained_weights": "", "image_path": None, "image_size": (480, 480), "threshold": None,
    }  # fmt: skip
    assert {name: args[name] for name in published} == published
    assert args["arch"] is args["patch_size"] is args["checkpoint_key"] is None  # as the weights say
    assert args["output_dir"] == "attention"  # published: ".", where it overwrote the user's files


# ---- attention


def test_rows_of_patches_come_out_as_rows_of_the_image():
    torch.manual_seed(0)
    vit = backbones.build_backbone("vit_nano", 8, 32)[0].eval()
    images = torch.randn(2, 3, 16, 40)
    with torch.no_grad():
        whole = vit.get_last_selfattention(images)
    attention = cls_attention(vit, images)
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
        cls_attention(theirs, images), cls_attention(ours, images), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16_224", "vit_small_patch14_reg4_dinov2", "cait_xxs24_224"])
def test_other_vits_of_timm(arch):
    patch = 14 if "14" in arch else 16
    with torch.device("meta"):
        size = timm.create_model(arch, num_classes=0).default_cfg["input_size"][-1]
    backbone = backbones.build_backbone(arch)[0].eval()
    attention = cls_attention(backbone, torch.randn(1, 3, size, size))
    assert attention.shape[-2:] == (size // patch, size // patch)
    assert (attention >= 0).all() and (attention.sum((-2, -1)) <= 1.0001).all()


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "cait_xxs24_224"])
def test_hooks_of_timms_networks_are_removed_again(arch):
    backbone = backbones.build_backbone(arch)[0].eval()

    def state():
        return [(len(m._forward_hooks), getattr(m, "fused_attn", None)) for m in backbone.modules()]

    before = state()
    first, second = (cls_attention(backbone, torch.ones(1, 3, 224, 224)) for _ in range(2))
    assert state() == before and torch.equal(first, second)
    if arch.startswith("cait"):
        with pytest.raises(UserError):
            cls_attention(backbone, torch.ones(1, 3, 256, 256))
        assert state() == before


@pytest.mark.parametrize("arch", ["resnet18", "swin_tiny_patch4_window7_224", "vit_base_patch16_siglip_224"])
def test_networks_without_such_attention_are_named(arch):
    backbone = backbones.build_backbone(arch)[0].eval()
    with pytest.raises(UserError, match="has no CLS attention over patches"):
        cls_attention(backbone, torch.randn(1, 3, 224, 224))


def test_a_size_that_a_network_cannot_take_is_named():
    backbone = backbones.build_backbone("cait_xxs24_224")[0].eval()
    with pytest.raises(UserError, match=r"Cait: .*\(--image_size\): try 224 224"):
        cls_attention(backbone, torch.randn(1, 3, 256, 256))


def test_all_of_the_mass_is_all_of_the_patches():
    attention = torch.rand(4, 60, 60, generator=torch.Generator().manual_seed(0)) + 1e-6
    assert keep_mass(attention, 1.0).all()
    assert (keep_mass(attention, 1e-9).sum((-2, -1)) == 1).all()


def test_mask_by_hand():
    attention = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    assert keep_mass(attention, 0.4).tolist() == [[False, True], [False, False]]
    assert keep_mass(attention, 0.6).tolist() == [[False, True], [True, False]]
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


def test_patches_become_blocks():
    blocks = enlarge(torch.tensor([[[1, 2], [3, 4]]]), (4, 6))
    assert blocks.tolist() == [[[1, 1, 1, 2, 2, 2]] * 2 + [[3, 3, 3, 4, 4, 4]] * 2]


# ---- pictures


def test_every_image_has_a_folder_of_its_own():
    paths = ["x/a.png", "x/a-2.png", "y/a.png", "y/b.png", "z/a.jpg"]
    assert visualize_attention.folder_names(paths) == ["a", "a-2", "a-3", "b", "a-4"]


def test_any_patch_size_will_do(tmp_path):
    save_images(tmp_path, 1)
    look(
        *RANDOM_VIT, "--patch_size", 5, "--image_path", tmp_path, "--image_size", 42, "--output_dir", tmp_path
    )
    with Image.open(tmp_path / "img.png") as image:
        assert image.size == (40, 40)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_default_folder_is_a_subfolder(tmp_path, monkeypatch):
    save_images(tmp_path, 1)
    (tmp_path / "000.png").rename(tmp_path / "img.png")
    (tmp_path / "sheet.png").write_bytes(b"the user's")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    look(*RANDOM_VIT, "--image_path", "img.png", "--image_size", 32)
    assert before.items() <= contents(tmp_path).items()
    assert {path.name for path in tmp_path.iterdir()} == {"attention", "img.png", "sheet.png"}


@pytest.mark.parametrize("name", ["img.png", "sheet.png"])
def test_no_file_of_the_user_is_overwritten(tmp_path, name):
    save_images(tmp_path, 1)
    (tmp_path / "000.png").rename(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=rf"would overwrite .*{name}\): give another --output_dir"):
        look(*RANDOM_VIT, "--image_path", tmp_path / name, "--image_size", 32, "--output_dir", tmp_path)
    assert contents(tmp_path) == {name: before}  # refused before anything is written


def test_a_picture_of_ours_that_is_the_input_is_not_overwritten_either(tmp_path):
    save_images(tmp_path / "in", 1)
    flags = *RANDOM_VIT, "--image_size", 32, "--output_dir", tmp_path / "out", "--image_path"
    look(*flags, tmp_path / "in")
    with pytest.raises(UserError, match=r"would overwrite .*img.png"):
        look(*flags, tmp_path / "out" / "img.png")


@pytest.mark.parametrize("out", ["out", "."])
def test_a_second_run_on_a_folder_gives_the_same(tmp_path, capsys, out):
    save_images(tmp_path, 2)
    flags = *RANDOM_VIT, "--image_path", tmp_path, "--image_size", 32, "--output_dir", tmp_path / out
    look(*flags)
    first = contents(tmp_path)
    assert "left out" not in capsys.readouterr().out
    look(*flags)
    assert contents(tmp_path) == first
    assert f"left out {len(first) - 2} pictures of an earlier run" in capsys.readouterr().out


def test_photos_are_shown_as_a_viewer_shows_them(tmp_path):
    photo = Image.new("RGB", (64, 32))
    photo.paste((255, 255, 255), (0, 0, 32, 32))  # stored: white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer shows white at the top
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    look(*RANDOM_VIT, "--image_path", tmp_path / "photo.jpg", "--image_size", 32, "--output_dir", tmp_path)
    with Image.open(tmp_path / "img.png") as shown:
        assert shown.size == (32, 64)
        assert np.asarray(shown)[:24].mean() > 240 and np.asarray(shown)[40:].mean() < 15


def test_a_broken_photo_does_not_end_a_run_over_many(tmp_path, capsys):
    save_images(tmp_path / "in", 3)
    (tmp_path / "in" / "001.png").write_bytes(b"not an image")
    flags = *RANDOM_VIT, "--image_path", tmp_path / "in", "--image_size", 32
    with pytest.raises(TrainingError, match=r"1 of 3 images could not be read"):
        look(*flags, "--output_dir", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000", "002", "sheet.png"}
    assert "warning: cannot read image" in capsys.readouterr().out
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="cannot read image") as error:
        look(*flags, "--output_dir", tmp_path / "none")
    assert error.value.exit_code == 2 and not list((tmp_path / "none").iterdir())


def test_it_waits_for_no_other_process(tmp_path):
    save_images(tmp_path, 1)
    flags = [*RANDOM_VIT, "--image_path", str(tmp_path), "--image_size", "32", "--output_dir", str(tmp_path)]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # where nobody listens
    run("visualize_attention.py", *flags, env=group | {"RANK": "1"})
    assert not (tmp_path / "sheet.png").exists()
    run("visualize_attention.py", *flags, env=group | {"RANK": "0"})
    assert (tmp_path / "sheet.png").exists()


def test_it_says_what_it_took(tmp_path, capsys):
    save_images(tmp_path, 2)
    look(*RANDOM_VIT, "--image_path", tmp_path, "--image_size", 32, "--output_dir", tmp_path)
    said = capsys.readouterr().out
    assert "weights: random" in said and "images: 2 images" in said
    assert "preprocessing: mean (0.485, 0.456, 0.406), deviation (0.229, 0.224, 0.225)" in said


def test_a_sheet_keeps_relative_sizes():
    large, small = Image.new("RGB", (64, 32)), Image.new("RGB", (32, 32))
    sheet = np.asarray(visualize_attention.contact_sheet([[large, small]], side=128))
    assert sheet.shape == (4 + 132, 4 + 2 * 132, 3)
    black = (sheet == 0).all(-1)
    assert black[:, :136].sum() == 128 * 64 and black[:, 136:].sum() == 64 * 64


def test_one_image_gives_the_published_files_and_a_sheet(tmp_path):
    save_images(tmp_path, 1, size=50)
    look(*RANDOM_VIT, "--image_path", tmp_path / "000.png", "--image_size", 43, 60, "--threshold", 0.6,
         "--output_dir", tmp_path / "out")  # fmt: skip
    names = {f"{kind}-{part}" for kind in ("attn", "overlay") for part in ("mean", "head0", "head3")}
    names |= {"img", "sheet", "mask_th0.6_head0", "mask_th0.6_head3", "mask_th0.6_mean"}
    found = {path.stem for path in (tmp_path / "out").iterdir()}
    assert names <= found and len(found) == 2 + 3 * 5
    with Image.open(tmp_path / "out" / "img.png") as image:
        assert image.size == (56, 40)  # 60 x 43 cut to whole patches of 8
    with Image.open(tmp_path / "out" / "mask_th0.6_head0.png") as mask:
        share = np.asarray(mask).mean()
        assert set(np.unique(np.asarray(mask)).tolist()) == {False, True} and 0.2 < share < 0.7
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > sheet.height and len(sheet.getcolors(2**24)) > 50
    with Image.open(tmp_path / "out" / "attn-head1.png") as heat:
        blocks = np.asarray(heat).reshape(5, 8, 7, 8, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()  # one colour per patch


def test_folders_and_several_images(tmp_path):
    save_images(tmp_path / "a", 2)
    save_images(tmp_path / "b", 1)
    look(*RANDOM_VIT, "--image_path", tmp_path / "a", tmp_path / "b" / "000.png", "--image_size", 32,
         "--output_dir", tmp_path / "out")  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000", "001", "000-2", "sheet.png"}
    assert not list((tmp_path / "out").glob("*/mask*"))


@pytest.mark.slow
def test_the_demo_draws_the_trained_network(tmp_path):
    flags = "--demo", "--max_steps", "2", "--batch_size_per_gpu", "4", "--num_workers", "0"
    run("-c", f"import main_dino as m; m.train_dino(m.parse_args({[*flags, '--output_dir', str(tmp_path)]}))")
    out = run("visualize_attention.py", "--demo", "--pretrained_weights", str(tmp_path / "checkpoint.pth"),
              "--output_dir", str(tmp_path)).stdout  # fmt: skip
    demo = "--demo", "--pretrained_weights", tmp_path / "checkpoint.pth", "--output_dir", tmp_path
    with pytest.raises(UserError, match="trained with vit_nano"):
        look(*demo, "--arch", "vit_small")
    with pytest.raises(UserError, match="--image_size 60"):
        look(*demo, "--image_size", "60")
    assert "eval_segmentation.py --demo measures" in out and "Jaccard" not in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 + 6 * 132, 4 + 8 * 132)  # image, mean and 4 heads; 4 images on 2 rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no images given .*--demo"),
        (["--image_path", "/nowhere.png"], "no such file .*--image_path /nowhere.png"),
        (["--image_path", "tests/data"], "no images found"),
        (["--image_path", "{broken}"], "cannot read image: .*broken.png"),
        (["--image_path", "{good}", "--image_size", "4"], "smaller than a patch of 8"),
        (["--image_path", "{good}", "--image_size", "1", "2", "3"], "one or two lengths"),
        (["--image_path", "{good}", "--pretrained_weights", "pixels"], "Flatten has no CLS attention"),
        (["--image_path", "{good}", "--pretrained_weights", ""], "no weights given"),
        (["--demo", "--image_path", "{good}"], "draws its own images"),
        (["--demo", "--pretrained_weights", "/nowhere.pth"], "main_dino.py --demo first"),
    ],
)
def test_bad_usage_is_one_clear_line(tmp_path, flags, message):
    save_images(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    flags = [flag.format(broken=tmp_path / "broken.png", good=tmp_path / "000.png") for flag in flags]
    with pytest.raises(UserError, match=message) as error:
        look(*RANDOM_VIT, "--output_dir", tmp_path / "out", *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "60"], "--threshold: must be at most 1, not 60"),
        (["--threshold", "0"], "--threshold: must be above 0, not 0"),
        (["--image_size", "0"], "--image_size: must be at least 1, not 0"),
        (["--patch_size", "0"], "--patch_size: must be at least 1, not 0"),
        (["--seed=-1"], "--seed: must be at least 0, not -1"),
    ],
)
def test_a_number_out_of_range_is_one_clear_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        visualize_attention.parse_args(flags)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1
