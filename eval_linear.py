"""Evaluate frozen features with a linear classifier.

    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights runs/vits16/checkpoint.pth \\
        --data_path /data/imagenet --lr 0.001 0.003 0.01 --output_dir runs/vits16/linear
    python eval_linear.py --pretrained_weights ... --data_path ... --output_dir ... --evaluate
    python eval_linear.py --pretrained_weights ... --data_path ... --few_shot 1% --few_shot_seeds 3 --logistic

Each `--lr` trains its own classifier on the same features, in one pass over the images. A run resumes
from `checkpoint.pth.tar` in its `--output_dir` if there is one.

`--few_shot` trains on a few images of each class, a seeded subset. `--logistic` fits a logistic regression to
the features of the images without augmentation, as in the paper's low-shot table; held-out training images
choose its regularisation.

Shapes: B images, D backbone width, F feature width, H classifiers, C classes.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import math
import random
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision import transforms

from support import cli, logistic
from support.checkpoints import PUBLISHED, download, load_checkpoint
from support.checks import check_on_first_rank, open_checked
from support.cli import bool_flag
from support.data import (
    Images,
    Source,
    class_names,
    digest,
    on_all_ranks,
    open_labelled_images,
    read_labelled,
)
from support.distributed import (
    all_reduce_mean,
    fix_random_seeds,
    get_world_size,
    is_main_process,
    only_one_in_process,
    same_error_on_all_ranks,
)
from support.errors import TrainingError, UserError, counted, few
from support.features import compute, concat_patches, extract_features, frozen_features, load_by_flags
from support.layouts import is_state
from support.loading import EpochBatches, Loader
from support.logger import MetricLogger, log
from support.pixels import Size, as_tensor, copy_to, height_and_width, normalize, to_rgb
from support.restart import Run, comparable, recorded_identity
from support.subsets import FewImages, draw_few, few_shot, labels_of
from support.weights import Frozen, check_finite, digest_weights, load_strictly
from vision_transformer import VisionTransformer


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    cli.add_weights_flags(parser, seed_of="the weights of --pretrained_weights random, the classifiers' "
        "first weights, the order of the images, the augmentation and the subset of --few_shot")
    positive = cli.number(int, at_least=1)
    group = parser.add_argument_group("features")
    cli.add_size_flag(group, "--image_size", None,
        "image size in pixels: one length, or height and width (default: the file's, else 224)")
    group.add_argument("--n_last_blocks", default=4, type=positive,
        help="concatenate the CLS tokens of this many last blocks; the paper uses 4 for ViT-S, 1 for ViT-B; "
             "for our ViTs only: other networks give their pooled output")
    group.add_argument("--avgpool_patchtokens", default=False, type=bool_flag,
        help="add the mean of the last block's patch tokens; the paper does so for ViT-B, not for ViT-S")
    cli.add_concat_flag(group, "the CLS tokens")
    group.add_argument("--precision", default="fp32", choices=cli.PRECISIONS,
        help="precision of the backbone's forward pass; the classifiers are trained in fp32")
    group.add_argument("--cache_features", action="store_true",
        help="compute the training features once, without augmentation, then train in seconds; for quick "
             "looks: this is not the paper's protocol")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=100, type=positive, help="passes over the training images")
    group.add_argument("--lr", default=[0.001], type=cli.number(float, above=0), nargs="+",
        help="first learning rate for 256 images per step, scaled linearly with the batch of all processes; "
             "the best value differs between checkpoints: give several, the backbone runs only once")
    group.add_argument("--batch_size_per_gpu", default=128, type=positive, help="images per process and step")
    group.add_argument("--val_freq", default=1, type=positive, help="validate every this many epochs")

    group = parser.add_argument_group("few labels")
    group.add_argument("--few_shot", default=None, type=few_shot, metavar="NUMBER",
        help="train on this many images of each class, e.g. 5, or on this share, e.g. 1%% (at least one)")
    group.add_argument("--logistic", action="store_true",
        help="fit a logistic regression instead, by L-BFGS, and choose its regularisation on held-out fifths "
             "of the training images")
    group.add_argument("--few_shot_seeds", default=1, type=positive,
        help="with --logistic: repeat for this many seeds (--seed, --seed + 1, ...); prints mean and "
             "standard deviation")

    cli.add_data_flags(parser,
        "folder with train and val: folders of class folders, .tar, .zip or lists such as train.txt",
        "evaluate on the drawn shapes of main_dino.py --demo")

    group = parser.add_argument_group("run")
    group.add_argument("--num_labels", default=None, type=positive,
        help="number of classes (default: as in the data)")
    group.add_argument("--output_dir", default=".",
        help="folder for checkpoint.pth.tar and log_linear.txt; a run resumes from the checkpoint in it")
    group.add_argument("--evaluate", action="store_true",
        help="validate a trained classifier: --linear_weights, or the one in --output_dir")
    group.add_argument("--linear_weights", default="",
        help="a classifier for --evaluate: a file, or a published one by its model's name (dino_vits16, ...)")
    cli.add_launch_flags(group)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# Flags that may change when a run resumes. `run_identity` holds what matters of them: the network's weights,
# and the names, sizes and classes of the images, wherever they are.
FREE_FLAGS = cli.LOCAL_FLAGS | {
    "val_freq", "evaluate", "output_dir", "checkpoint_key", "arch", "patch_size", "image_size", "in_chans",
    "value_range", "num_labels", "logistic", "few_shot_seeds",
}  # fmt: skip

# Flags that only training uses, and flags of the CLS tokens, which only our ViTs have.
TRAINING_FLAGS = ("epochs", "lr", "val_freq", "cache_features")
VIT_FLAGS = ("n_last_blocks", "avgpool_patchtokens")
OLD_VALUES = {"concat_patchtokens": False, "few_shot": None}  # values in older checkpoints


def check_args(args: argparse.Namespace) -> None:
    """Warn of flags without effect; raise UserError for flags that contradict each other."""
    if len(set(args.lr)) < len(args.lr):
        raise UserError("a rate is given twice", f"--lr {' '.join(map(str, args.lr))}", "give each rate once")
    if args.linear_weights and not args.evaluate:
        raise UserError("needs --evaluate", "--linear_weights", "add --evaluate, or leave it out")
    if args.evaluate and args.logistic:
        what = "--logistic saves no classifier to evaluate"
        raise UserError(what, "--evaluate, --logistic", "leave out one of the two")
    rules = [(name, args.evaluate, "--evaluate does not train") for name in TRAINING_FLAGS]
    rules += [(name, args.logistic, "--logistic ignores it") for name in TRAINING_FLAGS]
    rules += [
        ("few_shot", args.evaluate, "--evaluate does not train"),
        ("output_dir", args.logistic, "--logistic writes no files"),
        ("few_shot_seeds", not (args.logistic and args.few_shot), "it is for --logistic --few_shot"),
    ]
    cli.warn_no_effect(args, get_args_parser(), rules)


# ---------------------------------------------------------------------------------------------
# Features and classifiers
# ---------------------------------------------------------------------------------------------


class AugmentedImages(Dataset):
    """Randomly cropped and flipped images with label, to train a linear classifier on.

    Item (epoch, i) is uint8 (C, H, W) and the label; it depends on the seed, the epoch and i alone.
    """

    def __init__(self, images: Images, size: Size, seed: int):
        self.images, self.seed = images, seed
        height, width = height_and_width(size)
        # torchvision's defaults, as in the published evaluation: bilinear, where training is bicubic.
        ratio = width / height * 3 / 4, width / height * 4 / 3
        crop = transforms.RandomResizedCrop((height, width), ratio=ratio)
        flip = transforms.RandomHorizontalFlip()
        self.transform = transforms.Compose([crop, flip, as_tensor])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        image, label = read_labelled(self.images, index)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPUs, whose state is not restored here.
            seed = random.Random(f"{self.seed} {epoch} {index}").getrandbits(32)
            torch.default_generator.manual_seed(seed)
            return self.transform(image if isinstance(image, Tensor) else to_rgb(image)), label


class LinearClassifier(nn.Module):
    """Features to class scores: (B, F), of any shape after B, -> (B, C)."""

    def __init__(self, dim: int, num_labels: int = 1000):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class LinearClassifiers(nn.ModuleList):
    """`count` classifiers that start from the same weights: (B, F) -> (H, B, C)."""

    def __init__(self, count: int, dim: int, num_labels: int):
        super().__init__(LinearClassifier(dim, num_labels) for _ in range(count))
        self.num_labels = num_labels
        for other in list(self)[1:]:
            other.load_state_dict(self[0].state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([classifier(x) for classifier in self])


def build_optimizer(classifiers: LinearClassifiers, lrs: list[float]) -> torch.optim.SGD:
    """SGD with momentum 0.9, without weight decay, and with a learning rate for each classifier."""
    groups = [{"params": c.parameters(), "lr": lr} for c, lr in zip(classifiers, lrs, strict=True)]
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=0)


def features_of_images(
    images: Tensor, labels: Tensor, features: "Features", device: torch.device
) -> tuple[Tensor, Tensor]:
    """Loaded uint8 images (B, C, H, W) and labels -> features (B, F) and labels (B,) on the device."""
    images = normalize(copy_to(images, device), features.frozen.mean, features.frozen.std)
    # A clone, because a tensor made in inference mode cannot take part in a backward pass.
    return features.of(images).clone(), copy_to(labels, device)


def cached_batches(
    features: Tensor, labels: Tensor, batches: Iterable[list[tuple[int, int]]]
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield rows of features (N, F) and labels (N,) for each batch of (epoch, index)."""
    for batch in batches:
        rows = copy_to(torch.tensor([index for _, index in batch]), features.device)
        yield features[rows], labels[rows]


def train(
    classifiers: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, int]]:
    """Train one step per batch of features (B, F) and labels (B,); yield its cross-entropies, (H,), and B."""
    for features, labels in batches:
        losses = torch.stack([F.cross_entropy(scores, labels) for scores in classifiers(features)])
        optimizer.zero_grad()
        losses.sum().backward()  # the gradient of each classifier comes from its own loss only
        optimizer.step()
        yield losses.detach(), len(labels)


CHUNK = 512  # images at a time
PRINT_FREQ = 10  # steps
ACCURACY = "top-1 {acc1:.2f} %, top-5 {acc5:.2f} %"


@torch.inference_mode()
def validate_network(classifiers: nn.Module, features: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Loss, and top-1 and top-5 accuracy in percent, of each classifier on features (N, F), labels (N,).

    With fewer than five classes, top-5 counts all of them. Scores that are not finite, as with a learning
    rate that is too high, count as wrong.
    """
    sums = torch.zeros(3, 1, device=features.device)
    for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        scores = classifiers(x)  # (H, B, C)
        hits = scores.topk(min(5, scores.shape[-1]), dim=-1).indices == y[:, None]  # (H, B, 5)
        hits &= scores.isfinite().all(dim=-1, keepdim=True)
        loss = torch.stack([F.cross_entropy(s, y, reduction="sum") for s in scores])
        sums = sums + torch.stack([loss, 100 * hits[..., 0].sum(-1), 100 * hits.sum((-2, -1))])
    return [
        {"loss": loss, "acc1": acc1, "acc5": acc5} for loss, acc1, acc5 in (sums.T / len(labels)).tolist()
    ]


# ---------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------


def count_classes(images: Images, num_labels: int | None) -> int:
    """The number of classes: `num_labels`, or as many as the data names. Raises UserError."""
    names = class_names(images)
    if num_labels is None:
        if not names:
            raise UserError("dataset does not name its classes", "--num_labels", "give their number")
        return len(names)
    if num_labels < len(names):
        what = f"the data has {counted(len(names), 'class')}"
        raise UserError(what, f"--num_labels {num_labels}", "leave it out")
    return num_labels


def to_classes(labels: Tensor, images: Images, classes: list[str] | None, num_labels: int) -> Tensor:
    """Convert labels (N,) of images to the classifier's, which number `classes`; matched by name.

    Without names on both sides, labels stay unchanged. Raises UserError for classes that the
    classifier does not know.
    """
    names = class_names(images)
    if names and names == classes:  # also where torchvision gives two classes one name, as ImageNet's cranes
        return labels
    if classes and names:
        unknown = sorted(set(names) - set(classes))
        if unknown:
            what = f"the classifier does not know {counted(len(unknown), 'class')}: {few(unknown)}"
            raise UserError(what, "--data_path", "remove their folders, or train with them")
        return torch.tensor([classes.index(name) for name in names], device=labels.device)[labels]
    found = len(names) if names else int(labels.max()) + 1
    if found > num_labels or (names and found < num_labels):
        what = f"the classifier has {num_labels} classes without names, the data has {found}"
        raise UserError(what, "--data_path", "give data with the classes that it was trained on")
    return labels


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """The features of a frozen network."""

    of: Callable[[Tensor], Tensor]  # normalised images (B, C, H, W) -> (B, F), on the device
    width: int  # F
    frozen: Frozen
    digest: str  # of the network's weights
    flags: dict[str, int | bool]  # those that chose the features


def build_features(args: argparse.Namespace, device: torch.device) -> Features:
    """Load the network and describe its features, as the flags say. Raises UserError."""
    frozen = load_by_flags(args)
    network = frozen.network.to(device)
    is_vit = isinstance(network, VisionTransformer)
    if args.concat_patchtokens:
        kind, why = "patch tokens", "it is not for --concat_patchtokens"
        features: Callable[[nn.Module, Tensor], Tensor] = concat_patches
    elif isinstance(network, VisionTransformer) and args.n_last_blocks > len(network.blocks):
        depth = len(network.blocks)
        where, fix = f"--n_last_blocks {args.n_last_blocks}", f"give at most {depth}"
        raise UserError(f"the network has {depth} blocks", where, fix)
    else:
        kind, why = "CLS tokens" if is_vit else "the network's output", "it is for our ViTs only"
        n, mean = args.n_last_blocks, args.avgpool_patchtokens
        features = functools.partial(frozen_features, n_last_blocks=n, avgpool_patchtokens=mean)
    unused = VIT_FLAGS if args.concat_patchtokens or not is_vit else ()
    cli.warn_no_effect(args, get_args_parser(), [(name, True, why) for name in unused])
    flags = {name: getattr(args, name) for name in ("concat_patchtokens", *VIT_FLAGS) if name not in unused}
    of = functools.partial(compute, features, network, dtype=cli.PRECISIONS[args.precision])
    width = of(frozen.zeros(1).to(device)).shape[1]
    log(f"features: {kind}, {width} wide")
    return Features(of, width, frozen, digest_weights(network), flags)


def extract(
    args: argparse.Namespace, features: Features, images: Images, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute features (N, F) and labels (N,) of images without augmentation."""
    batch_size, workers = args.batch_size_per_gpu, args.num_workers
    return extract_features(features.of, images, features.frozen.transform, device, batch_size, workers)


def load_classifier(weights: str, features: Features) -> tuple[LinearClassifiers, list[str] | None]:
    """Load a trained classifier, ours or published, by file or name; also its class names if recorded.

    Raises UserError, also if the file records that it was trained on other features.
    """
    path = download(weights, "linearweights") if weights in PUBLISHED else weights
    checkpoint = load_checkpoint(path)
    trained = recorded_identity(checkpoint)
    for name, flag in features.flags.items():
        value = trained.get(name, OLD_VALUES.get(name, flag))
        if value != flag:
            what = f"the classifier was trained with --{name} {value}"
            raise UserError(what, f"--{name} {flag}", f"give --{name} {value}")
    frozen = features.frozen
    seen = {
        "pixels": ("size", frozen.image_size),
        "mean": ("mean", frozen.mean),
        "std": ("deviation", frozen.std),
        "values": ("value range", frozen.value_range),
    }
    for name, (words, value) in seen.items():
        before = trained.get(name, value)
        if comparable({name: before}) != comparable({name: value}):
            what = f"the classifier was trained on images of {words} {before}, not {value}"
            raise UserError(what, weights, "give the --image_size and --pretrained_weights of its training")
    if trained.get("backbone", features.digest) != features.digest:
        what = "the classifier was trained on the features of other weights"
        raise UserError(what, weights, "give their --pretrained_weights")
    state = checkpoint.get("state_dict", checkpoint)
    if not is_state(state):
        raise UserError("no classifier in file", weights, "use another file")
    check_finite(state, weights)
    num_labels = state["linear.bias"].numel() if "linear.bias" in state else 1000
    classifiers = LinearClassifiers(1, features.width, num_labels)
    source = f"{weights}, for {features.width} features and {num_labels} classes"
    load_strictly(classifiers[0], state, source, f"check --{', --'.join(features.flags)}")
    return classifiers, checkpoint.get("classes")


def evaluate(args: argparse.Namespace, device: torch.device) -> list[dict[str, float]]:
    """Validate a trained classifier; returns its loss and accuracies in a list of one."""
    features = build_features(args, device)
    images = on_all_ranks(open_labelled_images, Source.of(args, features.frozen.form), "val")
    check_on_first_rank(images, alike=False)
    trained = Path(args.output_dir, "checkpoint.pth.tar").expanduser()
    with same_error_on_all_ranks():
        if not args.linear_weights and not trained.exists():
            fix = "give the folder of a trained classifier, or --linear_weights"
            raise UserError(f"folder has no {trained.name}", f"--output_dir {args.output_dir}", fix)
        classifier, classes = load_classifier(args.linear_weights or str(trained), features)
    num_labels = classifier.num_labels
    if args.num_labels not in (None, num_labels):
        what = f"the classifier has {num_labels} classes"
        raise UserError(what, f"--num_labels {args.num_labels}", "leave it out")
    to_classes(torch.zeros(1, dtype=torch.long), images, classes, num_labels)  # before all the work
    x, labels = extract(args, features, images, device)
    labels = to_classes(labels, images, classes, num_labels)
    results = validate_network(classifier.to(device), x, labels)
    log(f"Accuracy of the network on the {len(images)} test images: {ACCURACY.format(**results[0])}")
    return results


def run_identity(
    args: argparse.Namespace, features: Features, num_labels: int, train_images: Images, val_images: Images
) -> dict:
    """Everything that determines the result, by name."""
    flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    return flags | {
        "number of classes": num_labels,
        "pixels": features.frozen.image_size,
        "mean": features.frozen.mean,
        "std": features.frozen.std,
        "values": features.frozen.value_range,
        "world_size": get_world_size(),
        "backbone": features.digest,
        "training images": digest(train_images),
        "validation images": digest(val_images),
    }


def resume(run: Run, pieces: dict, identity: dict, num_rates: int) -> dict:
    """Resume the pieces if there is a checkpoint. Returns the epoch to continue from, the best validation
    of each classifier, and the best classifier's `state_dict`. Raises UserError.
    """
    state = {"epoch": 0, "best": [{"acc1": -1.0}] * num_rates, "state_dict": {}}
    saved = run.resume(pieces, identity, added=OLD_VALUES)
    if not saved:
        return state
    for name, value in state.items():
        if not isinstance(saved.get(name), type(value)):
            raise UserError(f"checkpoint lacks {name}", str(run.checkpoint), "give another --output_dir")
    return {name: saved[name] for name in state}


class Batches(NamedTuple):
    """What a classifier trains on, epoch after epoch."""

    loaded: Generator[tuple[Tensor, Tensor], None, None]
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # to features (B, F) and labels (B,)
    per_epoch: int  # of one rank
    images: int  # of all ranks in an epoch


def build_batches(
    args: argparse.Namespace, features: Features, images: Images, first_epoch: int, device: torch.device
) -> Batches:
    """Build the batches from this epoch on."""
    order = EpochBatches(len(images), args.batch_size_per_gpu, args.seed, drop_last=False)
    order.first_step = first_epoch * order.steps_per_epoch
    order.last_step = args.epochs * order.steps_per_epoch
    if args.cache_features:
        cached = cached_batches(*extract(args, features, images, device), order)
        return Batches(cached, lambda *batch: batch, order.steps_per_epoch, len(images))
    augmented = AugmentedImages(images, features.frozen.image_size, args.seed)
    loader = Loader(augmented, order, args.num_workers, device)
    prepare = functools.partial(features_of_images, features=features, device=device)
    return Batches(iter(loader), prepare, order.steps_per_epoch, len(images))


def train_linear(args: argparse.Namespace, device: torch.device) -> list[dict[str, float]]:
    """Train a classifier for each rate, or resume the training; returns the best validation of each."""
    with same_error_on_all_ranks():
        folder = cli.make_folder(args.output_dir)
    features = build_features(args, device)
    train_images, val_images = open_checked(Source.of(args, features.frozen.form))
    train_images = few_images(args, train_images)
    classes, num_labels = class_names(train_images), count_classes(train_images, args.num_labels)

    classifiers = LinearClassifiers(len(args.lr), features.width, num_labels).to(device)
    batch_size = args.batch_size_per_gpu * get_world_size()
    optimizer = build_optimizer(classifiers, [lr * batch_size / 256 for lr in args.lr])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=0)
    pieces = {"classifiers": classifiers, "optimizer": optimizer, "scheduler": scheduler}
    identity = run_identity(args, features, num_labels, train_images, val_images)
    with Run(folder, list(pieces), ".pth.tar", "log_linear.txt", advice=None) as run:
        state = resume(run, pieces, identity, len(args.lr))
        if state["epoch"] < args.epochs:  # else the images are not needed
            x, labels = extract(args, features, val_images, device)
            val_data = x, to_classes(labels, val_images, classes, num_labels)
            batches = build_batches(args, features, train_images, state["epoch"], device)
            state |= {"args": vars(args), "classes": classes or None}
            with contextlib.closing(batches.loaded):  # also ends the workers after an error
                train_epochs(args, run, state, batches, val_data)
    report(args.lr, state["best"])
    return state["best"]


def few_images(args: argparse.Namespace, images: Images) -> Images:
    """The images that `--few_shot` takes, all without it. Raises UserError."""
    if not args.few_shot:
        return images
    drawn = draw_few(labels_of(images), args.few_shot, args.seed, class_names(images))
    log(f"training on {len(drawn):,} of {len(images):,} images: {args.few_shot} of each class")
    return FewImages(images, drawn.tolist())


def train_epochs(
    args: argparse.Namespace, run: Run, state: dict, batches: Batches, val_data: tuple[Tensor, Tensor]
) -> None:
    """Train the pieces of the run to `--epochs`; validate, log and save.

    Updates `state`: the epoch, and the best validations and classifier. Raises TrainingError if no
    classifier's loss is finite.
    """
    classifiers, optimizer, scheduler = run.pieces.values()
    model = DistributedDataParallel(classifiers) if get_world_size() > 1 else classifiers
    steps = batches.per_epoch
    for epoch in range(state["epoch"], args.epochs):
        logger = MetricLogger(images_per_step=batches.images / steps)
        sums = torch.zeros(len(args.lr) + 1, device=val_data[0].device)  # of the losses, and of the images
        left = steps * (args.epochs - epoch - 1)
        loaded = logger.log_every(
            itertools.islice(batches.loaded, steps), PRINT_FREQ, f"epoch {epoch}", steps, steps_after=left
        )
        prepared = itertools.starmap(batches.prepare, loaded)
        for step, (losses, count) in enumerate(train(model, optimizer, prepared)):
            sums += count * torch.cat([losses, losses.new_ones(1)])
            if step % PRINT_FREQ == 0:  # the host waits here; the rates that are too high do not show
                logger.update(loss=losses.nan_to_num(nan=torch.inf, posinf=torch.inf).min().item())
        scheduler.step()
        sums = all_reduce_mean(sums)
        mean_losses = (sums[:-1] / sums[-1]).tolist()
        if not any(map(math.isfinite, mean_losses)):
            raise TrainingError("the loss of every --lr is not finite", f"epoch {epoch}", "lower --lr")
        rows = zip(args.lr, mean_losses, strict=True)
        records = [{"epoch": epoch, "lr": lr, "train_loss": loss} for lr, loss in rows]
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            results = validate_network(classifiers, *val_data)
            keep_best(state, classifiers, results, epoch)
            for record, result in zip(records, results, strict=True):
                record |= {f"test_{name}": value for name, value in result.items()}
        state["epoch"] = epoch + 1
        run.save(state, records, last=epoch == args.epochs - 1)


def keep_best(state: dict, classifiers: LinearClassifiers, results: list[dict], epoch: int) -> None:
    """Update the best validation of each classifier, and the best classifier, in `state`."""
    for i, result in enumerate(results):
        if result["acc1"] > max(row["acc1"] for row in state["best"]):
            state["state_dict"] = copy.deepcopy(classifiers[i].state_dict())
        if result["acc1"] > state["best"][i]["acc1"]:
            state["best"][i] = result | {"epoch": epoch}
    top = max(results, key=lambda result: result["acc1"])
    log(f"epoch {epoch}: {ACCURACY.format(**top)}")


def report(lrs: list[float], best: list[dict]) -> None:
    """Print the best validation of each learning rate, and which rate was best."""
    log(f"{'lr':>10} {'top-1':>7} {'top-5':>7}  epoch")
    for lr, row in zip(lrs, best, strict=True):
        log(f"{lr:10g} {row['acc1']:7.2f} {row['acc5']:7.2f}  {row['epoch']}")
    # Of equal ones, the first that was reached, as in `keep_best`.
    lr, row = max(zip(lrs, best, strict=True), key=lambda pair: (pair[1]["acc1"], -pair[1]["epoch"]))
    log(f"Best accuracy: {ACCURACY.format(**row)}, with --lr {lr:g}")


def fit_logistic(args: argparse.Namespace, device: torch.device) -> list[dict[str, float]]:
    """Fit a logistic regression for each seed of the subset; returns its loss and accuracies on rank 0."""
    features = build_features(args, device)
    train_images, val_images = open_checked(Source.of(args, features.frozen.form))
    names, num_labels = class_names(train_images), count_classes(train_images, args.num_labels)
    subsets = {args.seed: np.arange(len(train_images))}
    if args.few_shot:
        labels = labels_of(train_images)
        seeds = range(args.seed, args.seed + args.few_shot_seeds)
        subsets = {seed: draw_few(labels, args.few_shot, seed, names) for seed in seeds}
    needed = np.unique(np.concatenate(list(subsets.values())))
    x, y = extract(args, features, FewImages(train_images, needed.tolist()), device)
    val_x, val_y = extract(args, features, val_images, device)
    val_y = to_classes(val_y, val_images, names, num_labels)
    if not is_main_process():
        return []
    results = []
    for seed, subset in subsets.items():
        rows = torch.from_numpy(np.searchsorted(needed, subset)).to(x.device)
        l2 = logistic.choose_l2(x[rows], y[rows], num_labels, seed)
        classifiers = LinearClassifiers(1, features.width, num_labels)
        classifiers[0].linear = logistic.fit(x[rows], y[rows], num_labels, l2)
        results += validate_network(classifiers, val_x, val_y)
        accuracy = ACCURACY.format(**results[-1])
        log(f"seed {seed}: {len(rows):,} images, regularisation {l2:g}: {accuracy}")
    if len(results) > 1:
        top1, top5 = ([result[name] for result in results] for name in ("acc1", "acc5"))
        log(f"mean and deviation of {len(results)} subsets: "
            f"top-1 {statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} %, "
            f"top-5 {statistics.mean(top5):.2f} ± {statistics.stdev(top5):.2f} %")  # fmt: skip
    return results


@only_one_in_process()
def main(args: argparse.Namespace) -> list[dict[str, float]]:
    """Train classifiers on frozen features, or evaluate one; returns the validation of each."""
    check_args(args)
    device = cli.join_processes(args)
    fix_random_seeds(args.seed)
    if args.logistic:
        return fit_logistic(args, device)
    return evaluate(args, device) if args.evaluate else train_linear(args, device)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
