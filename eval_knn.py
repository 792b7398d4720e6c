"""Evaluate frozen features with a weighted k-nearest-neighbour classifier.

    python eval_knn.py --pretrained_weights runs/vits16/checkpoint.pth --data_path /data/imagenet

Architecture, patch size, image size, mean and deviation come from the checkpoint. The classifier follows
Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018),
https://arxiv.org/abs/1805.01978. With `torchrun`, the GPUs share the feature extraction.

Shapes: N training images, M test images, D features, k neighbours.
"""

import argparse
import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from extract_features import read_features
from support import cli
from support.checkpoints import find_file, load_file
from support.checks import open_checked
from support.cli import bool_flag
from support.data import Images, Source, match_classes
from support.distributed import (
    all_gather_object,
    broadcast_buffers,
    fix_random_seeds,
    get_world_size,
    is_main_process,
    same_error_on_all_ranks,
)
from support.errors import ImageError, UserError, WrongFormat, counted
from support.features import SAME, all_finite, compute, concat_patches, extract_features, load_by_flags
from support.files import evenly_spread, replacing
from support.lock import FolderLock
from support.logger import log
from support.pixels import AnyImage
from support.weights import is_plain
from utils import MultiCropWrapper


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    parser.add_argument("--batch_size_per_gpu", default=128, type=cli.number(int, at_least=1),
        help="images per process and forward pass")
    parser.add_argument("--nb_knn", default=[10, 20, 100, 200], nargs="+", type=cli.number(int, at_least=1),
        help="numbers of neighbours; 20 is usually best")
    parser.add_argument("--temperature", default=0.07, type=cli.number(float, above=0),
        help="temperature of the vote: the weight of a neighbour is exp(similarity / temperature)")
    cli.add_weights_flags(parser)
    cli.add_size_flag(parser, "--image_size", None,
        "image size in pixels: one length, or height and width (default: the file's, else 224)")
    cli.add_concat_flag(parser, "the CLS token")
    parser.add_argument("--use_cuda", default=True, type=bool_flag,
        help="keep the features on the GPU, if there is one; turn off if they do not fit into its memory")
    parser.add_argument("--dump_features", default=None, help="folder to save the features in")
    parser.add_argument("--load_features", default=None,
        help="folder of saved features, to use instead of weights and images: train/ and val/, each written "
             "by extract_features.py; or torch files trainfeat.pth (N, D), trainlabels.pth (N,), "
             "testfeat.pth (M, D), testlabels.pth (M,)")
    cli.add_data_flags(parser,
        "folder with train and val: folders of class folders, .tar, .zip or lists such as train.txt",
        "evaluate on the drawn shapes of main_dino.py --demo")
    cli.add_launch_flags(parser)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# Flags that determine the features.
FEATURE_FLAGS = (
    "pretrained_weights", "checkpoint_key", "arch", "patch_size", "image_size", "in_chans", "value_range",
    "concat_patchtokens", "data_path", "dataset", "download", "demo", "batch_size_per_gpu", "num_workers",
    "seed",
)  # fmt: skip


CHUNK = 2**25  # similarities at a time; 128 MiB
ROWS = 64  # test images at a time, at least: each part reads all training features


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    T: float,
    num_classes: int,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 in percent for each k, from one search for max(ks) neighbours.

    Features are L2-normalised, (N, D) and (M, D). The weight of a neighbour's vote is exp(cosine / T).
    """
    correct = {k: torch.zeros(2, dtype=torch.long, device=test_features.device) for k in ks}
    for first, k, votes in knn_votes(train_features, train_labels, test_features, ks, T, num_classes):
        # As published, classes without a vote fill up the top 5 of few neighbours.
        ranking = votes.sort(dim=1, descending=True).indices
        hit = ranking == test_labels[first : first + len(votes), None]
        correct[k] += torch.stack([hit[:, :1].sum(), hit[:, : min(5, k)].sum()])
    return {k: tuple(100.0 * n / len(test_labels) for n in c.tolist()) for k, c in correct.items()}


def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    ks: Sequence[int],
    T: float,
    num_classes: int,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first row, k, votes) for one part of the test set after the other, and for each k.

    Votes are (rows of the part, num_classes); the nearest neighbour's vote is 1. Arguments as in
    `knn_accuracies`.
    """
    for first, similarity, neighbour in neighbours(train_features, test_features, max(ks)):
        # Relative to the nearest neighbour, which avoids overflow for a small T and keeps the ranking.
        # As the published code does, features of half precision vote in float32.
        dtype = torch.promote_types(similarity.dtype, torch.float32)
        vote, label = ((similarity - similarity[:, :1]).to(dtype) / T).exp(), train_labels[neighbour]
        for k in ks:
            votes = vote.new_zeros(len(vote), num_classes)
            yield first, k, votes.scatter_add_(1, label[:, :k], vote[:, :k])


def neighbours(train_features: Tensor, test_features: Tensor, k: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first row, cosines, neighbours) for one part of the test set after the other.

    Cosines and neighbours, the nearest first, are (rows of the part, k).
    """
    rows = max(1, min(max(CHUNK // len(train_features), ROWS), len(test_features)))
    # Allocated once, because fresh memory is slow on a CPU.
    room = train_features.new_empty(rows, len(train_features))
    for first in range(0, len(test_features), rows):
        chunk = test_features[first : first + rows]
        similarities = torch.mm(chunk, train_features.T, out=room[: len(chunk)])
        yield first, *similarities.topk(k, dim=1)


def warn_of_copies(train_features: Tensor, test_features: Tensor, most: int = 1_000) -> None:
    """Warn of test images with the features of a training image, among up to `most`.

    They are copies, also in another lossless format, or the network gives all images the same features.
    """
    some = test_features[evenly_spread(len(test_features), most)]
    copies = torch.zeros((), dtype=torch.long, device=some.device)
    for first, _, neighbour in neighbours(train_features, some, 1):
        nearest = train_features[neighbour[:, 0]]
        copies += ((nearest - some[first : first + len(nearest)]).norm(dim=1) < SAME).sum()
    if count := int(copies):
        what = f"{count} of {len(some)} compared test images have the features of a training image"
        log(f"warning: {what}: the accuracy may be too high")


@torch.no_grad()
def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    T: float,
    num_classes: int = 1000,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of the weighted k-NN classifier.

    Features as in `knn_accuracies`; warns of other lengths. Raises ValueError if one is not finite, since it
    would be the nearest of all; for whole numbers, which overflow; unless k and T are above 0; and unless
    there is one label for each feature.
    """
    if not (k > 0 and T > 0):
        raise ValueError(f"k and T have to be above 0, not {k} and {T}")
    for features, labels in (train_features, train_labels), (test_features, test_labels):
        if len(features) != labels.numel():
            raise ValueError(f"{len(features)} features have {labels.numel()} labels")
        if not features.is_floating_point() or features.ndim != 2:
            what = f"{features.dtype} {tuple(features.shape)}"
            raise ValueError(f"takes floating-point features (N, D), not {what}")
    if not (all_finite(train_features) and all_finite(test_features)):
        raise ValueError("features are not finite")
    lengths = torch.cat([features.float().norm(dim=1) for features in (train_features, test_features)])
    if ((lengths - 1).abs() > 0.01).any():
        log("warning: features are not of length 1: the nearest may not have the largest cosine")
    data = train_features, train_labels.flatten(), test_features, test_labels.flatten()
    return knn_accuracies(*data, [k], T, num_classes)[k]


def knn_top1(
    model: Callable[[Tensor], Tensor],
    train: Images,
    val: Images,
    transform: Callable[[AnyImage], Tensor],
    device: torch.device,
    num_workers: int = 0,
) -> float:
    """Top-1 accuracy in percent of 20 neighbours, on every rank; `model` as in `extract_features`."""
    x, y = extract_features(model, train, transform, device, num_workers=num_workers)
    test_x, test_y = extract_features(model, val, transform, device, num_workers=num_workers)
    y, test_y, num_classes = number_classes(y, test_y)
    data = F.normalize(x, dim=1, out=x), y, F.normalize(test_x, dim=1, out=test_x), test_y
    k = min(20, len(train))
    return knn_accuracies(*data, [k], T=0.07, num_classes=num_classes)[k][0]


def number_classes(y: Tensor, test_y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Labels (N,) and (M,) numbered from 0 without gaps, since each number takes memory for votes; and the
    number of classes. Test labels that are not among the training labels become -1, which no vote gives.
    """
    classes, numbers = y.unique(return_inverse=True)
    test_numbers = torch.searchsorted(classes, test_y).clamp(max=len(classes) - 1)
    return numbers, test_numbers.where(classes[test_numbers] == test_y, -1), len(classes)


class PeriodicKNN:
    """k-NN accuracy of networks while they train: every few epochs, for about a `share` of the time.

    Does not change the bits of the training. If a rank is asked to stop, skips the evaluation, because
    there may be little time.
    """

    class Stopped(Exception):
        """A rank was asked to stop."""

    def __init__(
        self,
        evaluate: Callable[[Callable[[Tensor], Tensor]], float],
        every: int,
        share: float,
        dtype: torch.dtype | None,
        stop_asked: Callable[[], bool],
    ):
        """`evaluate(model)` returns the accuracy in percent of a function from images (B, C, H, W) to
        features (B, D); `stop_asked()` says whether this rank was asked to stop.
        """
        self.evaluate, self.every, self.share = evaluate, every, share
        self.dtype, self.stop_asked = dtype, stop_asked
        self.run_begun, self.spent = time.perf_counter(), 0.0

    def __call__(self, epoch: int, networks: dict[str, MultiCropWrapper]) -> dict[str, float]:
        """{"knn_" + name: percent}; {} if no evaluation is due. All ranks call this together."""
        if (epoch + 1) % self.every:
            return {}
        begun = time.perf_counter()
        late = self.spent > self.share * (begun - self.run_begun)  # each rank has its own clock
        if all_gather_object(late)[0]:
            log(f"epoch {epoch}: no k-NN: it has taken more than --knn_share {self.share:g} of the time")
            return {}
        try:
            found = {f"knn_{name}": self.accuracy(network) for name, network in networks.items()}
        except self.Stopped:
            log(f"epoch {epoch}: no k-NN: stopped by a signal")
            return {}
        except (ImageError, WrongFormat) as error:  # an image to evaluate with should not end a training
            if get_world_size() > 1:  # the other ranks wait for this one
                raise
            log(f"warning: epoch {epoch}: no k-NN: {error}")
            return {}
        finally:
            self.spent += time.perf_counter() - begun
        log(f"epoch {epoch}  " + "  ".join(f"{name} {top1:.1f}" for name, top1 in found.items()))
        return found

    def accuracy(self, network: MultiCropWrapper) -> float:
        """In percent. Raises Stopped, on all ranks together."""

        def features(images: Tensor) -> Tensor:
            if any(all_gather_object(self.stop_asked())):
                raise self.Stopped
            # `forward`, because the compiled call is for training
            return compute(lambda backbone, x: backbone.forward(x), network.backbone, images, self.dtype)

        training = network.training
        network.eval()
        broadcast_buffers(network)  # those that the checkpoint has
        try:
            return self.evaluate(features)
        finally:
            network.train(training)


# Features (N, D) and labels (N,) to classify with, features (M, D) and labels (M,) to classify.
Data = tuple[Tensor, Tensor, Tensor, Tensor]

FEATURE_FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def dump_features(folder: Path, tensors: Sequence[Tensor]) -> None:
    """Save train and test features and labels in the published code's files.

    Writes all before it replaces the first, so that old and new ones do not mix. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        for name, tensor in zip(FEATURE_FILES, tensors, strict=True):
            file = stack.enter_context(replacing(folder / name))
            torch.save(tensor.cpu(), file)
            file.flush()
            os.fsync(file.fileno())


def load_features(folder: str, device: torch.device) -> Data:
    """Features (N, D) and labels (N,) of train, then of test.

    Reads the folders train/ and val/ of extract_features.py, or the files that `dump_features` saves.
    Normalises features whose length is not 1. Raises UserError for tensors that do not fit together, for
    values that are neither features nor class numbers, and for files that others replace meanwhile.
    """
    names: Sequence[str] = FEATURE_FILES
    root = Path(folder).expanduser()
    is_extracted = (root / "train").is_dir()
    if is_extracted and any((root / name).exists() for name in FEATURE_FILES):
        what = f"has both train/ of extract_features.py and {FEATURE_FILES[0]} of --dump_features"
        raise UserError(what, f"--load_features {folder}", "keep one of them")
    if is_extracted:
        names, tensors = ("train/features", "train/labels", "val/features", "val/labels"), _extracted(root)
    else:
        paths = [find_file(root / name) for name in names]
        before = list(map(_version, paths))
        tensors = list(map(load_file, paths))
        if before != list(map(_version, paths)):
            what, fix = "features were replaced while they were read", "run the same command again"
            raise UserError(what, f"--load_features {folder}", fix)
    for name, tensor in zip(names, tensors, strict=True):
        if isinstance(tensor, Tensor) and (tensor.is_meta or not is_plain(tensor)):
            what = "tensor is sparse, quantized, nested or without values"
            raise UserError(what, f"{folder}/{name}", "save a dense tensor")
    shapes = [tuple(tensor.shape) if isinstance(tensor, Tensor) else () for tensor in tensors]
    x_shape, y_shape, test_x_shape, test_y_shape = shapes
    fit = len(x_shape) == len(test_x_shape) == 2 and x_shape[1] == test_x_shape[1]
    fit = fit and y_shape == x_shape[:1] and test_y_shape == test_x_shape[:1]
    if not (fit and all(map(min, shapes))):
        what = f"features and labels do not fit together: {', '.join(map(str, shapes))}"
        raise UserError(what, f"--load_features {folder}", "save (N, D), (N,), (M, D) and (M,)")
    (N, D), (M, _) = x_shape, test_x_shape
    rows = list(zip(tensors, (f"{folder}/{name}" for name in names), strict=True))
    features = [_unit_rows(x, where, expected=is_extracted) for x, where in rows[::2]]
    labels = [_class_numbers(y, where) for y, where in rows[1::2]]
    unknown = int((~torch.isin(labels[1], labels[0])).sum())
    if unknown:
        log(f"warning: {unknown} of {M} test labels are not among the training labels: counted as wrong")
    num_classes = len(labels[0].unique())
    log(f"features: {N} training and {M} test rows of {D} from {folder}, {counted(num_classes, 'class')}")
    if num_classes == 1:
        log("warning: only one class: every prediction is right")
    (x, test_x), (y, test_y) = ([tensor.to(device) for tensor in pair] for pair in (features, labels))
    return x, y, test_x, test_y


def _version(path: Path) -> tuple[int, int, int]:
    """Differs if the file was replaced or written to. Raises OSError."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _extracted(folder: Path) -> list[Tensor]:
    """Features and labels of train/, then of val/, with the same class numbers. Raises UserError."""
    train, val = (read_features(folder / split) for split in ("train", "val"))
    kind = train.identity.get("kind", "not recorded")
    log(f"weights: {train.weights or 'not recorded'}; kind of features: {kind}")
    if train.labels is None or val.labels is None:
        split = "train" if train.labels is None else "val"
        fix = "extract features of class folders"
        raise UserError("features without labels", f"--load_features {folder}: {split}/", fix)
    if bool(train.classes) != bool(val.classes):
        what, fix = "only one of train/ and val/ has names of classes", "extract both from class folders"
        raise UserError(what, f"--load_features {folder}", fix)
    differ = [name for name in NETWORK_FACTS if train.identity.get(name) != val.identity.get(name)]
    if differ:
        fix = "extract both with the same weights and flags"
        raise UserError(f"train/ and val/ differ in {', '.join(differ)}", f"--load_features {folder}", fix)
    labels = val.labels
    if train.classes != val.classes:
        numbers = match_classes(train.classes, val.classes, f"--load_features {folder}")
        labels = torch.tensor([*numbers, -1])[labels]  # -1 stays -1
    return [train.features, train.labels, val.features, labels]


# Facts that must be equal for train and val features.
NETWORK_FACTS = ("kind", "network", "pixels", "mean", "std", "value_range")


def _unit_rows(features: Tensor, where: str, expected: bool) -> Tensor:
    """Convert features (N, D) to float32 rows of length 1. Raises UserError if that is not possible.

    Logs other lengths unless they are `expected`.
    """
    if features.is_complex() or not all_finite(features):
        raise UserError("features are not finite numbers", where, "save finite features")
    features = features.float()
    lengths = features.norm(dim=1)
    shortest, longest = lengths.min().item(), lengths.max().item()
    if not (shortest > 0 and math.isfinite(longest)):
        what = f"rows of length {shortest:g} to {longest:g} cannot be normalised"
        raise UserError(what, where, "save features other than zero")
    if max(longest - 1, 1 - shortest) > 1e-3:
        if not expected:
            log(f"note: rows of length {shortest:.4g} to {longest:.4g} normalised to 1 ({where})")
        features = F.normalize(features, dim=1)
    return features


def _class_numbers(labels: Tensor, where: str) -> Tensor:
    """Convert labels (N,) to int64. Raises UserError if one is not a whole number from 0."""
    # As float64, because torch compares few unsigned types.
    wrong = labels.is_complex() or (labels.double() != labels.long()).any() or (labels.double() < 0).any()
    if wrong:
        raise UserError("labels are not whole numbers from 0", where, "save class numbers")
    return labels.long()


def compute_features(args: argparse.Namespace, device: torch.device, keep_on: torch.device) -> Data:
    """Compute L2-normalised features and labels of train, then of val, by the flags."""
    frozen = load_by_flags(args)
    train, val = open_checked(Source.of(args, frozen.form))
    model: Callable[[Tensor], Tensor] = frozen.network.to(device)
    if args.concat_patchtokens:
        model = functools.partial(compute, concat_patches, frozen.network)
        log(f"features: patch tokens, {model(frozen.zeros(1).to(device)).shape[1]} wide")
    flags = args.batch_size_per_gpu, args.num_workers
    x, y = extract_features(model, train, frozen.transform, device, *flags, keep_on)
    test_x, test_y = extract_features(model, val, frozen.transform, device, *flags, keep_on)
    return normalized(x, "training"), y, normalized(test_x, "test"), test_y


def normalized(features: Tensor, which: str) -> Tensor:
    """Features (N, D) divided by their lengths, in place; logs the number of zero rows.

    Raises UserError if all are zeros.
    """
    zeros = len(features) - int(features.any(dim=1).sum())
    if zeros == len(features):
        what = f"the {which} images' features are all zero"
        raise UserError(what, "--pretrained_weights", "give other weights")
    if zeros:
        log(f"warning: the features of {zeros} of {len(features)} {which} images are zero")
    return F.normalize(features, dim=1, out=features)


def main(args: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """Compute or load features, classify, and print a line for each k; {k: (top1, top5)} on rank 0."""
    device = cli.join_processes(args)
    fix_random_seeds(args.seed)
    if not args.dump_features:
        return evaluate(args, device)
    with same_error_on_all_ranks():  # checked at the start, not after all the work
        folder = cli.make_folder(args.dump_features, "dump_features")
        if args.load_features and folder.resolve() == Path(args.load_features).expanduser().resolve():
            raise UserError("would overwrite --load_features", f"--dump_features {folder}", "leave it out")
        lock = FolderLock(folder / ".features.lock", flag="dump_features")
        if is_main_process():
            lock.acquire()
    try:
        return evaluate(args, device, folder)
    finally:
        lock.release()


def evaluate(
    args: argparse.Namespace, device: torch.device, folder: Path | None = None
) -> dict[int, tuple[float, float]]:
    """What `main` does; saves the features to `folder`, if given."""
    keep_on = device if args.use_cuda else torch.device("cpu")
    if args.load_features:
        loaded = [(name, True, "--load_features gives the features") for name in FEATURE_FLAGS]
        cli.warn_no_effect(args, get_args_parser(), loaded)
        with same_error_on_all_ranks():
            tensors = load_features(args.load_features, keep_on)
    else:
        tensors = compute_features(args, device, keep_on)
    if not is_main_process():
        return {}
    x, y, test_x, test_y = tensors
    y, test_y, num_classes = number_classes(y, test_y)
    most = len(x)
    ks = list(dict.fromkeys(min(k, most) for k in args.nb_knn))
    if max(args.nb_knn) > most:
        log(f"note: --nb_knn limited to the {most} training images")
    warn_of_copies(x, test_x)
    accuracies = knn_accuracies(x, y, test_x, test_y, ks, args.temperature, num_classes)
    for k, (top1, top5) in accuracies.items():
        log(f"{k}-NN classifier result: Top1: {top1}, Top5: {top5}")
    if folder:
        dump_features(folder, tensors)
    return accuracies


if __name__ == "__main__":
    cli.run_script(main, parse_args())
