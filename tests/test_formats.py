"""Images of any number of channels and any type of values: read, trained on, evaluated."""

import importlib.util
import json
import os
import random
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import EpsImagePlugin, Image

import eval_knn
import eval_linear
import eval_segmentation
import export
import extract_features
import hubconf
import main_dino
import visualize_attention
from support import cli
from support.backbones import build_backbone, check_crop_sizes
from support.checks import check_images
from support.data import ImageFiles, Source, open_labelled_images, open_training_images, read_image
from support.errors import ImageError, UserError, WrongFormat
from support.estimates import estimate_normalization, estimate_range, sample_values
from support.formats import (
    ImageFormat,
    load_image,
    load_pixels,
    pairs,
    share_within,
    to_levels,
)
from support.pixels import Colour, apply_colours, eval_transform
from support.restart import Run
from support.weights import load_backbone
from tests.conftest import TINY, call, picture, torchrun, train

BANDS, RANGE = 13, ((100.0, 3_000.0),)
FORM = ImageFormat(BANDS, RANGE)


def scene(seed: int, label: int, bands: int = BANDS, size: int = 40) -> np.ndarray:
    """uint16 (bands, size, size); its class is the band that is bright."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(200, 1_500, (bands, 5, 5)).astype(np.float32)
    coarse[label] += 1_200
    fine = [
        np.asarray(Image.fromarray(band).resize((size, size), Image.Resampling.BICUBIC)) for band in coarse
    ]
    return np.stack(fine).clip(0, 65_535).astype(np.uint16)


def save_tiff(path: Path, values: np.ndarray) -> None:
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="separate")


def save_array(path: Path, values: np.ndarray) -> None:
    np.save(path, values.transpose(1, 2, 0))


@pytest.fixture(scope="module")
def satellite(tmp_path_factory) -> Path:
    """train/ and val/ with two classes of 13-band, 16-bit TIFFs."""
    root = tmp_path_factory.mktemp("satellite")
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("field", "water")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                save_tiff(folder / f"{i}.tif", scene(100 * label + 10 * (split == "val") + i, label))
    return root


@pytest.fixture(scope="module")
def run(satellite, tmp_path_factory) -> Path:
    """A run on them, whose numbers are estimated."""
    folder = tmp_path_factory.mktemp("run")
    train_on_bands(satellite / "train", folder, "--value_range", "auto")
    return folder


def train_on_bands(data: Path, folder: Path, *flags) -> None:
    train("--data_path", data, "--output_dir", folder, "--in_chans", BANDS, *flags)


def weights_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth", weights_only=True)


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def test_values_become_levels_rounded_and_clipped():
    values = np.array([[[0, 100, 1_550, 3_000, 9_000]]], np.uint16)
    expected = [0, 0, round(255 / 2), 255, 255]
    for kind in (np.uint16, np.int32, np.float32, np.float64):
        assert to_levels(values.astype(kind), RANGE, "")[0, 0].tolist() == expected
    two = to_levels(np.array([[[5.0]], [[5.0]]]), ((0.0, 10.0), (5.0, 6.0)), "")
    assert two.ravel().tolist() == [128, 0]


@pytest.mark.parametrize(
    "kind", ["separate", "contig", "pages", "unnamed first", "unnamed last", "npy", "npy first"]
)
def test_every_layout_gives_the_same_bits(tmp_path, kind):
    values = scene(0, 1)
    last = values.transpose(1, 2, 0)
    path = tmp_path / ("x.npy" if "npy" in kind else "x.tif")
    grey = {"photometric": "minisblack"}
    {
        "separate": lambda: tifffile.imwrite(path, values, planarconfig="separate", **grey),
        "contig": lambda: tifffile.imwrite(path, last, planarconfig="contig", **grey),
        "pages": lambda: tifffile.imwrite(path, values, metadata={"axes": "CYX"}, **grey),
        "unnamed first": lambda: tifffile.imwrite(path, values),
        "unnamed last": lambda: tifffile.imwrite(path, last),
        "npy": lambda: np.save(path, last),
        "npy first": lambda: np.save(path, values),
    }[kind]()
    expected = torch.from_numpy(to_levels(values, RANGE, ""))
    assert torch.equal(load_pixels(str(path), None, FORM), expected)
    assert torch.equal(load_pixels(str(path), path.read_bytes(), FORM), expected)


def test_containers_give_the_same_bits(satellite, tmp_path):
    """The same values as TIFF, as .npy, in a tar and in a zip."""
    arrays = tmp_path / "arrays" / "train"
    for path in sorted((satellite / "train").rglob("*.tif")):
        (arrays / path.parent.name).mkdir(parents=True, exist_ok=True)
        save_array(arrays / path.parent.name / f"{path.stem}.npy", tifffile.imread(path))
    for extension, folder in (("tar", satellite / "train"), ("zip", arrays)):
        place = tmp_path / extension
        place.mkdir()
        if extension == "tar":
            with tarfile.open(place / "train.tar", "w") as archive:
                archive.add(folder, "train")
        else:
            with zipfile.ZipFile(place / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(folder.rglob("*.npy")):
                    archive.write(path, str(path.relative_to(folder)))
    listed = tmp_path / "list" / "train.txt"
    listed.parent.mkdir()
    names = sorted(arrays.rglob("*.npy"))
    listed.write_text("".join(f"{path}\t{path.parent.name}\n" for path in names))
    roots = [satellite, arrays.parent, tmp_path / "tar", tmp_path / "zip", listed.parent]
    first, *others = (open_labelled_images(Source(str(root), form=FORM), "train") for root in roots)
    for other in others:
        assert len(other) == len(first) == 12 and other.classes == first.classes
        for i in range(len(first)):
            assert torch.equal(other.pixels(i), first.pixels(i))
            assert torch.equal(other[i][0], first[i][0]) and other[i][1] == first[i][1]


def test_arrays_are_images_only_where_the_flags_say_so(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 3), np.uint8))
    assert len(open_training_images(Source(str(tmp_path)))) == 1
    assert len(open_training_images(Source(str(tmp_path), form=ImageFormat(3, ((0, 255),))))) == 2
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"only .npy 1 .*for .npy files train with --value_range"):
        open_training_images(Source(str(tmp_path)))


def test_a_16_bit_rgb_tiff_keeps_its_bits(tmp_path):
    values = np.arange(3 * 64, dtype=np.uint16).reshape(3, 8, 8)  # all below 256: 8 bits would be black
    tifffile.imwrite(tmp_path / "x.tif", values.transpose(1, 2, 0), photometric="rgb")
    form = ImageFormat(3, ((0.0, 255.0),))
    images = open_training_images(Source(str(tmp_path), form=form))
    assert np.array_equal(images.pixels(0).numpy(), values)
    assert np.array_equal(np.asarray(images[0][0]).transpose(2, 0, 1), values)


@pytest.mark.parametrize("colours", ["miniswhite", "palette", "ycbcr"])
def test_tiffs_whose_numbers_are_no_brightness_are_refused(tmp_path, colours):
    values = np.arange(192, dtype=np.uint8).reshape((8, 8, 3) if colours == "ycbcr" else (8, 24))
    more = {"colormap": np.zeros((3, 256), np.uint16)} if colours == "palette" else {}
    tifffile.imwrite(tmp_path / "x.tif", values, photometric=colours, **more)
    images = open_training_images(Source(str(tmp_path), form=ImageFormat(3, ((0.0, 255.0),))))
    with pytest.raises(WrongFormat, match=f"stores colours as {colours.upper()}, not as brightness"):
        images.pixels(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (np.ones((8, 8, 3), complex), "values of type complex128"),
        (np.full((8, 8, 3), "a"), "values of type <U1"),
        (np.full((8, 8, 3), np.nan), "not finite"),
        (np.full((8, 8, 3), np.inf), "not finite"),
    ],
)
def test_an_array_that_holds_no_image_is_unreadable_and_takes_no_part_in_estimates(tmp_path, values, message):
    np.save(tmp_path / "0.npy", values)
    form = ImageFormat(3, ((0.0, 255.0),))
    with pytest.raises(UserError, match=r"no image of the sample can be read \(.*0.npy\)"):
        sample_values(open_training_images(Source(str(tmp_path), form=form)), 3)
    sound = np.random.default_rng(0).integers(0, 999, (8, 8, 3))
    np.save(tmp_path / "1.npy", sound)
    images = open_training_images(Source(str(tmp_path), form=form))
    with pytest.raises(ImageError, match=rf"{message}.* \(.*0.npy\)"):
        read_image(images, 0)
    (sample,) = sample_values(images, 3)
    assert np.array_equal(sample, sound.reshape(-1, 3).T) and sample.dtype == sound.dtype


@pytest.mark.parametrize("name", ["x.npy", "x.tif", "x.png"])
def test_one_channel_is_taken_for_grey(tmp_path, name):
    """Also where a network takes three channels."""
    values, path = scene(0, 0)[0], tmp_path / name
    {".npy": np.save, ".tif": tifffile.imwrite, ".png": lambda p, v: Image.fromarray(v).save(p)}[path.suffix](
        path, values
    )
    levels = torch.from_numpy(to_levels(values[None], RANGE, ""))
    assert torch.equal(load_pixels(str(path), None, ImageFormat(1, RANGE)), levels)
    assert torch.equal(load_pixels(str(path), None, ImageFormat(3, RANGE)), levels.expand(3, -1, -1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_8_bit_values_without_a_range_are_the_levels(tmp_path, channels, capsys):
    """Also for the checks before the training, and for what is estimated."""
    values = np.random.default_rng(0).integers(0, 256, (channels, 20, 20), np.uint8)
    np.save(tmp_path / "x.npy", values)
    images = ImageFiles(tmp_path / "x.npy", form=ImageFormat(channels))
    assert np.array_equal(images.pixels(0), values)
    check_images(images)
    assert "warning" not in capsys.readouterr().out
    sample = sample_values(images, channels)
    assert np.array_equal(sample[0], values.reshape(channels, -1))
    mean = estimate_normalization(sample, images.form)[0]
    assert mean == pytest.approx((values / 255).mean(axis=(1, 2)).tolist(), rel=1e-3)


@pytest.mark.parametrize("limits", [None, ((0.0, 255.0),)])
def test_estimates_for_grey_from_rgb_are_those_of_the_luma(tmp_path, limits):
    """Not of the three channels as one."""
    Image.fromarray(
        (np.random.default_rng(0).integers(0, 256, (40, 40, 3)) // [1, 4, 9]).astype(np.uint8)
    ).save(tmp_path / "x.png")
    images = ImageFiles(tmp_path / "x.png", form=ImageFormat(1, limits))
    grey = np.asarray(Image.open(tmp_path / "x.png").convert("L")) / 255
    (mean,), (std,) = estimate_normalization(sample_values(images, 1), images.form)
    assert (mean, std) == pytest.approx((grey.mean(), grey.std()), rel=1e-3)


@pytest.mark.parametrize("parts", [{"rowsperstrip": 5}, {"tile": (16, 16)}])
def test_a_tiff_that_was_not_written_to_its_end_is_an_unreadable_image(tmp_path, parts):
    """tifffile would read zeros."""
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, scene(0, 0, 4), photometric="minisblack", planarconfig="separate", **parts)
    form = ImageFormat(4, RANGE)
    load_pixels(str(path), None, form)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages[0].tags
        sizes = tags.get("StripByteCounts") or tags["TileByteCounts"]
        sizes.overwrite([*sizes.value[:-1], 0])
    with pytest.raises(ImageError, match=r"parts of the image are not in the file \(.*x.tif\)"):
        read_image(ImageFiles(path, form=form), 0)


def test_an_array_too_large_for_the_memory_is_named(tmp_path):
    """Its header may be damaged."""
    header = {"descr": "<u2", "fortran_order": False, "shape": (5, 10**6, 10**6)}
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    flags = "--pretrained_weights pixels --image_size 8 --in_chans 5 --value_range 0 9 --num_workers".split()
    places = "--data_path", tmp_path / "in", "--output_dir", tmp_path / "out"
    for workers in "01":
        argv = [*flags, workers, *places]
        with pytest.raises(MemoryError) as error:
            call(extract_features, *argv)
        assert "out of memory: " in (said := str(cli.as_user_error(error.value)))
        assert "x.npy: Unable to allocate" in said


def test_no_image_starts_ghostscript(tmp_path, monkeypatch):
    """Pillow goes by the content: PostScript, which is a program, may be called x.jpg."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert EpsImagePlugin.gs_binary is False  # None would look for it
    picture().save(tmp_path / "x.jpg", "EPS")
    with pytest.raises(OSError, match="Ghostscript"):
        load_image(str(tmp_path / "x.jpg"))
    assert not (tmp_path / "started").exists()


def test_a_tiff_that_would_fill_the_memory_is_refused_as_pillow_refuses_others(tmp_path, monkeypatch):
    """A small file may unpack to gigabytes."""
    path, form = tmp_path / "x.tif", ImageFormat(4, ((0.0, 10_000.0),))
    tifffile.imwrite(path, scene(0, 0, 4), photometric="minisblack", planarconfig="separate")
    assert load_pixels(str(path), None, form).numel() > 800
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image of shape \(4, .* is larger than Pillow's limit"):
        load_pixels(str(path), None, form)


@pytest.mark.skipif(bool(importlib.util.find_spec("imagecodecs")), reason="imagecodecs is installed")
def test_a_compression_that_tifffile_lacks_names_the_package(tmp_path):
    picture().save(tmp_path / "x.tif", compression="tiff_lzw")
    with pytest.raises(WrongFormat, match=r"needs the package imagecodecs \(.*x.tif\): pip install"):
        load_pixels(str(tmp_path / "x.tif"), None, ImageFormat(3, ((0.0, 255.0),)))


def test_grey_images_rgb_and_the_demo_for_one_channel(tmp_path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    for image, name in ((colour, "a.png"), (colour.convert("L"), "b.png")):
        image.save(tmp_path / name)
    grey = torch.from_numpy(np.asarray(colour.convert("L")).copy())[None]
    images = open_training_images(Source(str(tmp_path), form=ImageFormat(1)))
    assert all(torch.equal(images.pixels(i), grey) and torch.equal(images[i][0], grey) for i in (0, 1))
    ranged = ImageFormat(1, ((0.0, 255.0),))  # read by another path
    assert all(torch.equal(load_pixels(str(tmp_path / f"{x}.png"), None, ranged), grey) for x in "ab")
    shape = open_training_images(Source(demo=True, form=ImageFormat(1)))
    colour = open_training_images(Source(demo=True))[3]
    assert np.array_equal(shape[3][0][0], np.asarray(colour[0].convert("L"))) and shape[3][1] == colour[1]
    assert len(shape) == 2_048
    for form in (ImageFormat(4), ImageFormat(3, ((0, 1),))):
        with pytest.raises(UserError, match="--demo"):
            open_training_images(Source(demo=True, form=form))


@pytest.mark.parametrize("name", ["x.tif", "x.png"])
def test_three_samples_are_colours_and_four_are_not(tmp_path, name):
    path, form = str(tmp_path / name), ImageFormat(1, ((0.0, 255.0),))
    values = np.random.default_rng(0).integers(0, 256, (8, 9, 4), np.uint8)
    colour = Image.fromarray(values[..., :3])
    colour.save(path)
    assert np.array_equal(load_pixels(path, None, form)[0], np.asarray(colour.convert("L")))
    Image.fromarray(values).save(path)
    with pytest.raises(WrongFormat, match="image has 4 channels, not 1"):
        load_pixels(path, None, form)


def test_inks_are_four_channels_and_one_row_is_an_image(tmp_path):
    inks = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 4), np.uint8), "CMYK")
    inks.save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    levels = load_pixels(str(tmp_path / "x.jpg"), None, ImageFormat(4, ((0.0, 255.0),)))
    assert np.array_equal(levels, expected)
    tifffile.imwrite(tmp_path / "x.tif", np.arange(6, dtype=np.uint8)[None], photometric="minisblack")
    levels = load_pixels(str(tmp_path / "x.tif"), None, ImageFormat(1, ((0.0, 255.0),)))
    assert levels.tolist() == [[[0, 1, 2, 3, 4, 5]]]


def save(folder: Path, name: str, values: np.ndarray) -> None:
    save_tiff(folder / name, values) if name.endswith("tif") else np.save(folder / name, values)


@pytest.mark.parametrize(
    ("name", "values", "form", "message"),
    [
        ("x.tif", scene(0, 0, 4), FORM, r"4 channels, not 13 \(.*x.tif\)"),
        ("x.npy", scene(0, 0, 4), FORM, r"no axis of 13 channels \(.*x.npy: shape \(4, 40, 40\)"),
        ("x.npy", np.zeros((13, 8, 13)), FORM, r"both have 13 .*x.npy: shape \(13, 8, 13\)"),
        ("x.npy", np.zeros((2, 2, 13, 8)), FORM, r"not an image .*x.npy"),
        ("x.tif", scene(0, 0), ImageFormat(13), r"uint16 .*no agreed .*: train with --value_range"),
        ("x.npy", np.zeros((8, 8)), ImageFormat(1), r"float64 .*x.npy\): train with --value_range"),
        ("x.tif", scene(0, 0), ImageFormat(), r"13 channels, not 3 \(.*x.tif\)"),
        ("x.tif", scene(0, 0, 4), ImageFormat(1, RANGE), r"4 channels, not 1 \(.*x.tif\)"),
        ("x.tif", np.zeros((2, 13, 8, 8)), FORM, r"the axes \w+ \(2, 13, 8, 8\) \(.*x.tif\): save height"),
    ],
)
def test_another_format_is_one_line_and_never_replaced(tmp_path, name, values, form, message):
    save(tmp_path, "a" + name, scene(0, 0)) if form == FORM else None
    save(tmp_path, name, values)
    images = open_training_images(Source(str(tmp_path), form=form or FORM))
    for read in (
        lambda: read_image(images, len(images) - 1),
        lambda: check_images(images),
        lambda: sample_values(images, form.channels),
    ):
        with pytest.raises(WrongFormat, match=message):
            read()
    views = main_dino.TrainingViews(images, lambda pixels, rng: pixels, 0)
    with pytest.raises(WrongFormat, match=message):
        views.readable(0, len(images) - 1)


def test_16_bit_colour_pngs_are_refused_with_a_range(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    write_png16(tmp_path / "deep.png", np.zeros((8, 8, 3), ">u2"))
    form = ImageFormat(3, ((0.0, 4_000.0),))
    load_pixels(str(tmp_path / "x.png"), None, form)
    with pytest.raises(WrongFormat, match="upper 8 of its 16 bits .*deep.png"):
        load_pixels(str(tmp_path / "deep.png"), None, form)


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """A 16-bit RGB PNG of big-endian pixels (H, W, 3); Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_a_range_that_no_image_reaches(satellite, capsys):
    """All values are above or below it; or only some channels' are."""
    for low, high in ((-100.0, 0.0), (60_000.0, 65_000.0)):
        images = open_training_images(
            Source(str(satellite / "train"), form=ImageFormat(BANDS, ((low, high),)))
        )
        with pytest.raises(
            UserError, match=f"no value of 12 checked images .*--value_range {low:g} {high:g}"
        ):
            check_images(images)
    some = ImageFormat(BANDS, RANGE * 12 + ((0.0, 1.0),))
    check_images(open_training_images(Source(str(satellite / "train"), form=some)))
    assert "in channel 13" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------


def test_colours_of_other_channels_leave_out_what_only_rgb_has():
    images = torch.randint(0, 256, (2, BANDS, 16, 16), dtype=torch.uint8)
    only_rgb = Colour((2, 3, -1, -1), (0.3, 0.2, 0.0, 0.0), True, 0.0, False)
    assert torch.equal(apply_colours(images, [only_rgb] * 2), images.float())
    contrast = apply_colours(images, [Colour((1, -1, -1, -1), (0.5, 0, 0, 0), False, 0.0, False)] * 2)
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True).round()
    assert torch.equal(contrast, (mean + 0.5 * (images - mean)).round())


def test_device_and_workers_give_the_same_views():
    args = main_dino.parse_args([*TINY, "--in_chans", "5"])
    augmentation = main_dino.build_augmentation(args)
    pixels = torch.randint(0, 256, (5, 60, 70), dtype=torch.uint8)
    done, none = augmentation.views(pixels, random.Random(4))
    crops, colours = augmentation.crops(pixels, random.Random(4))
    scale = (0.5,) * 5, (0.2,) * 5
    one = main_dino.normalized_views([view[None] for view in done], none, *scale)
    other = main_dino.normalized_views(
        [crop[None] for crop in crops], [field[None] for field in colours], *scale
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------
# Training and evaluations
# ---------------------------------------------------------------------------------------------


def test_trained_and_evaluated_end_to_end(satellite, run, tmp_path):
    args = weights_of(run)["args"]
    lengths = [len(args[name]) for name in ("value_range", "mean", "std")]
    assert (args["in_chans"], lengths) == (13, [26, 13, 13])
    data = ["--pretrained_weights", run / "checkpoint.pth", "--data_path", satellite]
    data += ["--num_workers", "0"]
    accuracy = call(eval_knn, *data, "--nb_knn", "3")[3][0]
    assert accuracy == 100
    out = ["--output_dir", tmp_path, "--epochs", "2"]
    assert len(call(eval_linear, *data, *out)) == 1
    call(eval_linear, *data, "--logistic")
    baseline = ["--pretrained_weights", "pixels", "--image_size", "32", "--in_chans", "13"]
    argv = [*data, *baseline, "--value_range", "100", "3000", "--nb_knn", "3"]
    assert call(eval_knn, *argv)[3][0] == 100


def test_auto_is_resolved_and_a_restart_takes_the_same_numbers(satellite, run, tmp_path, capsys):
    """Also after the images have changed place, or are read from an argument file."""
    first = weights_of(run)["args"]
    images = open_training_images(Source(str(satellite / "train"), form=ImageFormat(BANDS, ())))
    values = sample_values(images, BANDS)
    limits = estimate_range(values, BANDS)
    assert first["value_range"] == limits
    form = ImageFormat(BANDS, pairs(limits))
    assert (first["mean"], first["std"]) == estimate_normalization(values, form)
    again = main_dino.parse_args([f"@{run / 'args.txt'}"])
    assert all(getattr(again, name) == first[name] for name in ("in_chans", "value_range", "mean", "std"))

    train_on_bands(satellite / "train", tmp_path, "--value_range", "auto", "--max_steps", "3")
    weights = weights_of(tmp_path)
    changed = weights["args"] | {"mean": [0.25] * BANDS}  # what a new estimate would not give
    weights["identity"]["mean"] = changed["mean"]
    torch.save(weights | {"args": changed}, tmp_path / "checkpoint.pth")
    moved = tmp_path / "moved"
    (satellite / "train").rename(moved)
    try:
        train_on_bands(moved, tmp_path, "--value_range", "auto")
    finally:
        moved.rename(satellite / "train")
    assert weights_of(tmp_path)["normalization"]["mean"] == [0.25] * BANDS
    assert "from the run to resume: --value_range" in capsys.readouterr().out


@pytest.mark.parametrize("value", [5, "auto", [0.0, "1"]])
def test_numbers_of_the_run_to_resume_that_are_none_are_not_taken(satellite, tmp_path, value):
    args = main_dino.parse_args([*TINY, "--in_chans", str(BANDS), "--value_range", "auto", *normalization()])
    images = open_training_images(Source(str(satellite / "train"), form=main_dino.image_format(args)))
    with Run(tmp_path, required=()) as run:
        run.save({"args": {"value_range": value}})
        main_dino.settle_format(args, images, run)
    assert args.value_range == estimate_range(sample_values(images, BANDS), BANDS)


@pytest.mark.parametrize("given", ["range", "mean and deviation", "deviation", "nothing"])
def test_what_is_estimated_stands_beside_what_is_given(satellite, tmp_path, given):
    """What the run to resume has is not taken in part."""
    ranged = ["0", "10000"] if given == "range" else ["auto"]
    scaled = [] if given == "mean and deviation" else ["--mean", "auto"]
    scaled += [] if "deviation" in given else ["--std", "auto"]
    flags = ["--in_chans", str(BANDS), "--value_range", *ranged, *normalization(), *scaled]
    args = main_dino.parse_args([*TINY, *flags])
    images = open_training_images(Source(str(satellite / "train"), form=main_dino.image_format(args)))
    with Run(tmp_path, required=()) as run:
        run.save({"args": {"mean": [0.1] * BANDS, "std": [0.1] * BANDS, "value_range": None}})
        main_dino.settle_format(args, images, run if given == "nothing" else None)
    values = sample_values(images, BANDS)
    assert args.value_range == ([0, 10_000] if given == "range" else estimate_range(values, BANDS))
    mean, std = estimate_normalization(values, ImageFormat(BANDS, pairs(args.value_range)))
    assert args.mean == ([0.5] * BANDS if given == "mean and deviation" else mean)
    assert args.std == ([0.25] * BANDS if "deviation" in given else std)


def planted(run: Path, path: Path) -> str:
    """The run's weights with another mean and range on record."""
    weights = weights_of(run)
    weights["normalization"] = {"mean": [0.9] * BANDS, "std": [0.1] * BANDS, "value_range": [[0, 60_000]]}
    torch.save(weights, path)
    return str(path)


def features(weights: str, satellite: Path, folder: Path) -> np.ndarray:
    argv = ["--pretrained_weights", weights, "--data_path", satellite / "val", "--num_workers", "0"]
    return np.load(call(extract_features, *argv, "--output_dir", folder))


def test_each_script_uses_the_recorded_numbers(satellite, run, tmp_path):
    """What they compute equals the record applied by hand, and changes with a record that is planted."""
    right, wrong = str(run / "checkpoint.pth"), planted(run, tmp_path / "wrong.pth")
    images = open_labelled_images(Source(str(satellite), form=ImageFormat(BANDS, ())), "val")
    raw = [tifffile.imread(path) for path in images.paths]
    found = {}
    for weights in (right, wrong):
        frozen, folder = load_backbone(weights), tmp_path / Path(weights).stem
        transform = eval_transform(frozen.image_size, frozen.mean, frozen.std)
        levels = [torch.from_numpy(to_levels(values, frozen.value_range, "")) for values in raw]
        inputs = torch.stack([transform(level) for level in levels])
        expected = frozen.network(inputs)
        found[weights] = expected

        extracted = features(weights, satellite, folder)
        assert np.allclose(extracted, expected, atol=1e-5)
        argv = ["--pretrained_weights", weights, "--data_path", str(satellite), "--num_workers", "0"]
        knn = eval_knn.parse_args([*argv, "--dump_features", str(folder / "knn")])
        eval_knn.main(knn)
        dumped = torch.load(folder / "knn" / "testfeat.pth", weights_only=True)
        assert torch.allclose(dumped, torch.nn.functional.normalize(expected), atol=1e-5)

        linear = eval_linear.parse_args([*argv, "--n_last_blocks", "1"])
        built = eval_linear.build_features(linear, torch.device("cpu"))
        val = open_labelled_images(Source(str(satellite), form=built.frozen.form), "val")
        assert torch.allclose(
            eval_linear.extract(linear, built, val, torch.device("cpu"))[0], expected, atol=1e-5
        )
        augmented = torch.stack([eval_linear.AugmentedImages(val, 32, 0)[0, 0][0]])
        device = torch.device("cpu")
        batch, _ = eval_linear.features_of_images(augmented, torch.zeros(1), built, device)
        center, scale = (torch.tensor(x).view(-1, 1, 1) for x in (frozen.mean, frozen.std))
        assert torch.allclose(batch, frozen.network((augmented / 255 - center) / scale), atol=1e-4)

        call(export, "--pretrained_weights", weights, "--output_dir", folder / "x")
        exported = load_backbone(str(folder / "x" / "backbone.pth"))
        assert (exported.mean, exported.std, exported.form) == (frozen.mean, frozen.std, frozen.form)

        network = hubconf.dino(weights)
        read = torch.stack([network.transform(network.read(path)) for path in images.paths])
        assert torch.equal(read, inputs)

        viewer = visualize_attention.load_viewer(
            visualize_attention.parse_args(["--pretrained_weights", weights]), torch.device("cpu")
        )._replace(image_size=[32])
        shown = visualize_attention.open_images([str(satellite / "val")], viewer.frozen.form)
        picture, pixels = viewer.prepare(shown[0][0])
        level = torch.from_numpy(to_levels(tifffile.imread(shown.paths[0]), frozen.value_range, ""))
        expected = visualize_attention.resize(level, [32])
        assert torch.allclose(pixels[0], (expected / 255 - center) / scale, atol=1e-4)
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture).transpose(2, 0, 1), expected[:3])
    assert not torch.allclose(found[right], found[wrong], atol=1e-2)


def test_segmentation_uses_the_recorded_numbers(run, tmp_path):
    for folder in (*eval_segmentation.FOLDERS.values(), "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text(f"{split}\n")
        save_tiff(tmp_path / "JPEGImages" / f"{split}.tif", scene(5, 1))
        mask = np.zeros((40, 40), np.uint8)
        mask[:20] = 1
        Image.fromarray(mask).save(tmp_path / "SegmentationClass" / f"{split}.png")
    frozen = load_backbone(planted(run, tmp_path / "wrong.pth"))
    _, val = eval_segmentation.open_masked(str(tmp_path), False, frozen.form)
    _, batch = next(eval_segmentation.resized_batches(frozen, val, torch.device("cpu")))
    level = torch.from_numpy(to_levels(scene(5, 1), ((0, 60_000),), ""))
    resized = eval_segmentation.transforms.Resize([32, 32], Image.Resampling.BICUBIC)(level)
    assert torch.allclose(batch[0], (resized / 255 - 0.9) / 0.1, atol=1e-4)
    argv = ["--pretrained_weights", run / "checkpoint.pth", "--data_path", tmp_path]
    call(eval_segmentation, *argv, "--num_workers", "0")
    save_tiff(tmp_path / "JPEGImages" / "val.tif", scene(5, 1, 4))
    with pytest.raises(WrongFormat, match=r"^image has 4 channels, not 13 \(.*val.tif\)"):
        eval_segmentation.open_masked(str(tmp_path), False, frozen.form)


def test_the_loop_normalises_by_the_flags(satellite, tmp_path):
    losses = []
    for mean in ("0.1", "0.6"):
        folder, scale = tmp_path / mean, ["--mean", *[mean] * 13, "--std", *["0.2"] * 13]
        train_on_bands(satellite / "train", folder, "--value_range", "100", "3000", *scale, "--epochs", "1")
        losses.append(json.loads((folder / "log.txt").read_text())["train_loss"])
    assert losses[0] != losses[1]


def test_knn_and_preview_of_a_training_normalise_by_the_flags(satellite):
    """The k-NN in the training and the preview."""
    seen = {}
    flags = f"--data_path {satellite}/train --in_chans 13 --value_range 100 3000 --max_steps 1"
    flags = f"{flags} --knn_every 1 --knn_data {satellite}".split()
    for mean in ("0.1", "0.6"):
        argv = [*TINY, *flags, "--mean", *[mean] * 13, "--std", *["0.2"] * 13]
        args = main_dino.parse_args(argv)
        main_dino.check_args(args)
        images = open_training_images(Source.of(args, main_dino.image_format(args)))
        main_dino.settle_format(args, images)
        steps = main_dino.count_steps(args, len(images))
        training = main_dino.build_training(args, torch.device("cpu"), steps, resumes=False)
        assert training.mean == (float(mean),) * 13
        monitor = main_dino.Monitor(9, str, main_dino.CollapseWatch(64), "")
        knn = main_dino.build_knn(args, training, monitor)
        transform = knn.evaluate.keywords["transform"]
        seen[mean] = transform(torch.full((13, 40, 40), 51, dtype=torch.uint8)).mean().item()
        pictures = main_dino.preview_rows(args, images)
        assert len(pictures) == 12 and {picture.mode for picture in pictures[0]} == {"RGB"}
    assert seen == {"0.1": pytest.approx(0.5), "0.6": pytest.approx(-2)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--value_range 5 1", "LOW is not below HIGH .*--value_range 5 1"),
        ("--value_range 5 5", "LOW is not below HIGH .*--value_range 5 5"),
        ("--value_range 0 1 2", "one pair for all channels, or one for each"),
        ("--value_range 0 1 0 1", "give LOW HIGH, or 13 pairs"),
        ("--value_range 0 auto", "mixes auto and numbers"),
        ("--mean 0.5 0.5 0.5", "3 numbers for 13 channels .*--mean"),
        ("--mean " + "0.5 " * 13 + "--std 0 " + "0.2 " * 12, "above 0 .*--std"),
    ],
)
def test_bad_flags_are_one_line(satellite, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train_on_bands(satellite / "train", tmp_path, *flags.split())


def test_a_value_range_without_values_is_refused_before_training(satellite, tmp_path):
    with pytest.raises(UserError, match="no value of 12 checked images"):
        train_on_bands(satellite / "train", tmp_path, "--value_range", "50000", "60000", *normalization())
    with pytest.raises(UserError, match=r"no value of the sample .*--value_range 50000 60000"):
        train_on_bands(satellite / "train", tmp_path, "--value_range", "50000", "60000")


def normalization() -> list[str]:
    return ["--mean", *["0.5"] * 13, "--std", *["0.25"] * 13]


def test_a_constant_channel_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        values = scene(i, 0)
        values[10] = 7
        save_tiff(tmp_path / "images" / f"{i}.tif", values)
    with pytest.raises(UserError, match="channel 11 is 7 in nearly all"):
        train_on_bands(tmp_path / "images", tmp_path / "run", "--value_range", "auto")
    with pytest.raises(UserError, match="channel 11 is the same in all"):
        train_on_bands(tmp_path / "images", tmp_path / "run", "--value_range", "0", "3000")


def test_weights_of_three_channels_start_a_network_of_thirteen(satellite, images, tmp_path, capsys):
    flags = ["--max_steps", 1, "--data_path", images, "--output_dir", tmp_path / "rgb"]
    train(*flags)
    start = tmp_path / "rgb" / "checkpoint.pth"
    new = *"--value_range 100 3000 --max_steps 1 --lr 0 --min_lr 0 --init_from".split(), start
    train_on_bands(satellite / "train", tmp_path / "13", *new, *normalization())
    rgb, wide = (
        weights_of(tmp_path / x)["student"]["backbone.patch_embed.proj.weight"] for x in ("rgb", "13")
    )
    assert wide.shape[1] == 13
    for channel in range(13):
        assert torch.allclose(wide[:, channel], weights_of(tmp_path / "rgb")["teacher"][
            "backbone.patch_embed.proj.weight"][:, channel % 3] * 3 / 13, atol=1e-6)  # fmt: skip
    assert "filters for three channels adapted to 13: patch_embed.proj.weight" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"weights of 13 channels cannot start a network of 3 .*--in_chans 13"
    ):
        again = [*flags, "--init_from", tmp_path / "13" / "checkpoint.pth"]
        train(*again, "--output_dir", tmp_path / "no")
    with pytest.raises(UserError, match="the weights have in_chans 13 .*--in_chans 3"):
        load_backbone(str(tmp_path / "13" / "checkpoint.pth"), in_chans=3)


def test_the_log_and_warnings_name_what_has_no_effect(satellite, tmp_path, capsys):
    flags = "--value_range 100 3000 --max_steps 1 --gray_p 0.3 --jitter 0.4 0.4 0.3 0.1".split()
    train_on_bands(satellite / "train", tmp_path, *flags, *normalization())
    said = capsys.readouterr().out
    assert "13 channels: hue, saturation and grey views are left out" in said
    assert "--gray_p has no effect" in said and "--jitter has no effect" not in said  # B and C act


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18", "vit_tiny_patch16_224", "convnext_tiny"])
def test_every_kind_of_network_takes_other_channels(arch):
    """And torchvision's first layer gives values of the same size as with three."""
    outputs = []
    for channels in (3, 5):
        torch.manual_seed(0)
        network, width = build_backbone(arch, 16, 64, in_chans=channels)
        check_crop_sizes(network, arch, width, [64], channels)
        first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
        outputs.append(first(torch.randn(2, channels, 64, 64)).std().item())
        assert first.in_channels == channels
    if arch in ("resnet18", "convnext_tiny"):
        assert outputs[1] == pytest.approx(outputs[0], rel=0.3)


def test_exports_of_other_channels_equal_the_network(run, tmp_path, capsys):
    argv = ["--pretrained_weights", run / "checkpoint.pth", "--output_dir", tmp_path]
    formats = ["backbone", "timm", "torch_export"]
    formats += ["hf"] if importlib.util.find_spec("transformers") else []
    differences = call(export, *argv, "--to", *formats)
    assert differences.keys() == set(formats) and max(differences.values()) < 1e-4
    said = capsys.readouterr().out
    assert "in_chans=13" in said
    if "hf" in formats:
        assert "takes uint8 (13, H, W); it neither reads files nor maps their values" in said
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_channels"] == 13


def test_without_tifffile_one_line_says_what_to_install(tmp_path, monkeypatch):
    save_tiff(tmp_path / "x.tif", scene(0, 0))
    monkeypatch.setitem(sys.modules, "tifffile", None)  # as if it were not installed
    with pytest.raises(WrongFormat, match=r"need tifffile \(.*x.tif\): pip install tifffile"):
        load_pixels(str(tmp_path / "x.tif"), None, FORM)


@pytest.mark.slow
def test_two_processes_take_the_numbers_of_the_first(satellite, tmp_path):
    """And an image of another format ends all of them with one line."""
    flags = [*TINY, *"--batch_size_per_gpu 2 --in_chans 13 --value_range auto --max_steps 1".split()]
    data = ["--data_path", satellite / "train", "--output_dir"]
    torchrun(2, "main_dino.py", *flags, *data, tmp_path / "two")
    call(main_dino, *flags, *data, tmp_path / "one")
    one, two = (weights_of(tmp_path / name)["normalization"] for name in ("one", "two"))
    assert one == two

    odd = tmp_path / "odd"
    shutil.copytree(satellite / "train", odd)
    save_tiff(odd / "field" / "odd.tif", scene(0, 0, 4))
    numbers = ["--value_range", "100", "3000", *normalization()]
    failed = torchrun(2, "main_dino.py", *flags, *numbers, "--data_path", odd, "--output_dir",
                      tmp_path / "failed", check=False)  # fmt: skip
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "image has 4 channels, not 13" in lines[0] and "odd.tif" in lines[0]


def test_an_old_run_resumes_without_the_new_records(images, tmp_path):
    flags = ["--data_path", images, "--output_dir", tmp_path]
    train(*flags, "--max_steps", 1)
    weights = weights_of(tmp_path)
    for record in (weights["args"], weights["identity"]):
        for name in ("in_chans", "value_range", "mean", "std"):
            del record[name]
    del weights["normalization"]["value_range"]
    torch.save(weights, tmp_path / "checkpoint.pth")
    assert load_backbone(str(tmp_path / "checkpoint.pth")).form == ImageFormat()
    with pytest.raises(UserError, match=r"mean \[0.485, 0.456, 0.406\] -> \[0.5, 0.5, 0.5\]"):
        train(*flags, "--mean", 0.5, 0.5, 0.5)
    train(*flags, "--max_steps", 2)
    assert weights_of(tmp_path)["step"] == 2


def test_the_limits_of_a_range_lie_within_it():
    values = np.array([[[0, 5, 10, 11]], [[-1, 0, 3, 4]]])
    assert share_within(values, ((0.0, 10.0),)).tolist() == [0.75, 0.75]
    assert share_within(values, ((5.0, 11.0), (0.0, 3.0))).tolist() == [0.75, 0.5]


def test_an_odd_number_of_limits_is_one_line():
    with pytest.raises(UserError, match="one pair for all channels, or one for each .*--value_range 0 1 2"):
        pairs([0, 1, 2])


def test_a_hot_pixel_does_not_decide_the_range():
    values = 100_000 + np.arange(10_000, dtype=np.float32)[None]
    low, high = estimate_range([values, np.full((1, 5), 1e9, np.float32)], 1)
    assert 100_009 <= low <= 100_011 and 109_985 <= high <= 109_999


def test_each_channel_has_its_own_range():
    values = np.stack([np.arange(1000), 5000 + np.arange(1000)])
    assert estimate_range([values, values], 2) == pytest.approx([1, 998, 5001, 5998], abs=1)
    assert estimate_range([values], 1) == pytest.approx([2, 5997], abs=1)  # RGB, which becomes grey later
    values[1] = 7
    with pytest.raises(UserError, match="channel 2 is 7 in nearly all of the sample .--value_range auto"):
        estimate_range([values], 2)


def test_a_narrow_range_far_from_zero_keeps_its_levels():
    """float32 has steps of 4 there."""
    values = 2**25 + np.arange(256, dtype=np.int32)[None, None]
    assert to_levels(values, ((2**25, 2**25 + 255),), "x").flatten().tolist() == list(range(256))


def test_a_sample_is_spread_over_all_images_and_over_the_whole_of_each():
    dark, half = Image.new("RGB", (130, 64)), Image.new("RGB", (130, 64))
    half.paste("white", (65, 0, 130, 64))
    images = [(dark, 0)] * 300 + [(half, 0)] * 300  # a set is often in the order of its classes
    sample = sample_values(images, 3)
    assert len(sample) == 256 and {part.shape for part in sample} == {(3, 64 * 44)}  # every third column
    mean, std = estimate_normalization(sample, ImageFormat())
    assert mean == pytest.approx([0.25] * 3, abs=0.01) and std == pytest.approx([0.433] * 3, abs=0.01)
    with pytest.raises(UserError, match="channel 1 is the same in all"):
        estimate_normalization(sample_values([(dark, 0)], 3), ImageFormat())
