"""Seeded subsets of labelled images, with a number or a share of the images of each class."""

import argparse
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Subset

from support.data import LABELS, Images, read_labelled
from support.errors import UserError, counted
from support.logger import log


class FewImages(Subset):
    """Images of a labelled set, by index, with the set's classes."""

    def __init__(self, images: Images, indices: Sequence[int]):
        super().__init__(images, list(indices))  # type: ignore[arg-type]
        self.classes = getattr(images, "classes", None)


def few_shot(text: str) -> str:
    """The argparse type of a number of images per class, e.g. 5, or a share of them, e.g. 10%."""
    share = text.endswith("%")
    try:
        value = float(text[:-1]) if share else int(text)
    except ValueError:
        words = "neither a number of images nor a share such as 1%"
        raise argparse.ArgumentTypeError(f"{text!r} is {words}") from None
    if not (0 < value <= 100 if share else value >= 1):
        raise argparse.ArgumentTypeError(f"must be at least 1, or above 0% and at most 100%, not {text}")
    return text


def labels_of(images: Images) -> np.ndarray:
    """The labels of all images, (N,). Reads the images if the set does not have its labels as a list."""
    for name in LABELS:
        labels = np.asarray(getattr(images, name, None))
        if labels.shape == (len(images),) and labels.dtype.kind in "iu":  # QMNIST's have more columns
            return labels
    log(f"reading the labels of {len(images):,} images")
    return np.array([read_labelled(images, index)[1] for index in range(len(images))])


def draw_few(labels: np.ndarray, wanted: str, seed: int, classes: Sequence[str] | None = None) -> np.ndarray:
    """Draw `wanted` images of each class, as `few_shot` describes it; their indices, ascending.

    A share is rounded, to at least one image of a class. With the same seed, a larger subset contains a
    smaller one. Raises UserError if a class has too few images; `classes` are their names.
    """
    numbers, sizes = np.unique(labels, return_counts=True)
    if wanted.endswith("%"):
        counts = np.maximum(1, np.round(sizes * float(wanted[:-1]) / 100)).astype(int)
    else:
        counts = np.full(len(sizes), int(wanted))
    smallest = int(sizes.argmin())
    if counts[smallest] > sizes[smallest]:
        name = classes[numbers[smallest]] if classes else numbers[smallest]
        what = f"class {name} has only {counted(sizes[smallest], 'image')}"
        raise UserError(what, f"--few_shot {wanted}", f"give at most {sizes[smallest]}")
    chosen = []
    of_classes = np.split(np.argsort(labels, kind="stable"), sizes.cumsum()[:-1])  # the images of each class
    for number, count, rows in zip(numbers.tolist(), counts.tolist(), of_classes, strict=True):
        chosen.append(np.random.default_rng([seed, number]).permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))
