import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import visualize_attention
from support.attention import attention_map
from support.backbones import build_backbone
from support.distributed import fix_random_seeds
from support.errors import TrainingError, UserError
from support.pictures import enlarge, heat_map
from support.pixels import normalize
from support.video import Frames, write_video
from support.weights import load_backbone
from tests.conftest import call, picture, run, run_on_full_disk, save_images

RANDOM_VIT = "--pretrained_weights random --arch vit_nano --patch_size 8".split()


def look(*flags) -> None:
    call(visualize_attention, *flags)


@pytest.mark.parametrize(("arch", "words"), [("vit_nano", "vit_nano, patch 8"), ("resnet10t", "resnet10t")])
def test_a_random_vit_has_the_patch_size_of_the_help(tmp_path, capsys, arch, words):
    assert "else 8)" in " ".join(visualize_attention.get_args_parser().format_help().split())
    save_images(tmp_path, 2)
    look("--pretrained_weights", "random", "--arch", arch, "--image_path", tmp_path, "--image_size", 128,
         "--pca", "--foreground", "all", "--output_dir", tmp_path / "out")  # fmt: skip
    said = capsys.readouterr().out
    assert f"weights: random: {words}\n" in said and "--patch_size" not in said


# ---- pictures


def test_every_image_has_a_folder_of_its_own():
    paths = ["x/a.png", "x/a-2.png", "y/a.png", "y/b.png", "z/a.jpg"]
    assert visualize_attention.folder_names(paths, paths) == ["a", "a-2", "a-3", "b", "a-4"]
    paths = ["x/a.png", "x/y/a.jpg", "x/y/a.png", "x/y/z.b.png", "a.png", "x.zip/y/a.png"]
    names = ["a", "y/a", "y/a-2", "y/z.b", "a-2", "y/a-3"]
    assert visualize_attention.folder_names(paths, ["./x/", "a.png", "x.zip"]) == names
    paths = ["x/Cat.png", "y/cat.png", "x/caf\u00e9.png", "y/cafe\u0301.png"]  # one folder on a Mac
    names = ["Cat", "cat-2", "caf\u00e9", "cafe\u0301-2"]
    assert visualize_attention.folder_names(paths, paths) == names


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


def test_a_full_disk_leaves_no_half_picture(tmp_path):
    save_images(tmp_path / "in", 1)
    flags = [*RANDOM_VIT, "--image_path", tmp_path / "in", "--image_size", "32", "--output_dir"]
    result = run_on_full_disk("visualize_attention", 200, *flags, tmp_path / "out")
    where, fix = tmp_path / "out" / "img.png", "correct this, then run the same command"
    assert result.returncode == 1 and result.stderr == f"error: File too large ({where}): {fix}\n"
    assert not list((tmp_path / "out").iterdir())
    look(*flags, tmp_path / "out")  # once there is room


def test_a_picture_of_ours_that_is_the_input_is_not_overwritten_either(tmp_path):
    save_images(tmp_path / "in", 1)
    flags = *RANDOM_VIT, "--image_size", 32, "--output_dir", tmp_path / "out", "--image_path"
    look(*flags, tmp_path / "in")
    with pytest.raises(UserError, match=r"would overwrite .*img.png"):
        look(*flags, tmp_path / "out" / "img.png")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match=r"would overwrite .*out/img.png"):
        look(*flags, tmp_path / "out" / "img.png", "--output_dir", tmp_path / "link")


@pytest.mark.parametrize("out", ["out", "."])
def test_a_second_run_on_a_folder_gives_the_same(tmp_path, capsys, out):
    save_images(tmp_path, 2)
    flags = *RANDOM_VIT, "--image_path", tmp_path, "--image_size", 32, "--output_dir", tmp_path / out
    look(*flags)
    first, said = contents(tmp_path), capsys.readouterr().out
    assert "left out" not in said and said.count("would read its pictures") == 1
    look(*flags)
    assert contents(tmp_path) == first
    assert f"left out {len(first) - 2} pictures of an earlier run" in capsys.readouterr().out


def test_pictures_of_an_earlier_run_that_stay_are_named(tmp_path, capsys):
    save_images(tmp_path, 1)
    flags = *RANDOM_VIT, "--image_path", tmp_path / "000.png", "--image_size", 32
    look(*flags, "--output_dir", tmp_path / "out", "--threshold", 0.6)
    look(*flags, "--output_dir", tmp_path / "out", "--threshold", 0.6)
    assert "earlier run" not in capsys.readouterr().out
    look(*flags, "--output_dir", tmp_path / "out")
    assert "; 5 of an earlier run stay, e.g. mask_th0.6_head0.png" in capsys.readouterr().out


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


def test_the_sheet_shows_the_first_images_that_can_be_read(tmp_path, capsys, monkeypatch):
    save_images(tmp_path / "in", 3)
    (tmp_path / "in" / "000.png").write_bytes(b"not an image")
    for most, rows in ((1, 1), (2, 2), (3, 2)):
        monkeypatch.setattr(visualize_attention, "ON_SHEET", most)
        with pytest.raises(TrainingError):
            look(*RANDOM_VIT, "--image_path", tmp_path / "in", "--image_size", 32, "--output_dir", tmp_path)
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.height == 4 + rows * 164
        said = capsys.readouterr().out
        assert said.count(", the first ") == said.count("sheet.png, the first 1 of 2 images") == (most == 1)


@pytest.mark.slow
def test_the_first_process_draws_without_waiting_for_the_others(tmp_path):
    save_images(tmp_path, 1)
    flags = [*RANDOM_VIT, "--image_path", tmp_path, "--image_size", "32", "--output_dir", tmp_path]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # where nobody listens
    run("visualize_attention.py", *flags, env=group | {"RANK": "1"})
    assert not (tmp_path / "sheet.png").exists()
    run("visualize_attention.py", *flags, env=group | {"RANK": "0"})
    assert (tmp_path / "sheet.png").exists()


def test_weights_images_and_preprocessing_are_said(tmp_path, capsys):
    save_images(tmp_path, 1)
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    look(*RANDOM_VIT, "--image_path", tmp_path, "--image_size", 32, "--output_dir", tmp_path)
    said = capsys.readouterr().out
    assert "weights: random" in said and "images: 2 images" in said
    assert "are nearly constant" in said
    assert "preprocessing: mean (0.485, 0.456, 0.406), deviation (0.229, 0.224, 0.225)" in said


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


def test_a_folder_that_cannot_be_made_is_named_before_all_work(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"\(--output_dir .*out\)"):
        look("--pretrained_weights", "none.pth", "--image_path", tmp_path, "--output_dir", tmp_path / "out")


def test_folders_and_several_images(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "a", 2)
    save_images(tmp_path / "b", 1)
    look(*RANDOM_VIT, "--image_path", "~/a", tmp_path / "b" / "000.png", "--image_size", 32,
         "--output_dir", "~/out")  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000", "001", "000-2", "sheet.png"}
    assert not list((tmp_path / "out").glob("*/mask*"))


def test_pictures_of_a_linked_folder_lie_in_its_folders(tmp_path):
    save_images(tmp_path / "photos" / "cat", 2)
    (tmp_path / "link").symlink_to("photos")
    flags = "--image_path", tmp_path / "link", "--image_size", 32, "--output_dir", tmp_path / "out"
    look(*RANDOM_VIT, *flags)
    assert (tmp_path / "out" / "cat" / "001" / "img.png").exists()


# ---- queries and layers


@pytest.mark.parametrize(
    ("query", "patch"),
    [((0, 0), (0, 0)), ((11, 10), (0, 0)), ((12, 11), (1, 1)), ((45, 10), (0, 3)), ((46, 11), (1, 4)),
     ((99, 59), (4, 7))],
)  # fmt: skip
def test_the_patch_of_a_pixel(query, patch):
    # 69 x 43 after resizing, 64 x 40 after cropping: a patch has 11.6 x 11.2 pixels of the original.
    assert visualize_attention.patch_at(query, Image.new("RGB", (100, 60)), [43, 69], 8) == patch


def test_a_query_counts_pixels_as_a_viewer_shows_them():
    photo = Image.new("RGB", (64, 32))
    photo.getexif()[0x0112] = 6  # shown turned, 32 wide and 64 high
    assert visualize_attention.patch_at((31, 63), photo, [32], 8) == (7, 3)
    with pytest.raises(UserError, match="outside of the 32 x 64 image .*give X below 32 and Y below 64"):
        visualize_attention.patch_at((63, 31), photo, [32], 8)


def test_a_query_and_a_layer_choose_the_row(tmp_path):
    save_images(tmp_path, 1, size=50)
    flags = *RANDOM_VIT, "--image_path", tmp_path / "000.png", "--image_size", 43, 60
    look(*flags, "--query", 31, 22, "--layer", 2, "--output_dir", tmp_path / "out")
    with Image.open(tmp_path / "000.png") as file:
        image = visualize_attention.prepare(file.convert("RGB"), [43, 60], 8)
    pixels = normalize(pil_to_tensor(image)[None])
    fix_random_seeds(0)
    frozen = load_backbone("random", None, "vit_nano", 8)
    expected = attention_map(frozen.network, pixels, 2, (2, 4))[
        0
    ]  # 31 / 50 of 60 columns, 22 / 50 of 43 rows
    with Image.open(tmp_path / "out" / "attn-head1.png") as heat:
        assert np.array_equal(np.asarray(heat), np.asarray(heat_map(enlarge(expected[1], (40, 56)))))
    for name in ("img", "overlay-mean"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            red = (np.asarray(picture) == (255, 0, 0)).all(-1)
            assert red.sum() == 4 * 7 and red[16:24, 32:40].sum() == 4 * 7  # the frame of one patch


# ---- principal components


def test_components_of_several_images(tmp_path, capsys):
    save_images(tmp_path / "in", 3)
    (tmp_path / "in" / "001.png").write_bytes(b"not an image")
    flags = *RANDOM_VIT, "--image_path", tmp_path / "in", "--image_size", 64, "--pca"
    with pytest.raises(TrainingError, match="1 of 3 images could not be read"):
        look(*flags, "--output_dir", tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert files == {"000/img.png", "000/pca.png", "002/img.png", "002/pca.png", "sheet.png"}
    said = capsys.readouterr().out
    share = int(
        re.search(r"principal components: foreground (\d+)% of the patches; if it is the back", said)[1]
    )
    blocks = []
    for name in ("000", "002"):
        with Image.open(tmp_path / "out" / name / "pca.png") as picture:
            patches = np.asarray(picture).reshape(8, 8, 8, 8, 3)
        assert (patches == patches[:, :1, :, :1]).all()  # one colour per patch
        blocks.append(patches[:, 0, :, 0])
    coloured = np.stack(blocks).max(axis=-1) > 0
    assert 100 * coloured.mean() == pytest.approx(share, abs=0.5) and 5 < share < 95
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size == (4 + 2 * 164, 4 + 2 * 164)  # images, and below them their components
    with pytest.raises(TrainingError):
        look(*flags, "--output_dir", tmp_path / "other", "--foreground", "negative")
    with Image.open(tmp_path / "other" / "000" / "pca.png") as picture:
        assert np.array_equal(np.asarray(picture)[::8, ::8].max(-1) == 0, coloured[0])
    with pytest.raises(TrainingError):
        look(*flags, "--output_dir", tmp_path / "deep", "--layer", "3")
    pictures = [(tmp_path / name / "000" / "pca.png").read_bytes() for name in ("out", "deep")]
    assert pictures[0] != pictures[1]


def test_components_of_timms_networks(tmp_path):
    save_images(tmp_path, 2)
    look("--pretrained_weights", "random", "--arch", "resnet10t", "--image_path", tmp_path,
         "--image_size", 128, "--pca", "--foreground", "all", "--output_dir", tmp_path / "out")  # fmt: skip
    with Image.open(tmp_path / "out" / "000" / "pca.png") as picture:
        assert picture.size == (128, 128) and (np.asarray(picture) > 0).all()


def test_flags_without_effect_are_named(tmp_path, capsys):
    save_images(tmp_path, 1)
    flags = *RANDOM_VIT, "--image_path", tmp_path, "--image_size", 64, "--output_dir", tmp_path / "out"
    look(*flags, "--pca", "--threshold", 0.5)
    assert "warning: --threshold has no effect: --pca draws no masks" in capsys.readouterr().out
    visualize_attention.check_args(visualize_attention.parse_args("--demo --pca --threshold 0.5".split()))
    assert "warning: --threshold has no effect: --pca draws no masks" in capsys.readouterr().out
    look(*flags, "--foreground", "all", "--fps", 3, "--video_format", "avi")
    said = capsys.readouterr().out
    for flag in ("foreground", "fps", "video_format"):
        assert f"warning: --{flag} has no effect" in said


# ---- videos


def bright_and_dark(path, count: int = 6) -> None:
    """A video of two pictures in turn."""
    with write_video(path, 12, "") as append:
        for i in range(count):
            append(picture(seed=i % 2, size=(96, 64)))


def mean_attention(frame: Image.Image):
    fix_random_seeds(0)
    frozen = load_backbone("random", None, "vit_nano", 8)
    return attention_map(frozen.network, normalize(pil_to_tensor(frame)[None]))[0].mean(dim=0)


def test_a_video_of_the_attention_has_one_scale(tmp_path, capsys):
    bright_and_dark(tmp_path / "in.mp4")
    flags = *RANDOM_VIT, "--video", tmp_path / "in.mp4", "--image_size", 64, "--output_dir", tmp_path / "out"
    look(*flags, "--threshold", 0.6)
    assert "scale: one for all 6 frames, from 6 of them" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["video.mp4"]
    taken, made = Frames(str(tmp_path / "in.mp4")), Frames(str(tmp_path / "out" / "video.mp4"))
    assert len(made) == 6 and made.rate == 12 and made.size == (3 * 96, 64)
    maps = [mean_attention(frame) for frame in taken]
    tops = [attention.max().item() for attention in maps]
    assert max(tops) > 1.02 * min(tops)
    for frame, shown, attention in zip(taken, made, maps, strict=True):
        heat = heat_map(enlarge(attention, (64, 96)), max(tops))
        for left, expected in {0: frame, 96: Image.blend(frame, heat, 0.6)}.items():
            panel = np.asarray(shown.crop((left, 0, left + 96, 64)), np.float32)
            assert np.abs(panel - np.asarray(expected, np.float32)).mean() < 6  # what the encoder loses


def test_a_video_of_the_components_from_a_folder_of_frames(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(visualize_attention, "FIT_ON", 2)
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves ~ after = to us
    save_images(tmp_path / "frames", 5)
    flags = *RANDOM_VIT, "--video=~/frames", "--output_dir", tmp_path / "out", "--pca"
    look(*flags, "--image_size", 64, "--video_format", "avi", "--fps", 5)
    said = capsys.readouterr().out
    assert "scale: one for all 5 frames, from 2 of them, evenly spread" in said
    made = Frames(str(tmp_path / "out" / "video.avi"))
    assert len(made) == 5 and made.rate == 5 and made.size == (128, 64)
    look(*flags, "--image_size", 64, "--video_format", "avi")  # its own file may be replaced
    assert Frames(str(tmp_path / "out" / "video.avi")).rate == 30


def test_a_video_keeps_the_shape_of_its_frames():
    assert visualize_attention.parse_args(["--video", "a.mp4"]).image_size == [480]


def test_a_query_in_a_video(tmp_path):
    bright_and_dark(tmp_path / "in.mp4", 2)
    flags = *RANDOM_VIT, "--video", tmp_path / "in.mp4", "--image_size", 64, "--output_dir", tmp_path / "out"
    look(*flags, "--query", 40, 20)
    first, shown = (next(iter(Frames(str(tmp_path / name)))) for name in ("in.mp4", "out/video.mp4"))
    frame = np.zeros((64, 96), dtype=bool)
    frame[16:24, 40:48] = True
    frame[17:23, 41:47] = False
    before, after = (np.asarray(picture, np.int64)[:, :96] for picture in (first, shown))
    redder = (after - before)[..., 0] - (after - before)[..., 1:].mean(axis=-1)
    assert redder[frame].mean() > 50 and abs(redder[~frame].mean()) < 5
    with pytest.raises(UserError, match=r"outside of the 96 x 64 image \(--query 40 64\)"):
        look(*flags, "--query", 40, 64)


@pytest.mark.parametrize("name", ["in.mp4", "out/video.mp4"])
def test_no_video_of_the_user_is_overwritten(tmp_path, name):
    (tmp_path / "out").mkdir()
    bright_and_dark(tmp_path / "in.mp4", 2)
    bright_and_dark(tmp_path / "out" / "video.mp4", 2)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"would overwrite .*video.mp4\): give another --output_dir"):
        look(*RANDOM_VIT, "--video", tmp_path / name, "--output_dir", tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_the_demo_draws_the_trained_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = "--demo", "--max_steps", "2", "--batch_size_per_gpu", "4", "--num_workers", "0"
    run("-c", f"import main_dino as m; m.train_dino(m.parse_args({[*flags, '--output_dir', str(tmp_path)]}))")
    out = run("visualize_attention.py", "--demo", "--pretrained_weights", tmp_path / "checkpoint.pth",
              "--output_dir", tmp_path).stdout  # fmt: skip
    demo = "--demo", "--pretrained_weights", "~/checkpoint.pth", "--output_dir", tmp_path
    with pytest.raises(UserError, match="have arch vit_nano"):
        look(*demo, "--arch", "vit_small")
    with pytest.raises(UserError, match="--image_size 60"):
        look(*demo, "--image_size", "60")
    assert "eval_segmentation.py --demo measures" in out and "Jaccard" not in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 + 6 * 132, 4 + 8 * 132)  # image, mean and 4 heads; 4 images on 2 rows
    look(*demo, "--pca")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 + 8 * 132, 4 + 6 * 132)  # image, components, mask; 16 images in 2 bands


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no images given .*--demo"),
        (["--image_path", "/nowhere.png"], "no such file .*--image_path /nowhere.png"),
        (["--image_path", "{empty}"], "no images found"),
        (["--image_path", "{broken}"], "cannot read image: .*broken.png"),
        (["--image_path", "{good}", "--image_size", "4"], "smaller than a patch of 8"),
        (["--image_path", "{good}", "--image_size", "1", "2", "3"], "one or two lengths"),
        (
            ["--image_path", "{good}", "--pretrained_weights", "pixels"],
            "Pixels has no CLS attention over patches: use a ViT",
        ),
        (["--image_path", "{good}", "--query", "40", "3"], r"outside of the 40 x 40 image \(--query 40 3\)"),
        (["--image_path", "{good}", "{good}", "--query", "3", "3"], "there are 2 images"),
        (["--image_path", "{good}", "--query", "3", "3", "--pca"], "leave out one of the two"),
        (
            ["--image_path", "{good}", "--layer", "7"],
            r"6 layers with attention \(--layer 7\): give 1 to 6",
        ),
        (
            ["--image_path", "{good}", "--layer", "7", "--pca"],
            r"6 blocks \(--layer 7\): give 1 to 6",
        ),
        (["--image_path", "{good}", "--pca", "--pretrained_weights", "pixels"], "no patch tokens"),
        (["--image_path", "{good}", "--pca", "--image_size", "8"], "1 patches have 0 of the 1 principal"),
        (["--image_path", "{broken}", "--pca"], "cannot read image: .*broken.png"),
        (["--image_path", "{good}", "--video", "{good}"], "leave out one of the two"),
        (["--demo", "--video", "{good}"], "draws its own images"),
        (["--in_chans", "13", "--video", "{good}"], r"takes 13 channels \(--video\): give --image_path"),
        (["--video", "/nowhere.mp4"], r"no such file \(--video /nowhere.mp4\)"),
        (["--video", "{broken}"], "cannot read video"),
        (["--video", "{empty}"], "no frames"),
        (["--demo", "--image_path", "{good}"], "draws its own images"),
        (["--demo", "--pretrained_weights", "/nowhere.pth"], "no such file .*: check the name"),
    ],
)
def test_bad_usage_is_one_clear_line(tmp_path, flags, message):
    save_images(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "empty").mkdir()
    names = {"broken": "broken.png", "good": "000.png", "empty": "empty"}
    flags = [flag.format(**{name: tmp_path / file for name, file in names.items()}) for flag in flags]
    with pytest.raises(UserError, match=message):
        look(*RANDOM_VIT, "--output_dir", tmp_path / "out", *flags)


def test_the_rate_is_the_flags(tmp_path):
    bright_and_dark(tmp_path / "in.mp4", 2)
    flags = *RANDOM_VIT, "--video", tmp_path / "in.mp4", "--image_size", 64, "--output_dir", tmp_path
    look(*flags, "--fps", 5)
    assert Frames(str(tmp_path / "video.mp4")).rate == 5


def test_the_attention_is_that_of_the_flags_and_of_the_recorded_normalization(tmp_path):
    save_images(tmp_path, 1)
    networks = [build_backbone("vit_nano", 16, 32)[0].state_dict() for _ in range(2)]
    content = dict(zip(("student", "teacher"), networks, strict=True))
    torch.save(content, tmp_path / "plain.pth")
    torch.save(content | {"normalization": {"mean": [0.9] * 3, "std": [0.1] * 3}}, tmp_path / "recorded.pth")
    plain, recorded = ("--pretrained_weights", tmp_path / "plain.pth"), tmp_path / "recorded.pth"
    ways = [
        (*RANDOM_VIT, "--seed", 0), (*RANDOM_VIT, "--seed", 1), plain,
        (*plain, "--checkpoint_key", "student"), ("--pretrained_weights", recorded),
    ]  # fmt: skip
    for number, way in enumerate(ways):
        flags = "--image_path", tmp_path / "000.png", "--image_size", 64
        look(*way, *flags, "--output_dir", tmp_path / f"{number}")
    assert len({(tmp_path / f"{number}" / "attn-mean.png").read_bytes() for number in range(5)}) == 5


def test_other_channels_are_mapped_from_the_range_of_the_flag(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (64, 64, 5), dtype=np.uint16)
    np.save(tmp_path / "wide.npy", values)
    flags = *RANDOM_VIT, "--image_path", tmp_path / "wide.npy", "--image_size", 64, "--in_chans", 5
    look(*flags, "--value_range", 0, 4095, "--output_dir", tmp_path / "out")
    with Image.open(tmp_path / "out" / "img.png") as shown:  # of the first three channels
        assert np.array_equal(np.asarray(shown), np.rint(values[..., :3] * (255 / 4095)))


def test_a_mask_is_of_its_own_head_and_the_sheet_shows_the_image_behind_it():
    image, heads = picture(size=(16, 8)), torch.eye(2).view(2, 1, 2)  # the left and the right patch
    pictures = visualize_attention.draw(image, visualize_attention.by_head(heads), 0.6)
    masks = [np.asarray(pictures[f"mask_th0.6_{name}"])[0].tolist() for name in ("mean", "head0", "head1")]
    assert masks == [[True] * 16, [True] * 8 + [False] * 8, [False] * 8 + [True] * 8]
    behind, white = visualize_attention.sheet_rows(pictures)[1][2], Image.new("RGB", (8, 8), "white")
    assert behind.crop((0, 0, 8, 8)).tobytes() == image.crop((0, 0, 8, 8)).tobytes()
    assert behind.crop((8, 0, 16, 8)).tobytes() == white.tobytes()


def test_a_network_of_one_channel_sees_a_video_in_grey(tmp_path):
    save_images(tmp_path / "frames", 2)
    flags = *RANDOM_VIT, "--in_chans", 1, "--video", tmp_path / "frames", "--image_size", 64
    look(*flags, "--output_dir", tmp_path)
    shown = np.asarray(next(iter(Frames(str(tmp_path / "video.mp4")))), int)[:, :56]
    assert np.ptp(shown, axis=-1).max() <= 2 and np.ptp(shown) > 50  # beside it, the attention has colours


def test_the_foreground_is_the_flags(tmp_path):
    save_images(tmp_path / "frames", 2)
    flags = *RANDOM_VIT, "--video", tmp_path / "frames", "--image_size", 64, "--pca", "--output_dir", tmp_path
    black = []
    for side in ("positive", "all"):
        look(*flags, "--foreground", side)
        shown = np.asarray(next(iter(Frames(str(tmp_path / "video.mp4")))))[:, 64:]
        black.append((shown.max(axis=-1) < 10).mean())
    assert black[0] > 0.05 and black[1] == 0
