"""Evaluate frozen features by finding the originals of copied images, on Copydays.

    python eval_copy_detection.py --pretrained_weights dino_vitb8 --data_path /data/copydays \\
        --whitening_path /data/whitening --distractors_path /data/distractors

`--data_path` holds the folders `original`, `strong`, `jpegqual/75` and others, `crops/10` and others. All
their images are queries. The database to search is the originals and the distractors. The feature of an image
is the CLS token beside the generalised mean of the patch tokens (Berman et al., "MultiGrain: a unified image
embedding for classes and instances" (2019), https://arxiv.org/abs/1902.05509). With `torchrun`, the GPUs
share the feature extraction.

Shapes: B images, Q queries, N images of the database, D features.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from eval_image_retrieval import average_precision
from support import cli
from support.cli import bool_flag
from support.data import ImageFiles, JoinedFiles, describe, digest
from support.distributed import agree, fix_random_seeds, is_main_process, same_error_on_all_ranks
from support.errors import UserError, counted
from support.features import SAME, cls_and_patches, confirm_network, extract_features
from support.files import Folder, by_number
from support.logger import log
from support.pixels import rgb_transform
from support.weights import Frozen, load_backbone

NEAREST = 20  # images of the database that count for a query
POWER = 4  # of the generalised mean

# The paper's Table 4: weights -> (--imsize, mAP on `strong`), with these numbers of images.
PAPER = {"dino_vitb16": (224, 0.817), "dino_vitb8": (320, 0.855)}
PAPER_IMAGES = {"original": 157, "strong": 229, "distractors": 10_000, "whitening": 20_000}


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="",
        help="folder with original/, strong/, jpegqual/*/ and crops/*/; evaluates those that exist")
    group.add_argument("--distractors_path", default="",
        help="folder of other images to search; without it, only the originals are searched")
    group.add_argument("--whitening_path", default="",
        help="folder of other images, from which the whitening of the features is computed; without it, the "
             "features are not whitened")
    group.add_argument("--whiten_centred", action="store_true",
        help="whiten by the covariance about the mean, as textbooks do; the published code removes the mean "
             "from the features, but takes the covariance about 0")
    group.add_argument("--imsize", "--image_size", default=320, type=cli.number(int, at_least=1),
        help="resize images to this height and width, in pixels")
    group.add_argument("--num_workers", default=10, type=cli.number(int, at_least=0),
        help="data-loading workers per process; at most one per core")
    cli.add_weights_flags(parser, arch="vit_base", patch_size=8, rgb_only=True)
    parser.add_argument("--batch_size_per_gpu", default=16, type=cli.number(int, at_least=1),
        help="images per process and forward pass")
    parser.add_argument("--use_cuda", default=True, type=bool_flag,
        help="keep the features on the GPU, if there is one")
    cli.add_launch_flags(parser)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def open_blocks(data_path: str) -> dict[str, ImageFiles]:
    """Open the blocks of queries that are there, by name, the originals first. Raises UserError."""
    root = cli.data_folder(data_path, "give the folder that holds original/")
    names = [name for name in ("original", "strong") if (root / name).is_dir()]
    if "original" not in names:
        raise UserError("no folder original/", f"--data_path {root}", "give the folder that holds it")
    for family in ("jpegqual", "crops"):
        if not (root / family).is_dir():
            continue
        found = Folder(root / family).class_folders()
        if not found:
            fix = f"put its images into folders such as {family}/75/"
            raise UserError(f"no folders in {family}/", f"--data_path {root}", fix)
        names += [f"{family}/{name}" for name in sorted(found, key=by_number)]
    return {name: open_folder(root / name, f"--data_path {root}") for name in names}


def open_folder(folder: str | Path, flag: str, at_least: int = 1) -> ImageFiles:
    """Open the images of a folder. Raises UserError if there are fewer than `at_least`."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError("no such folder", flag, "check the path")
    images = ImageFiles(path)
    if len(images) < at_least:
        what = f"{counted(len(images), 'image')} in {path}" if len(images) else f"no images in {path}"
        raise UserError(what, flag, f"put at least {counted(at_least, 'image')} there")
    return images


def positives_of(block: str, images: ImageFiles, originals: ImageFiles) -> list[np.ndarray]:
    """Indices of the originals of each image of a block.

    For `strong`, those whose names begin with the same four letters; for other blocks, the original with
    the same index, whose name has to begin with them too, or be the same if those letters are not its own.
    Raises UserError if an image has no original or, by its name, another one.
    """
    starts = np.array([Path(path).name[:4] for path in originals.paths])
    distinct = len(np.unique(starts)) == len(starts)
    queries = [Path(path).name for path in images.paths]
    if block == "strong":
        if not distinct:
            log("warning: originals that begin with the same four letters all count as right for strong/")
        found = [np.flatnonzero(starts == name[:4]) for name in queries]
        for name, positives in zip(queries, found, strict=True):
            if not len(positives):
                what = f"no original begins with {name[:4]!r}, as strong/{name} does"
                raise UserError(what, str(images.paths.root), "add the original, or remove the image")
        return found
    if len(queries) > len(starts):
        what = f"{block} has {len(queries)} images, but there are {len(starts)} originals"
        raise UserError(what, str(images.paths.root), "give each image its original")
    for name, start, path in zip(queries, starts, originals.paths, strict=False):
        if name[:4] != start if distinct else Path(name).stem != Path(path).stem:
            what = f"{block}/{name} does not match original/{Path(path).name}"
            raise UserError(what, str(images.paths.root), "name each image like its original")
    return [np.array([index]) for index in range(len(queries))]


def open_sets(data_path: str, distractors: str, whitening: str) -> dict[str, ImageFiles]:
    """Open the blocks, and "distractors" and "whitening" if their folders are given. Raises UserError."""
    sets = open_blocks(data_path)
    if distractors:
        sets["distractors"] = open_folder(distractors, f"--distractors_path {distractors}")
    if whitening:
        sets["whitening"] = open_folder(whitening, f"--whitening_path {whitening}", at_least=2)
    return sets


# ---------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------


def copy_features(network: Any, images: Tensor) -> Tensor:
    """CLS token, and generalised mean of the patch tokens: (B, 3, H, W) -> (B, 2 D).

    Raises UserError for networks without patch tokens.
    """
    cls, patches = cls_and_patches(network, images)  # (B, D), (B, R, C, D)
    mean = patches.clamp(min=1e-6).pow(POWER).mean(dim=(1, 2)).pow(1 / POWER)
    return torch.cat([cls, mean], dim=1)


def input_transform(imsize: int, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """Resize and normalise: an RGB image -> (3, imsize, imsize), float32."""
    return rgb_transform(transforms.Resize((imsize, imsize), transforms.InterpolationMode.BICUBIC), mean, std)


def fit_whitening(features: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean (D,) and matrix (D, D) such that (x - mean) @ matrix is white, from features (N, D).

    As published, the covariance is that of the features themselves; with `centred`, that of their
    distance from the mean. Eigenvalues are at least 1e-5 of the largest. Raises UserError if all are 0.
    """
    x = features.cpu().double()  # on the CPU, because not every device has float64
    mean = x.mean(dim=0)
    x = x - mean if centred else x
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    if not values[-1] > 0:
        raise UserError("features of all images are equal", "--whitening_path", "give different images")
    matrix = vectors / values.clamp(min=1e-5 * values[-1]).sqrt()
    mean, matrix = mean.to(features.dtype), matrix.to(features.dtype)
    return mean.to(features.device), matrix.to(features.device)


def whiten(features: dict[str, Tensor], centred: bool) -> dict[str, Tensor]:
    """Whiten all features by those of "whitening"."""
    count, width = features["whitening"].shape
    if count < width:
        few = f"{count} images for {width} features"
        log(f"note: --whitening_path has {few}: the covariance lacks full rank")
    mean, matrix = fit_whitening(features["whitening"], centred)
    return {name: (x - mean) @ matrix for name, x in features.items()}


# ---------------------------------------------------------------------------------------------
# The evaluation
# ---------------------------------------------------------------------------------------------


def mean_average_precision(queries: Tensor, database: Tensor, positives: Sequence[np.ndarray]) -> float:
    """Mean over queries (Q, D) of the average precision among the nearest in the database (N, D)."""
    similarities = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    nearest = similarities.topk(min(NEAREST, len(database)), dim=1).indices.cpu().numpy()
    found = zip(nearest, positives, strict=True)
    return float(np.mean([average_precision(np.flatnonzero(np.isin(i, p)), len(p)) for i, p in found]))


def warn_of_copies(features: dict[str, Tensor], sets: dict[str, ImageFiles], blocks: Sequence[str]) -> None:
    """Warn of images that are in the sets twice: equal features (N, D) show copies under any name."""
    for other, checked, effect in (
        ("original", ["original"], "most blocks count only one of the two as right"),
        ("distractors", blocks, "there they count as wrong"),
        ("whitening", blocks, "the whitening is fitted to what is evaluated"),
    ):
        if other not in sets or (other == "original" and len(sets[other]) == 1):
            continue
        some = F.normalize(torch.cat([features[name] for name in checked]), dim=1)
        others = F.normalize(features[other], dim=1)
        similarities = some @ others.T
        if other == "original":
            similarities.fill_diagonal_(-1)  # an image is not its own copy
        nearest = similarities.argmax(dim=1)
        copies = ((some - others[nearest]).norm(dim=1) < SAME).nonzero().flatten().tolist()
        if copies:
            paths = [path for name in checked for path in sets[name].paths]
            first, second = paths[copies[0]], sets[other].paths[int(nearest[copies[0]])]
            what = f"{len(copies)} of {len(paths)} images look the same to the network as one of {other}"
            log(f"warning: {what}: {effect}; e.g. {first} and {second}")


def paper_line(weights: str, imsize: int, centred: bool, counts: dict[str, int]) -> str | None:
    """The paper's result, if these are its weights, its numbers of images and its flags."""
    size, result = PAPER.get(weights, (0, 0))
    same_flags = imsize == size and not centred
    if not same_flags or any(counts.get(name) != count for name, count in PAPER_IMAGES.items()):
        return None
    return f"paper, Table 4: eval on strong mAP={result:.3f}"


def load_network(args: argparse.Namespace) -> Frozen:
    """Load the network by the flags. All ranks call this together. Raises UserError.

    Random weights are of a ViT-B/8, the published default.
    """
    untold = args.pretrained_weights == "random" and args.arch is None
    arch, patch_size = ("vit_base", args.patch_size or 8) if untold else (args.arch, args.patch_size)
    with same_error_on_all_ranks():
        frozen = load_backbone(args.pretrained_weights, args.checkpoint_key, arch, patch_size, args.imsize)
        frozen.require_rgb("the benchmark's photographs")
    confirm_network(frozen, f"{args.imsize} pixels")
    return frozen


def main(args: argparse.Namespace) -> dict[str, float]:
    """Compute features, search, and print a line for each block; {block: mAP} on rank 0."""
    device = cli.join_processes(args)
    keep_on = device if args.use_cuda else torch.device("cpu")
    fix_random_seeds(args.seed)
    no_whitening = [("whiten_centred", not args.whitening_path, "--whitening_path is not given")]
    cli.warn_no_effect(args, get_args_parser(), no_whitening)
    with same_error_on_all_ranks():
        sets = open_sets(args.data_path, args.distractors_path, args.whitening_path)
        blocks = [name for name in sets if name not in ("distractors", "whitening")]
        positives = {name: positives_of(name, sets[name], sets["original"]) for name in blocks}
    agree("images", "; ".join(f"{name}: {describe(x)}, digest {digest(x)}" for name, x in sets.items()))
    counts = {name: len(images) for name, images in sets.items()}
    log("images: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    frozen = load_network(args)
    model = functools.partial(copy_features, frozen.network.to(device))
    transform = input_transform(args.imsize, frozen.mean, frozen.std)
    images = JoinedFiles([*sets.values()])
    flags = args.batch_size_per_gpu, args.num_workers, keep_on
    together = extract_features(model, images, transform, device, *flags)[0]
    if not is_main_process():
        return {}
    features = dict(zip(counts, together.split(list(counts.values())), strict=True))
    warn_of_copies(features, sets, blocks)
    if args.whitening_path:
        features = whiten(features, args.whiten_centred)
    database = torch.cat([features[name] for name in ("original", "distractors") if name in features])
    results = {}
    for name in blocks:
        results[name] = mean_average_precision(features[name], database, positives[name])
        log(f"eval on {name} mAP={results[name]:.3f}")
    if line := paper_line(args.pretrained_weights, args.imsize, args.whiten_centred, counts):
        log(line)
    return results


if __name__ == "__main__":
    cli.run_script(main, parse_args())
