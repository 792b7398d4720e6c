"""Evaluate frozen features by image retrieval on the revisited Oxford and Paris buildings.

    python eval_image_retrieval.py --pretrained_weights dino_vits16_landmarks --data_path /data/revisitop \\
        --dataset rparis6k --imsize 512 --multiscale true

`--data_path` holds a folder for each benchmark with `gnd_roxford5k.pkl` or `gnd_rparis6k.pkl`, and `jpg/` for
all its images. Ground truth and measures follow Radenovic et al., "Revisiting Oxford and Paris: Large-Scale
Image Retrieval Benchmarking" (2018), https://arxiv.org/abs/1803.11285. With `torchrun`, the GPUs share the
feature extraction.

Shapes: B images, H x W pixels, N images of the database, Q queries, D features.
"""

import argparse
import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from support import cli
from support.cli import bool_flag
from support.data import ImageFiles, on_all_ranks
from support.distributed import fix_random_seeds, is_main_process, same_error_on_all_ranks
from support.errors import UserError, counted, few, first_line
from support.features import confirm_network, extract_features, patch_size_of
from support.formats import load_image
from support.logger import log
from support.pickles import load_pickle
from support.pixels import rgb_transform
from support.weights import Frozen, load_backbone

DATASETS = {"roxford5k": (4_993, 70), "rparis6k": (6_322, 70)}  # images of the database, queries

# The paper's Table 3 for published weights: mAP in percent, Medium and Hard.
PAPER = {
    ("dino_resnet50", "roxford5k"): (35.4, 11.1),
    ("dino_resnet50", "rparis6k"): (55.9, 27.5),
    ("dino_vits16", "roxford5k"): (41.8, 13.7),
    ("dino_vits16", "rparis6k"): (63.1, 34.4),
    ("dino_vits16_landmarks", "roxford5k"): (51.5, 24.3),
    ("dino_vits16_landmarks", "rparis6k"): (75.3, 51.6),
}


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="",
        help="folder with roxford5k/ and rparis6k/, each with its gnd_*.pkl and jpg/")
    group.add_argument("--dataset", default="roxford5k", choices=list(DATASETS), help="benchmark")
    group.add_argument("--imsize", default=224, type=cli.number(int, at_least=1),
        help="reduce images to this length of the longer side, in pixels; smaller images are not enlarged")
    group.add_argument("--multiscale", default=False, type=bool_flag,
        help="average the features of three sizes of each image: 1, 0.71 and 0.5 of its sides")
    group.add_argument("--crop_queries", action="store_true",
        help="crop each query to its building, as the benchmark does; the paper uses the whole image")
    group.add_argument("--num_workers", default=10, type=cli.number(int, at_least=0),
        help="data-loading workers per process; at most one per core")
    cli.add_weights_flags(parser, rgb_only=True)
    parser.add_argument("--use_cuda", default=True, type=bool_flag,
        help="keep the features on the GPU, if there is one")
    cli.add_launch_flags(parser)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# ---------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------


class Query(NamedTuple):
    """What the ground truth says of a query; images are indices into the database."""

    name: str
    box: Any  # left, top, right, bottom of the building in pixels; checked where it is used
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray  # too hard or too ambiguous to count


class Benchmark(NamedTuple):
    """A database and its queries."""

    folder: Path  # of the images
    images: list[str]  # names of the database's files, without extension
    queries: list[Query]


# How each protocol uses the labels: those of the positives, and those of the images to ignore.
PROTOCOLS = {"M": (("easy", "hard"), ("junk",)), "H": (("hard",), ("junk", "easy"))}


def read_benchmark(data_path: str, dataset: str) -> Benchmark:
    """Read the ground truth of a benchmark. Raises UserError, also for images that are not there."""
    root = cli.data_folder(data_path, "give the folder that holds roxford5k/ or rparis6k/") / dataset
    path = root / f"gnd_{dataset}.pkl"
    if not path.is_file():
        raise UserError("no such file", str(path), "lay the benchmark out as in docs/evaluations.md")
    content = load_pickle(path)
    parts: list[Any] = [
        content.get(key) if isinstance(content, dict) else None for key in ("imlist", "qimlist", "gnd")
    ]
    if not all(isinstance(part, list) and part for part in parts):
        raise UserError("no lists imlist, qimlist and gnd", str(path), "use the benchmark's own file")
    names, queries, truth = parts
    if len(queries) != len(truth):
        what = f"{counted(len(queries), 'query')}, but ground truth for {len(truth)}"
        raise UserError(what, str(path), "use the benchmark's own file")
    for names_of, kind in ((names, "database image"), (queries, "query image")):
        check_files(root / "jpg", names_of, kind)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"database has an image twice: {twice[0]}", str(path), "use the benchmark's own file")
    read = functools.partial(_read_query, num_images=len(names), path=path)
    benchmark = Benchmark(root / "jpg", names, [read(*pair) for pair in zip(queries, truth, strict=True)])
    warn_of_labels(benchmark)
    return benchmark


def warn_of_labels(benchmark: Benchmark) -> None:
    """Warn of images with two labels, and of queries that are in the database without a label."""
    place = {name: number for number, name in enumerate(benchmark.images)}
    labels = {query.name: np.concatenate([query.easy, query.hard, query.junk]) for query in benchmark.queries}
    if double := [name for name, images in labels.items() if len(np.unique(images)) < len(images)]:
        what = f"for {counted(len(double), 'query')}, an image has two of the labels easy, hard and junk"
        log(f"warning: {what}; e.g. {double[0]}")
    if found := [name for name, images in labels.items() if name in place and place[name] not in images]:
        what = f"{counted(len(found), 'query')} found in the database too, and counted as wrong there"
        log(f"warning: {what}; e.g. {found[0]}")


def check_files(folder: Path, names: Sequence[str], kind: str) -> None:
    """Raise UserError if the folder lacks an image."""
    missing = [f"{name}.jpg" for name in names if not (folder / f"{name}.jpg").is_file()]
    if missing:
        what = f"{len(missing)} of {len(names)} {kind}s are missing: {few(missing)}"
        raise UserError(what, str(folder), "add the images that the ground truth names")


def _read_query(name: str, truth: Any, num_images: int, path: Path) -> Query:
    """Check the ground truth of a query. Raises UserError."""
    labels = {}
    for label in ("easy", "hard", "junk"):
        if not isinstance(truth, dict) or label not in truth:
            raise UserError(f"query {name} has no {label!r}", str(path), "use the benchmark's own file")
        indices = _array(truth[label])
        indices = indices.astype(int) if not indices.size else indices
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or len(np.unique(indices)) < len(indices):
            what = f"query {name}: {label!r} is not a list of different images"
            raise UserError(what, str(path), "use the benchmark's own file")
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_images):
            outside = indices[(indices < 0) | (indices >= num_images)][0]
            what = f"query {name}: {label!r} names image {outside} of {num_images}, counted from 0"
            raise UserError(what, str(path), "use the benchmark's own file")
        labels[label] = indices
    return Query(name, truth.get("bbx"), **labels)


def _array(record: Any) -> np.ndarray:
    """A record as an array; of objects if it is ragged."""
    try:
        return np.asarray(record)
    except ValueError:
        return np.asarray(record, dtype=object)


class CroppedFiles(ImageFiles):
    """Image files, each cropped to its box (left, top, right, bottom)."""

    def __init__(self, paths: Sequence[str | Path], boxes: Sequence[Sequence[float]]):
        super().__init__(*paths)
        self.boxes = boxes

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        left, top, right, bottom = self.boxes[index]
        return load_image(*self.paths.file(index)).crop((left, top, right, bottom)), 0


def open_images(benchmark: Benchmark, crop_queries: bool) -> tuple[ImageFiles, ImageFiles]:
    """Open the database and the queries. Raises UserError if a box to crop to is none."""
    database = ImageFiles(*(benchmark.folder / f"{name}.jpg" for name in benchmark.images))
    paths = [benchmark.folder / f"{query.name}.jpg" for query in benchmark.queries]
    if not crop_queries:
        return database, ImageFiles(*paths)
    boxes = []
    for query in benchmark.queries:
        box = _array(query.box)
        is_box = box.shape == (4,) and box.dtype.kind in "iuf" and np.isfinite(box).all()
        if not (is_box and (box[2:] - box[:2] >= 1).all()):
            fix = "correct the ground truth, or leave --crop_queries out"
            raise UserError(f"query {query.name}: bbx is not a box: {query.box!s:.60}", "--crop_queries", fix)
        boxes.append(box.tolist())
    if outside := [str(path) for path, box in zip(paths, boxes, strict=True) if _reaches_out(path, box)]:
        what = f"the boxes of {len(outside)} of {counted(len(paths), 'query')} reach beyond their images"
        log(f"warning: {what}, where they are black: were the images resized? e.g. {outside[0]}")
    return database, CroppedFiles(paths, boxes)


def _reaches_out(path: Path, box: Sequence[float]) -> bool:
    """Whether a box (left, top, right, bottom) ends more than a pixel outside an image; False without one."""
    with contextlib.suppress(OSError), Image.open(path) as image:  # the header only
        return box[2] > image.width + 1 or box[3] > image.height + 1
    return False


# ---------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------


def reduce(image: Image.Image, longest: int) -> Image.Image:
    """Reduce the longer side to `longest` pixels by Lanczos; images that are smaller stay as they are."""
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


SMALLER = math.sqrt(1 / 2), 1 / 2


def cut(images: Tensor, patch_size: int) -> Tensor:
    """Cut the right and the lower edge to whole patches. Raises UserError if no patch remains."""
    height, width = (side - side % patch_size for side in images.shape[-2:])
    if not height or not width:
        rows, cols = images.shape[-2:]
        what = f"an image of {rows}x{cols} pixels is smaller than a patch of {patch_size}"
        raise UserError(what, "--imsize", "raise it, or use larger images", alone=True)
    return images[..., :height, :width]


def global_features(network: nn.Module, multiscale: bool) -> Callable[[Tensor], Tensor]:
    """The function from images of any size (B, 3, H, W) to the L2-normalised output (B, D).

    Raises UserError for a size that the network does not take.
    """
    patch_size = patch_size_of(network)

    def output(images: Tensor) -> Tensor:
        try:
            return network(cut(images, patch_size))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a network may raise anything for a size that it does not take
            size = "{}x{}".format(*images.shape[-2:])
            what = f"{type(network).__name__} takes no images of {size} pixels: {first_line(error)}"
            raise UserError(what, fix="use one of our ViTs, or raise --imsize", alone=True) from None

    def features(images: Tensor) -> Tensor:
        sizes = [images]
        for scale in SMALLER if multiscale else ():
            sizes.append(F.interpolate(images, scale_factor=scale, mode="bilinear"))
        return F.normalize(torch.stack([output(size) for size in sizes]).mean(dim=0), dim=1)

    return features


def check_takes_any_size(network: nn.Module, imsize: int, multiscale: bool) -> None:
    """Raise UserError unless images of two shapes give features, and of the same width."""
    features = global_features(network, multiscale)
    both = (imsize, imsize + max(32, patch_size_of(network)))
    if len({features(torch.zeros(1, 3, imsize, width)).shape[1:] for width in both}) > 1:
        what = "the width of the features depends on the size of the image"
        fix = "use one of our ViTs, timm's ViTs, or a convolutional network"
        raise UserError(what, "--pretrained_weights", fix)


def load_network(args: argparse.Namespace) -> Frozen:
    """Load the network by the flags. All ranks call this together. Raises UserError."""
    with same_error_on_all_ranks():
        frozen = load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size)
        frozen.require_rgb("the benchmark's photographs")
        with torch.inference_mode():
            check_takes_any_size(frozen.network, args.imsize, args.multiscale)
    confirm_network(frozen, f"longer side at most {args.imsize} pixels", *["three scales"] * args.multiscale)
    return frozen


# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def average_precision(ranks: np.ndarray, num_positives: int) -> float:
    """Area under the curve of precision over recall, by trapezoids.

    `ranks`, ascending and counted from 0, are those of the positives that were found.
    """
    found = np.arange(len(ranks))
    before = np.divide(found, ranks, out=np.ones(len(ranks)), where=ranks > 0)  # precision just above
    return float((before + (found + 1) / (ranks + 1)).sum()) / (2 * num_positives)


def measure_query(
    ranking: np.ndarray, positive: np.ndarray, ignored: np.ndarray, ks: Sequence[int]
) -> np.ndarray:
    """Average precision, and the precision among the first k for each k, (1 + len(ks),).

    `ranking` lists the database's images, the most similar first. Ignored images are taken out of it. Not
    more images count than the rank of the last positive. NaN if there is no positive.
    """
    if not len(positive):
        return np.full(1 + len(ks), np.nan)
    ranks = np.flatnonzero(np.isin(ranking, positive))
    ranks = ranks - np.searchsorted(np.flatnonzero(np.isin(ranking, ignored)), ranks)
    counted = [min(k, ranks[-1] + 1) for k in ks]
    precisions = [(ranks < count).sum() / count for count in counted]
    return np.array([average_precision(ranks, len(positive)), *precisions])


def measure(rankings: np.ndarray, queries: Sequence[Query], protocol: str, ks: Sequence[int]) -> np.ndarray:
    """Means over the queries of `measure_query`, in percent; (Q, N) rankings.

    Queries without positives are left out, and counted in the log.
    """
    positive, ignored = PROTOCOLS[protocol]
    scores = np.stack(
        [
            measure_query(
                ranking,
                np.concatenate([getattr(query, label) for label in positive]),
                np.concatenate([getattr(query, label) for label in ignored]),
                ks,
            )
            for ranking, query in zip(rankings, queries, strict=True)
        ]
    )
    scored = scores[~np.isnan(scores[:, 0])]
    if len(scored) < len(scores):
        left_out = len(scores) - len(scored)
        share = f"{left_out} of {counted(len(scores), 'query')}"
        log(f"note: {protocol}: {share} left out, without a positive image")
    return 100 * scored.mean(axis=0) if len(scored) else np.full(1 + len(ks), np.nan)


def rank(database: Tensor, queries: Tensor) -> np.ndarray:
    """Order the images of the database (N, D) for each query (Q, D) by similarity: (Q, N) indices."""
    return (queries @ database.T).argsort(dim=1, descending=True, stable=True).cpu().numpy()


def paper_line(weights: str, dataset: str, num_images: int, num_queries: int) -> str | None:
    """The paper's result, if these are its weights and its data."""
    numbers = PAPER.get((weights, dataset))
    if numbers is None or (num_images, num_queries) != DATASETS[dataset]:
        return None
    return f"paper, Table 3: mAP M: {numbers[0]}, H: {numbers[1]}"


def main(args: argparse.Namespace) -> dict[str, float]:
    """Compute features, rank, and print the benchmark's lines; {protocol: mAP in percent} on rank 0."""
    device = cli.join_processes(args)
    keep_on = device if args.use_cuda else torch.device("cpu")
    fix_random_seeds(args.seed)
    with same_error_on_all_ranks():
        benchmark = read_benchmark(args.data_path, args.dataset)
    database, queries = on_all_ranks(open_images, benchmark, args.crop_queries)
    cropped = ", cropped to their boxes" * args.crop_queries
    log(f"{args.dataset}: {counted(len(database), 'image')}, {counted(len(queries), 'query')}{cropped}")
    frozen = load_network(args)
    model = global_features(frozen.network.to(device), args.multiscale)
    transform = rgb_transform(functools.partial(reduce, longest=args.imsize), frozen.mean, frozen.std)
    # One image at a time, because their sizes differ.
    extract = functools.partial(
        extract_features, model, transform=transform, device=device, batch_size=1,
        num_workers=args.num_workers, keep_on=keep_on,
    )  # fmt: skip
    features, query_features = (extract(images)[0] for images in (database, queries))
    if not is_main_process():
        return {}
    rankings, ks = rank(features, query_features), (1, 5, 10)
    medium, hard = (measure(rankings, benchmark.queries, protocol, ks) for protocol in PROTOCOLS)
    M, H = np.around(medium, 2), np.around(hard, 2)
    log(f">> {args.dataset}: mAP M: {M[0]}, H: {H[0]}")
    log(f">> {args.dataset}: mP@k{np.array(ks)} M: {M[1:]}, H: {H[1:]}")
    if line := paper_line(args.pretrained_weights, args.dataset, len(database), len(queries)):
        log(line)
    return {"M": float(medium[0]), "H": float(hard[0])}


if __name__ == "__main__":
    cli.run_script(main, parse_args())
