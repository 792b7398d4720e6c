import gzip
import hashlib
import itertools
import ntpath
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import eval_knn
import main_dino
from support import data
from support.checks import open_checked
from support.data import (
    ImageFiles,
    JoinedFiles,
    Source,
    open_any_images,
    open_labelled_images,
    open_train_and_val,
    open_training_images,
    read_image,
    read_labelled,
    text_lines,
)
from support.errors import UserError
from support.estimates import sample_values
from support.files import Paths, lies_below, replacing, select_images
from support.formats import ImageFormat, load_image
from support.loading import TrainingViews
from support.pixels import to_pixels
from support.shapes import Shapes
from tests.conftest import ROOT, picture, save_images
from utils import DataAugmentationDINO


def test_images_are_found_in_any_folder_and_other_files_are_not(images, tmp_path):
    found = open_training_images(Source(str(images)))
    paths = list(found.paths)
    assert len(found) == 20 and paths == sorted(paths, key=lambda p: (os.path.dirname(p), p))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"no images found, only .txt 1"):
        open_training_images(Source(str(tmp_path)))


def test_a_folder_of_one_part_other_than_train_is_named(tmp_path, capsys):
    for part, named in (("val", True), ("train", False), ("evaluation of 2019", False)):
        save_images(tmp_path / part / part / "a", 2)
        open_training_images(Source(str(tmp_path / part)))
        assert (
            f"warning: {tmp_path}/{part}: all images lie in {part}/: check" in capsys.readouterr().out
        ) == named


@pytest.mark.parametrize(
    "parts",
    [("train", "val"), ("train", "validation"), ("train", "test"), ("Train", "Val"), ("training", "testing"),
     ("train2017", "val2017"), ("img_train", "img_val")],
)  # fmt: skip
def test_a_folder_of_two_parts_is_not_trained_on_as_one(tmp_path, parts):
    for part in parts:
        save_images(tmp_path / part / "a", 2)
    with pytest.raises(UserError, match=f"folder has {parts[0]}/ and {parts[1]}/ .*: give .*/{parts[0]}$"):
        open_training_images(Source(str(tmp_path)))
    for source in (Source(str(tmp_path / parts[0])), Source(str(tmp_path), split=parts[0])):
        assert len(open_training_images(source)) == 2


def test_parts_of_a_dataset_are_found_at_any_depth(tmp_path):
    """The folders of YOLO: images/train/ and images/val/, and labels beside them."""
    for part in ("train", "val"):
        save_images(tmp_path / "images" / part, 2)
        (tmp_path / "labels" / part).mkdir(parents=True)
    with pytest.raises(UserError, match=r"images has train/ and val/ .*: give --data_path .*/images/train$"):
        open_training_images(Source(str(tmp_path)))
    both = [str(tmp_path / "images" / part) for part in ("train", "val")]
    assert len(open_training_images(Source(both[0], more=(both[1],)))) == 4
    assert len(open_training_images(Source(str(tmp_path), split="images/train"))) == 2
    assert len(open_any_images(Source(str(tmp_path)))) == 4  # features of all may be wanted
    for path in (tmp_path / "images" / "val").iterdir():
        path.unlink()
    assert len(open_training_images(Source(str(tmp_path)))) == 2


def test_parts_of_several_datasets_are_all_named(tmp_path):
    """The folders of MVTec AD."""
    for folder in ("bottle/train", "bottle/test", "cable/train", "cable/test", "bullet_train", "test_tube"):
        save_images(tmp_path / folder, 1)
    train = f"--data_path {tmp_path}/bottle/train {tmp_path}/cable/train"
    with pytest.raises(UserError, match=f"bottle has train/ and test/; 1 more like it .*: give {train}"):
        open_training_images(Source(str(tmp_path)))


def test_files_that_are_pipes_do_not_block(tmp_path, must_end):
    save_images(tmp_path, 2)
    os.mkfifo(tmp_path / "zz.png")
    assert data.digest(open_training_images(Source(str(tmp_path))))


@pytest.mark.parametrize("link", ["again", "a/again"])
def test_a_link_to_the_folder_of_the_classes_adds_no_images(tmp_path, link):
    for name in "ab":
        save_images(tmp_path / "train" / name, 2)
    (tmp_path / "train" / link).symlink_to(tmp_path / "train")
    if link == "again":
        with pytest.raises(UserError, match="no images in class folders again"):
            open_labelled_images(Source(str(tmp_path)), "train")
    else:
        images = open_labelled_images(Source(str(tmp_path)), "train")
        assert images.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"data_path": ""}, "--demo"),
        ({"data_path": "/nowhere"}, "no such file or folder"),
        ({"data_path": "/tmp", "dataset": "FashionMINST"}, "did you mean FashionMNIST"),
        ({"data_path": "", "dataset": "FashionMNIST"}, "--data_path"),
        ({"data_path": "/nowhere", "dataset": "FashionMNIST"}, "--download"),
        ({"data_path": "/nowhere", "dataset": "EMNIST"}, "use a folder instead"),
        ({"data_path": "/nowhere", "dataset": "Places365"}, r"no train split: .*--dataset Places365\): use"),
        ({"data_path": "/nowhere", "dataset": "SEMEION"}, "not found, or damaged, in this"),  # not fetched
        ({"data_path": "/nowhere", "dataset": "FER2013"}, r"\(--dataset FER2013 .*\): check the folder$"),
        ({"data_path": "/nowhere", "dataset": "LSUN"}, "reads a pickle of the working folder for it"),
        ({"data_path": "/nowhere", "dataset": "PCAM"}, "needs the package h5py .*: pip install h5py"),
        ({"data_path": "/nowhere", "dataset": "MNIST", "split": "val"}, r"train and test \(--split val\)"),
        ({"demo": True, "split": "train"}, r"has no effect with --demo \(--split train\): leave it out"),
    ],
)
def test_data_that_is_not_there_is_one_clear_line(kwargs, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(UserError, match=message):
        open_training_images(Source(**kwargs))


def test_the_home_directory_of_a_dataset_is_expanded(tmp_path, monkeypatch):
    """Not all of torchvision's datasets do it."""
    folder = tmp_path / "gtsrb" / "GTSRB" / "Training" / "00000"
    folder.mkdir(parents=True)
    picture().save(folder / "0.ppm")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_training_images(Source("~", "GTSRB"))) == 1


def test_download_without_a_dataset_is_said_to_have_no_effect(capsys):
    for script in (main_dino, eval_knn):
        for flags, count in (("--data_path x", 1), ("--demo", 1), ("--data_path x --dataset CIFAR10", 0)):
            Source.of(script.parse_args([*flags.split(), "--download"]))
            assert capsys.readouterr().out.count("warning: --download has no effect: ") == count


def test_a_dataset_that_cannot_be_downloaded_is_named(capsys):
    with pytest.raises(UserError, match="check the folder$"):
        open_training_images(Source("/nowhere", "FER2013", download=True))
    words = "note: --download has no effect: torchvision does not download FER2013\n"
    assert capsys.readouterr().out == words


def write_fashion_mnist(root, train: int, test: int) -> None:
    """Gzipped idx files with random grey images, named as torchvision's."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8).tobytes()
        with gzip.open(raw / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 0x803, n, 28, 28) + pixels)
        with gzip.open(raw / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 0x801, n) + bytes(i % 10 for i in range(n)))


def test_torchvision_dataset_by_name_from_gzipped_files(tmp_path):
    write_fashion_mnist(tmp_path, 30, 20)
    source = Source(str(tmp_path), "FashionMNIST")
    train, val = open_training_images(source), open_labelled_images(source, "val")
    assert (len(train), len(val)) == (30, 20) and train.classes == val.classes
    augmentation = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 1, 28, 14)
    views, _, unreadable = TrainingViews(train, augmentation.views, 0)[0, 3]
    assert views[0].shape == (2, 3, 28, 28) and unreadable == -1


def test_jpegs_are_decoded_to_pils_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "0.jpg", quality=80)
    image.save(tmp_path / "1.JPEG", progressive=True, subsampling=0)
    image.convert("L").save(tmp_path / "2.jpg")
    image.convert("CMYK").save(tmp_path / "3.jpg")
    image.save(tmp_path / "4.png")
    image.save(tmp_path / "5.jpg", format="PNG")
    image.quantize(7).save(tmp_path / "6.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    image.save(tmp_path / "7.jpg", exif=exif)
    files = ImageFiles(tmp_path)
    for i in range(8):
        assert torch.equal(files.pixels(i), to_pixels(files[i][0])), files.paths[i]
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        files.pixels(0)


def test_sixteen_bits_keep_their_greys(tmp_path):
    values = np.linspace(0, 65_535, 64 * 64).reshape(64, 64)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    read = np.asarray(load_image(str(tmp_path / "deep.png")))
    np.testing.assert_array_equal(read, np.repeat(values.astype(np.uint16)[..., None] // 256, 3, axis=2))


def test_alpha_and_palettes_become_their_colours_without_a_warning(tmp_path, recwarn):
    red = Image.new("RGB", (8, 8), (250, 10, 20))
    red.quantize(4).save(tmp_path / "palette.png", transparency=bytes([9]))
    Image.new("RGBA", (8, 8), (250, 10, 20, 5)).save(tmp_path / "alpha.png")
    for name in ("palette", "alpha"):
        assert load_image(str(tmp_path / f"{name}.png")).getpixel((3, 3)) == (250, 10, 20)
    assert not recwarn.list


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    save_images(tmp_path / "elsewhere", 2)
    save_images(tmp_path / "data" / "inner", 1)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "inner" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "inner" / "here").symlink_to(".")
    assert len(ImageFiles(tmp_path / "data")) == 3


@pytest.mark.parametrize("name", ["current", "current/list.txt", "current/train", "current/train.zip"])
def test_a_link_that_is_switched_to_other_images_does_not_mix_them(name, tmp_path):
    """A link such as `current -> v1`, under which a new version appears while a run reads the old one."""
    for seed, version in enumerate(("v1", "v2")):
        save_images(tmp_path / version / "train", 2, seed=seed)
        (tmp_path / version / "list.txt").write_text("train/000.png\ntrain/001.png\n")
        shutil.make_archive(str(tmp_path / version / "train"), "zip", tmp_path / version / "train")
    link = tmp_path / "current"
    link.symlink_to("v1")
    images = open_training_images(Source(str(tmp_path / name)))
    link.unlink(), link.symlink_to("v2")
    others = open_training_images(Source(str(tmp_path / name)))
    for i, path in enumerate(("000.png", "001.png")):
        old, new = (load_image(str(tmp_path / version / "train" / path)) for version in ("v1", "v2"))
        assert images[i][0] == old != new == others[i][0]


def test_folders_that_link_to_each_other_are_entered_once_by_their_own_path(tmp_path):
    for name in "ab":
        save_images(tmp_path / name, 5)
    for name, other in ("ab", "ba"):
        (tmp_path / name / "0_other").symlink_to(tmp_path / other)
        (tmp_path / name / "1_again").symlink_to(tmp_path / other)
    save_images(tmp_path / "elsewhere" / "inner", 2)
    files = ImageFiles(tmp_path)
    assert len(files) == 12 and not any("_" in path.removeprefix(str(tmp_path)) for path in files.paths)


def test_hidden_names_are_left_out_and_what_pillow_reads_is_taken(tmp_path, capsys):
    save_images(tmp_path / "data", 3)
    save_images(tmp_path / "data" / ".ipynb_checkpoints", 2)
    (tmp_path / "data" / "._000.png").write_bytes(b"a Mac's companion file")
    for name in ("a.jfif", "b.JPE"):
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name, format="JPEG")
    for name in ("a.txt", "b.txt", "c.h5", "d.eps", "e.mpg", "README"):  # Pillow knows most, and reads none
        (tmp_path / "data" / name).write_text("no image")
    images = open_training_images(Source(str(tmp_path / "data")))
    assert len(images) == 5 and len([images[i] for i in range(5)]) == 5
    expected = (
        "5 images (.png 3, .jfif 1, .jpe 1); "
        "left out 6 files (.txt 2, .eps 1, .h5 1, .mpg 1, no extension 1) and 2 hidden names"
    )
    assert expected in capsys.readouterr().out


def test_one_class_and_equal_parts_do_not_pass_for_a_good_accuracy(tmp_path, capsys):
    for name in ("cat", "dog"):
        save_images(tmp_path / "train" / name, 2)
    shutil.copytree(tmp_path / "train", tmp_path / "train" / "nested")
    (tmp_path / "val").symlink_to("train")
    open_checked(Source(str(tmp_path)))
    said = capsys.readouterr().out
    assert "warning: train and val are the same images" in said and "one class" not in said
    for name, is_last in (("cat", False), ("dog", True)):
        shutil.rmtree(tmp_path / "train" / name)
        open_checked(Source(str(tmp_path)))
        said = capsys.readouterr().out
        assert ("only one class" in said) == is_last
    assert "warning: only one class, nested: every prediction is right" in said


def test_an_image_beside_class_folders_takes_their_classes_away_and_is_named(tmp_path, capsys):
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 2)
    assert open_any_images(Source(str(tmp_path))).classes == ["cat", "dog"]
    assert "no classes" not in capsys.readouterr().out
    picture().save(tmp_path / "cover.png")
    assert open_any_images(Source(str(tmp_path))).classes == []
    said = capsys.readouterr().out
    assert f"note: {tmp_path}: no classes, because images lie beside folders, e.g. cover.png" in said


@pytest.mark.parametrize(
    ("place", "packed"), [("data", ""), ("data.tar", "data"), ("in/val.tar", "data/val")]
)
def test_what_lies_beside_class_folders_is_left_out_and_counted(tmp_path, place, packed):
    root = tmp_path / "data" / "val"
    for name in ("cat", "dog"):
        save_images(root / name, 2)
    save_images(root, 3)  # e.g. not yet sorted
    save_images(root / ".ipynb_checkpoints", 1)
    (root / "__MACOSX" / "cat").mkdir(parents=True)  # from a zip that a Mac made
    (root / "._000.png").write_text("a Mac's companion")
    (root / "labels.csv").write_text("no image")
    if packed:
        shutil.make_archive(str(tmp_path / place).removesuffix(".tar"), "tar", tmp_path / packed)
    images = open_labelled_images(Source(str(tmp_path / place.removesuffix("val.tar"))), "val")
    assert (len(images), images.classes) == (4, ["cat", "dog"]) and images.taken == {".png": 4}
    assert images.left_out == {"images beside class folders": 3, ".csv": 1}


def test_paths_are_one_buffer_of_few_bytes_an_image():
    """A list of strings costs each worker about 100 bytes more, as reference counts change."""
    tracemalloc.start()
    paths = Paths((f"n{i // 1300:08}/n{i // 1300:08}_{i:05}.JPEG" for i in range(100_000)), "/data/train")
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 42 * 100_000 and len(paths) == 100_000  # 32 bytes of the name and 8 of its place
    assert paths[99_999] == "/data/train/n00000076/n00000076_99999.JPEG"
    for index in (-1, 100_000):
        with pytest.raises(IndexError):
            paths[index]
    assert all(isinstance(part, np.ndarray) for part in (paths.buffer, paths.ends))
    odd = Paths([os.fsdecode(b"\xff.png"), "\u00e4.png"])
    assert [os.fsencode(path) for path in odd] == [b"\xff.png", "\u00e4.png".encode()]


def write_stl10(root, monkeypatch) -> None:
    """Files as STL-10's, with 4 training, 3 test and 5 unlabelled images, and their checksums."""
    folder = root / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 4), ("test", 3), ("unlabeled", 5)):
        (folder / f"{part}_X.bin").write_bytes(rng.integers(0, 256, n * 3 * 96 * 96, np.uint8).tobytes())
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(bytes(range(1, n + 1)))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("")
    for name in ("train_list", "test_list"):
        files = [f for f, _ in getattr(torchvision.datasets.STL10, name)]
        sums = [[f, hashlib.md5((folder / f).read_bytes()).hexdigest()] for f in files]
        monkeypatch.setattr(torchvision.datasets.STL10, name, sums)


def test_training_takes_the_unlabelled_images_where_there_are_some(tmp_path, monkeypatch, capsys):
    write_stl10(tmp_path, monkeypatch)
    stl10 = Source(str(tmp_path), "STL10")
    assert len(open_training_images(stl10)) == 5
    assert "training images: STL10, split unlabeled: 5 images" in capsys.readouterr().out
    assert len(open_training_images(stl10._replace(split="train+unlabeled"))) == 9
    assert [len(open_any_images(stl10._replace(split=split))) for split in ("unlabeled", "val")] == [5, 3]
    capsys.readouterr()
    assert len(open_labelled_images(stl10, "train")) == 4 and len(open_labelled_images(stl10, "val")) == 3
    named = [line.split(" images")[0] for line in capsys.readouterr().out.splitlines()]
    assert named == ["train", "val"]
    with pytest.raises(UserError, match=r"Unknown value 'tset' .*--split tset"):
        open_training_images(stl10._replace(split="tset"))


@pytest.mark.parametrize("name", ["ImageFolder", "DatasetFolder"])
def test_a_folder_is_not_given_as_a_dataset(tmp_path, name):
    for part in ("train", "val"):
        save_images(tmp_path / part / "a", 2)
    with pytest.raises(UserError, match=f"not the name of a dataset .--dataset {name}.: leave it out"):
        open_training_images(Source(str(tmp_path), name))


def test_a_tiff_whose_zero_is_white_is_inverted_whatever_its_bits(tmp_path):
    dark = np.full((4, 6), 56, np.uint8)
    wide = 65535 - 257 * dark.astype(np.uint16)
    for name, values in (("8.tif", dark), ("16.tif", wide)):  # Pillow inverts those of 8 bits when it writes
        Image.fromarray(values).save(tmp_path / name, tiffinfo={262: 0})
        with Image.open(tmp_path / name) as image:
            assert image.tag_v2[262] == 0
        assert (np.asarray(load_image(str(tmp_path / name))) == 56).all(), name


def test_a_dataset_without_splits_trains_but_is_not_evaluated_on(tmp_path):
    for name in "ab":
        folder = tmp_path / "eurosat" / "2750" / name
        save_images(folder, 3)
    source = Source(str(tmp_path), "EuroSAT")
    assert len(open_training_images(source)) == 6
    with pytest.raises(UserError, match="no train/val split"):
        open_labelled_images(source, "val")
    with pytest.raises(UserError, match="no train/val split"):
        open_training_images(source._replace(split="train"))


UNPACK = """
import sys
from support.data import Source, open_training_images
print(len(open_training_images(Source(sys.argv[1], "FashionMNIST"))))
"""


@pytest.mark.slow
def test_an_archive_is_unpacked_whole_for_runs_that_start_meanwhile(tmp_path):
    write_fashion_mnist(tmp_path, 5_000, 10)
    command = [sys.executable, "-c", UNPACK, str(tmp_path)]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = subprocess.Popen(command, **options)
    raw = tmp_path / "FashionMNIST" / "raw"
    archive = raw / "train-images-idx3-ubyte.gz"
    seen = set()
    while first.poll() is None:  # what a second run would find at any moment
        seen |= {p.stat().st_size for p in raw.glob("train-images-idx3-ubyte")}
        time.sleep(0.002)
    assert first.communicate()[0].endswith("5000\n") and seen <= {16 + 5_000 * 784}
    assert {p.suffix for p in raw.iterdir()} == {"", ".gz"} and not list(raw.glob(".*"))
    assert (raw / archive.stem).stat().st_mode == archive.stat().st_mode
    (raw / archive.stem).unlink()
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot unpack: .*download it again"):
        open_training_images(Source(str(tmp_path), "FashionMNIST"))
    assert not list(raw.glob(".*"))


def test_val_may_lack_classes_of_train_but_not_the_other_way_round(tmp_path, capsys):
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            save_images(tmp_path / split / name, 2)
    train, val = open_train_and_val(Source(str(tmp_path)))
    assert train.classes == val.classes == ["a", "b", "c"]
    assert [val[i][1] for i in range(4)] == [0, 0, 2, 2]
    assert "note: val lacks 1 of 3 classes: b" in capsys.readouterr().out
    save_images(tmp_path / "val" / "d", 1)
    with pytest.raises(UserError, match="val has classes that train lacks: d "):
        open_train_and_val(Source(str(tmp_path)))
    (tmp_path / "train" / "d").mkdir()
    with pytest.raises(UserError, match="no images in class folders d "):
        open_train_and_val(Source(str(tmp_path)))


def test_a_dataset_whose_val_numbers_its_classes_otherwise_is_refused(tmp_path):
    for part, names in (("train", "abc"), ("valid", "ac")):
        for name in names:
            save_images(tmp_path / "country211" / part / name, 1)
    with pytest.raises(UserError, match="train and val number their classes differently"):
        open_train_and_val(Source(str(tmp_path), "Country211"))
    save_images(tmp_path / "country211" / "valid" / "b", 1)
    train, val = open_train_and_val(Source(str(tmp_path), "Country211"))
    assert [val[i][1] for i in range(3)] == [0, 1, 2] and train.classes == val.classes


def test_a_folder_or_link_that_cannot_be_read_is_named(permissions):
    save_images(Path("train/a"), 1)
    source = Source(".")
    for place in (Path("train/a/loop.png"), Path("train/loop")):
        place.symlink_to(place.name)
        for read in (lambda: open_training_images(source), lambda: open_labelled_images(source, "train")):
            with pytest.raises(UserError, match=rf"Too many levels of .* \(\S*{place}\): make it readable"):
                read()
        place.unlink()
    for closed in (Path("train/a"), Path("train")):
        closed.chmod(0)
        for read in (lambda: open_training_images(source), lambda: open_labelled_images(source, "train")):
            with pytest.raises(UserError, match=rf"Permission denied \(\S*{closed}\): make it readable"):
                read()
        closed.chmod(0o700)


def test_too_few_open_files_do_not_make_an_image_unreadable(images):
    """Nor is it replaced by another one, or left out of a sample."""
    files = ImageFiles(images)
    views = TrainingViews(files, DataAugmentationDINO((0.4, 1), (0.1, 0.4), 1, 24, 12).views, 0)
    reads = lambda: read_image(files, 0), lambda: views[0, 0], lambda: sample_values(files, 3)
    for read in reads:
        read()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        for read in reads:
            with pytest.raises(OSError, match="Too many open files"):
                read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_file_lies_below_a_folder_by_any_path_to_both(tmp_path, monkeypatch):
    """Else a picture of a run would become one of the images of the next."""
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    monkeypatch.chdir(tmp_path), monkeypatch.setenv("HOME", str(tmp_path))
    places = ["images", "link", "~/images", "../" + tmp_path.name + "/images", tmp_path / "images"]
    for one in places:
        assert all(lies_below(Path(one, "a", "p.png"), ["elsewhere", other]) for other in places)
        assert not lies_below(Path("images.png"), [one]) and not lies_below(Path("p.png"), [one])


def test_a_split_that_is_a_folder_and_a_file_is_named(tmp_path, capsys):
    save_images(tmp_path / "train" / "a", 2)
    (tmp_path / "train.csv").write_text("train/a/000.png,b\n")
    images = open_labelled_images(Source(str(tmp_path)), "train")
    assert images.classes == ["a"] and "reads the folder train/, and not train.csv" in capsys.readouterr().out


def test_a_folder_of_webdatasets_is_not_taken_for_a_class(tmp_path):
    for shard in ("00000", "00001"):
        save_images(tmp_path / "train" / shard, 2)
        (tmp_path / "train" / shard / "000.cls").write_text("3")
    with pytest.raises(UserError, match=r"\.cls files beside the images"):
        open_labelled_images(Source(str(tmp_path)), "train")
    assert open_any_images(Source(str(tmp_path / "train"))).classes == []


def test_the_digest_is_the_same_for_a_moved_folder_only(tmp_path):
    def of(name):
        return data.digest(open_labelled_images(Source(str(tmp_path / name)), "train"))

    for name in "ab":
        save_images(tmp_path / "one" / "train" / name, 3)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    first = of("one")
    assert re.fullmatch("[0-9a-f]{12}", first) and of("moved") == first
    train = tmp_path / "moved" / "train"
    changes = [
        lambda: (train / "a" / "000.png").rename(train / "a" / "zzz.png"),
        lambda: (train / "a" / "001.png").write_bytes(b"shorter"),
        lambda: (train / "b").rename(train / "c"),
        lambda: (train / "a" / "002.png").rename(train / "c" / "new.png"),
    ]
    seen = {first}
    for change in changes:
        change()
        seen.add(of("moved"))
    assert len(seen) == 5
    (tmp_path / "eurosat").mkdir()
    train.rename(tmp_path / "eurosat" / "2750")
    source = Source(str(tmp_path), "EuroSAT")
    before = data.digest(open_training_images(source))
    shutil.copytree(tmp_path / "eurosat", tmp_path / "again" / "eurosat")
    assert data.digest(open_training_images(source._replace(data_path=str(tmp_path / "again")))) == before
    (tmp_path / "eurosat" / "2750" / "c" / "new.png").write_bytes(b"other")
    assert data.digest(open_training_images(source)) != before
    files = data.digest(ImageFiles(tmp_path / "one")), data.digest(ImageFiles(tmp_path / "moved"))
    shapes = [data.digest(Shapes(*arguments)) for arguments in (("train", 9), ("val", 9), ("train", 8))]
    assert len({*files, *shapes}) == 5
    write_fashion_mnist(tmp_path / "f", 30, 30)  # with the same labels
    fashion = Source(str(tmp_path / "f"), "FashionMNIST")
    parts = [data.digest(open_labelled_images(fashion, split)) for split in ("train", "val")]
    assert len(set(parts)) == 2


def test_a_dataset_whose_labels_are_no_numbers_has_a_digest_too(tmp_path):
    """Kitti's targets are paths."""
    folder = tmp_path / "Kitti" / "raw" / "training"
    save_images(folder / "image_2", 2)
    (folder / "label_2").mkdir()
    assert data.digest(open_training_images(Source(str(tmp_path), "Kitti")))


def test_the_digest_tells_files_of_the_same_names_and_sizes_apart(tmp_path):
    """Arrays and bitmaps of one shape have one size, whatever their pixels."""
    for name, level in (("one", 10), ("other", 11)):
        (tmp_path / name).mkdir()
        for number in range(300):
            Image.new("L", (8, 8), level).save(tmp_path / name / f"{number:03}.bmp")
    one, other = (ImageFiles(tmp_path / name) for name in ("one", "other"))
    assert [one.paths.size(0)] == [other.paths.size(0)] and data.digest(one) != data.digest(other)
    (tmp_path / "one" / "299.bmp").unlink()
    assert data.digest(one) != data.digest(ImageFiles(tmp_path / "one"))


def test_the_digest_of_known_files_stays_as_it_was(tmp_path):
    """Checkpoints record it; a run refuses to resume on images of another."""
    for name in ("train/a/x.jpg", "train/b/y.jpg", "val/a/z.jpg", "val/b/w.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "list.txt").write_text("train/a/x.jpg\ta\nval/b/w.jpg\tb\n")
    for number in range(100):
        (tmp_path / f"{number}.npy").write_bytes(bytes([number]) * 5000)
    one, joined = Source(str(tmp_path / "train")), Source(str(tmp_path), more=(str(tmp_path),))
    sets = [
        open_training_images(one),
        open_any_images(one),
        open_any_images(Source(str(tmp_path / "list.txt"))),
        open_labelled_images(Source(str(tmp_path)), "val"),
        open_labelled_images(joined, "train"),
        ImageFiles(tmp_path, form=ImageFormat(1, ((0, 1),))),
    ]
    assert list(map(data.digest, sets)) == [
        "778e856d5eee",
        "f4bf234b2692",
        "31b0b7869b0f",
        "4cf6fa77ec7f",
        "d1bf022b6cfb",
        "9baa98782ee3",  # more files than contents are read of
    ]


def test_the_digest_of_an_image_folder_of_torchvision_stays_as_it_was(tmp_path):
    for name in ("a/x.jpg", "b/c/y.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(name.encode())
    images = torchvision.datasets.ImageFolder(f"{tmp_path}/a/..")
    assert data.digest(images) == "f7158b3f3465"


@pytest.mark.parametrize("label", [0.73, torch.tensor([0, 1, 1]), torch.tensor(2.5), "cat", -1, None, (1, 2)])
def test_a_label_that_is_no_class_number_is_one_clear_line(label):
    with pytest.raises(UserError, match=r"label is not a class number \(image 0: "):
        read_labelled([(Image.new("RGB", (4, 4)), label)], 0)


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), torch.tensor([3])])
def test_a_label_may_be_any_whole_number(label):
    assert read_labelled([(Image.new("RGB", (4, 4)), label)], 0)[1] == 3


def test_a_tiff_that_says_how_many_bits_it_uses_is_scaled_by_them(tmp_path):
    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "said.tif", tiffinfo={281: 4095})
    Image.fromarray(values).save(tmp_path / "not.tif")
    said, silent = (np.asarray(load_image(str(tmp_path / name)))[..., 0] for name in ("said.tif", "not.tif"))
    np.testing.assert_array_equal(said, values >> 4)
    np.testing.assert_array_equal(silent, values >> 8)


def test_names_below_a_folder_are_the_same_on_windows(monkeypatch):
    monkeypatch.setattr(os, "path", ntpath)
    found = select_images([("a/b", ["0.png"], 0), ("", ["1.png"], 0)], {".png"})
    assert found.names == ["1.png", "a/b/0.png"]  # as in archives, and as `_check_one_part` splits them


def test_a_list_of_another_encoding_is_named_on_windows(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_bytes("0.png\ncaf\u00e9.png\n".encode("cp1252"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"is not UTF-8 text \(.*list.txt, line 2\): save it as UTF-8"):
        list(text_lines(tmp_path / "list.txt"))


@pytest.mark.parametrize("places", ["a/train b/train", "a/train a/val", "a/train b/train a/val b/val"])
def test_classes_that_differ_in_the_form_of_unicode_are_named(places, tmp_path):
    """As in a folder that comes from a Mac, beside one that does not."""
    for root, split in itertools.product("ab", ("train", "val")):
        save_images(tmp_path / root / split / "plain", 1)
    for place, name in zip(places.split(), ("caf\u00e9", "cafe\u0301") * 2, strict=False):
        save_images(tmp_path / place / name, 1)
    source = Source(str(tmp_path / "a"), more=(str(tmp_path / "b"),))
    with pytest.raises(UserError, match=r"two classes look the same: 'cafe?\\\w+' and 'cafe?\\\w+' "):
        open_train_and_val(source)


def test_the_order_of_images_does_not_depend_on_the_order_of_the_disk(tmp_path):
    contents = [("", ["z.png", "y.png"], 0), ("a", ["2.png", "1.png"], 0), ("b", ["0.png"], 0)]
    expected = ["y.png", "z.png", "a/1.png", "a/2.png", "b/0.png"]
    for order in (contents, contents[::-1]):
        assert select_images(order, {".png"}).names == expected
    save_images(tmp_path / "other", 1)
    (tmp_path / "root").mkdir()
    for name in "edcba":
        (tmp_path / "root" / name).symlink_to(tmp_path / "other")
    assert list(ImageFiles(tmp_path / "root").paths.names()) == ["a/000.png"]


def test_the_digest_tells_the_middles_of_files_and_the_order_of_sets_apart(tmp_path):
    found = []
    for middle in (b"a", b"b"):
        (tmp_path / "x.npy").write_bytes(bytes(10_000) + middle + bytes(10_000))
        found.append(Paths(["x.npy"], str(tmp_path)).digest)
    assert found[0] != found[1]
    for name in "ab":
        save_images(tmp_path / name, 2, seed=ord(name))
    first, second = ImageFiles(tmp_path / "a"), ImageFiles(tmp_path / "b")
    assert data.digest(JoinedFiles([first, second])) != data.digest(JoinedFiles([second, first]))


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """A power cut could leave an empty file, or undo the rename."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (done.append(n), f(*a)))
    os.close(free := os.dup(0))
    with replacing(tmp_path / "x") as file:
        file.write(b"x")
    os.close(descriptor := os.dup(0))
    assert descriptor == free  # a run of many checkpoints would use up the open files
    assert done == ["fsync", "replace", "fsync"]
