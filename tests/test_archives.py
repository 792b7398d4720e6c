"""Images from lists and archives, against the same images in a folder."""

import os
from pathlib import Path

import pytest
import torch

import eval_knn
from support import data
from support.data import Images, Source, open_any_images, open_labelled_images, open_training_images
from support.errors import UserError
from support.loading import TrainingViews
from tests.conftest import save_images
from utils import DataAugmentationDINO


def write_list(path: Path, folder: Path, classes: str = "") -> Path:
    """List the images of `folder` in its order, with classes after the separator `classes`."""
    names = list(data.ImageFiles(folder).paths.names())
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
    return eval_knn.main(eval_knn.parse_args([*flags, str(folder)]))


@pytest.fixture
def own(labelled, tmp_path) -> Path:
    """A copy of `labelled`, in which a test may put files."""
    for split in ("train", "val"):
        for name in "abc":
            save_images(tmp_path / "data" / split / name, 4, seed=ord(name) + len(split))
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\t", ",", " , "])
def test_listed_images_are_those_of_the_folder(own, tmp_path, separator):
    train = own / "train"
    plain = write_list(train / "all.txt", train)
    assert same(open_training_images(Source(str(plain))), open_training_images(Source(str(train))))
    classes = write_list(train / "classes.txt", train, separator)
    folder = open_labelled_images(Source(str(own)), "train")
    any_images = open_any_images(Source(str(classes)))
    assert same(any_images, folder) and any_images.classes == list("abc")


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
        ("000.png\n001.png\n", r"no class \(.*train.txt, line 1\)"),
        ("\n", r"no images found \(--data_path .*train.txt\)"),
    ],
)
def test_a_bad_list_is_one_clear_line(tmp_path, text, message):
    save_images(tmp_path, 2)
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        knn(tmp_path)
    assert "\n" not in str(error.value)


def test_a_list_is_one_part(own, tmp_path):
    path = write_list(tmp_path / "train.txt", own / "train", "\t")
    with pytest.raises(UserError, match="a list is one part of a dataset .*: give the folder that"):
        knn(path)
    with pytest.raises(UserError, match="has no effect on a file"):
        open_training_images(Source(str(path), split="train"))
