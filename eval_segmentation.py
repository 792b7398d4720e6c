"""Measure how well frozen features segment images: the attention of the CLS token, and the patch tokens.

    python eval_segmentation.py --pretrained_weights dino_vits16 --image_size 480 \\
        --data_path VOCdevkit/VOC2012
    python eval_segmentation.py --demo --pretrained_weights demo_run/checkpoint.pth

`--data_path` has VOC's layout: `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png` (a palette or grey PNG of
class numbers; 0 is the background, 255 is void and counts nowhere), and the names in
`ImageSets/Segmentation/train.txt` and `val.txt`. Images are resized to `--image_size`: a square, or height
and width. Predictions are enlarged to the size of the mask and compared there, pixel by pixel.

Attention: of each head, the patches that hold a share of it (`--threshold`) against the objects, by the
Jaccard index. The paper (Section 4.2.2, table of Figure 4) shows "the best head". Its first author explains
(https://github.com/facebookresearch/dino/issues/54): the best head for each true mask, averaged over the
masks of an image, then over the images. This script takes a class in an image as a mask, and also reports
all objects of an image together, with the best head of the image and with one head for all images.

Patch tokens: a patch's label is the class of most of its pixels. Two classifiers are trained on a sample of
the training patches, weighted k-NN and logistic regression. Their scores of the validation patches,
enlarged bilinearly, give each pixel's class. The mean over classes is over those of the validation masks.

Shapes: B images of a batch, M images, h heads, H x W pixels, R x C patches, D features, N training patches,
K classes.
"""

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from torchvision import transforms

from eval_knn import knn_votes
from support import cli, logistic
from support.attention import attention_map, keep_mass
from support.checks import check_images
from support.data import ImageFiles, Images, in_format, read_names
from support.distributed import choose_device, fix_random_seeds
from support.errors import UserError, counted, few, reading, reason_of
from support.features import load_by_flags, patch_tokens
from support.files import readable_extensions
from support.formats import RGB, ImageFormat, extensions_of
from support.loading import EvalImages, Loader
from support.logger import log
from support.masks import VOID, compare_palettes, jaccard, read_mask, warn_of_turned
from support.pictures import enlarge
from support.pixels import as_tensor, height_and_width, in_channels, normalize
from support.shapes import Shapes
from support.weights import Frozen

L2 = 1e-4  # regularisation of the linear classifier; it matters little with far more patches than features

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    cli.add_weights_flags(parser, seed_of="the sample of patches and of --pretrained_weights random")
    positive = cli.number(int, at_least=1)
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="",
        help="folder in VOC's layout, with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/")
    group.add_argument("--demo", action="store_true",
        help="evaluate on the drawn shapes of main_dino.py --demo, whose masks are exact")
    cli.add_size_flag(group, "--image_size", None,
        "side in pixels of the square, or height and width, that images are resized to; larger gives more "
        "patches, e.g. 480 (default: the file's, else 224)")
    group.add_argument("--batch_size_per_gpu", default=16, type=positive, help="images per forward pass")
    group.add_argument("--num_workers", default=10, type=cli.number(int, at_least=0),
        help="data-loading workers; at most one per core")
    group = parser.add_argument_group("attention")
    group.add_argument("--threshold", default=0.6, type=cli.number(float, above=0, at_most=1),
        help="share of each head's attention that its mask keeps; the paper's is 0.6")
    group = parser.add_argument_group("patch tokens")
    group.add_argument("--train_patches", default=50_000, type=positive,
        help="train the classifiers on at most this many patches, as many of each training image; the time "
             "of k-NN grows with them")
    group.add_argument("--nb_knn", default=20, type=positive, help="number of neighbours")
    group.add_argument("--temperature", default=0.07, type=cli.number(float, above=0),
        help="temperature of the vote: the weight of a neighbour is exp(similarity / temperature)")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Images with masks
# ---------------------------------------------------------------------------------------------


class Masked(Images, Protocol):
    """Images with the class of each pixel."""

    names: Sequence[str]  # of the classes by number; may be empty
    present: set[int]  # the numbers of the classes in the masks

    def class_mask(self, index: int) -> Tensor:
        """Class of each pixel, (H, W) uint8: 0 is the background, VOID counts nowhere."""


class MaskedShapes(Shapes):
    """The demo's shapes; an object of class k has the number k + 1."""

    names: Sequence[str] = ("background", *Shapes.classes)
    present = set(range(len(names)))

    def class_mask(self, index: int) -> Tensor:
        """Class of each pixel, (H, W) uint8."""
        _, label, mask = self.draw(index)
        return torch.from_numpy(mask).to(torch.uint8) * (label + 1)


class MaskedFiles(ImageFiles):
    """The images of a list in VOC's layout.

    Reads all masks once. Raises UserError for a missing file, a mask of another size than its image, and
    masks without any class.
    """

    names: Sequence[str] = ()

    def __init__(self, root: Path, split: str, form: ImageFormat = RGB):
        listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        self.stems = read_names(
            listed, "give the folder with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/"
        )
        found = {"masks": folder_files(root / FOLDERS["masks"], readable_extensions())}
        found |= {"images": folder_files(root / FOLDERS["images"], extensions_of(form))}
        for kind, files in found.items():
            if missing := [stem for stem in self.stems if stem not in files]:
                what = f"{len(missing)} of {len(self.stems)} {kind} are missing: {few(missing)}"
                fix = f"add them to {root / FOLDERS[kind]}, or remove their names from the list"
                raise UserError(what, str(listed), fix)
        super().__init__(*(found["images"][stem] for stem in self.stems), form=form)
        self.masks = [found["masks"][stem] for stem in self.stems]
        self.present = self._check()
        log(f"{split} images: {root}: {counted(len(self), 'image')}, {counted(len(self.present), 'class')}")
        if split == "val" and 0 not in self.present:  # attention is measured on val
            log("warning: no mask has the background 0: all pixels count as objects")
        compare_palettes(self.masks)
        warn_of_turned(list(self.paths))

    def class_mask(self, index: int) -> Tensor:
        """Class of each pixel, (H, W) uint8. Raises UserError if the mask cannot be read."""
        return torch.from_numpy(read_mask(self.masks[index]))

    def _size(self, index: int) -> tuple[int, ...]:
        """Height and width of an image."""
        if not self.form.by_pillow:
            return tuple(self.pixels(index).shape[1:])
        with Image.open(self.paths[index]) as image:  # the header only
            return image.size[::-1]

    def _check(self) -> set[int]:
        """Check the sizes of the masks; the numbers of the classes in them. Raises UserError."""
        present: set[int] = set()
        for index, path in enumerate(self.paths):
            mask = self.class_mask(index)
            with reading("image", path):
                height, width = self._size(index)
            if mask.shape != (height, width):
                what = f"mask has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}"
                raise UserError(what, self.masks[index], "give masks of the images' size")
            present |= set(mask.unique().tolist())
        if not present - {0, VOID}:
            what = f"no class in the masks, only {' and '.join(map(str, sorted(present)))}"
            folder = str(Path(self.masks[0]).parent)
            raise UserError(what, folder, "give masks of class numbers; 0 is the background, 255 void")
        return present - {VOID}


FOLDERS = {"images": "JPEGImages", "masks": "SegmentationClass"}


def folder_files(folder: Path, extensions: Set[str]) -> dict[str, str]:
    """Paths of the images in a folder by name without extension. Raises UserError."""
    try:
        paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    except OSError as error:
        raise UserError(reason_of(error), str(folder), "give a folder in VOC's layout") from None
    found: dict[str, str] = {}
    for path in paths:
        stem, extension = os.path.splitext(os.path.basename(path))
        if extension.lower() not in extensions:
            continue
        if stem in found:
            what = f"two files with the same name: {os.path.basename(found[stem])}"
            raise UserError(what, path, "remove one")
        found[stem] = path
    return found


def open_masked(data_path: str, demo: bool, form: ImageFormat = RGB) -> tuple[Masked, Masked]:
    """Open the training and validation images. Raises UserError."""
    if demo and data_path:
        raise UserError("--demo draws its own images", f"--data_path {data_path}", "leave out one of the two")
    if demo:
        in_format(Shapes("val", 1), form, "--demo")  # checks it
        return MaskedShapes("train", 4_096), MaskedShapes("val", 1_000)
    root = cli.data_folder(data_path, "give a folder in VOC's layout, or try --demo")
    train, val = (MaskedFiles(root, split, form) for split in ("train", "val"))
    if is_voc12(val):
        train.names = val.names = VOC_CLASSES
    if both := set(train.stems) & set(val.stems):
        what = "the accuracy says nothing about other images"
        log(f"warning: {len(both)} of {len(val)} validation images are training images too: {what}")
    if unknown := sorted(val.present - train.present):
        what = f"val has classes that train lacks: {few(unknown)}"
        raise UserError(what, f"--data_path {root}", "name training images of these classes in train.txt")
    return train, val


def is_voc12(val: Masked) -> bool:
    """Whether these are the validation images of PASCAL VOC 2012."""
    return isinstance(val, MaskedFiles) and len(val) == 1_449 and val.stems[0] == "2007_000033"


def resized_batches(
    frozen: Frozen, images: Images, device: torch.device, batch_size: int = 16, num_workers: int = 0
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices and all images, in their order, resized to the network's size and normalised,
    (B, C, H, W).
    """
    size = height_and_width(frozen.image_size)
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    channels = functools.partial(in_channels, channels=frozen.form.channels)
    transform = transforms.Compose([channels, resize, as_tensor])
    order = BatchSampler(range(len(images)), batch_size, drop_last=False)
    for pixels, _, indices in Loader(EvalImages(images, transform), order, num_workers, device):
        yield indices.tolist(), normalize(pixels.to(device), frozen.mean, frozen.std)


Batches = Iterable[tuple[list[int], Tensor]]  # as `resized_batches` yields them


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


class AttentionScores(NamedTuple):
    """How the attention in M images matches their objects, in [0, 1]."""

    classes: Tensor  # (M,) mean Jaccard index over the image's classes, each with its best head
    objects: Tensor  # (M, h) Jaccard index of a head's mask and all objects together
    on_objects: Tensor  # (M, h) share of a head's attention on the objects
    area: Tensor  # (M,) the objects' share of the image; the Jaccard index of a mask that is all of it


def score_attention(attention: Tensor, truth: Tensor, threshold: float) -> AttentionScores:
    """Compare the attention (h, R, C) in an image with its classes (H, W); M = 1.

    The image has to have a class other than 0, the background.
    """
    valid = truth != VOID
    objects = valid & (truth > 0)
    masks = enlarge(keep_mass(attention, threshold), truth.shape) & valid
    pixels = enlarge(attention, truth.shape) * valid
    classes = [jaccard(masks, truth == number).max() for number in truth[objects].unique()]
    return AttentionScores(
        torch.stack(classes).mean()[None],
        jaccard(masks, objects)[None],
        ((pixels * objects).sum(dim=(-2, -1)) / pixels.sum(dim=(-2, -1)))[None],
        (objects.sum() / valid.sum())[None],
    )


@torch.inference_mode()
def measure_attention(
    network: nn.Module, images: Masked, batches: Batches, threshold: float
) -> AttentionScores:
    """Score the attention in all images that have objects. Raises UserError as `attention_map` does."""
    scores = []
    for indices, batch in batches:
        for index, attention in zip(indices, attention_map(network, batch), strict=True):
            truth = images.class_mask(index).to(batch.device)
            if ((truth > 0) & (truth != VOID)).any():
                scores.append(score_attention(attention, truth, threshold))
    return AttentionScores(*(torch.cat(parts) for parts in zip(*scores, strict=True)))


def report_attention(scores: AttentionScores, threshold: float, num_images: int) -> dict[str, float]:
    """Print the Jaccard indices in percent, and return them by name."""
    left_out = num_images - len(scores.area)
    log(f"attention: {threshold:.0%} of a head's attention against the objects, {len(scores.area)} images"
        + f"; left out {left_out} without objects" * bool(left_out))  # fmt: skip
    one = int(scores.objects.mean(dim=0).argmax())
    found = {
        "jaccard": ("each class, its best head", scores.classes.mean()),
        "jaccard_image": ("all objects, the image's best head", scores.objects.amax(dim=1).mean()),
        "jaccard_one_head": (f"all objects, head {one} for all images", scores.objects[:, one].mean()),
        "area": ("all objects, the whole image as mask", scores.area.mean()),
    }
    for words, value in found.values():
        log(f"  {words:38} Jaccard {100 * value.item():5.1f} %")
    share = 100 * scores.on_objects[:, one].mean().item()
    log(f"  of head {one}'s attention, {share:.1f} % is on the objects")
    return {name: 100 * value.item() for name, (_, value) in found.items()}


# ---------------------------------------------------------------------------------------------
# Patch tokens
# ---------------------------------------------------------------------------------------------


def patch_labels(mask: Tensor, rows: int, cols: int) -> Tensor:
    """The most frequent class in each patch, (R, C), of a mask (H, W); of several, the lowest number."""
    numbers, places = mask.unique(return_inverse=True)
    shares = F.adaptive_avg_pool2d(F.one_hot(places, len(numbers)).permute(2, 0, 1).float(), (rows, cols))
    return numbers[shares.argmax(dim=0)].long()


@torch.no_grad()  # not inference mode: a classifier is trained on the tokens
def sample_tokens(
    network: nn.Module, images: Masked, batches: Batches, limit: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Sample patches that are not void, about as many of each image; tokens (N, D) and labels (N,).

    The sample of an image depends on the seed and the image's index alone. N is at most `limit`.
    """
    quota = math.ceil(limit / len(images))
    found = []
    for indices, batch in batches:
        for index, tokens in zip(indices, patch_tokens(network, batch), strict=True):
            labels = patch_labels(images.class_mask(index), *tokens.shape[:2]).flatten()
            usable = (labels != VOID).nonzero().flatten().numpy()
            chosen = torch.from_numpy(np.random.default_rng([seed, index]).permutation(usable)[:quota])
            found.append((tokens.flatten(0, 1)[chosen.to(tokens.device)].float(), labels[chosen]))
    tokens, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not len(labels):
        raise UserError("most of each patch is void", "training masks", "give masks with more of the classes")
    kept = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(labels))[:limit]))
    return tokens[kept.to(tokens.device)], labels[kept].to(tokens.device)


Classifier = Callable[[Tensor], Tensor]  # tokens (M, D) -> scores of the classes (M, K)


def knn_segmenter(tokens: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int) -> Classifier:
    """A weighted k-NN classifier of tokens; its scores are shares of the votes."""
    normed = F.normalize(tokens, dim=1)

    def classify(queries: Tensor) -> Tensor:
        data = normed, labels, F.normalize(queries, dim=1)
        votes = torch.cat([part for *_, part in knn_votes(*data, [k], temperature, num_classes)])
        return votes / votes.sum(dim=1, keepdim=True)

    return classify


@torch.inference_mode()
def segment(
    network: nn.Module, images: Masked, batches: Batches, classifiers: dict[str, Classifier], num_classes: int
) -> dict[str, Tensor]:
    """Classify all pixels; for each classifier the number of pixels by true and predicted class, (K, K)."""
    pixels = {name: torch.zeros(num_classes, num_classes, dtype=torch.long) for name in classifiers}
    for indices, batch in batches:
        tokens = patch_tokens(network, batch).float()  # (B, R, C, D)
        truths = [images.class_mask(index) for index in indices]
        for name, classify in classifiers.items():
            scores = classify(tokens.flatten(0, 2)).unflatten(0, tokens.shape[:3])  # (B, R, C, K)
            for truth, maps in zip(truths, scores.permute(0, 3, 1, 2), strict=True):
                predicted = enlarge_scores(maps, truth.shape).argmax(dim=0)
                pixels[name] += count_pixels(predicted.cpu(), truth, num_classes)
    return pixels


def enlarge_scores(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate scores (K, R, C) to pixels (K, H, W), bilinearly."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def count_pixels(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count the pixels (H, W) by true and predicted class, (K, K), without void ones."""
    valid = truth != VOID
    places = truth[valid].long() * num_classes + predicted[valid]
    return places.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(pixels: Tensor) -> Tensor:
    """In percent for each class (K,), of pixels by true and predicted class; NaN without true pixels."""
    both, true, predicted = pixels.diag(), pixels.sum(dim=1), pixels.sum(dim=0)
    return torch.where(true > 0, 100 * both / (true + predicted - both).clamp(min=1), torch.nan)


def report_segmentation(pixels: dict[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """Print the intersection over union class by class; returns the mean of each classifier, in percent."""
    scores = {name: intersection_over_union(counts) for name, counts in pixels.items()}
    log(f"  {'class':22} " + " ".join(f"{name:>8}" for name in scores))
    for number, row in enumerate(zip(*(score.tolist() for score in scores.values()), strict=True)):
        if not math.isnan(row[0]):
            name = names[number] if number < len(names) else ""
            log(f"  {number:3} {name:18} " + " ".join(f"{value:8.1f}" for value in row))
    means = {name: score.nanmean().item() for name, score in scores.items()}
    log(f"  {'mean':22} " + " ".join(f"{value:8.1f}" for value in means.values()))
    return means


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def has_attention(frozen: Frozen, device: torch.device) -> bool:
    """Whether the network has CLS attention; if not, says so. Raises UserError if it has no patch tokens."""
    image = frozen.zeros(1).to(device)
    patch_tokens(frozen.network, image)
    try:
        attention_map(frozen.network, image)
    except UserError as error:
        log(f"note: no attention is measured: {str(error).partition(': ')[0]}")
        return False
    return True


def main(args: argparse.Namespace) -> dict[str, float]:
    """Measure and print; returns the Jaccard indices and the means over classes, in percent."""
    if cli.leaves_work_to_first():
        return {}
    device = choose_device()
    fix_random_seeds(args.seed)
    frozen = load_by_flags(args)
    train, val = open_masked(args.data_path, args.demo, frozen.form)
    for images in (train, val):
        check_images(images, alike=False)
    network = frozen.network.to(device)
    loading = device, args.batch_size_per_gpu, args.num_workers
    found: dict[str, float] = {}
    if has_attention(frozen, device):
        scores = measure_attention(network, val, resized_batches(frozen, val, *loading), args.threshold)
        found |= report_attention(scores, args.threshold, len(val))
        if is_voc12(val) and args.pretrained_weights == "dino_vits16":
            log("  the paper's: DINO 45.9, supervised 27.3, random weights 22.0")

    data = resized_batches(frozen, train, *loading)
    tokens, labels = sample_tokens(network, train, data, args.train_patches, args.seed)
    num_classes, k = max(train.present) + 1, min(args.nb_knn, len(labels))
    log(f"patch tokens: {len(labels):,} training patches of {len(train):,} images, {k} neighbours; "
        f"intersection over union in {len(val):,} images, %")  # fmt: skip
    classifiers: dict[str, Classifier] = {
        "k-NN": knn_segmenter(tokens, labels, k, args.temperature, num_classes),
        "linear": logistic.fit(tokens, labels, num_classes, L2),
    }
    pixels = segment(network, val, resized_batches(frozen, val, *loading), classifiers, num_classes)
    return found | report_segmentation(pixels, val.names)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
