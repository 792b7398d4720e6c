"""Evaluate frozen features with a weighted k-nearest-neighbour classifier.

    python eval_knn.py --pretrained_weights runs/vit_small/checkpoint.pth --data_path /data/imagenet

Architecture, patch size and image size come from the checkpoint. The classifier is that of Wu et
al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018),
https://arxiv.org/abs/1805.01978. `torchrun` shares the feature extraction among GPUs.

Shapes: N training images, M test images, D features, k neighbours.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from support import cli
from support.cli import bool_flag
from support.data import open_train_and_val
from support.distributed import all_gather_object, fix_random_seeds, init_distributed_mode, is_main_process
from support.errors import UserError
from support.features import extract_features
from support.logger import log
from support.weights import load_backbone, load_file
from utils import MultiCropWrapper


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; a parent for other parsers, hence without `--help` of its own."""
    parser = cli.ArgumentParser("Evaluation with weighted k-NN on ImageNet", add_help=False)
    # fmt: off
    parser.add_argument("--batch_size_per_gpu", default=128, type=int,
        help="images per process and forward pass")
    parser.add_argument("--nb_knn", default=[10, 20, 100, 200], nargs="+", type=int,
        help="numbers of neighbours; 20 is usually best")
    parser.add_argument("--temperature", default=0.07, type=float,
        help="of the vote: a neighbour weighs exp(similarity / temperature)")
    cli.add_weights_flags(parser)
    parser.add_argument("--image_size", default=None, type=cli.number(int, at_least=1),
        help="pixels per side (default: what the weights were trained with, else 224)")
    parser.add_argument("--use_cuda", default=True, type=bool_flag,
        help="keep the features on the GPU, where there is one; turn off if they do not fit into its "
             "memory")
    parser.add_argument("--dump_features", default=None, help="folder to save the features in")
    parser.add_argument("--load_features", default=None,
        help="folder of features saved before: skips their computation")
    parser.add_argument("--seed", default=0, type=int,
        help="decides the weights of --pretrained_weights random")
    cli.add_data_flags(parser, "folder with train/ and val/ of class folders",
        "evaluate on the drawn shapes of main_dino.py --demo")
    cli.add_launch_flags(parser)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return cli.ArgumentParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]).parse_args(
        argv
    )


def check_args(args: argparse.Namespace) -> None:
    """UserError for values that make no sense."""
    cli.check_least(args, 1, "batch_size_per_gpu")
    cli.check_least(args, 0, "num_workers", "seed")
    if min(args.nb_knn) < 1:
        raise UserError("must be at least 1", f"--nb_knn {min(args.nb_knn)}", "raise it")
    if not 0 < args.temperature < math.inf:
        raise UserError("must be above 0", f"--temperature {args.temperature}", "try 0.07")


CHUNK = 2**25  # similarities at a time; 128 MiB


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    T: float,
    num_classes: int,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 in percent for each k, by one search for the most neighbours.

    Features are L2-normalised, (N, D) and (M, D). A neighbour's vote weighs exp(cosine / T).
    """
    correct = {k: torch.zeros(2, dtype=torch.long, device=test_features.device) for k in ks}
    rows = max(1, min(CHUNK // len(train_features), len(test_features)))
    room = train_features.new_empty(rows, len(train_features))  # got once: fresh memory is slow on a CPU
    for chunk, target in zip(test_features.split(rows), test_labels.split(rows), strict=True):
        similarities = torch.mm(chunk, train_features.T, out=room[: len(chunk)])
        similarity, neighbour = similarities.topk(max(ks), dim=1)  # (rows, k)
        # Less the nearest one's: the ranking stays, and no vote grows beyond float32 for a small T.
        vote, label = ((similarity - similarity[:, :1]) / T).exp(), train_labels[neighbour]
        for k in ks:
            votes = vote.new_zeros(len(chunk), num_classes).scatter_add_(1, label[:, :k], vote[:, :k])
            ranking = votes.sort(dim=1, descending=True).indices
            hit = ranking == target[:, None]
            correct[k] += torch.stack([hit[:, :1].sum(), hit[:, : min(5, k)].sum()])
    return {k: tuple(100.0 * n / len(test_labels) for n in c.tolist()) for k, c in correct.items()}


def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    T: float,
    num_classes: int = 1000,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of the weighted k-NN classifier."""
    data = train_features, train_labels, test_features, test_labels
    return knn_accuracies(*data, [k], T, num_classes)[k]


def knn_top1(
    model: Callable[[Tensor], Tensor],
    train: Dataset,
    val: Dataset,
    image_size: int,
    device: torch.device,
    num_workers: int = 0,
    k: int = 20,
) -> float:
    """Top-1 accuracy in percent, on every rank, of `model` as in `extract_features`."""
    data: list[Tensor] = []
    for images in (train, val):
        data += extract_features(model, images, image_size, device, num_workers=num_workers)
    num_classes = int(torch.cat([data[1], data[3]]).max()) + 1
    return knn_classifier(*data, min(k, len(train)), T=0.07, num_classes=num_classes)[0]


class PeriodicKNN:
    """20-NN accuracy of networks while they train: every so many epochs, for about a `share` of the time.

    Training goes on with the bits that it would have had without. Where a rank is asked to stop, the
    evaluation is left out: the weights are saved, and there may be little time.
    """

    class Stopped(Exception):
        """A rank was asked to stop."""

    def __init__(
        self,
        train: Dataset,
        val: Dataset,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype | None,
        num_workers: int,
        every: int,
        share: float,
        stop_asked: Callable[[], bool],
    ):
        """`stop_asked` says whether this rank was asked to stop."""
        self.train, self.val, self.image_size, self.device = train, val, image_size, device
        self.dtype, self.num_workers, self.every, self.share = dtype, num_workers, every, share
        self.stop_asked = stop_asked
        self.begun, self.spent = time.perf_counter(), 0.0

    def __call__(self, epoch: int, networks: dict[str, MultiCropWrapper]) -> dict[str, float]:
        """{"knn_" + name: top-1 in percent}; nothing if it is not yet time. All ranks come here."""
        begun = time.perf_counter()
        late = self.spent > self.share * (begun - self.begun)  # each rank has its own clock
        if (epoch + 1) % self.every or all_gather_object(late)[0]:
            return {}
        try:
            found = {f"knn_{name}": self.top1(network) for name, network in networks.items()}
        except self.Stopped:
            return {}
        self.spent += time.perf_counter() - begun
        log(f"epoch {epoch}  " + "  ".join(f"{name} {top1:.1f}" for name, top1 in found.items()))
        return found

    def top1(self, network: MultiCropWrapper) -> float:
        """In percent. Raises Stopped, on all ranks together."""

        def features(images: Tensor) -> Tensor:
            if any(all_gather_object(self.stop_asked())):
                raise self.Stopped
            return network.backbone.forward(images)  # as such: what is compiled is compiled for training

        training = network.training
        network.eval()
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                return knn_top1(
                    features, self.train, self.val, self.image_size, self.device, self.num_workers
                )
        finally:
            network.train(training)


FEATURE_FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def dump_features(folder: str, tensors: Sequence[Tensor]) -> None:
    """Save train and test features and labels in the published code's files."""
    for name, tensor in zip(FEATURE_FILES, tensors, strict=True):
        torch.save(tensor.cpu(), Path(folder) / name)


def load_features(folder: str, device: torch.device) -> list[Tensor]:
    """What `dump_features` saved. Raises UserError."""
    train, _, test, _ = tensors = [load_file(Path(folder) / name) for name in FEATURE_FILES]
    shapes = [tuple(tensor.shape) if isinstance(tensor, Tensor) else () for tensor in tensors]
    fit = [len(shape) for shape in shapes] == [2, 1, 2, 1] and all(map(min, shapes))
    (N, D), n, (M, d), m = shapes if fit else ((0, 0), (), (1, 1), ())
    if not (n == (N,) and m == (M,) and D == d):
        what = f"features and labels do not fit together: {', '.join(map(str, shapes))}"
        raise UserError(what, f"--load_features {folder}", "dump anew")
    if not (train.isfinite().all() and test.isfinite().all()):
        raise UserError("features are not finite", f"--load_features {folder}", "dump anew")
    return [tensor.to(device) for tensor in tensors]


def compute_features(args: argparse.Namespace, device: torch.device, keep_on: torch.device) -> list[Tensor]:
    """Train and test features and labels, from images and weights named by the flags."""
    train, test = open_train_and_val(args.data_path, args.dataset, args.download, args.demo)
    frozen = load_backbone(
        args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.image_size
    )
    log(frozen.description)
    model = frozen.network.to(device)
    tensors: list[Tensor] = []
    for images in (train, test):
        tensors += extract_features(
            model,
            images,
            frozen.image_size,
            device,
            args.batch_size_per_gpu,
            args.num_workers,
            keep_on=keep_on,
        )
    return tensors


def main(args: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """Compute or load features, classify, print a line for each k; {k: (top1, top5)}."""
    check_args(args)
    device = init_distributed_mode(args.dist_url)
    keep_on = device if args.use_cuda else torch.device("cpu")
    fix_random_seeds(args.seed)
    if args.dump_features:  # now: its folder is needed when all the work is done
        cli.make_folder(args.dump_features, "dump_features")
    if args.load_features:
        tensors = load_features(args.load_features, keep_on)
    else:
        tensors = compute_features(args, device, keep_on)
    if not is_main_process():
        return {}
    if args.dump_features:
        dump_features(args.dump_features, tensors)
    train_features, train_labels, test_features, test_labels = tensors
    most = len(train_features)
    ks = list(dict.fromkeys(min(k, most) for k in args.nb_knn))
    if max(args.nb_knn) > most:
        log(f"note: --nb_knn limited to the {most} training images")
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    accuracies = knn_accuracies(
        train_features, train_labels, test_features, test_labels, ks, args.temperature, num_classes
    )
    for k, (top1, top5) in accuracies.items():
        log(f"{k}-NN classifier result: Top1: {top1}, Top5: {top5}")
    return accuracies


if __name__ == "__main__":
    cli.run_script(main, parse_args())
