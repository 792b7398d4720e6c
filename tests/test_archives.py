"""Images from lists and archives, against the same images in a folder."""

import contextlib
import gzip
import os
import pickle
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import eval_knn
import main_dino
from support import data
from support.archives import Members
from support.checkpoints import load_checkpoint
from support.checks import check_images, open_checked
from support.data import (
    ImageFiles,
    Images,
    ListedFiles,
    Source,
    open_any_images,
    open_labelled_images,
    open_train_and_val,
    open_training_images,
)
from support.errors import ImageError, UserError, WrongFormat
from support.loading import TrainingViews
from tests.conftest import call, picture, save_images, train
from utils import DataAugmentationDINO


def write_list(path: Path, folder: Path, classes: str = "") -> Path:
    """List the images of `folder` in its order, with classes after the separator `classes`."""
    names = list(ImageFiles(folder).paths.names())
    ends = [classes and classes + name.split(os.sep)[0] for name in names]
    lines = [
        f"{os.path.relpath(folder / name, path.parent)}{end}\n" for name, end in zip(names, ends, strict=True)
    ]
    path.write_text("".join(lines))
    return path


def views(images: Images) -> list[torch.Tensor]:
    augmentation = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 1, 24, 12)
    items = TrainingViews(images, augmentation.views, 0)
    return [part for index in range(len(images)) for part in items[1, index][0]]


def same(one: Images, other: Images) -> bool:
    """Whether two sets give the same bits in the same order, have the same labels, and the same digest."""
    labels = [[images[i][1] for i in range(len(images))] for images in (one, other)]
    equal = [torch.equal(a, b) for a, b in zip(views(one), views(other), strict=True)]
    return all(equal) and labels[0] == labels[1] and data.digest(one) == data.digest(other)


def knn(folder: Path) -> dict:
    flags = "--pretrained_weights pixels --image_size 16 --nb_knn 3 --num_workers 0 --data_path".split()
    return call(eval_knn, *flags, folder)


@pytest.fixture
def own(tmp_path) -> Path:
    """train/ and val/ with three classes of four images, to which a test may add files."""
    for split in ("train", "val"):
        for name in "abc":
            save_images(tmp_path / "data" / split / name, 4, seed=ord(name) + len(split))
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\t", ",", " , "])
def test_listed_images_are_those_of_the_folder(own, separator):
    train = own / "train"
    plain = write_list(train / "all.txt", train)
    assert same(open_training_images(Source(str(plain))), open_training_images(Source(str(train))))
    classes = write_list(train / "classes.txt", train, separator)
    folder = open_labelled_images(Source(str(own)), "train")
    any_images = open_any_images(Source(str(classes)))
    assert same(any_images, folder) and any_images.classes == list("abc")


def test_a_list_may_have_a_mark_of_its_encoding_blank_lines_and_classes_in_any_order(tmp_path):
    save_images(tmp_path, 3)
    path = tmp_path / "list.txt"
    path.write_text("\ufeff000.png\tb\n \t\n001.png\tc\n002.png\ta\n", encoding="utf-8")
    images = open_any_images(Source(str(path)))
    assert images.classes == list("abc") and images.labels.tolist() == [1, 2, 0]
    path.write_text("000.png\n001.png\ta\n")  # also where classes are not required
    with pytest.raises(UserError, match=r"no class \(.*list.txt, line 1\)"):
        open_any_images(Source(str(path)))


def test_lists_serve_evaluations(own, tmp_path):
    expected = knn(own)
    for split in ("train", "val"):
        write_list(tmp_path / f"{split}.txt", own / split, "\t")
    assert knn(tmp_path) == expected
    (tmp_path / "val.csv").write_text("data/val/c/001.png,c\n")
    with pytest.raises(UserError, match=r"both val.txt and val.csv .*: keep one of them"):
        knn(tmp_path)
    (tmp_path / "val.txt").unlink()
    assert open_labelled_images(Source(str(tmp_path)), "val").classes == ["c"]
    assert knn(tmp_path)[3][1] == 100  # `c` has the number that train gives it


def test_a_comma_may_belong_to_the_name(tmp_path):
    save_images(tmp_path, 2)
    (tmp_path / "001.png").rename(tmp_path / "a,b.png")
    (tmp_path / "list.txt").write_text("a,b.png\n000.png\n")
    assert open_any_images(Source(str(tmp_path / "list.txt"))).classes == []
    (tmp_path / "list.txt").write_text("a,b.png,cat\n000.png,dog\n")
    assert open_any_images(Source(str(tmp_path / "list.txt"))).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000.png\ta\n\nabsent.png\ta\n", r"no such file: absent.png \(.*train.txt, line 3\)"),
        ("000.png\ta\n001.png\n", r"no class \(.*train.txt, line 2\): write path and class in each line"),
        ("000.png\n001.png\ta\n", r"no class \(.*train.txt, line 1\)"),
        ("000.png\n001.png\n", r"no class \(.*train.txt, line 1\)"),
        ("\n", r"no images found \(--data_path .*train.txt\)"),
    ],
)
def test_a_bad_list_is_one_clear_line(tmp_path, text, message):
    save_images(tmp_path, 2)
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        knn(tmp_path)


def test_a_list_is_one_part(own, tmp_path):
    path = write_list(tmp_path / "train.txt", own / "train", "\t")
    with pytest.raises(UserError, match="a list is one part of a dataset .*: give the folder that"):
        knn(path)
    with pytest.raises(UserError, match="has no effect on a file"):
        open_training_images(Source(str(path), split="train"))


def test_images_in_train_and_val_are_counted(own, tmp_path, capsys):
    train = write_list(tmp_path / "train.txt", own / "train", "\t").read_text().splitlines()
    val = write_list(tmp_path / "val.txt", own / "val", "\t")
    knn(tmp_path)
    assert "in train too" not in capsys.readouterr().out
    leaked = [f"../{tmp_path.name}/{train[3]}", train[1], train[1]]  # one of them by another path
    val.write_text("\n".join([*leaked, *val.read_text().splitlines()]))
    count = len(val.read_text().splitlines())
    first = os.path.normpath(tmp_path / train[3].split("\t")[0])
    knn(tmp_path)
    assert f"warning: 3 of {count} images of val are in train too, e.g. {first}" in capsys.readouterr().out
    open_checked(Source(str(tmp_path), more=(str(own),)))  # several sets
    assert "warning: 3 of " in capsys.readouterr().out
    write_list(own / "train.txt", own / "val", "\t")  # a list beside a folder
    shutil.rmtree(own / "train")
    open_checked(Source(str(own)))
    assert "images of val are in train too" in capsys.readouterr().out


def test_images_in_train_and_val_are_found_by_relative_paths_and_through_links(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_images(tmp_path / "pool" / name, 3, seed=ord(name))
    paths = [f"pool/{name}/{i:03}.png" for name in "ab" for i in range(3)]
    Path("train.csv").write_text("".join(f"{tmp_path}/{path},{path[5]}\n" for path in paths))
    Path("val.csv").write_text("".join(f"{path},{path[5]}\n" for path in paths[::2]))
    open_checked(Source("."))
    assert "warning: 3 of 3 images of val are in train too" in capsys.readouterr().out
    for part, name in (("train", "a"), ("train", "b"), ("val", "b")):
        (tmp_path / "linked" / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "linked" / part / name).symlink_to(tmp_path / "pool" / name)
    open_checked(Source("linked"))
    assert "warning: 3 of 3 images of val are in train too" in capsys.readouterr().out


def test_an_image_that_a_list_names_twice_is_said(own, tmp_path, capsys):
    path = write_list(tmp_path / "train.txt", own / "train", "\t")
    ListedFiles(path)
    assert capsys.readouterr().out == ""
    lines = path.read_text().splitlines()
    name, label = lines[0].split("\t")
    path.write_text("\n".join([*lines, lines[1], f"{name}\tnot {label}"]))
    ListedFiles(path)
    said = capsys.readouterr().out
    assert f"note: {path}: 2 of {len(lines) + 2} lines repeat an image" in said
    assert f"warning: {path}: lines that give an image a second class: 1" in said


def test_several_data_paths_are_one_set(own, tmp_path, capsys):
    """Of any kinds, in the order given, with the classes of all."""
    shutil.move(own / "train" / "a", tmp_path / "more" / "train" / "a")
    shutil.copytree(own / "val" / "a", tmp_path / "more" / "val" / "a")
    archive = str(pack(tmp_path / "more.zip", tmp_path / "more"))
    args = eval_knn.parse_args(["--data_path", str(own), archive])
    train, val = open_train_and_val(Source.of(args))
    assert "train images: 2 sets: 12 images, 3 classes" in capsys.readouterr().out
    assert [train[i][1] for i in range(12)] == [1] * 4 + [2] * 4 + [0] * 4 and len(val) == 16
    parts = [ImageFiles(own / "train"), ImageFiles(tmp_path / "more" / "train")]
    for i in range(12):
        assert torch.equal(train.pixels(i), parts[i // 8].pixels(i % 8))
        assert train.paths.size(i) == parts[i // 8].paths.size(i % 8)
    assert train.paths[9] == f"{archive}/train/a/001.png"
    other = main_dino.parse_args(["--data_path", f"{own}/train", f"{tmp_path}/more/train"])
    joined = open_training_images(Source.of(other))
    assert len(joined) == 12 and data.digest(joined) != data.digest(train)
    assert "no classes" not in capsys.readouterr().out
    flat = open_any_images(Source(f"{own}/train", more=(f"{own}/train/b",)))
    assert flat.classes == [] and "some sets have no classes: labels ignored" in capsys.readouterr().out
    with pytest.raises(UserError, match="--dataset takes one folder"):
        Source.of(eval_knn.parse_args(["--data_path", "a", "b", "--dataset", "CIFAR10"]))
    assert main_dino.parse_args(["--data_path", "a"]).data_path == "a"


# ---------------------------------------------------------------------------------------------
# Archives
# ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino" / "archives"


def pack(
    path: Path, folder: Path, reverse: bool = True, method: int = zipfile.ZIP_STORED, only: str = ""
) -> Path:
    """Pack a folder, or of its folders `only` one, in an order that is not the folder's."""
    path.parent.mkdir(exist_ok=True, parents=True)
    names = sorted((str(file.relative_to(folder)) for file in (folder / only).rglob("*")), reverse=reverse)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name in names:
                archive.write(folder / name, name)
    else:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
            for name in names:
                archive.add(folder / name, f"./{name}", recursive=False)
    return path


def pack_in_parts(folder: Path, parts: Path, kind: str, each_class: bool) -> Path:
    """Pack a folder into several archives: one for each class, or classes over all of them."""
    for name in "abc":
        if each_class:
            pack(parts / f"{name}.{kind}", folder / name)
    for part in range(0 if each_class else 2):
        half = parts.parent / f"half{part}"
        for file in sorted(folder.rglob("*.*"))[part::2]:
            (half / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, half / file.relative_to(folder))
        pack(parts / f"shard-{part}.{kind}", half)
    return parts


CONTAINERS = {
    "tar": lambda folder, to: pack(to / f"{folder.name}.tar", folder),
    "zip": lambda folder, to: pack(to / f"{folder.name}.zip", folder),
    "deflated": lambda folder, to: pack(to / f"{folder.name}.zip", folder, method=zipfile.ZIP_DEFLATED),
    "own folder": lambda folder, to: pack(to / f"{folder.name}.tar", folder.parent, only=folder.name),
    "shards": lambda folder, to: pack_in_parts(folder, to / folder.name, "zip", False),
    "tar a class": lambda folder, to: pack_in_parts(folder, to / folder.name, "tar", True),
    "tar of tars": lambda folder, to: pack(
        to / f"{folder.name}.tar", pack_in_parts(folder, to / f"parts_{folder.name}", "tar", True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_give_what_the_folder_gives(own, tmp_path, kind, capsys):
    """The order, the bits of the views, the labels, the digest, and the result of k-NN."""
    for split in ("train", "val"):
        Image.new("RGB", (30, 30), "red").save(own / split / "a" / "x.jpg")
        save_images(own / split / "a" / "inner", 2)
        save_images(own / split / "a-b", 2)
        (own / split / "c" / "notes.md").write_text("no image")
        if "class" in kind or "tars" in kind:
            shutil.rmtree(own / split / "a-b")
    for split in ("train", "val"):
        CONTAINERS[kind](own / split, tmp_path / "in")
    part = next(path for path in (tmp_path / "in").glob("train*"))
    folder = Source(str(own / "train"))
    capsys.readouterr()
    assert same(open_training_images(Source(str(part))), open_training_images(folder))
    said = capsys.readouterr().out
    assert ".jpg 1); left out 1 file (.md 1)" in said and " archive" in said
    assert same(open_any_images(Source(str(part))), open_any_images(folder))
    labelled = [open_labelled_images(Source(str(place)), "train") for place in (tmp_path / "in", own)]
    assert same(*labelled) and labelled[0].classes == labelled[1].classes
    assert knn(tmp_path / "in") == knn(own)


def test_an_archive_with_its_own_folder_beside_one_with_several(own, tmp_path):
    """a.zip with a/... and others.zip with b/... and c/... are unpacked into three folders."""
    folder = own / "train"
    (tmp_path / "in").mkdir()
    pack(tmp_path / "in" / "a.zip", folder, only="a")
    shutil.copytree(folder, tmp_path / "rest", ignore=shutil.ignore_patterns("a"))
    pack(tmp_path / "in" / "others.zip", tmp_path / "rest")
    assert same(open_any_images(Source(str(tmp_path / "in"))), open_any_images(Source(str(folder))))


def absolute(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """As `tar -P` names it."""
    member.name = f"/{member.name}"
    return member


@pytest.mark.parametrize("kind", ["tar", "TAR", "ZIP"])
def test_a_folder_packed_by_its_name_gives_what_the_folder_gives(own, tmp_path, kind):
    """As by `tar cf train.tar train`, where the folder itself comes first; a Mac adds companions to a zip."""
    folder, archive = own / "train", tmp_path / f"train.{kind}"
    if kind == "ZIP":
        with zipfile.ZipFile(archive, "w") as packed:
            for path in [folder, *sorted(folder.rglob("*"))]:
                packed.write(path, path.relative_to(own))
            packed.writestr("__MACOSX/train/._a", b"")
    else:
        with tarfile.open(archive, "w") as packed:
            if kind == "TAR":
                packed.add(own, ".", recursive=False)
            packed.add(folder, "train", filter=absolute if kind == "TAR" else None)
    assert same(open_any_images(Source(str(archive))), open_any_images(Source(str(folder))))


def test_shards_packed_by_their_names_are_not_classes(own, tmp_path):
    """Nor do the companion files of a Mac at the top of each make them classes."""
    parts, expected = tmp_path / "parts", open_any_images(Source(str(own / "train")))
    for number, names in enumerate(("ab", "c")):
        for name in names:
            shutil.copytree(own / "train" / name, parts / f"shard-{number}" / name)
        pack(tmp_path / "named" / f"shard-{number}.tar", parts, only=f"shard-{number}")
        (parts / f"shard-{number}" / f"._{number}.png").write_text("a Mac's companion")
        pack(tmp_path / "flat" / f"shard-{number}.tar", parts / f"shard-{number}")
    for place in ("named", "flat"):
        (tmp_path / place / ".DS_Store").write_text("")
        assert same(open_any_images(Source(str(tmp_path / place))), expected)


def test_images_beside_the_tars_in_a_tar_are_taken_too(own, tmp_path):
    for path in list((own / "train").rglob("*.png")):
        path.rename(path.with_suffix(".JPEG"))  # as ImageNet's
    parts = pack_in_parts(own / "train", tmp_path / "parts", "tar", True)
    (parts / "b.tar").rename(parts / "b.TAR")
    (parts / "c.tar").unlink()
    shutil.copytree(own / "train" / "c", parts / "c")
    packed = open_any_images(Source(str(pack(tmp_path / "x.tar", parts))))
    assert same(packed, open_any_images(Source(str(own / "train"))))
    zipped = open_any_images(Source(str(pack(tmp_path / "x.zip", parts))))  # of which the tars are not read
    assert zipped.classes == ["c"] and zipped.left_out == {".tar": 2}


def test_hidden_files_among_shards_are_no_obstacle(own, tmp_path):
    """A Mac adds companions of tars to a tar of them, and .DS_Store to each folder."""
    for name in "ab":
        folder = tmp_path / f"shard-{name}"
        shutil.copytree(own / "train" / name, folder / name)
        (folder / ".DS_Store").write_bytes(b"x")
        pack(tmp_path / "tars" / f"{name}.tar", folder)
        pack(tmp_path / "of other names" / f"shard-{name}.tar", folder)
    for place in ("tars", "of other names"):
        assert open_any_images(Source(str(tmp_path / place))).classes == ["a", "b"]
    hidden = tmp_path / "tars" / ".old"
    hidden.mkdir()
    shutil.copy(tmp_path / "tars" / "a.tar", hidden)
    (tmp_path / "tars" / "._a.tar").write_bytes(b"a companion")
    (tmp_path / "tars" / "missing.tar").symlink_to("/nowhere/missing.tar")
    tar = str(pack(tmp_path / "x.tar", tmp_path / "tars"))
    assert open_any_images(Source(tar)).classes == ["a", "b"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_the_last_member_of_a_name_counts(own, tmp_path, kind):
    """As in unpacking; `tar --update` appends a file that has taken the place of a link."""
    folder = own / "train" / "a"
    path = tmp_path / f"x.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(folder / "000.png", "000.png")
            for link_type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                link = tarfile.TarInfo("b.png")
                link.type, link.linkname = link_type, "000.png"
                archive.addfile(link)
            archive.add(folder / "001.png", "b.png")
    else:
        with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(folder / "000.png", "000.png")
            link = zipfile.ZipInfo("b.png")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "000.png")
            archive.write(folder / "001.png", "b.png")
    last, expected = (open_any_images(Source(str(place))).pixels(1) for place in (path, folder))
    assert torch.equal(last, expected)


def test_a_hard_link_is_the_member_before_it(own, tmp_path):
    """As in unpacking, also when `tar --append` adds another file of that name."""
    folder = own / "train" / "a"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder / "000.png", "a.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
        archive.add(folder / "001.png", "a.png")
    images, expected = (open_any_images(Source(str(place))) for place in (tmp_path / "x.tar", folder))
    assert [torch.equal(images.pixels(i), expected.pixels(1 - i)) for i in (0, 1)] == [True, True]


def test_a_hard_link_may_lead_to_a_link_and_state_a_size(own, tmp_path):
    """GNU tar packs a link that has two names so; other programs repeat the size of the file."""
    folder = own / "train" / "a"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder / "001.png", "c/a.png")
        for name, kind, target in (
            ("c/b.png", tarfile.SYMTYPE, "a.png"),
            ("c/c.png", tarfile.LNKTYPE, "c/b.png"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname, link.size = kind, target, 10**6
            archive.addfile(link)
    images, expected = (open_any_images(Source(str(place))) for place in (tmp_path / "x.tar", folder))
    assert [torch.equal(images.pixels(i), expected.pixels(1)) for i in range(3)] == [True] * 3


def test_an_archive_among_images_is_left_out(own, tmp_path):
    """Also in a folder that is called as an archive is."""
    shutil.move(own / "train", tmp_path / "train.tar")
    pack(tmp_path / "train.tar" / "copy.zip", own / "val")
    images = open_training_images(Source(str(tmp_path / "train.tar")))
    assert len(images) == 12 and images.left_out == {".zip": 1}


def test_archives_of_train_and_val_are_not_mixed(own, tmp_path):
    for split in ("train", "val"):
        pack(tmp_path / "in" / f"{split}.tar", own / split, only={"train": "a", "val": "b"}[split])
    with pytest.raises(UserError, match="folder has train/ and val/ .*: add --split train"):
        open_training_images(Source(str(tmp_path / "in")))
    assert len(open_training_images(Source(str(tmp_path / "in"), split="train"))) == 4


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_one_archive_may_hold_both_parts(own, tmp_path, kind):
    packed = pack(tmp_path / f"data.{kind}", own)
    assert knn(packed) == knn(own)
    with pytest.raises(UserError, match="folder has train/ and val/ .*: add --split train"):
        open_training_images(Source(str(packed)))
    train = open_training_images(Source(str(packed), split="train"))
    assert same(train, open_training_images(Source(str(own / "train"))))
    assert train.paths[0] == str(packed / "train" / "a" / "000.png")


def test_the_index_is_built_once_for_each_state_of_an_archive(own, tmp_path, cache, capsys):
    path = pack(tmp_path / "a.tar", own / "train")
    source = Source(str(path))
    first = open_training_images(source)
    assert "built the index of 15 members" in capsys.readouterr().out
    assert same(open_training_images(source), first)
    assert "built the index" not in capsys.readouterr().out
    kept = next(cache.iterdir())
    kept.write_bytes(kept.read_bytes()[:200])
    assert same(open_training_images(source), first)
    np.savez(kept, names=np.frombuffer(b"a/000.png\0", np.uint8), places=np.zeros((2, 6), np.int64))
    assert same(open_training_images(source), first)
    with open(kept, "wb") as file:
        np.save(file, np.zeros(3))
    assert same(open_training_images(source), first)
    pack(path, own / "val" / "a")
    assert len(open_training_images(source)) == 4
    capsys.readouterr()
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as some tools do
    assert len(open_training_images(source)) == 4 and "built the index" in capsys.readouterr().out
    shutil.rmtree(cache)
    cache.parent.rmdir()
    cache.parent.write_text("no folder can be made here")
    assert len(open_training_images(source)) == 4


def test_a_relative_cache_is_not_made_where_the_run_is_started(own, tmp_path, monkeypatch):
    """Nor one in "~", for which a user without a home has no folder."""
    path = pack(tmp_path / "a.tar", own / "train")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.chdir(own)
    assert len(open_training_images(Source(str(path)))) == 12
    assert sorted(os.listdir(own)) == ["train", "val"]


class Pixels(Dataset):
    """Images as workers inherit them: with the archive open."""

    def __init__(self, images: ImageFiles):
        self.images = images

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images.pixels(index)


def test_workers_read_at_the_same_time(own, tmp_path):
    """With a shared handle, one worker would move the place at which another one reads."""
    images = open_training_images(Source(str(pack(tmp_path / "a.tar", own / "train"))))
    expected = [images.pixels(i) for i in range(len(images))]  # opens the archive before the fork
    handle = images.paths._open[0]
    place = handle.tell()
    options = dict(batch_size=None, num_workers=3, multiprocessing_context="fork")
    read = DataLoader(Pixels(images), sampler=list(range(5)) * 40, **options)
    assert all(torch.equal(pixels, expected[i % 5]) for i, pixels in enumerate(read))
    assert handle.tell() == place
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.pixels(3), expected[3])


def test_a_link_of_another_name_does_not_share_the_index_of_an_archive(own, tmp_path, cache):
    store = pack(tmp_path / "store" / "flowers.zip", own, only="train")
    link = tmp_path / "train.zip"
    link.symlink_to(store)
    assert open_any_images(Source(str(store))).classes == ["train"]
    assert len(open_any_images(Source(str(link))).classes) == 3


def test_links_and_hidden_names_in_archives(own, tmp_path, capsys):
    folder = own / "train"
    (folder / "a" / "link.png").symlink_to("../b/000.png")
    (folder / "z.png").symlink_to("/nowhere.png")
    os.link(folder / "c" / "000.png", folder / "c" / "hard.png")
    save_images(folder / ".hidden" / "inner", 1)
    (folder / "a" / "._000.png").write_text("a Mac's companion")
    (folder / "__MACOSX").mkdir()
    images = open_training_images(Source(str(pack(tmp_path / "a.tar", folder, reverse=False))))
    assert "15 images in 1 archive (.png 15); left out 3 hidden names" in capsys.readouterr().out
    names = list(images.paths.names())
    pixels = {name: images.pixels(i) for i, name in enumerate(names) if name != "z.png"}
    assert torch.equal(pixels["a/link.png"], pixels["b/000.png"])
    assert torch.equal(pixels["c/hard.png"], pixels["c/000.png"])
    with pytest.raises(OSError, match="link out of the archive"):
        images.pixels(0)
    check_images(images)
    assert "1 of 15 checked images cannot be read; e.g. " in capsys.readouterr().out


def add_link(archive: Path, name: str, target: str) -> None:
    """Add a link to a zip, as `zip --symlinks` does, or to a tar."""
    if archive.suffix == ".tar":
        with tarfile.open(archive, "a", format=tarfile.GNU_FORMAT) as packed:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            packed.addfile(link)
        return
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(info, target)


LINKS = pytest.mark.parametrize(("kind", "fix"), [(".tar", "--dereference"), (".zip", "without --symlinks")])


@LINKS
@pytest.mark.parametrize("deeper", ["", "x"])
def test_links_that_would_lose_a_class_are_refused(own, tmp_path, kind, fix, deeper):
    (own / "store" / deeper).parent.mkdir(exist_ok=True)
    (own / "train" / "c").rename(own / "store" / deeper)
    for path in list((own / "store").rglob("*.png")):
        path.rename(path.with_suffix(".PNG"))
    archive = pack(tmp_path / f"a{kind}", own)
    add_link(archive, "train/c", "../store")
    with pytest.raises(UserError, match=f"train/c is a link to a folder with images .*: pack it .*{fix}"):
        open_labelled_images(Source(str(archive)), "train")


@LINKS
def test_other_links_are_no_obstacle(own, tmp_path, kind, fix):
    (own / "docs").mkdir()
    (own / "docs" / "README.md").write_text("words")
    archive = pack(tmp_path / f"a{kind}", own)
    links = {
        ".venv/lib64": "../train/a",
        "train/a/loop": ".",
        "README": "docs/README.md",
        "latest": "docs",
        "all": ".",
        "out": "/a",
    }
    images = {"train/a/x.png": "y.png", "train/a/y.png": "../b/000.png", "train/b/link.png": "../a/000.png"}
    for name, target in {**links, **images}.items():
        add_link(archive, name, target)
    images = open_labelled_images(Source(str(archive)), "train")
    assert images.classes == ["a", "b", "c"] and len(images) == 15
    found = {name: images.pixels(i) for i, name in enumerate(images.paths.names())}
    assert torch.equal(found["b/link.png"], found["a/000.png"])
    assert torch.equal(found["a/x.png"], found["b/000.png"])  # through a link to a link


@pytest.mark.parametrize("kind", [".json", ".txt"])
def test_shards_with_labels_beside_the_images_are_not_classes(tmp_path, kind):
    """As img2dataset writes them."""
    for part in ("train", "val"):
        for shard in ("000", "001"):
            folder = tmp_path / part / shard
            save_images(folder, 3)
            for path in list(folder.iterdir()):
                path.with_suffix(kind).write_text("{}")
            pack(tmp_path / "packed" / part / f"{shard}.tar", folder)
    with pytest.raises(UserError, match=rf"classes in \{kind} files beside the images, as in WebDataset"):
        open_labelled_images(Source(str(tmp_path / "packed")), "train")
    assert open_any_images(Source(str(tmp_path / "packed" / "train"))).classes == []


def test_annotations_beside_the_images_do_not_take_classes_away(own, tmp_path):
    """As captions, or boxes in YOLO's files; also where class folders end in a number, as ImageNet's."""
    for path in list((own / "train").rglob("*.png")):
        path.with_suffix(".txt").write_text("0 0.5 0.5 1 1")
    for name in "abc":
        pack(tmp_path / "packed" / "train" / f"{name}.tar", own / "train" / name)
    packed = Source(str(tmp_path / "packed"))
    assert open_labelled_images(packed, "train").classes == ["a", "b", "c"]
    for name in "abc":
        (own / "train" / name).rename(own / "train" / f"{name}1")
    for source in (own / "train", pack(tmp_path / "train.zip", own / "train")):
        assert open_any_images(Source(str(source))).classes == ["a1", "b1", "c1"]
    pack(tmp_path / "zipped" / "train.zip", own / "train")
    assert open_labelled_images(Source(str(tmp_path / "zipped")), "train").classes == ["a1", "b1", "c1"]
    (own / "train" / "a1" / "000.txt").unlink()
    for name in "abc":
        pack(tmp_path / "most" / "train" / f"{name}1.tar", own / "train" / f"{name}1")
    assert open_labelled_images(Source(str(tmp_path / "most")), "train").classes == ["a1", "b1", "c1"]


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size + size if size < 0 else size)


def broken_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[tarfile.open(path).getmembers()[5].offset + 150] ^= 0xFF  # the checksum
    path.write_bytes(content)


def last_end(path: Path) -> int:
    """Where the last member of a tar ends."""
    member = tarfile.open(path).getmembers()[-1]
    return member.offset_data + -(-member.size // 512) * 512


def change_entry(path: Path, place: int, byte: int) -> None:
    """Set bits of a byte in a zip's entry for its first member."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + place] |= byte
    path.write_bytes(content)


def encrypt_a_link(path: Path) -> None:
    path.unlink()
    add_link(path, "a.png", "b.png")
    change_entry(path, 8, 1)


def make_sparse(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(member)


def give_negative_size(path: Path, size: int, *before: str) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in (*before, "a.png"):
            member = tarfile.TarInfo(name)
            member.size = size if name == "a.png" else 0
            archive.addfile(member)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "x.tar",
            lambda path: give_negative_size(path, -1024),
            r"damaged at byte -512 \(.*x.tar\): download",
        ),
        ("x.tar", lambda path: give_negative_size(path, -512, "b.png"), r"cut short in a.png \(.*x.tar\)"),
        (
            "x.tar",
            lambda path: cut(path, last_end(path) - 1_200),
            r"cut short in a/000.png \(.*x.tar\): download",
        ),
        (
            "x.tar",
            lambda path: cut(path, last_end(path)),
            r"cut short or damaged at byte \d+,\d+ \(.*x.tar\)",
        ),
        ("x.tar", broken_header, r"cut short or damaged at byte \d+,\d+ \(.*x.tar\)"),
        ("x.tar", lambda path: path.write_bytes(b"no tar" * 200), "damaged after the beginning: .*x.tar"),
        (
            "x.tar",
            lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
            "compressed tar .*x.tar.*: dec",
        ),
        ("x.tgz", lambda path: None, "compressed tar cannot be read in place .*x.tgz"),
        ("x.tar", lambda path: path.write_bytes(bytes(10_240)), r"no images found \(--data_path .*x.tar\)"),
        ("x.zip", lambda path: cut(path, -30), r"cut short or damaged: .*x.zip\): download"),
        ("x.tar", make_sparse, r"a.png is a sparse file \(.*x.tar\): pack it without --sparse"),
        ("x.zip", lambda path: change_entry(path, 8, 1), r"archive is encrypted: .*x.zip"),
        ("x.zip", encrypt_a_link, r"archive is encrypted: a.png \(.*x.zip\)"),
        ("x.zip", lambda path: change_entry(path, 23, 1), r"cut short in c/003.png \(.*x.zip\): download"),
    ],
)
def test_a_bad_archive_is_one_clear_line(own, tmp_path, must_end, name, damage, message):
    path = pack(tmp_path / name, own / "train")
    damage(path)
    with pytest.raises(UserError, match=message):
        open_training_images(Source(str(path)))


def test_a_link_in_a_zip_is_not_unpacked_to_gigabytes(own, tmp_path):
    path = pack(tmp_path / "x.zip", own / "train")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        link = zipfile.ZipInfo("a/link.png")
        link.external_attr, link.compress_type = (stat.S_IFLNK | 0o777) << 16, zipfile.ZIP_DEFLATED
        archive.writestr(link, bytes(2**26))
    tracemalloc.start()
    open_training_images(Source(str(path)))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_archives_that_cannot_be_a_dataset_are_refused(own, tmp_path):
    with pytest.raises(UserError, match=r"by bzip2: c/003.png \(.*x.zip\): pack it with the usual method"):
        open_training_images(Source(str(pack(tmp_path / "x.zip", own / "train", method=zipfile.ZIP_BZIP2))))
    (own / "train" / "d").mkdir()
    for kind in ("tar", "zip"):
        pack(tmp_path / kind / f"train.{kind}", own / "train")
        with pytest.raises(UserError, match="no images in class folders d "):
            open_labelled_images(Source(str(tmp_path / kind)), "train")
    pack(tmp_path / "flat" / "train.tar", own / "train" / "a")
    with pytest.raises(UserError, match=r"no class folders \(.*train.tar\)"):
        open_labelled_images(Source(str(tmp_path / "flat")), "train")
    pack_in_parts(own / "train", tmp_path / "parts" / "train", "tar", True)
    pack(tmp_path / "parts" / "train" / "d.tar", own / "train" / "d")
    with pytest.raises(UserError, match="no images in class folders d "):
        open_labelled_images(Source(str(tmp_path / "parts")), "train")
    for part in ("0", "1"):
        pack(tmp_path / "twice" / f"{part}.tar", own / "train")
    with pytest.raises(UserError, match=r"two archives contain c/003.png \(.*twice\): give one"):
        open_training_images(Source(str(tmp_path / "twice")))
    (tmp_path / "tars").mkdir()
    inner = pack(tmp_path / "tars" / "a.tar", own / "train" / "a")
    for size in (last_end(inner), 1_500):  # between members: zeros of the outer one follow
        cut(inner, size)
        with pytest.raises(UserError, match=r"cut short .*outer.tar, a.tar\)"):
            open_training_images(Source(str(pack(tmp_path / "outer.tar", tmp_path / "tars"))))


def test_archives_joined_by_cat_are_refused(own, tmp_path):
    """A reader of tars stops at the end of the first."""
    first, second = (pack(tmp_path / f"{name}.tar", own / "train" / name) for name in "ab")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"data follows the end of .*joined.tar\): .*--ignore-zeros"):
        open_training_images(Source(str(joined)))
    joined.write_bytes(first.read_bytes() + bytes(3 << 20))
    assert len(open_training_images(Source(str(joined)))) == len(open_training_images(Source(str(first))))


def test_only_images_in_a_zip_have_to_be_compressed_in_the_usual_way(own, tmp_path):
    path = pack(tmp_path / "x.zip", own / "train")
    for name, message in (("notes.txt", ""), ("A.PNG", "compressed by LZMA: A.PNG ")):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"words", zipfile.ZIP_LZMA)
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            assert len(open_training_images(Source(str(path)))) == 12


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_changes_later_is_no_unreadable_image(own, tmp_path, kind):
    """Members may lie at other places, so that an image would get another's label."""
    path = pack(tmp_path / f"x.{kind}", own / "train")
    images = open_any_images(Source(str(path)))
    data.read_image(images, 0)
    status = path.stat()
    path.write_bytes(path.read_bytes())  # a tool may write into the open file
    with pytest.raises(WrongFormat, match="archive was changed"):
        data.read_image(images, 0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    pack(tmp_path / "other", own / "val").replace(path)
    data.read_image(images, 0)  # from the file that is open
    worker = pickle.loads(pickle.dumps(images))
    message = rf"^archive was changed after it was opened \(.*x.{kind}\): run the same command again"
    with pytest.raises(WrongFormat, match=message):
        TrainingViews(worker, None, 0).readable(0, 0)
    with pytest.raises(WrongFormat, match=message):
        data.read_image(worker, 0)


def test_a_zip_that_is_not_what_its_index_says_is_an_unreadable_image(own, tmp_path):
    path = pack(tmp_path / "x.zip", own / "train")
    change_entry(path, 24, 0xFF)  # the size of the unpacked file
    images = open_any_images(Source(str(path)))
    with pytest.raises(ImageError, match="the archive is damaged .*x.zip/c/003.png"):
        data.read_image(images, len(images) - 1)
    data.read_image(images, 0)
    path.write_bytes(path.read_bytes().replace(b"PK\3\4", b"PK\0\0"))  # before the content of each file
    images = open_any_images(Source(str(path)))
    with pytest.raises(ImageError, match="the archive is damaged .*x.zip/a/000.png"):
        data.read_image(images, 0)


def test_a_damaged_zip_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**25))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 24 : entry + 28] = (100).to_bytes(4, "little")  # the size of the unpacked file
    path.write_bytes(content)
    images = open_any_images(Source(str(path)))
    tracemalloc.start()
    with pytest.raises(ImageError, match="the archive is damaged"):
        data.read_image(images, 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**23


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_with_one_wrong_bit_is_an_unreadable_image(tmp_path, method):
    """The decoder of JPEGs does not notice it."""
    (tmp_path / "own").mkdir()
    picture(64).save(tmp_path / "own" / "a.jpg", quality=95)
    path = pack(tmp_path / "x.zip", tmp_path / "own", method=method)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("a.jpg").compress_size - 300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match="damaged|while decompressing"):
        data.read_image(open_any_images(Source(str(path))), 0)


def test_a_damaged_image_in_a_zip_stops_nothing_before_it_is_read(own, tmp_path):
    path = pack(tmp_path / "x.zip", own / "train", method=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[(start := content.index(b"c/003.png") + 9) : start + 100] = b"\xff" * 100
    path.write_bytes(content)
    images = open_any_images(Source(str(path)))
    assert data.digest(images) != data.digest(open_any_images(Source(str(own / "train"))))
    with pytest.raises(ImageError, match="cannot read image: .*x.zip/c/003.png"):
        data.read_image(images, len(images) - 1)


def test_an_archive_without_permission_is_named(permissions):
    save_images(Path("a"), 1)
    pack(Path("x.tar"), Path("a")).chmod(0)
    with pytest.raises(UserError, match=r"Permission denied \(x.tar\): make it readable"):
        open_training_images(Source("x.tar"))


def test_a_process_keeps_few_archives_open(own, tmp_path, monkeypatch):
    monkeypatch.setattr(Members, "MOST_OPEN", 2)
    images = open_any_images(Source(str(pack_in_parts(own / "train", tmp_path / "parts", "tar", True))))
    expected = open_any_images(Source(str(own / "train")))
    for i in (0, 5, 9, 1, 6, 10):
        assert torch.equal(images.pixels(i), expected.pixels(i)) and len(images.paths._open) <= 2


@pytest.mark.slow
def test_a_run_goes_on_with_the_archive_bit_by_bit(own, tmp_path):
    """The same images in another container are the same data, also to two workers."""
    archive = pack(tmp_path / "x.zip", own / "train")
    for data_path, out, steps in (
        (own / "train", "whole", 0),
        (own / "train", "moved", 2),
        (archive, "moved", 0),
    ):
        places = "--data_path", data_path, "--output_dir", tmp_path / out
        train(*places, "--num_workers", 2, "--max_steps", steps)
    whole, moved = (load_checkpoint(tmp_path / out / "checkpoint.pth") for out in ("whole", "moved"))
    assert moved["step"] == whole["step"] > 2
    for name, value in whole["teacher"].items():
        assert torch.equal(value, moved["teacher"][name]), name


class Unflagged(zipfile.ZipInfo):
    """A member whose name is UTF-8 without the flag that says so, as Linux's zip writes it."""

    def _encodeFilenameFlags(self):
        return self.filename.encode(), self.flag_bits


class Dos(zipfile.ZipInfo):
    """A member whose name is in DOS's code page, as the format of zips says."""

    def _encodeFilenameFlags(self):
        return self.filename.encode("cp437"), self.flag_bits


class PowerShell(zipfile.ZipInfo):
    """A member with backslashes between its folders."""

    def __init__(self, name: str):
        super().__init__(name)
        self.filename, self.create_system = name.replace("/", "\\"), 0


def test_a_backslash_may_be_half_of_a_character(tmp_path):
    """As in Japanese and Chinese names of Windows without the flag for UTF-8."""
    path = tmp_path / "x.png"
    picture().save(path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("\u30bd.png", "\u80fd\u529b.png"):
            member = Dos(f"a/{name}".encode("cp932").decode("cp437"))
            member.create_system = 0
            archive.writestr(member, path.read_bytes())
    assert len(open_training_images(Source(str(tmp_path / "x.zip")))) == 2


@pytest.mark.parametrize("member", [Unflagged, Dos, PowerShell, zipfile.ZipInfo])
def test_names_in_a_zip_are_those_in_the_folder(tmp_path, member):
    save_images(tmp_path / "in" / "ünï code", 2)
    if member is not PowerShell:  # Windows has no such names
        picture().save(tmp_path / "in" / "back\\slash.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted((tmp_path / "in").rglob("*.png")):
            packed = member(path.relative_to(tmp_path / "in").as_posix())
            packed.extra = b"UT\5\0\1" + bytes(4)  # the time, as Linux's zip adds it
            archive.writestr(packed, path.read_bytes())
    folder, zipped = (open_training_images(Source(str(tmp_path / name))) for name in ("in", "x.zip"))
    assert list(zipped.paths.names()) == list(folder.paths.names())
    assert data.digest(zipped) == data.digest(folder)


def test_names_that_are_no_valid_text_are_kept_in_the_index(tmp_path):
    save_images(tmp_path / "in", 1)
    (tmp_path / "in" / "000.png").rename(tmp_path / "in" / os.fsdecode(b"\xff.png"))
    archive = pack(tmp_path / "x.tar", tmp_path / "in")
    for _ in range(2):  # with the index that is built, and with the one that is kept
        assert same(open_any_images(Source(str(archive))), open_any_images(Source(str(tmp_path / "in"))))
