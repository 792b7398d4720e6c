import argparse

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.data import Source, digest, in_format, open_labelled_images, sample_name
from support.errors import UserError
from support.formats import ImageFormat
from support.subsets import FewImages, draw_few, few_shot, labels_of

LABELS = np.array([2] * 10 + [0] * 200 + [1] * 30)


def counts(wanted: str, seed: int = 0) -> list[int]:
    return np.bincount(LABELS[draw_few(LABELS, wanted, seed)]).tolist()


def test_each_class_has_its_share():
    assert counts("5") == [5, 5, 5] and counts("10") == [10, 10, 10]
    assert counts("10%") == [20, 3, 1] and counts("1%") == [2, 1, 1] and counts("100%") == [200, 30, 10]
    assert counts("2.5%") == [5, 1, 1]


@settings(max_examples=30, deadline=None)
@given(few=st.integers(1, 10), more=st.integers(0, 5), seed=st.integers(0, 100))
def test_a_subset_follows_the_seed_and_is_part_of_the_larger_ones(few, more, seed):
    small = draw_few(LABELS, str(few), seed)
    assert np.array_equal(small, draw_few(LABELS, str(few), seed)) and (np.diff(small) > 0).all()
    assert set(small) <= set(draw_few(LABELS, str(min(10, few + more)), seed))


def test_other_seeds_and_other_classes_draw_other_images():
    assert not np.array_equal(draw_few(LABELS, "5", 0), draw_few(LABELS, "5", 1))
    first, second = draw_few(np.repeat([0, 1], 200), "5", 0).reshape(2, 5)
    assert not np.array_equal(first, second - 200)


def test_a_seed_draws_the_images_that_it_drew_in_earlier_versions():
    assert draw_few(LABELS, "2", 0).tolist() == [2, 8, 16, 115, 211, 227]


def test_the_class_that_is_too_small_is_named():
    with pytest.raises(UserError, match=r"class cat has only 10 images \(--few_shot 11\): give at most 10"):
        draw_few(2 * LABELS, "11", 0, ["ant", "no image", "bee", "no image", "cat"])


@pytest.mark.parametrize("text", ["1%", "0.5%", "100%", "1", "20"])
def test_numbers_and_shares_are_taken(text):
    assert few_shot(text) == text


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "1.5", "few", "%", "nan%", ""])
def test_numbers_and_shares_out_of_range_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        few_shot(text)


def test_a_subset_has_its_images_names_labels_and_classes(labelled):
    images = open_labelled_images(Source(str(labelled)), "train")
    few = FewImages(images, [1, 7, 14])
    assert labels_of(images).tolist() == [images[i][1] for i in range(15)]
    assert few.classes == list("abc") and [few[i][1] for i in range(3)] == [0, 1, 2]
    assert sample_name(few, 1) == sample_name(images, 7)
    assert digest(few) == digest(FewImages(images, [1, 7, 14])) != digest(FewImages(images, [1, 7, 13]))
    others = open_labelled_images(Source(str(labelled)), "val")
    assert digest(FewImages(images, [0, 1])) != digest(FewImages(others, [0, 1]))


def test_labels_of_a_set_without_a_list_are_read(capsys):
    shapes = open_labelled_images(Source(demo=True), "val")
    few = FewImages(shapes, range(5))
    assert labels_of(few).tolist() == [shapes[i][1] for i in range(5)]
    assert "reading the labels of 5 images" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("name", ["labels", "targets", "_labels"])
def test_grey_images_keep_the_list_of_labels(capsys, dtype, name):
    class Listed(list):
        pass

    images = Listed([(Image.new("RGB", (2, 2)), 3), (Image.new("RGB", (2, 2)), 1)])
    digests = set()
    for labels in ([3, 1], [3, 2]):
        setattr(images, name, torch.tensor(labels, dtype=dtype))
        grey = in_format(images, ImageFormat(1), "--dataset")
        assert labels_of(grey).tolist() == labels
        digests.add(digest(grey))
    assert len(digests) == 2 and "reading" not in capsys.readouterr().out


def test_labels_of_several_columns_are_read_from_the_images(capsys):
    """QMNIST's `targets` also hold the writer, and so on; its items have the digit."""

    class Columns(list):
        targets = torch.tensor([[3, 40], [1, 50]])

    images = Columns([(Image.new("RGB", (2, 2)), 3), (Image.new("RGB", (2, 2)), 1)])
    assert labels_of(images).tolist() == [3, 1] and "reading the labels of 2" in capsys.readouterr().out


def test_a_share_is_rounded_and_targets_of_a_regression_are_no_classes():
    labels = np.repeat([0, 1], [19, 14])
    assert np.bincount(labels[draw_few(labels, "10%", 0)]).tolist() == [2, 1]

    class Ages(torch.utils.data.Dataset):
        targets = [20.5, 31.0]

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.zeros(3, 4, 4, dtype=torch.uint8), self.targets[index]

    with pytest.raises(UserError, match="label is not a class number"):
        labels_of(Ages())
