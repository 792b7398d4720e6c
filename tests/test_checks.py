import itertools
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from support.checks import check_images, copied_files, open_checked
from support.data import ImageFiles, Source, open_any_images
from support.formats import ImageFormat
from support.shapes import Shapes
from tests.conftest import run, save_images


def noise(seed: int, *shape: int, most: int = 255) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most + 1, shape)


def warnings(folder, capsys, **kwargs) -> list[str]:
    check_images(ImageFiles(folder), **kwargs)
    return capsys.readouterr().out.splitlines()


def test_images_without_fault_are_not_mentioned(images, tmp_path, capsys):
    assert warnings(images, capsys) == []
    red = noise(0, 32, 32, 3) * (1, 0, 0)  # one channel is enough
    Image.fromarray(red.astype(np.uint8)).save(tmp_path / "red.png")
    assert warnings(tmp_path, capsys) == []
    check_images(Shapes("train", 300))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bit_files_that_use_twelve_are_named_before_the_training(tmp_path, capsys, extension):
    for i in range(3):
        values = noise(i, 32, 32, most=1000).astype(np.uint16)
        values[0, 0] = 1000 if i else 4095  # the largest one counts, in whatever order they are read
        Image.fromarray(values).save(tmp_path / f"{i}.{extension}")
    found = [line for line in warnings(tmp_path, capsys) if "16 bits" in line]
    assert len(found) == 1 and "3 of 3 checked images" in found[0]
    assert "use 12 of them (largest value 4095)" in found[0] and "train with --value_range 0 4095" in found[0]
    assert found[0].endswith(f"e.g. {tmp_path / f'0.{extension}'}")
    Image.fromarray(noise(0, 32, 32, most=16_383).astype(np.uint16)).save(tmp_path / f"0.{extension}")
    assert any("use 14 of them (largest value 16" in line for line in warnings(tmp_path, capsys))


def test_a_range_that_nearly_all_values_lie_outside_is_named(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(0, 64, 64, most=4600).astype(np.uint16)).save(tmp_path / "in" / "0.png")
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "in")
    for place, (high, named) in itertools.product((tmp_path / "in", packed), ((255, True), (4600, False))):
        check_images(open_any_images(Source(str(place), form=ImageFormat(1, ((0, high),)))))
        said = capsys.readouterr().out
        assert ("few values of 1 checked images lie within --value_range 0 255: " in said) == named
        assert "cannot be read" not in said


def test_shares_of_a_range_are_those_of_the_images_that_are_read(tmp_path, capsys):
    """Not of the last one, nor of those that cannot be read; and few values in one channel stop nothing."""
    form = ImageFormat(2, ((0, 1), (0, 1)))
    for i, high in enumerate((9, 1, 9)):
        values = noise(i, 2, 32, 32, most=high).astype(np.float32)
        values[1] = noise(i, 32, 32) + 9
        np.save(tmp_path / f"{i}.npy", values)
    for i in range(3, 19):
        (tmp_path / f"{i}.npy").write_bytes(b"")
    check_images(ImageFiles(tmp_path, form=form))
    said = capsys.readouterr().out
    assert "few values of 3 checked images lie within --value_range 0 1 0 1: 0 % in channel 2;" in said, said


def test_images_that_fill_little_of_their_range_are_named(tmp_path, capsys):
    """As 8-bit copies of the 12-bit images that a network was trained with."""
    for name, most, named in (("copies", 255, True), ("originals", 4095, False)):
        (tmp_path / name).mkdir()
        for i in range(8):
            values = noise(i, 64, 64, most=most).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
        check_images(ImageFiles(tmp_path / name, form=ImageFormat(1, ((0, 4095),))))
        said = capsys.readouterr().out
        for words in ("8 checked images fill the lowest", " 6.6 % of --value_range 0 4095"):
            assert (words in said) == named, said


def test_one_dark_or_uniform_image_within_the_range_is_no_mistake(tmp_path, capsys):
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / "0.png")
    check_images(ImageFiles(tmp_path, form=ImageFormat(1, ((0, 4095),))))
    assert [line for line in capsys.readouterr().out.splitlines() if "nearly constant" not in line] == []
    np.save(tmp_path / "1.npy", np.stack([np.zeros((32, 32)), np.full((32, 32), -9)]).astype(np.float32))
    check_images(ImageFiles(tmp_path / "1.npy", form=ImageFormat(2, ((0, 1), (0, 1)))))
    assert "0 % in channel 2;" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_values_at_the_ends_of_a_range_lie_within_it(tmp_path, capsys, share):
    values = np.random.default_rng(0).random((64, 64))
    np.save(tmp_path / "0.npy", np.where(values < share, 1.0, 0.0))
    check_images(ImageFiles(tmp_path, form=ImageFormat(1, ((0, 1),))))
    assert "within" not in capsys.readouterr().out


def test_sixteen_bit_files_that_use_all_or_say_how_many_are_not_mentioned(tmp_path, capsys):
    for most in (65_535, 32_767):
        Image.fromarray(noise(0, 32, 32, most=most).astype(np.uint16)).save(tmp_path / "all.png")
        assert warnings(tmp_path, capsys) == []
    (tmp_path / "all.png").unlink()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "black.png")
    assert len(found := warnings(tmp_path, capsys)) == 1 and "nearly constant" in found[0]
    (tmp_path / "black.png").unlink()
    twelve = Image.fromarray(noise(1, 32, 32, most=4095).astype(np.uint16))
    twelve.save(tmp_path / "said.tif", tiffinfo={281: 4095})
    assert warnings(tmp_path, capsys) == []


def test_colour_files_of_sixteen_bits_that_use_twelve_are_named_too(tmp_path, capsys):
    tifffile = pytest.importorskip("tifffile")
    values = noise(0, 32, 32, 3, most=4095).astype(np.uint16)
    for tags in ([], [(281, "H", 3, (4095,) * 3, True)]):  # what it states is not heeded either
        tifffile.imwrite(tmp_path / "0.tif", values, photometric="rgb", extratags=tags)
        found = warnings(tmp_path, capsys)
        assert len(found) == 1 and "use 12 of them (largest value 4095)" in found[0]
    tifffile.imwrite(tmp_path / "0.tif", values * 16, photometric="rgb")
    assert warnings(tmp_path, capsys) == []


def test_files_that_state_different_bits_are_named(tmp_path, capsys):
    """Some programs state the largest value of the very image, others that of the camera."""
    for i, most in enumerate((1023, 4095, 4095)):
        image = Image.fromarray(noise(i, 32, 32, most=most).astype(np.uint16))
        image.save(tmp_path / f"{i}.tif", tiffinfo={281: most})
    found = warnings(tmp_path, capsys)
    assert len(found) == 1 and "3 of 3 checked images" in found[0]
    assert "state that they use 10 or 12 of them" in found[0]
    Image.fromarray(noise(3, 32, 32, most=2047).astype(np.uint16)).save(tmp_path / "3.tif")
    few, different = warnings(tmp_path, capsys)
    assert "1 of 4 checked images have 16 bits but use 11 of them" in few
    assert "4 of 4 checked images" in different and "use 10 or 12 or 16 of them" in different


def test_bands_that_training_drops_are_named(tmp_path, capsys):
    Image.fromarray(noise(0, 32, 32, 4).astype(np.uint8), "RGBX").save(tmp_path / "infrared.tif")
    Image.fromarray(noise(1, 32, 32, 4).astype(np.uint8), "RGBA").save(tmp_path / "alpha.png")
    opaque = Image.fromarray(noise(2, 32, 32, 3).astype(np.uint8))
    opaque.convert("RGBA").save(tmp_path / "opaque.png")
    Image.fromarray(noise(3, 32, 32, 3).astype(np.uint8)).convert("CMYK").save(tmp_path / "print.jpg")
    grey = Image.fromarray(noise(4, 32, 32).astype(np.uint8))
    Image.merge("LA", (grey, grey.rotate(90))).save(tmp_path / "grey.png")
    grey.convert("P").save(tmp_path / "palette.gif", transparency=int(np.asarray(grey)[0, 0]))
    found = warnings(tmp_path, capsys, alike=False)
    assert len(found) == 2 and any("3 of 6 checked images lose transparency" in line for line in found)
    assert any("1 of 6 checked images lose 1 of 4 bands" in line and "infrared.tif" in line for line in found)
    assert any("lose transparency" in line and "alpha.png" in line for line in found)


def test_pages_that_training_does_not_read_are_named(tmp_path, capsys):
    pages = [Image.fromarray(noise(i, 32, 32, 3).astype(np.uint8)) for i in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    photograph = tmp_path / "photograph and preview.jpg"
    pages[0].save(photograph, "MPO", save_all=True, append_images=pages[1:])
    if Image.open(photograph).format != "MPO":  # older versions of Pillow damage it
        photograph.unlink()
    save_images(tmp_path, 1)
    found = warnings(tmp_path, capsys, alike=False)
    assert len(found) == 1 and re.search("1 of [23] checked images have several pages or frames", found[0])
    assert found[0].endswith("stack.tif")


def test_constant_and_repeated_images_are_named_and_so_are_unreadable_ones(tmp_path, capsys):
    save_images(tmp_path, 4)
    Image.new("RGB", (30, 30), (9, 9, 9)).save(tmp_path / "black.png")
    same = np.asarray(Image.open(tmp_path / "001.png")).astype(int) + noise(0, 40, 40, 3, most=1)
    Image.fromarray(same.clip(0, 255).astype(np.uint8)).save(tmp_path / "again.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "000.png").read_bytes()[:200])  # for another reason
    found = warnings(tmp_path, capsys)
    assert [line.split(": ", 1)[1].split(" checked images ")[0] for line in found] == [
        "1 of 8", "2 of 8", "2 of 8",
    ]  # fmt: skip
    assert any("nearly constant" in line and "black.png" in line for line in found)
    assert any("nearly identical" in line and "001.png" in line for line in found)
    assert any(
        line.endswith("cannot be read; e.g. {} (cannot identify image file)".format(tmp_path / "broken.png"))
        for line in found
    )


def test_images_of_a_dataset_are_checked_and_named_by_their_files(tmp_path, capsys):
    save_images(tmp_path / "a", 1)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a" / "red.png")
    check_images(ImageFolder(tmp_path))
    words = "warning: 1 of 2 checked images are nearly constant: check how they were converted; e.g. "
    assert capsys.readouterr().out == f"{words}{tmp_path}/a/red.png\n"


def test_the_check_reads_few_of_many_images(tmp_path, capsys):
    save_images(tmp_path, 30)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    found = warnings(tmp_path, capsys, most=5)
    assert len(found) == 1 and "5 of 5 checked images" in found[0]
    assert "30 of 30 checked images" in warnings(tmp_path, capsys)[0]
    assert warnings(tmp_path, capsys, seconds=-1) == []


def test_the_images_that_are_checked_first_are_spread_over_all():
    seen = []

    class Recorded(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    check_images(Recorded((Image.fromarray(noise(i, 8, 8, 3).astype(np.uint8)), 0) for i in range(40)))
    assert sorted(seen) == list(range(40)) and min(seen[:10]) < 10 and max(seen[:10]) > 30


def test_copies_under_other_names_in_train_and_val_are_named(labelled, capsys, tmp_path):
    labelled = Path(shutil.copytree(labelled, tmp_path / "images"))

    def said() -> str:
        open_checked(Source(str(labelled)))
        return "".join(line for line in capsys.readouterr().out.splitlines() if "warning" in line)

    assert said() == ""
    train, val = (sorted((labelled / part / "a").iterdir()) for part in ("train", "val"))
    twin = labelled / "val" / "a" / "z.png"
    content = bytearray(train[0].read_bytes())
    content[-1] ^= 1  # as long, with the same middle, but another file
    twin.write_bytes(content)
    assert said() == ""
    shutil.copy(train[0], twin)
    count = len([*(labelled / "val").rglob("*.png")])
    words = f"at least 1 of {count} images of val are copies of images of train: the accuracy may be too high"
    assert said() == f"warning: {words}; e.g. {twin} and {train[0]}"
    shutil.move(labelled / "val", tmp_path / "val")
    shutil.make_archive(str(labelled / "val"), "zip", tmp_path / "val")
    assert f"{words}; e.g. {labelled / 'val.zip' / 'a' / 'z.png'} and {train[0]}" in said()


def test_both_parts_of_an_evaluation_are_checked_and_may_hold_images_alike(labelled, capsys, tmp_path):
    labelled = Path(shutil.copytree(labelled, tmp_path / "images"))
    shutil.copy(labelled / "train" / "a" / "000.png", labelled / "train" / "a" / "again.png")
    for part in ("train", "val"):
        (labelled / part / "c" / "broken.png").write_bytes(b"not an image")
    open_checked(Source(str(labelled)))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(said) == 3 and "copies of images of train" in said[0]  # the broken ones
    assert f"{labelled}/train/c/broken.png" in said[1] and f"{labelled}/val/c/broken.png" in said[2]


def test_copies_are_looked_for_among_all_of_a_few_thousand_files(tmp_path):
    paths = []
    for part, numbers in (("train", range(30)), ("val", range(29, -1, -1))):
        (tmp_path / part).mkdir()
        for number in numbers:
            (tmp_path / part / f"{part[0]}{number:02}.png").write_bytes(b"%04d" % (number + 1) * 2_000)
        paths.append(ImageFiles(tmp_path / part).paths)
    assert len(copied_files(*paths)) == 30
    assert copied_files(*paths, seconds=-1) == []


def test_files_without_content_are_not_copies(tmp_path):
    paths = []
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for name, content in (("empty", b""), ("gone", b"x"), ("own", part.encode())):
            (tmp_path / part / f"{name}.png").write_bytes(content)
        paths.append(ImageFiles(tmp_path / part).paths)
        (tmp_path / part / "gone.png").unlink()
    assert copied_files(*paths) == []


PEAK = """
import sys
from support.checks import check_images
from support.data import ImageFiles

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, large = map(ImageFiles, sys.argv[1:])
check_images(small)
before = peak()
check_images(large)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_a_photograph_is_not_checked_as_floats_of_all_channels(tmp_path):
    picture = Image.fromarray(noise(0, 32, 32, 3).astype(np.uint8))
    for name, side in (("small", 32), ("large", 4000)):
        (tmp_path / name).mkdir()
        picture.resize((side, side)).save(tmp_path / name / "0.jpg")
    peak = int(run("-c", PEAK, tmp_path / "small", tmp_path / "large").stdout)
    assert peak < 15 * 4000**2  # the pixels take 3 of these bytes, all channels as floats 12
