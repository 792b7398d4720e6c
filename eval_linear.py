"""Evaluate frozen features with a linear classifier.

    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights runs/vit_small/checkpoint.pth \\
        --data_path /data/imagenet --lr 0.001 0.003 0.01 --output_dir runs/vit_small/linear
    python eval_linear.py --pretrained_weights ... --data_path ... --output_dir ... --evaluate

Each `--lr` trains a classifier of its own on the same features, in one pass over the images. A run
continues from `checkpoint.pth.tar` in its `--output_dir` when there is one.

Shapes: B images, D backbone width, F feature width, H classifiers, C classes.
"""

import argparse
import copy
import functools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from support import cli
from support.cli import DefaultInt, bool_flag
from support.data import EpochSampler, open_labelled_images, open_train_and_val, read_labelled
from support.distributed import (
    all_reduce_mean,
    fix_random_seeds,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
)
from support.errors import UserError
from support.features import extract_features
from support.logger import MetricLogger, log
from support.pixels import normalize
from support.weights import (
    PUBLISHED,
    check_finite,
    digest,
    download,
    is_state,
    load_backbone,
    load_checkpoint,
    load_strictly,
    save_checkpoint,
)
from utils import HorizontalFlip, RandomResizedCrop
from vision_transformer import VisionTransformer


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; a parent for other parsers, hence without `--help` of its own."""
    parser = cli.ArgumentParser("Evaluation with linear classification on ImageNet", add_help=False)
    # fmt: off
    cli.add_weights_flags(parser)
    group = parser.add_argument_group("features")
    group.add_argument("--image_size", default=None, type=cli.number(int, at_least=1),
        help="pixels per side (default: what the weights were trained with, else 224)")
    group.add_argument("--n_last_blocks", default=4, type=int,
        help="concatenate the CLS tokens of so many last blocks; the paper takes 4 for ViT-S, 1 for ViT-B; "
             "for our ViTs, other networks give their pooled output")
    group.add_argument("--avgpool_patchtokens", default=False, type=bool_flag,
        help="add the mean of the last patch tokens; the paper does for ViT-B, not for ViT-S")
    group.add_argument("--precision", default="fp32", choices=cli.PRECISIONS,
        help="of the backbone's forward pass; the classifiers are trained in fp32")
    group.add_argument("--cache_features", action="store_true",
        help="compute the training features once, without augmentation, then train in seconds; another "
             "protocol than the paper's, for quick looks")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=100, type=int, help="passes over the training images")
    group.add_argument("--lr", default=[0.001], type=float, nargs="+",
        help="first learning rate for 256 images a step, scaled linearly with the batch of all processes; "
             "the best one differs between checkpoints: give several, the backbone runs but once")
    group.add_argument("--batch_size_per_gpu", default=128, type=int, help="images per process and step")
    group.add_argument("--val_freq", default=1, type=int, help="epochs from one validation to the next")

    cli.add_data_flags(parser, "folder with train/ and val/ of class folders",
        "evaluate on the drawn shapes of main_dino.py --demo")

    group = parser.add_argument_group("run")
    group.add_argument("--num_labels", default=DefaultInt(1000), type=int,
        help="number of classes; as in the data unless given")
    group.add_argument("--output_dir", default=".",
        help="folder for checkpoint.pth.tar and log_linear.txt; a run continues from the checkpoint in it")
    group.add_argument("--evaluate", action="store_true",
        help="validate a trained classifier: --linear_weights, or the one in --output_dir")
    group.add_argument("--linear_weights", default="",
        help="a classifier for --evaluate: a file, or a published one by its model's name (dino_vits16, ...)")
    group.add_argument("--seed", default=0, type=int,
        help="decides the classifiers' first weights, order and augmentation")
    cli.add_launch_flags(group)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0], parents=[get_args_parser()])
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """UserError for values that make no sense."""
    cli.check_least(
        args, 1, "n_last_blocks", "epochs", "batch_size_per_gpu", "val_freq", "num_labels",
    )  # fmt: skip
    cli.check_least(args, 0, "num_workers", "seed")
    if not all(0 < lr < math.inf for lr in args.lr):
        raise UserError("must be above 0", f"--lr {' '.join(map(str, args.lr))}", "try 0.001 0.01 0.1")
    if len(set(args.lr)) < len(args.lr):
        raise UserError("named twice", f"--lr {' '.join(map(str, args.lr))}", "name each rate once")
    if args.linear_weights and not args.evaluate:
        raise UserError("for --evaluate only", "--linear_weights", "add --evaluate or leave it out")


# ---------------------------------------------------------------------------------------------
# Features and classifiers
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def frozen_features(
    backbone: nn.Module,
    images: Tensor,
    n_last_blocks: int,
    avgpool_patchtokens: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalised images (B, 3, H, W) -> features (B, F), float32; `dtype` is autocast's, if any.

    Of our ViTs the CLS tokens of the last blocks, F = n D, and with `avgpool_patchtokens` the mean of
    the last block's patches, F = (n + 1) D; of other networks their output.
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        if not isinstance(backbone, VisionTransformer):
            return backbone(images).float()
        layers = backbone.get_intermediate_layers(images, n_last_blocks)
    classes = [layer[:, 0].float() for layer in layers]
    if avgpool_patchtokens:
        # Component by component: in this order the published classifiers of ViT-B were trained.
        mean = layers[-1][:, 1:].float().mean(dim=1)
        classes[-1] = torch.stack([classes[-1], mean], dim=-1).flatten(1)
    return torch.cat(classes, dim=-1)


class AugmentedImages(Dataset):
    """Randomly cropped and flipped images with label, as a linear classifier is trained on them.

    Item (epoch, i) is uint8 (3, size, size); it depends on the seed, the epoch and i alone.
    """

    def __init__(self, images: Dataset, size: int, seed: int):
        self.images, self.seed = images, seed
        # torchvision's defaults, which the published evaluation keeps: bilinear, unlike the training's
        self.crop = RandomResizedCrop(size, (0.08, 1), interpolation=Image.Resampling.BILINEAR)
        self.flip = HorizontalFlip()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        rng = random.Random(f"{self.seed} {epoch} {index}")
        image, label = read_labelled(self.images, index)
        return pil_to_tensor(self.flip(self.crop(image, rng), rng)), label


class LinearClassifier(nn.Module):
    """Features to class scores: (B, F) -> (B, C)."""

    def __init__(self, dim: int, num_labels: int = 1000):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class LinearClassifiers(nn.ModuleList):
    """`count` classifiers that begin with the same weights: (B, F) -> (H, B, C)."""

    def __init__(self, count: int, dim: int, num_labels: int):
        super().__init__(LinearClassifier(dim, num_labels) for _ in range(count))
        for other in list(self)[1:]:
            other.load_state_dict(self[0].state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([classifier(x) for classifier in self])


def build_optimizer(classifiers: LinearClassifiers, lrs: list[float]) -> torch.optim.SGD:
    """SGD with momentum 0.9, without weight decay; each classifier has a learning rate of its own."""
    groups = [{"params": c.parameters(), "lr": lr} for c, lr in zip(classifiers, lrs, strict=True)]
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=0)


def image_batches(
    loader: Iterable[tuple[Tensor, Tensor]], features_of: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 images and labels, as loaded -> features (B, F) and labels (B,) on the device."""
    for images, labels in loader:
        features = features_of(normalize(images.to(device, non_blocking=True)))
        # A clone, because a tensor made in inference mode cannot take part in a backward pass.
        yield features.clone(), labels.to(device, non_blocking=True)


def cached_batches(
    features: Tensor, labels: Tensor, sampler: EpochSampler, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The sampler's rows of features (N, F) and labels (N,), in batches."""
    for rows in torch.tensor([index for _, index in sampler], device=features.device).split(batch_size):
        yield features[rows], labels[rows]


def train(
    classifiers: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[Tensor]:
    """One step per batch of features and labels; yields each step's cross-entropies, (H,)."""
    for features, labels in batches:
        losses = torch.stack([F.cross_entropy(scores, labels) for scores in classifiers(features)])
        optimizer.zero_grad()
        losses.sum().backward()  # no classifier has a share in another's gradient
        optimizer.step()
        yield losses.detach()


CHUNK = 4096  # images at a time


@torch.inference_mode()
def validate_network(classifiers: nn.Module, features: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Loss and top-1 and top-5 accuracy in percent, of each classifier, on (N, F) and (N,).

    With fewer than five classes, top-5 counts them all. Scores that are not finite, of a classifier
    whose rate was too high, are all wrong.
    """
    sums = 0.0
    for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        scores = classifiers(x)  # (H, B, C)
        hits = scores.topk(min(5, scores.shape[-1]), dim=-1).indices == y[:, None]  # (H, B, 5)
        hits &= scores.isfinite().all(dim=-1, keepdim=True)
        loss = torch.stack([F.cross_entropy(s, y, reduction="sum") for s in scores])
        sums += torch.stack([loss, 100 * hits[..., 0].sum(-1), 100 * hits.sum((-2, -1))])
    return [
        {"loss": loss, "acc1": acc1, "acc5": acc5} for loss, acc1, acc5 in (sums.T / len(labels)).tolist()
    ]


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------

# What may change between the parts of a run; of the network, its weights are compared, not its path.
FREE_ARGS = {
    "val_freq", "num_workers", "data_path", "download", "evaluate", "output_dir", "dist_url", "local_rank",
    "pretrained_weights",
}  # fmt: skip


def resume(path: Path, pieces: dict, args: dict) -> dict:
    """Continue from `path` if it exists: load the pieces; its epoch and best results, {} for none.

    Raises UserError, also where the run was begun with other `args`.
    """
    if not path.exists():
        return {}
    checkpoint = load_checkpoint(path)
    kinds = dict.fromkeys((*pieces, "args", "state_dict"), dict) | {"epoch": int, "best": list}
    missing = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    if missing:
        raise UserError(f"checkpoint lacks {', '.join(missing)}", str(path), "give another --output_dir")
    changed = [
        f"{name} {old} -> {args[name]}"
        for name, old in checkpoint["args"].items()
        if name in args and name not in FREE_ARGS and old != args[name]
    ]
    if changed:
        changed = ", ".join(changed)
        raise UserError(f"run was begun otherwise: {changed}", str(path), "give another --output_dir")
    load_strictly(pieces["classifiers"], checkpoint["classifiers"], str(path))
    try:
        for name in ("optimizer", "scheduler"):
            pieces[name].load_state_dict(checkpoint[name])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{name} does not fit: {error}", str(path), "give another --output_dir") from None
    log(f"resuming {path} at epoch {checkpoint['epoch']}")
    return {name: checkpoint[name] for name in ("epoch", "best", "state_dict")}


def plain_args(args: argparse.Namespace) -> dict:
    """Flags and values, without the types that mark defaults."""
    plain = {DefaultInt: int, cli.DefaultStr: str}
    return {name: plain.get(type(value), lambda v: v)(value) for name, value in vars(args).items()}


def load_classifier(
    weights: str, width: int, num_labels: int, n_last_blocks: int, avgpool_patchtokens: bool, backbone: str
) -> LinearClassifiers:
    """A trained classifier, ours or published, from a file or by name, for features of `width`.

    `backbone` is the digest of what gives the features. Raises UserError, also where our file
    records other features.
    """
    path = download(weights, "linearweights") if weights in PUBLISHED else weights
    checkpoint = load_checkpoint(path)
    trained = checkpoint.get("args") or {}
    flags = {"n_last_blocks": n_last_blocks, "avgpool_patchtokens": avgpool_patchtokens}
    for name, flag in flags.items():
        value = trained.get(name, flag)
        if value != flag:
            raise UserError(
                f"classifier was trained with {value}", f"--{name} {flag}", f"give --{name} {value}"
            )
    if trained.get("backbone", backbone) != backbone:
        raise UserError(
            "classifier was trained on the features of other weights",
            weights,
            "give their --pretrained_weights",
        )
    state = checkpoint.get("state_dict", checkpoint)
    if not is_state(state):
        raise UserError("no classifier in file", weights, "use another file")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    check_finite(state, weights)
    classifiers = LinearClassifiers(1, width, num_labels)
    load_strictly(
        classifiers[0],
        state,
        f"{weights}, for {width} features and {num_labels} classes",
        "check --n_last_blocks, --avgpool_patchtokens and --num_labels",
    )
    return classifiers


def count_classes(images: Dataset, num_labels: int) -> tuple[int, int]:
    """How many classes to tell apart, and how many the data has. Raises UserError."""
    named = getattr(images, "classes", None)
    if named is None and isinstance(num_labels, DefaultInt):
        raise UserError("dataset does not name its classes", "--num_labels", "give their number")
    classes = num_labels if named is None else len(named)
    if isinstance(num_labels, DefaultInt):
        return classes, classes
    if num_labels < classes:
        raise UserError(f"the data has {classes} classes", f"--num_labels {num_labels}", "leave it out")
    return num_labels, classes


def report(lrs: list[float], best: list[dict]) -> None:
    """A line for each learning rate, and which was best; `best` holds each one's best validation."""
    log(f"{'lr':>10} {'top-1':>7} {'top-5':>7}  epoch")
    for lr, row in zip(lrs, best, strict=True):
        log(f"{lr:10g} {row['acc1']:7.2f} {row['acc5']:7.2f}  {row['epoch']}")
    lr, row = max(zip(lrs, best, strict=True), key=lambda pair: pair[1]["acc1"])
    log(f"Best accuracy: top-1 {row['acc1']:.2f} %, top-5 {row['acc5']:.2f} %, with --lr {lr:g}")


def main(args: argparse.Namespace) -> list[dict[str, float]]:
    """Train classifiers on frozen features, or evaluate one; each one's best validation."""
    check_args(args)
    device = init_distributed_mode(args.dist_url)
    fix_random_seeds(args.seed)

    where = args.data_path, args.dataset, args.download, args.demo
    if args.evaluate:
        val_images = open_labelled_images("val", *where)
    else:
        train_images, val_images = open_train_and_val(*where)
        cli.make_folder(args.output_dir)
    frozen = load_backbone(
        args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.image_size
    )
    log(frozen.description)
    backbone, image_size = frozen.network, frozen.image_size
    features_of = functools.partial(
        frozen_features,
        backbone.to(device),
        n_last_blocks=args.n_last_blocks,
        avgpool_patchtokens=args.avgpool_patchtokens,
        dtype=cli.PRECISIONS[args.precision],
    )
    extract = functools.partial(
        extract_features,
        features_of,
        image_size=image_size,
        device=device,
        batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers,
        normalized=False,
    )
    kind = "the network's output"
    if isinstance(backbone, VisionTransformer):
        kind, blocks = "CLS tokens", len(backbone.blocks)
        if args.n_last_blocks > blocks:
            what = f"the network has {blocks} blocks"
            raise UserError(what, f"--n_last_blocks {args.n_last_blocks}", "lower it")
    width = features_of(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
    num_labels, classes = count_classes(val_images, args.num_labels)
    log(f"features: {kind}, {width} wide; {classes} classes")

    if args.evaluate:
        weights = args.linear_weights or str(Path(args.output_dir, "checkpoint.pth.tar"))
        classifier = load_classifier(
            weights, width, num_labels, args.n_last_blocks, args.avgpool_patchtokens, digest(backbone)
        ).to(device)
        results = validate_network(classifier, *extract(val_images))
        log(
            f"Accuracy of the network on the {len(val_images)} test images: "
            f"top-1 {results[0]['acc1']:.2f} %, top-5 {results[0]['acc5']:.2f} %"
        )
        return results

    sampler = EpochSampler(train_images, get_world_size(), get_rank(), seed=args.seed)
    if args.cache_features:
        cached = functools.cache(functools.partial(extract, train_images))

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return cached_batches(*cached(), sampler, args.batch_size_per_gpu)

    else:
        loader = DataLoader(
            AugmentedImages(train_images, image_size, args.seed),
            args.batch_size_per_gpu,
            sampler=sampler,
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
            pin_memory=device.type == "cuda",
        )
        batches = functools.partial(image_batches, loader, features_of, device)
    classifiers = LinearClassifiers(len(args.lr), width, num_labels).to(device)
    # The backbone is frozen: one pass over the validation images serves all epochs.
    val_data = functools.cache(functools.partial(extract, val_images))
    best = train_linear(args, classifiers, sampler, batches, val_data, digest(backbone))
    report(args.lr, best)
    return best


def train_linear(
    args: argparse.Namespace,
    classifiers: LinearClassifiers,
    sampler: EpochSampler,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    val_data: Callable[[], tuple[Tensor, Tensor]],
    backbone: str,
) -> list[dict[str, float]]:
    """Train for `--epochs`, validate, log and save; resume if there is something to resume.

    `batches()` are those of the epoch that the sampler is set to, `val_data()` features and labels;
    neither is asked for before it is clear that the run can go on. `backbone` is the digest of what
    gives the features. Returns each classifier's best validation.
    """
    output_dir = cli.make_folder(args.output_dir)
    batch_size = args.batch_size_per_gpu * get_world_size()
    optimizer = build_optimizer(classifiers, [lr * batch_size / 256 for lr in args.lr])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=0)
    pieces = {"classifiers": classifiers, "optimizer": optimizer, "scheduler": scheduler}
    recorded = plain_args(args) | {"world_size": get_world_size(), "backbone": backbone}
    state = {"epoch": 0, "best": [{"acc1": -1.0}] * len(args.lr), "state_dict": {}, "args": recorded}
    state |= resume(output_dir / "checkpoint.pth.tar", pieces, recorded)
    model = DistributedDataParallel(classifiers) if get_world_size() > 1 else classifiers

    steps = math.ceil(len(sampler) / args.batch_size_per_gpu)
    for epoch in range(state["epoch"], args.epochs):
        sampler.set_epoch(epoch)
        logger = MetricLogger(f"epoch {epoch}", batch_size, steps * (args.epochs - epoch - 1))
        total = torch.zeros(len(args.lr), device=classifiers[0].linear.weight.device)
        for step, losses in enumerate(train(model, optimizer, logger.log_every(batches(), steps))):
            total += losses
            if step % logger.print_freq == 0:  # the host waits here
                logger.update(loss=losses.mean().item())
        scheduler.step()
        records = [
            {"epoch": epoch, "lr": lr, "train_loss": loss}
            for lr, loss in zip(args.lr, all_reduce_mean(total / steps).tolist(), strict=True)
        ]

        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            results = validate_network(classifiers, *val_data())
            for i, result in enumerate(results):
                records[i] |= {f"test_{name}": value for name, value in result.items()}
                if result["acc1"] > max(row["acc1"] for row in state["best"]):
                    state["state_dict"] = copy.deepcopy(classifiers[i].state_dict())
                if result["acc1"] > state["best"][i]["acc1"]:
                    state["best"][i] = result | {"epoch": epoch}
            top = max(results, key=lambda result: result["acc1"])
            log(f"epoch {epoch}: top-1 {top['acc1']:.2f} %, top-5 {top['acc5']:.2f} %")

        state["epoch"] = epoch + 1
        if is_main_process():
            saved = {name: piece.state_dict() for name, piece in pieces.items()}
            save_checkpoint(state | saved, output_dir / "checkpoint.pth.tar")
            with open(output_dir / "log_linear.txt", "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    return state["best"]


if __name__ == "__main__":
    cli.run_script(main, parse_args())
