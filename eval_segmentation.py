"""Measure how well frozen features segment images: the attention of the CLS token, and the patch tokens.

    python eval_segmentation.py --demo --pretrained_weights demo_run/checkpoint.pth

Images are resized to a square; predictions are enlarged to the size of the mask and compared there, pixel by
pixel. Void pixels (255) count nowhere.

Attention: of each head, the patches that hold a share of it (`--threshold`) against the objects, by the
Jaccard index. The paper (Section 4.2.2, table of Figure 4) shows "the best head". Its first author explains
(https://github.com/facebookresearch/dino/issues/54): the best head for each true mask, averaged over the
masks of an image, then over the images. This script takes a class in an image as a mask, and also reports
all objects of an image together, with the best head of the image and with one head for all images.

Shapes: M images, h heads, H x W pixels, R x C patches.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from torchvision import transforms

from support import cli
from support.data import Images
from support.distributed import choose_device, fix_random_seeds, launched_as
from support.errors import UserError
from support.features import load_by_flags
from support.loading import EvalImages, make_loader
from support.logger import log
from support.pixels import normalize
from support.shapes import Shapes
from support.weights import Frozen
from visualize_attention import cls_attention, enlarge, keep_mass

VOID = 255  # in masks: pixels that count nowhere, e.g. the outlines of VOC's objects


def get_args_parser() -> argparse.ArgumentParser:
    """All flags. A parent for other parsers, so it has no `--help`."""
    parser = cli.ArgumentParser("Evaluation of segmentation", add_help=False)
    # fmt: off
    cli.add_weights_flags(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--demo", action="store_true",
        help="evaluate on the drawn shapes of main_dino.py --demo")
    group.add_argument("--image_size", default=None, type=cli.number(int, at_least=1),
        help="side in pixels of the square that images are resized to (default: the checkpoint's, else 224)")
    group.add_argument("--batch_size_per_gpu", default=16, type=cli.number(int, at_least=1),
        help="images per forward pass")
    group.add_argument("--num_workers", default=10, type=cli.number(int, at_least=0),
        help="data-loading workers; at most one per core")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--threshold", default=0.6, type=cli.number(float, above=0, at_most=1),
        help="share of each head's attention that its mask keeps; the paper's is 0.6")
    group.add_argument("--seed", default=0, type=cli.number(int, at_least=0),
        help="seed of the weights of --pretrained_weights random")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0], parents=[get_args_parser()])
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Images with masks
# ---------------------------------------------------------------------------------------------


class MaskedShapes(Shapes):
    """The demo's shapes, with the class of each pixel."""

    names = ("background", *Shapes.classes)

    def class_mask(self, index: int) -> Tensor:
        """Class of each pixel, (H, W) uint8: 0 is the background, k + 1 an object of class k."""
        _, label, mask = self.draw(index)
        return torch.from_numpy(mask).to(torch.uint8) * (label + 1)


def square_batches(
    frozen: Frozen, images: Images, device: torch.device, batch_size: int, num_workers: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices and normalised squares (B, 3, S, S) of all images, in their order."""
    size = [frozen.image_size] * 2
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, transforms.PILToTensor()])
    order = BatchSampler(SequentialSampler(range(len(images))), batch_size, drop_last=False)
    for pixels, _, indices in make_loader(EvalImages(images, transform), order, num_workers, device):
        yield indices.tolist(), normalize(pixels.to(device), frozen.mean, frozen.std)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def jaccard(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks (..., H, W); 1 where both are empty."""
    both, either = (masks & truth).sum(dim=(-2, -1)), (masks | truth).sum(dim=(-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


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
    frozen: Frozen, images, threshold: float, device: torch.device, batch_size: int = 16, num_workers: int = 0
) -> AttentionScores:
    """Score the attention in all images that have objects. Raises UserError as `cls_attention` does."""
    scores = []
    for indices, batch in square_batches(frozen, images, device, batch_size, num_workers):
        for index, attention in zip(indices, cls_attention(frozen.network, batch), strict=True):
            truth = images.class_mask(index).to(device)
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
        "each class, its best head": scores.classes.mean(),
        "all objects, the image's best head": scores.objects.amax(dim=1).mean(),
        f"all objects, head {one} for all images": scores.objects[:, one].mean(),
        "all objects, the whole image as mask": scores.area.mean(),
    }
    for name, value in found.items():
        log(f"  {name:38} Jaccard {100 * value.item():5.1f} %")
    share = 100 * scores.on_objects[:, one].mean().item()
    log(f"  of head {one}'s attention, {share:.1f} % is on the objects")
    names = ("jaccard", "jaccard_image", "jaccard_one_head", "area")
    return {name: 100 * value.item() for name, value in zip(names, found.values(), strict=True)}


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> dict:
    """Measure and print; returns the Jaccard indices in percent."""
    if launched_as()[0]:  # one process does all the work
        return {}
    if not args.demo:
        raise UserError("no data given", "--demo", "try --demo")
    device = choose_device()
    fix_random_seeds(args.seed)
    frozen = load_by_flags(args)
    frozen.network.to(device)
    images = MaskedShapes("val", 1_000)
    scores = measure_attention(
        frozen, images, args.threshold, device, args.batch_size_per_gpu, args.num_workers
    )
    return report_attention(scores, args.threshold, len(images))


if __name__ == "__main__":
    cli.run_script(main, parse_args())
