"""Train DINO: self-distillation with no labels (Caron et al., 2021).

    python main_dino.py --demo                                          # minutes on a CPU
    torchrun --nproc_per_node=8 main_dino.py --arch vit_small \\
        --data_path /data/imagenet/train --output_dir runs/vits16    # one node, 8 GPUs
    srun python main_dino.py ...                                        # in a SLURM job

A run resumes from `checkpoint.pth` in its `--output_dir` when there is one. `@FILE` stands for the flags in a
file: `recipes/` has some, and a run writes its own to `args.txt` in its folder.
"""

import argparse
import contextlib
import copy
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

import eval_knn
import utils
from eval_segmentation import MaskedShapes, measure_attention, resized_batches
from support import backbones, cli
from support.attention import attention_map
from support.checks import check_on_first_rank, open_checked
from support.cli import bool_flag, number
from support.curves import Curves
from support.data import (
    ImageFiles,
    Images,
    Source,
    describe,
    digest,
    name_and_reason,
    on_all_ranks,
    open_training_images,
)
from support.distributed import (
    all_gather_object,
    barrier,
    fix_random_seeds,
    get_rank,
    get_world_size,
    is_main_process,
    launched_as,
    only_one_in_process,
    same_error_on_all_ranks,
)
from support.errors import UserError, counted, reason_of
from support.estimates import SAMPLE, estimate_normalization, estimate_range, sample_values
from support.files import replacing
from support.formats import ImageFormat, pairs
from support.loading import EpochBatches, Loader, TrainingViews, num_cores, to_device
from support.logger import MetricLogger, log
from support.monitor import Monitor
from support.pictures import as_picture, check_free, contact_sheet, glow, save_picture, titled_rows
from support.pixels import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOST_CHANNELS,
    Size,
    denormalize,
    eval_transform,
    height_and_width,
    normalized_views,
    size_words,
)
from support.restart import Run
from support.shapes import USUAL, Shapes
from support.weights import init_from, load_backbone
from utils import PAPER, CollapseWatch, DataAugmentationDINO, DINOHead, DINOLoss, MultiCropWrapper, Recipe
from vision_transformer import VITS, VisionTransformer


def demo_defaults() -> dict:
    """Defaults of flags under `--demo`: a recipe for a tiny network and tiny images, for minutes on a CPU."""
    return dict(
        arch="vit_nano",
        patch_size=16,
        out_dim=64,
        head_hidden_dim=512,
        head_bottleneck_dim=128,
        momentum_teacher=0.96,
        centering="sinkhorn",
        warmup_teacher_temp=0.01,  # with the paper's 0.04, so small a network collapses
        teacher_temp=0.01,
        precision="fp32",
        weight_decay=0.04,
        weight_decay_end=0.04,
        batch_size_per_gpu=16,
        epochs=5,
        freeze_last_layer=0,
        lr=0.008,
        warmup_epochs=1,
        min_lr=1e-5,
        drop_path_rate=0.0,
        global_crops_scale=(0.5, 1.0),
        local_crops_number=2,
        local_crops_scale=(0.25, 0.5),
        global_crops_size=96,
        local_crops_size=48,
        jitter=(0.2, 0.2, 0.1, 0.05),  # the paper's hides small textured objects: hardly anything is learned
        blur_sigma=(0.1, 1.0),
        solarize_p=(0.0, 0.0, 0.0),
        num_workers=1,
        cpu_threads=max(1, num_cores() - 1),  # one core draws the images
        output_dir="demo_run",
        saveckp_freq=0,
    )


def get_args_parser() -> argparse.ArgumentParser:
    """All training flags. A parent for other parsers, so it has no `--help`."""
    parser = cli.ArgumentParser(add_help=False)

    # fmt: off
    group = parser.add_argument_group("model")
    group.add_argument("--arch", default="vit_small",
        help="vit_nano, vit_tiny, vit_small, vit_base, or any torchvision classifier or timm "
             "model by name")
    group.add_argument("--patch_size", default=16, type=number(int, at_least=1),
        help="patch size in pixels, for our ViTs only; smaller patches learn better features but cost more "
             "time and memory")
    group.add_argument("--out_dim", default=65536, type=number(int, at_least=2),
        help="number of prototypes; small datasets need fewer")
    group.add_argument("--norm_last_layer", default=True, type=bool_flag,
        help="keep the prototypes at unit length: more stable; false can be better for ViT-S, not for ViT-B")
    group.add_argument("--momentum_teacher", default=0.996, type=number(float, at_least=0, at_most=1),
        help="first value of the teacher's EMA momentum, which rises to 1; raise it for small batches in "
             "long runs (e.g. 0.9995 for 256 images), lower it for a few thousand steps (e.g. 0.98)")
    group.add_argument("--use_bn_in_head", default=False, type=bool_flag,
        help="batch norm in the projection head: helps small networks that collapse at the start")
    group.add_argument("--head_hidden_dim", default=2048, type=number(int, at_least=1),
        help="width of the projection head's MLP; narrower for small networks and data, e.g. 512")
    group.add_argument("--head_bottleneck_dim", default=256, type=number(int, at_least=1),
        help="width of the head's output before the prototypes; narrower for few of them, e.g. 128")

    group = parser.add_argument_group("ablations (paper, Section 5)")
    group.add_argument("--teacher_update", default="ema", choices=["ema", "epoch", "copy"],
        help="how the teacher follows the student: ema = moving average; epoch = copied after each epoch "
             "(learns less); copy = copied after each step (collapses)")
    group.add_argument("--centering", default="ema", choices=["ema", "none", "sinkhorn"],
        help="how the teacher's outputs are centred: ema = running mean; none = not at all (collapses); "
             "sinkhorn = Sinkhorn-Knopp over the batch")

    group = parser.add_argument_group("teacher temperature")
    group.add_argument("--warmup_teacher_temp", default=0.04, type=number(float, above=0),
        help="value at the start of the warm-up, if there is one; lower it when the loss does not fall at "
             "the start")
    group.add_argument("--teacher_temp", default=0.04, type=number(float, above=0),
        help="value after the warm-up; above 0.07 training tends to be unstable")
    group.add_argument("--warmup_teacher_temp_epochs", default=0, type=number(float, at_least=0),
        help="epochs of linear warm-up, or a fraction of one (the paper's long runs: 30)")
    group.add_argument("--adapt_teacher_temp", default=0.0, type=number(float, at_least=0),
        help="lower the temperature while the teacher's outputs deviate from their mean by less than this "
             "many temperatures; 2 prevents the uniform collapse of small networks, best with --centering "
             "sinkhorn; 0: off")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--use_fp16", default=True, type=bool_flag,
        help="float16 autocast with loss scaling on CUDA; turn off if the loss becomes NaN; "
             "--precision overrides it")
    group.add_argument("--precision", default=None, choices=cli.PRECISIONS,
        help="autocast precision on any device; if not given, --use_fp16 decides on CUDA, and other "
             "devices take fp32")
    group.add_argument("--weight_decay", default=0.04, type=number(float, at_least=0),
        help="first value; weights only, not biases and norms; for convnets small, and the same at the end, "
             "e.g. 1e-4")
    group.add_argument("--weight_decay_end", default=0.4, type=number(float, at_least=0),
        help="last value, reached along a cosine; a larger one helps ViTs")
    group.add_argument("--clip_grad", default=3.0, type=number(float, at_least=0),
        help="largest norm of each parameter's gradient; lower it, e.g. to 0.3, if the loss becomes NaN; 0 "
             "turns clipping off")
    group.add_argument("--batch_size_per_gpu", default=64, type=number(int, at_least=1),
        help="images per process and forward pass: as many as fit; the learning rate follows")
    group.add_argument("--accum_steps", default=1, type=number(int, at_least=1),
        help="accumulate gradients over this many batches per update, to simulate a batch that does not fit "
             "into memory; batch norm, Sinkhorn-Knopp, an adapted temperature and drop path see one batch at "
             "a time")
    group.add_argument("--epochs", default=100, type=number(int, at_least=1, at_most=10**6),
        help="passes over the data; 100 for a first result, 300 and more are better")
    group.add_argument("--max_steps", default=0, type=number(int, at_least=0),
        help="stop after this many steps of the schedule, e.g. for a trial; 0: never")
    group.add_argument("--freeze_last_layer", default=1, type=number(float, at_least=0),
        help="epochs, or a fraction of one, in which the prototypes stay fixed; raise it if the loss of "
             "a large network does not fall, 0 for small ones that collapse at the start")
    group.add_argument("--lr", default=0.0005, type=number(float, at_least=0),
        help="peak learning rate for 256 images a step; scaled linearly with the batch of all processes")
    group.add_argument("--warmup_epochs", default=10, type=number(float, at_least=0),
        help="epochs of linear warm-up of the learning rate, or a fraction of one")
    group.add_argument("--min_lr", default=1e-6, type=number(float, at_least=0),
        help="last learning rate, reached along a cosine; rarely needs a change")
    group.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"],
        help="adamw for ViTs, sgd or lars for convnets")
    group.add_argument("--drop_path_rate", default=0.1, type=number(float, at_least=0, at_most=1),
        help="stochastic depth of the student's last block; 0 for small networks or short runs; "
             "torchvision's models keep their own, in the teacher too")

    group = parser.add_argument_group("crops")
    group.add_argument("--global_crops_scale", default=(0.4, 1.0),
        type=number(float, above=0, at_most=1), nargs=2, metavar=("MIN", "MAX"),
        help="share of the image's area; 0.14 1 without local crops")
    group.add_argument("--local_crops_number", default=8, type=number(int, at_least=0),
        help="small views per image, for the student only; 0 turns multi-crop off")
    group.add_argument("--local_crops_scale", default=(0.05, 0.4),
        type=number(float, above=0, at_most=1), nargs=2, metavar=("MIN", "MAX"),
        help="share of the image's area; larger where objects are small or fill the image")
    cli.add_size_flag(group, "--global_crops_size", 224,
        "pixels per side of a global view, a multiple of the patch; smaller for small images; height and "
        "width for views that are not square")
    cli.add_size_flag(group, "--local_crops_size", 96,
        "pixels per side of a local view, or its height and width, as for --global_crops_size")

    share = number(float, at_least=0, at_most=1)
    group = parser.add_argument_group("augmentation", "G1, G2, LOCAL: of the first global view, the second, "
        "and the local ones; --preview shows what the flags do to your images")
    group.add_argument("--jitter", default=PAPER.jitter, type=number(float, at_least=0), nargs=4,
        metavar=("B", "C", "S", "H"),
        help="strengths for brightness, contrast, saturation and hue, as in torchvision's ColorJitter; "
             "hue at most 0.5; lower where colour tells the objects apart")
    group.add_argument("--jitter_p", default=PAPER.jitter_p, type=share, help="probability of --jitter")
    group.add_argument("--gray_p", default=PAPER.gray_p, type=share,
        help="probability of a grey view; 0 for grey images and where colour matters most")
    group.add_argument("--blur_p", default=PAPER.blur_p, type=share, nargs=3, metavar=("G1", "G2", "LOCAL"),
        help="probability of Gaussian blur; lower where fine texture tells the objects apart")
    group.add_argument("--blur_sigma", default=PAPER.blur_sigma, type=number(float, at_least=0, at_most=100),
        nargs=2, metavar=("MIN", "MAX"),
        help="standard deviation of the blur in pixels of the view; smaller for small views")
    group.add_argument("--solarize_p", default=PAPER.solarize_p, type=share, nargs=3,
        metavar=("G1", "G2", "LOCAL"),
        help="probability that levels from 128 on are inverted; 0 where bright and dark have a meaning")
    group.add_argument("--hflip_p", default=PAPER.hflip_p, type=share,
        help="probability that left and right change places; 0 where they differ, as in text")
    group.add_argument("--vflip_p", default=PAPER.vflip_p, type=share,
        help="probability that top and bottom change places; 0.5 for images from above or through a "
             "microscope")
    group.add_argument("--quarter_turns", default=PAPER.quarter_turns, type=bool_flag,
        help="turn each view by 0, 90, 180 or 270 degrees, for images without a top side; together with "
             "--hflip_p 0.5 all eight orientations are equally frequent")
    group.add_argument("--crop_aspect", default=PAPER.crop_aspect,
        type=number(float, at_least=1e-3, at_most=1e3), nargs=2, metavar=("MIN", "MAX"),
        help="width over height of a crop before it is resized, divided by that of the view; 1 1 where "
             "shapes must not be distorted")

    cli.add_data_flags(parser,
        "folder, .tar or .zip of images, with or without class folders, or a text file that lists images",
        "train a small network on drawn shapes and evaluate it; takes minutes on a CPU, needs no data",
        "part of the images to train on: a split of --dataset (by default its unlabelled images, else its "
        "training split), or a folder, archive or list in --data_path, e.g. train for train.tar")

    group = parser.add_argument_group("images", "meaning of the pixel values; the checkpoint records it "
        "for other scripts")
    group.add_argument("--in_chans", default=3, type=number(int, at_least=1, at_most=MOST_CHANNELS),
        help="number of channels of the images; 1 makes RGB images grey, other numbers need TIFF (with "
             "tifffile), .npy or RGBA; unless 3, hue, saturation and --gray_p have no effect")
    group.add_argument("--value_range", default=None, type=cli.number_or_auto, nargs="+",
        metavar=("LOW", "HIGH"),
        help="values that become the grey levels 0 and 255, for 16-bit and floating-point images: one pair, "
             "or one for each channel; auto: percentiles 0.1 and 99.9 of each channel, from up to 256 images "
             "evenly spread over the data (default: 8-bit values as they are)")
    group.add_argument("--mean", default=IMAGENET_MEAN, type=cli.number_or_auto, nargs="+",
        help="mean of each channel, for levels in [0, 1]; auto: estimated as for --value_range, the default "
             "unless --in_chans is 3")
    group.add_argument("--std", default=IMAGENET_STD, type=cli.number_or_auto, nargs="+",
        help="standard deviation; see --mean")

    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=".",
        help="folder for checkpoints and log.txt; a run resumes from the checkpoint in it")
    group.add_argument("--preview", default="", metavar="FILE",
        help="draw the training views of a dozen images to this PNG, then exit")
    group.add_argument("--init_from", default="",
        help="start a new run from the teacher's weights in a file, or from a published model by name; "
             "ignored when the run resumes")
    group.add_argument("--saveckp_freq", default=20, type=number(int, at_least=0),
        help="epochs between numbered checkpoints, which are kept; 0: none")
    group.add_argument("--save_every_steps", default=0, type=number(int, at_least=0),
        help="steps between checkpoints within an epoch, for long epochs on machines that die without a "
             "signal; 0: after each epoch only")
    group.add_argument("--allow_changed_args", action="store_true",
        help="resume even if flags, the number of processes or the images have changed")
    group.add_argument("--knn_every", default=0, type=number(int, at_least=0),
        help="epochs between k-NN evaluations of student and teacher, which are written to log.txt and do "
             "not change the training; 0: none")
    group.add_argument("--knn_data", default="",
        help="folder with train/ and val/ of class folders to evaluate on; not needed with --dataset or "
             "--demo")
    group.add_argument("--knn_share", default=0.1, type=number(float, at_least=0, at_most=1),
        help="skip an evaluation while evaluations have used more than this share of the run time; 1: never "
             "skip")
    group.add_argument("--tensorboard", action="store_true",
        help="also write the numbers of log.txt for TensorBoard, to OUTPUT_DIR/tensorboard")
    group.add_argument("--augment_on", default="worker", choices=["worker", "device"],
        help="where to apply colour augmentation: worker, or device if the data workers are the bottleneck")
    group.add_argument("--compile", action="store_true",
        help="torch.compile student and teacher: minutes at the start, faster steps on GPUs")
    group.add_argument("--grad_checkpointing", action="store_true",
        help="recompute activations instead of keeping them: less memory, a third more time")
    group.add_argument("--cpu_threads", default=0, type=number(int, at_least=0, below=2**10),
        help="threads for computing on a CPU; 0: torch decides; fewer leave cores to the workers")
    group.add_argument("--seed", default=0, type=cli.seed,
        help="decides weights, order, views and drop path; change it for an independent run")
    cli.add_launch_flags(group)
    # fmt: on
    return parser


AUTO = ["auto"]  # a value of --value_range, --mean or --std

# Flags that may differ between a run and its restart: they do not change the maths.
FREE_FLAGS = cli.LOCAL_FLAGS | {
    "output_dir", "saveckp_freq", "save_every_steps", "max_steps", "allow_changed_args", "demo", "use_fp16",
    "precision", "init_from", "augment_on", "compile", "grad_checkpointing", "knn_every", "knn_share",
    "tensorboard", "preview", "split",
}  # fmt: skip


def no_effect(a: argparse.Namespace, parser: argparse.ArgumentParser) -> list[tuple[str, object, str]]:
    """Rules for `cli.warn_no_effect`: a flag, whether the flags `a` leave it without effect, and why.

    `parser` has the defaults.
    """

    def only_local_differs(name: str) -> bool:  # only the value of local views, and there are none
        return not a.local_crops_number and tuple(getattr(a, name)[:2]) == parser.get_default(name)[:2]

    return [
        ("warmup_teacher_temp", not a.warmup_teacher_temp_epochs and a.warmup_teacher_temp != a.teacher_temp,
         "--warmup_teacher_temp_epochs is 0"),
        ("momentum_teacher", a.teacher_update != "ema", "--teacher_update is not ema"),
        ("local_crops_size", not a.local_crops_number, "--local_crops_number is 0"),
        ("local_crops_scale", not a.local_crops_number, "--local_crops_number is 0"),
        ("patch_size", a.arch not in VITS, "it is for our ViTs only"),
        ("jitter", not a.jitter_p, "--jitter_p is 0"),
        ("jitter_p", not any(a.jitter), "--jitter is 0 0 0 0"),
        ("blur_p", not any(a.blur_sigma), "--blur_sigma is 0 0"),
        ("blur_p", only_local_differs("blur_p"), "--local_crops_number is 0"),
        ("blur_sigma", not any(a.blur_p[: 3 if a.local_crops_number else 2]), "--blur_p is 0"),
        ("solarize_p", only_local_differs("solarize_p"), "--local_crops_number is 0"),
        ("vflip_p", a.quarter_turns and a.hflip_p == 0.5,
         "--quarter_turns with --hflip_p 0.5 gives all orientations"),
        ("gray_p", a.in_chans != 3 and a.gray_p, "it needs three channels"),
        ("use_fp16", a.precision, "--precision overrides it"),
        ("warmup_teacher_temp_epochs", a.warmup_teacher_temp == a.teacher_temp,
         "--warmup_teacher_temp and --teacher_temp are equal"),
        ("knn_every", a.knn_every > a.epochs, "--epochs is smaller"),
        ("knn_data", not a.knn_every, "--knn_every is 0"),
        ("knn_share", not a.knn_every, "--knn_every is 0"),
        ("dist_url", launched_as()[1] == 1, "there is one process"),
    ]  # fmt: skip


def parse_args(
    argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Parse the command line; under `--demo`, flags that are not given take the demo's values.

    The defaults of `--mean` and `--std` are for three channels; for others they are `auto`. `parser` is the
    parser of a program with more flags.
    """
    if parser is None:
        parser = cli.ArgumentParser(__doc__, parents=[get_args_parser()])
    set_dependent_defaults(parser, parser.parse_known_args(argv)[0])
    return parser.parse_args(argv)


def set_dependent_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the defaults that follow from the flags `--demo` and `--in_chans` in `args`."""
    if args.demo:
        parser.set_defaults(**demo_defaults())
    if args.in_chans != 3:
        parser.set_defaults(mean=AUTO, std=AUTO)


def parser_for(args: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser with the defaults that hold for these flags."""
    parser = get_args_parser()
    set_dependent_defaults(parser, args)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Check combinations of flags, and shorten default warm-ups to `--epochs`. Raises UserError."""
    for name in ("global_crops_scale", "local_crops_scale", "blur_sigma", "crop_aspect"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError("MIN is larger than MAX", f"--{name} {low} {high}", "give MIN <= MAX")
    if args.jitter[3] > 0.5:
        where = f"--jitter {' '.join(map(str, args.jitter))}"
        raise UserError("the hue changes by at most 0.5", where, "give H <= 0.5")
    backbones.check_known(args.arch)
    if args.arch in VITS:
        for size, name in zip(crop_sizes(args), ("global_crops_size", "local_crops_size"), strict=False):
            backbones.check_divides(name, size, args.patch_size)
    check_local_views(args)
    if args.knn_every and not (args.knn_data or args.dataset or args.demo):
        raise UserError("needs labelled images", "--knn_every", "give --knn_data, with train/ and val/")
    if args.demo and args.init_from:
        what = "the demo starts from random weights"
        raise UserError(what, f"--init_from {args.init_from}", "leave it out")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("needs TensorBoard", "--tensorboard", "pip install tensorboard")
    check_format(args)
    parser = parser_for(args)
    cli.warn_no_effect(args, parser, no_effect(args, parser))

    for name in WARM_UPS:
        value = getattr(args, name)
        if not is_too_long(name, value, args.epochs):
            continue
        if value != parser.get_default(name):
            bound = "less than" if name == "freeze_last_layer" else "at most"
            fix = f"give {bound} {args.epochs}"
            raise UserError(f"too long for --epochs {args.epochs}", f"--{name} {value:g}", fix)
        setattr(args, name, args.epochs / 10)  # as long as in the published recipe, or shorter
        log(f"warning: --{name} shortened from {value} to {args.epochs / 10:g}, as --epochs is {args.epochs}")


WARM_UPS = "warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer"


def is_too_long(warm_up: str, value: float, epochs: int) -> bool:
    """Whether a warm-up does not fit into the training: a last layer that stays frozen learns nothing."""
    return value > epochs or (value == epochs and warm_up == "freeze_last_layer")


def shortened(args: argparse.Namespace) -> list[str]:
    """The names of the warm-ups that `check_args` has shortened, as their value shows."""
    parser = parser_for(args)
    found = (name for name in WARM_UPS if is_too_long(name, parser.get_default(name), args.epochs))
    return [name for name in found if getattr(args, name) == args.epochs / 10]


def check_local_views(args: argparse.Namespace) -> None:
    """Warn of local views that are larger than the global ones, in pixels or in their part of the image."""
    if not args.local_crops_number:
        return
    whole, part = (math.prod(height_and_width(size)) for size in crop_sizes(args))
    if part > whole:
        size = size_words(args.local_crops_size)
        log(f"warning: local views are larger than global ones: --local_crops_size {size}")
    if sum(args.local_crops_scale) > sum(args.global_crops_scale):
        scale = " ".join(map(str, args.local_crops_scale))
        log(f"warning: local views show more of an image than global ones: --local_crops_scale {scale}")


# ---------------------------------------------------------------------------------------------
# Format of the images
# ---------------------------------------------------------------------------------------------


def check_format(args: argparse.Namespace) -> None:
    """Check the flags of the images' format. Raises UserError."""
    count = args.in_chans
    for name in ("value_range", "mean", "std"):
        values = getattr(args, name)
        if values is None or values == AUTO:
            continue
        where = f"--{name} {' '.join(map(str, values))}"
        if "auto" in values:
            raise UserError("mixes auto and numbers", where, "give auto alone, or numbers only")
        if name == "value_range":
            pairs(values, count)
        elif len(values) != count:
            what = f"{counted(len(values), 'number')} for {counted(count, 'channel')}"
            raise UserError(what, where, "give one for each channel")
        elif name == "std" and min(values) <= 0:
            raise UserError("deviations must be above 0", where, "give numbers above 0")
        elif not (0 <= min(values) and max(values) <= 1):
            raise UserError("must be from 0 to 1", where, "divide by 255 if they are 8-bit levels")
    if count != 3:
        log(f"images of {counted(count, 'channel')}: hue, saturation and grey views are left out")


def image_format(args: argparse.Namespace) -> ImageFormat:
    """The format that the flags describe."""
    return ImageFormat(args.in_chans, () if args.value_range == AUTO else pairs(args.value_range))


def settle_format(args: argparse.Namespace, images: Images, run: Run | None = None) -> None:
    """Replace `auto` by numbers: those of the run to resume, else estimates from a sample of the images.

    All ranks call this together. Raises UserError.
    """
    unknown = [name for name in ("value_range", "mean", "std") if getattr(args, name) == AUTO]
    if unknown:
        with same_error_on_all_ranks():
            found = find_format(args, images, run, unknown) if is_main_process() else {}
        for name, numbers in all_gather_object(found)[0].items():
            setattr(args, name, numbers)
    if isinstance(images, ImageFiles):
        images.form = image_format(args)


def is_numbers(value: object) -> bool:
    """Whether a recorded flag has numbers, not e.g. "auto" or what another program recorded."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(x, float) for x in value)


def find_format(args: argparse.Namespace, images: Images, run: Run | None, names: list[str]) -> dict:
    """Numbers for these flags, as `settle_format` says; logs them. Raises UserError."""
    recorded = run.recorded_args() if run else {}
    known: dict = {name: recorded.get(name) for name in names}
    if all(is_numbers(value) for value in known.values()):
        found, origin = known, "from the run to resume"
    else:
        values = sample_values(images, args.in_chans)
        limits = estimate_range(values, args.in_chans) if "value_range" in names else args.value_range
        found, origin = {"value_range": limits}, f"estimated from up to {SAMPLE} images"
        if {"mean", "std"} & set(names):
            form = ImageFormat(args.in_chans, pairs(limits))
            found["mean"], found["std"] = estimate_normalization(values, form)
        found = {name: found[name] for name in names}
    words = " ".join(f"--{name} {' '.join(map(str, numbers))}" for name, numbers in found.items())
    log(f"{origin}: {words}")
    return found


# ---------------------------------------------------------------------------------------------
# Builders
# ---------------------------------------------------------------------------------------------


def crop_sizes(args: argparse.Namespace) -> list[Size]:
    """Size of the global views and, if there are any, of the local views."""
    sizes = [args.global_crops_size, args.local_crops_size]
    return sizes if args.local_crops_number else sizes[:1]


def build_augmentation(args: argparse.Namespace) -> DataAugmentationDINO:
    """Build the augmentation that the flags of crops and augmentation describe."""
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe._fields})
    return DataAugmentationDINO(
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
        args.global_crops_size,
        args.local_crops_size,
        recipe,
    )


class Steps(NamedTuple):
    """How many images a step takes, and how many steps there are."""

    per_rank: int  # images of one process
    batch: int  # images of all processes
    per_epoch: int
    last: int  # the step at which the run ends


def count_steps(args: argparse.Namespace, num_images: int) -> Steps:
    """Count the steps; log which flags they leave without effect.

    Raises UserError if the images do not fill one batch of all processes.
    """
    per_rank = args.batch_size_per_gpu * args.accum_steps
    batch = per_rank * get_world_size()
    if num_images < batch:
        what = f"a batch of {batch} over all processes is larger than the dataset of {num_images}"
        fix = "lower it" + " or --accum_steps" * (args.accum_steps > 1)
        raise UserError(what, f"--batch_size_per_gpu {args.batch_size_per_gpu}", fix)
    per_epoch = EpochBatches(num_images, per_rank, args.seed).steps_per_epoch
    whole = args.epochs * per_epoch
    last = min(args.max_steps or whole, whole)
    if (last - 1) / per_epoch < args.freeze_last_layer:
        log(f"warning: --freeze_last_layer keeps the prototypes frozen for all {last} steps")
    if args.save_every_steps >= min(per_epoch, last):
        log(f"warning: --save_every_steps has no effect: an epoch has {per_epoch} steps, the run {last}")
    return Steps(per_rank, batch, per_epoch, last)


def build_views(args: argparse.Namespace, images: Images) -> TrainingViews:
    """Build the dataset of the images' views."""
    augmentation = build_augmentation(args)
    make_views = augmentation.crops if args.augment_on == "device" else augmentation.views
    return TrainingViews(images, make_views, args.seed)


def build_loader(
    args: argparse.Namespace,
    images: Images,
    steps: Steps,
    first_step: int,
    device: torch.device,
    stop_asked: Callable[[], bool],
) -> Loader:
    """Build the loader of this rank's views, from `first_step` to the end of the run."""
    batches = EpochBatches(len(images), steps.per_rank, args.seed, first_step, steps.last)
    return Loader(build_views(args, images), batches, args.num_workers, device, stop_asked)


def build_networks(args: argparse.Namespace) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Build student and teacher with random weights; the teacher has no gradients and no drop path.

    Only torchvision's networks keep the drop path of their name, in the teacher too.
    """
    head = partial(
        DINOHead,
        out_dim=args.out_dim,
        use_bn=args.use_bn_in_head,
        norm_last_layer=args.norm_last_layer,
        hidden_dim=args.head_hidden_dim,
        bottleneck_dim=args.head_bottleneck_dim,
    )
    # Both backbones, then both heads: in another order, a seed would give other weights.
    (student_backbone, _), (teacher_backbone, embed_dim) = (
        backbones.build_backbone(
            args.arch, args.patch_size, args.global_crops_size, drop_path_rate, args.in_chans
        )
        for drop_path_rate in (args.drop_path_rate, 0.0)
    )
    backbones.check_crop_sizes(teacher_backbone, args.arch, embed_dim, crop_sizes(args), args.in_chans)
    if backbones.has_dropout(teacher_backbone):
        log(f"note: {args.arch} has dropout, which acts in the teacher too, as in the published code")
    student_head, teacher_head = head(embed_dim), head(embed_dim)
    student_head.defer_last_layer = True
    for backbone in (student_backbone, teacher_backbone):
        if type(backbone) is VisionTransformer:  # the output of a subclass may need the other tokens
            backbone.cls_only = True
    student = MultiCropWrapper(student_backbone, student_head)
    teacher = MultiCropWrapper(teacher_backbone, teacher_head)
    return student, teacher.requires_grad_(False)


def compile_in_place(*networks: MultiCropWrapper) -> None:
    """Apply torch.compile to backbones and heads, once per shape; raises for what it cannot compile."""
    for network in networks:
        for part in (network.backbone, network.head):
            part.compile(fullgraph=True, dynamic=False)


def distribute(model: nn.Module, device: torch.device, sizes: Iterable[Size], in_chans: int) -> nn.Module:
    """Wrap the student so that ranks start from the same weights and average their gradients."""
    if get_world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # DDP regroups the gradients after its first backward pass, and the groups determine the order in which
    # the ranks' sums are rounded. So make a blank pass first; otherwise a restart would change bits.
    model.eval()
    views = [torch.zeros(1, in_chans, *height_and_width(size), device=device) for size in sizes]
    loss = model(views).sum()
    loss += 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)  # some may act in training only
    loss.backward()
    model.zero_grad()
    return model.train()


def synchronize_batchnorms(models: tuple[MultiCropWrapper, ...], device: torch.device) -> None:
    """Make batch norms, in place, use the statistics of all ranks' images, where torch can."""
    if get_world_size() == 1 or not any(map(backbones.has_batchnorms, models)):
        return
    if device.type == "cpu":
        log("warning: batch norms see each process's own images: torch synchronises them on GPUs only")
        return
    for model in models:
        backbones.convert_batchnorms(model)


def check_device(args: argparse.Namespace, device: torch.device, backbone: nn.Module) -> None:
    """Raise UserError for flags, and for a backbone, that train wrongly on this device."""
    if args.grad_checkpointing and args.drop_path_rate and device.type == "mps":
        # The recomputed blocks would drop other paths (https://github.com/pytorch/pytorch/issues/127676).
        what = "on MPS, PyTorch recomputes activations with other random numbers"
        raise UserError(what, "--grad_checkpointing", "add --drop_path_rate 0, or leave it out")
    if args.precision == "fp16" and device.type == "mps":
        # The fused AdamW takes steps of infinite gradients (https://github.com/pytorch/pytorch/pull/186360).
        what = "on MPS, some releases of PyTorch train on gradients that overflow float16"
        raise UserError(what, "--precision fp16", "use bf16 or fp32")
    if device.type == "cuda" and torch.__version__ < "2.14":
        pads = backbones.pads_average_pools(backbone, args.global_crops_size, args.in_chans)
        if pads:  # in the layout of our views (https://github.com/pytorch/pytorch/issues/188344)
            what = "average pools with padding get wrong gradients from this torch"
            raise UserError(what, f"--arch {args.arch}", "upgrade torch to 2.14")


def check_batch_norms(args: argparse.Namespace, device: torch.device, backbone: nn.Module) -> None:
    """Raise UserError if a step would give batch norm one value per channel, on which it cannot train."""
    if args.batch_size_per_gpu * args.local_crops_number != 1:
        return
    backbone = copy.deepcopy(backbone)  # the pass changes the running mean
    try:
        with torch.no_grad():
            size = height_and_width(args.local_crops_size)
            backbone(torch.zeros(1, args.in_chans, *size, device=device))
    except ValueError as error:
        fix = "raise it, or give more or larger local crops"
        raise UserError(f"batch norm cannot train: {error}", "--batch_size_per_gpu 1", fix) from None


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer by name; learning rate and weight decay come from the schedules."""
    groups = utils.get_params_groups(model)
    optimizer: torch.optim.Optimizer
    if name == "lars":
        optimizer = utils.LARS(groups)
    elif name == "sgd":  # not fused: that one fails for parameters whose first gradient comes later
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True)
    optimizer.register_load_state_dict_pre_hook(keep_settings)
    return optimizer


# Of the optimizers above. Other optimizers' groups may also hold state, such as the `d` of Prodigy.
SETTINGS = {"amsgrad", "betas", "dampening", "eps", "eta", "fused", "momentum", "nesterov", "weight_decay"}


def keep_settings(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Load a saved state without its `SETTINGS`, which torch would load too.

    Otherwise a changed setting has no effect, and published checkpoints were not saved by a fused optimizer.
    """
    groups = [
        saved | {name: own[name] for name in own.keys() & SETTINGS}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False)
    ]
    return state | {"param_groups": groups + state["param_groups"][len(groups) :]}


def build_schedules(args: argparse.Namespace, steps: Steps) -> dict[str, np.ndarray]:
    """Learning rate, weight decay and teacher momentum, one value per global step.

    Other teachers are momenta too: 0 copies the student, 1 keeps the teacher.
    """
    cosine = partial(utils.cosine_scheduler, epochs=args.epochs, niter_per_ep=steps.per_epoch)
    lr = cosine(args.lr * steps.batch / 256, args.min_lr, warmup_epochs=args.warmup_epochs)
    if not lr[: steps.last].any():
        log(f"warning: the learning rate is 0 in all {steps.last} steps, so nothing is learnt")
    if round(args.warmup_epochs * steps.per_epoch) == len(lr):
        words = f"--warmup_epochs {args.warmup_epochs:g} is the whole run"
        log(f"warning: {words}: the learning rate never falls")
    step = np.arange(1, args.epochs * steps.per_epoch + 1)
    momenta = {
        "ema": cosine(args.momentum_teacher, 1.0),
        "epoch": (step % steps.per_epoch > 0).astype(float),
        "copy": np.zeros(len(step)),
    }
    momentum = momenta[args.teacher_update]
    if not (momentum[: steps.last] < 1).any():
        log(f"warning: the teacher's momentum is 1 in all {steps.last} steps, so it keeps its first weights")
    return {"lr": lr, "wd": cosine(args.weight_decay, args.weight_decay_end), "momentum": momentum}


def autocast_dtype(precision: str | None, use_fp16: bool, device: torch.device) -> torch.dtype | None:
    """The precision of the forward passes; None for float32, without autocast."""
    return cli.PRECISIONS[precision or ("fp16" if use_fp16 and device.type == "cuda" else "fp32")]


@dataclass
class Training:
    """What is trained, and the settings of a step."""

    student: nn.Module  # inside DistributedDataParallel if there are several processes
    student_without_ddp: MultiCropWrapper
    teacher: MultiCropWrapper
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: dict[str, np.ndarray]
    steps: Steps
    device: torch.device
    dtype: torch.dtype | None  # autocast's
    mean: tuple[float, ...]  # of the images' channels, in [0, 1]
    std: tuple[float, ...]
    accum_steps: int
    clip_grad: float
    freeze_last_layer: float
    seed: int

    def pieces(self) -> dict:
        """What a checkpoint holds, by its keys."""
        return {
            "student": self.student_without_ddp,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
            "dino_loss": self.dino_loss,
            "fp16_scaler": self.scaler,
        }


def build_loss(args: argparse.Namespace) -> DINOLoss:
    """Build the loss that the flags of temperature and centring describe."""
    return DINOLoss(
        args.out_dim,
        args.local_crops_number + 2,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        accum_steps=args.accum_steps,
        centering=args.centering,
        adapt_teacher_temp=args.adapt_teacher_temp,
    )


def build_training(args: argparse.Namespace, device: torch.device, steps: Steps, resumes: bool) -> Training:
    """Build networks, loss, optimizer and schedules. Raises UserError."""
    # Only kernels whose sums have a fixed order. With cuDNN's others, for convolutions and attention,
    # gradients have other last bits in each run (https://github.com/pytorch/pytorch/pull/182551).
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Weights come from 1. the run to resume, later; 2. --init_from; 3. the random seed.
    student_without_ddp, teacher = build_networks(args)
    check_device(args, device, student_without_ddp.backbone)
    center = None
    if args.init_from and not resumes:
        backbone, head = student_without_ddp.backbone, student_without_ddp.head
        network = args.arch, args.patch_size, args.global_crops_size
        with same_error_on_all_ranks():
            limits = pairs(args.value_range)
            center = init_from(backbone, head, args.init_from, *network, args.mean, args.std, limits)
        lengths = head.get_parameter("last_layer.weight_g")
        if args.norm_last_layer and (lengths != 1).any():
            log("prototypes scaled to unit length, as --norm_last_layer is true")
            nn.init.ones_(lengths)
    synchronize_batchnorms((student_without_ddp, teacher), device)
    for model in (student_without_ddp, teacher):
        model.to(device)
    check_batch_norms(args, device, student_without_ddp.backbone)
    if args.grad_checkpointing:
        backbones.checkpoint_activations(student_without_ddp.backbone, args.arch)
        if backbones.has_batchnorms(student_without_ddp.backbone):
            log("warning: --grad_checkpointing updates the student's means of batch norms twice a step")
    student = distribute(student_without_ddp, device, crop_sizes(args), args.in_chans)
    if args.compile:
        compile_in_place(student_without_ddp, teacher)
    teacher.load_state_dict(student_without_ddp.state_dict())  # the ranks now agree on the student

    dino_loss = build_loss(args)
    if center is not None:
        dino_loss.center.copy_(center)
    dtype = autocast_dtype(args.precision, args.use_fp16, device)
    return Training(
        student=student,
        student_without_ddp=student_without_ddp,
        teacher=teacher,
        dino_loss=dino_loss.to(device),
        optimizer=build_optimizer(args.optimizer, student_without_ddp),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        schedules=build_schedules(args, steps),
        steps=steps,
        device=device,
        dtype=dtype,
        mean=tuple(args.mean),
        std=tuple(args.std),
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        freeze_last_layer=args.freeze_last_layer,
        seed=args.seed,
    )


def build_knn(args: argparse.Namespace, training: Training, monitor: Monitor) -> eval_knn.PeriodicKNN:
    """Build the k-NN evaluation of student and teacher during training. Raises UserError."""
    form = image_format(args)
    source = Source(args.knn_data, form=form, flag="--knn_data") if args.knn_data else Source.of(args, form)
    train, val = open_checked(source)
    log(f"k-NN every {args.knn_every} epochs: train {describe(train)}; val {describe(val)}")
    evaluate = partial(
        eval_knn.knn_top1,
        train=train,
        val=val,
        transform=eval_transform(args.global_crops_size, args.mean, args.std),
        device=training.device,
        num_workers=args.num_workers,
    )
    return eval_knn.PeriodicKNN(evaluate, args.knn_every, args.knn_share, training.dtype, monitor.stop_asked)


def run_identity(args: argparse.Namespace, images: Images, dtype: torch.dtype | None) -> dict:
    """Everything that determines the maths of a run, by name."""
    flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    return flags | {
        "world_size": get_world_size(),
        "images": len(images),
        "digest of the images": digest(images),
        "dtype": str(dtype or torch.float32),
    }


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


# The panels of curves.png: a title, and the numbers of log.txt in it.
PANELS = [
    ("loss", ["train_loss"]),
    ("teacher entropy and KL from the student, nats", ["train_entropy", "train_kl"]),
    ("learning rate", ["train_lr"]),
    ("weight decay", ["train_wd"]),
    ("teacher momentum", ["train_momentum"]),
    ("k-NN, %", ["knn_teacher", "knn_student"]),
]

# What to try when the loss is not finite.
ADVICE = "try --precision fp32, a lower --lr or --clip_grad 0.3"


def set_threads(count: int, device: torch.device) -> None:
    """Set the threads that compute on a CPU; 0 keeps torch's number, and names more threads than cores."""
    if count:
        torch.set_num_threads(count)
    elif device.type == "cpu" and (threads := torch.get_num_threads()) > (cores := num_cores()):
        log(f"note: {threads} threads for {counted(cores, 'core')}: --cpu_threads {cores} is faster")


@only_one_in_process()
def train_dino(args: argparse.Namespace) -> None:
    """Open the images and --output_dir, train the run there, and release the folder also after an error."""
    check_args(args)
    device = cli.join_processes(args)
    fix_random_seeds(args.seed)
    set_threads(args.cpu_threads, device)

    source = Source.of(args, image_format(args))
    images = on_all_ranks(open_training_images, source)
    steps = count_steps(args, len(images))
    with same_error_on_all_ranks():
        source.check_outside(Path(args.output_dir, "curves.png"), f"--output_dir {args.output_dir}")
        folder = cli.make_folder(args.output_dir)
    with Run(folder, required=("student", "teacher", "optimizer"), advice=ADVICE) as run:
        train_run(args, run, images, steps, device)


def train_run(args: argparse.Namespace, run: Run, images: Images, steps: Steps, device: torch.device) -> None:
    """Resume the run if it has begun, train, save."""
    settle_format(args, images, run)
    training = build_training(args, device, steps, resumes=all_gather_object(run.exists())[0])

    # Unreadable images end the run if they are more than 1 % of an epoch and at least ten.
    unreadable_limit = max(9, len(images) // 100)
    monitor = Monitor(unreadable_limit, partial(name_and_reason, images), CollapseWatch(args.out_dim), ADVICE)
    logger = MetricLogger(images_per_step=steps.batch)
    knn = build_knn(args, training, monitor) if args.knn_every else None

    pieces = training.pieces() | {"guard": monitor, "metrics": logger}  # keys of older checkpoints
    identity = run_identity(args, images, training.dtype)
    defaults = vars(get_args_parser().parse_args([]))  # of flags that an older checkpoint lacks
    found = run.resume(pieces, identity, args.allow_changed_args, defaults)
    step = first_step(found, steps)
    keep_init_from(args, found)
    record_args(args, run, step, steps.last)
    if step:  # if the first loss is not finite, the saved weights are bad
        monitor.advice_at_first = f"{ADVICE}; or remove {run.checkpoint} to resume from {run.previous.name}"
    else:
        check_on_first_rank(images)
    purge_from = step + (step % steps.per_epoch == 0)  # drops the record of an epoch cut by --max_steps
    curves = Curves(run.folder, PANELS, args.tensorboard, purge_from) if is_main_process() else None
    log(
        f"training {args.arch} on {len(images):,} images, "
        f"{counted(get_world_size(), 'process')} on {device.type}, {training.dtype or torch.float32}, "
        + (f"from step {step} to {steps.last}" if step < steps.last else f"finished at step {step}")
    )
    batches = to_device(iter(build_loader(args, images, steps, step, device, monitor.stop_asked)), device)
    stopped = False
    with monitor, contextlib.closing(batches):
        while step < steps.last and not stopped:  # a stretch, then a checkpoint
            epoch = step // steps.per_epoch
            if step % steps.per_epoch == 0:  # else the sums continue from before the restart
                monitor.start_epoch()
                logger.start_epoch()
            stretch = range(step, end_of_stretch(step, steps, args.save_every_steps))
            step = train_one_epoch(training, batches, stretch, monitor, logger)
            stopped = monitor.stopping or step < stretch.stop
            record = None
            if step in (steps.last, (epoch + 1) * steps.per_epoch):
                record = {f"train_{name}": value for name, value in logger.averages().items()}
                record |= {"epoch": epoch, "step": step, "unreadable": monitor.unreadable}
            save(args, run, step, steps, record, last=stopped or step == steps.last)
            if record and knn and not stopped:  # after the save, so that nothing can be lost
                record |= knn(epoch, {"student": training.student_without_ddp, "teacher": training.teacher})
                run.write_records([record])
            if record and curves:
                curves.update(record, last=stopped or step == steps.last)
    barrier()  # every rank can now read what was saved
    monitor.raise_if_stopped(step, steps.last, run.folder)


ARGS_TITLE = "# The settings of a run of main_dino.py, written by it"  # identifies our file
CHANGED_AT = "# Changed at step "


def record_args(args: argparse.Namespace, run: Run, step: int, last: int) -> None:
    """Write the settings to args.txt, from which `main_dino.py @args.txt` repeats the run. Rank 0 writes.

    Comments list what changed when the run resumed. Leaves out --allow_changed_args, and warm-ups of the
    length to which `check_args` shortens, so that they fit other --epochs too. Keeps a file that this script
    did not write, and the settings of a finished run.
    """
    if not is_main_process() or step >= last:
        return
    settings = argparse.Namespace(**(vars(args) | dict.fromkeys(["allow_changed_args", *shortened(args)])))
    path = run.folder / "args.txt"
    try:
        old = path.read_text("utf-8", "surrogateescape") if path.exists() else ARGS_TITLE
        if not old.startswith(ARGS_TITLE):
            log(f"warning: {path} is not a file of main_dino.py and is kept: the checkpoint has the settings")
            return
        lines = [f"{ARGS_TITLE}.", f"# Processes: {get_world_size()}"]
        lines += [line for line in old.splitlines() if step and line.startswith(CHANGED_AT)]
        lines += [f"{CHANGED_AT}{step}: {run.changed}"] if run.changed else []
        parser = get_args_parser()
        if others := vars(args).keys() - vars(parser.parse_args([])).keys() - cli.LOCAL_FLAGS:
            log(f"note: {path} lacks flags that are not of main_dino.py: {', '.join(sorted(others))}")
        text = "\n".join([*lines, cli.argument_file(settings, parser)])
        with replacing(path) as file:
            file.write(text.encode(errors="surrogateescape"))
    except OSError as error:
        log(f"warning: cannot write the settings: {reason_of(error)} ({path})")


def keep_init_from(args: argparse.Namespace, found: dict) -> None:
    """Set `--init_from` to what the run to resume began with, so that its records still say it.

    Logs that another value has no effect.
    """
    if not found:
        return
    origin = (found.get("args") or {}).get("init_from") or ""
    if args.init_from not in ("", origin):
        log(f"warning: --init_from {args.init_from} has no effect: the run resumes")
    args.init_from = origin


def first_step(found: dict, steps: Steps) -> int:
    """The step at which to resume from a checkpoint; 0 for a new run.

    A checkpoint counts images, because the number of images per step may have changed. At least one step
    of a begun epoch remains, at whose end the epoch is recorded.
    """
    seen = (found.get("sampler") or {}).get("seen", 0)
    step = found.get("epoch", 0) * steps.per_epoch + min(seen // steps.batch, steps.per_epoch - 1)
    if step != found.get("step", step):
        log(f"note: with {steps.batch} images a step, the run goes on at step {step}")
    return step


def end_of_stretch(step: int, steps: Steps, save_every: int) -> int:
    """The step at which to save next: the end of the epoch or of the run, or the next save within it."""
    epoch_end = (step // steps.per_epoch + 1) * steps.per_epoch
    next_save = (step // save_every + 1) * save_every if save_every else epoch_end
    return min(epoch_end, steps.last, next_save)


def save(
    args: argparse.Namespace, run: Run, step: int, steps: Steps, record: dict | None, last: bool
) -> None:
    """Write the checkpoint; after an epoch also its `record` and, every few epochs, a numbered copy."""
    epochs, begun = divmod(step, steps.per_epoch)
    values = {
        "epoch": epochs,
        "step": step,
        "sampler": {"seen": begun * steps.batch},
        "args": vars(args),
        "normalization": {
            "mean": list(args.mean),
            "std": list(args.std),
            "value_range": pairs(args.value_range),
        },
    }
    due = record and not begun and args.saveckp_freq and (epochs - 1) % args.saveckp_freq == 0
    keep_as = f"checkpoint{epochs - 1:04}.pth" if due else ""
    run.save(values, [record] if record else [], keep_as, last)


def train_one_epoch(
    t: Training,
    batches: Iterator[tuple[list[Tensor], list[Tensor], Tensor]],
    stretch: range,
    monitor: Monitor,
    logger: MetricLogger,
) -> int:
    """Algorithm 1 of the paper, for these global steps of an epoch. Returns the step to continue from.

    A batch is as `to_device` yields it: uint8 views on the device, one tensor (B, V, C, H, W) for each size;
    the colours that are still to be applied to them; and (B,) indices of images that were replaced, or -1.
    """
    per_epoch = t.steps.per_epoch
    epoch, begun = divmod(stretch.start, per_epoch)
    logged = logger.log_every(
        zip(stretch, batches, strict=False),  # a signal may end the batches first
        header=f"epoch {epoch}",
        length=per_epoch,
        steps_after=t.steps.last - (epoch + 1) * per_epoch,
        numbers=range(begun + 1, begun + len(stretch) + 1),
    )
    next_step = stretch.start
    for step, (views, colours, unreadable) in logged:
        # schedules and random numbers (drop path) of this step
        lr, wd, momentum = (float(t.schedules[name][step]) for name in ("lr", "wd", "momentum"))
        utils.set_schedules(t.optimizer, lr, wd)
        fix_random_seeds(t.seed, get_rank(), step)
        progress = step / per_epoch  # in epochs

        # forward: the teacher sees the global views, the student all; backward
        views = normalized_views(views, colours, t.mean, t.std)
        t.optimizer.zero_grad()
        for part in utils.in_parts(views, t.accum_steps, t.student):
            with torch.autocast(t.device.type, t.dtype, enabled=t.dtype is not None):
                teacher_output = t.teacher(part[:2])
                student_output = t.student(part)  # `Prototypes`: the loss applies the last layer
            loss = t.dino_loss(student_output, teacher_output, progress)
            t.scaler.scale(loss / t.accum_steps).backward()

        # check: on a GPU, the host waits here while the gradients are computed
        metrics = monitor.check(step, t.dino_loss.stats, unreadable)

        # student
        t.scaler.unscale_(t.optimizer)
        if t.clip_grad:
            utils.clip_gradients(t.student, t.clip_grad)
        utils.cancel_gradients_last_layer(progress, t.student, t.freeze_last_layer)
        t.scaler.step(t.optimizer)
        t.scaler.update()

        # teacher
        utils.update_teacher(t.student, t.teacher, momentum)

        # log
        logger.update(**metrics, lr=lr, wd=wd, momentum=momentum)
        next_step = step + 1
        if monitor.stopping:
            break
    return next_step


# ---------------------------------------------------------------------------------------------
# Preview
# ---------------------------------------------------------------------------------------------

PREVIEW_IMAGES = 12
PREVIEW_MARK = "DINO main_dino.py --preview"  # text in the PNG, which identifies our pictures


def preview_rows(args: argparse.Namespace, images: Images) -> list[list[Image.Image]]:
    """For the first images of epoch 0, in the order of the training: the image, then its views.

    A large image is reduced to a global view's longer side.
    """
    dataset = build_views(args, images)
    items = next(iter(EpochBatches(len(images), min(PREVIEW_IMAGES, len(images)), args.seed)))
    views, colours, unreadable = default_collate([dataset[item] for item in items])
    for index in unreadable[unreadable >= 0].tolist():
        log(f"warning: another image replaces {name_and_reason(images, index)}")
    scale = args.mean, args.std
    shown = [denormalize(view, *scale) for view in normalized_views(views, colours, *scale)]
    rows = []
    side = max(height_and_width(args.global_crops_size))
    for i, item in enumerate(items):
        image = as_picture(dataset.readable(*item)[0])
        image.thumbnail((side, side))
        rows.append([image, *(as_picture(view[i]) for view in shown)])
    return rows


def draw_preview(args: argparse.Namespace) -> None:
    """Save the picture of `--preview`. Raises UserError, also if it would overwrite a file of others."""
    check_args(args)
    path, where, fix = Path(args.preview).expanduser(), f"--preview {args.preview}", "give another file"
    if path.suffix.lower() != ".png":
        raise UserError("the picture is a PNG", where, "give a name that ends in .png")
    source = Source.of(args, image_format(args))
    source.check_outside(path, where, fix)
    check_free(path, PREVIEW_MARK, fix=fix)
    images = open_training_images(source)
    settle_format(args, images)
    rows = preview_rows(args, images)
    cli.make_folder(path.parent, "preview")
    size = max(height_and_width(args.global_crops_size))
    side = size * max(1, 160 // size)  # a whole multiple: the picture has the views' own pixels
    save_picture(contact_sheet(rows, side), path, PREVIEW_MARK)
    log(f"preview of {len(rows)} of {describe(images)}, each with its views in epoch 0: {path}")


# ---------------------------------------------------------------------------------------------
# Demo
# ---------------------------------------------------------------------------------------------

DEMO_MARK = "DINO main_dino.py --demo"  # text in the PNG, which identifies our pictures


def report_demo(args: argparse.Namespace) -> None:
    """Evaluate before and after training as a user would; save a picture of the attention."""
    weights = str(Path(args.output_dir, "checkpoint.pth"))
    size = ["--image_size", *map(str, height_and_width(args.global_crops_size))]
    channels = f"--in_chans {args.in_chans}".split()
    # The seed gives the weights that the training started from.
    start = f"--arch {args.arch} --patch_size {args.patch_size} --seed {args.seed}".split()
    networks = {
        "raw pixels": ["pixels", *size, *channels],
        "random initialisation": ["random", *size, *start, *channels],
        "trained student": [weights, "--checkpoint_key", "student"],
        "trained teacher": [weights],
    }
    found = {}
    for name, flags in networks.items():
        argv = ["--demo", "--num_workers", "0", "--nb_knn", "20", "--pretrained_weights", *flags]
        found[name] = eval_knn.main(eval_knn.parse_args(argv))
    if not is_main_process():  # only the first rank gets results
        return
    knn = {name: accuracies[20][0] for name, accuracies in found.items()}
    log("")
    log("k-NN accuracy on shapes, 20 neighbours, chance 12.5 %")
    for name, accuracy in knn.items():
        log(f"  {name:22} {accuracy:5.1f} %")
    try:
        draw_demo(args, weights, knn)
    except UserError as error:  # a network without attention, or a demo.png of others
        log(f"note: no picture: {error}")


def draw_demo(args: argparse.Namespace, weights: str, knn: dict[str, float]) -> None:
    """Print how much of the attention is on the objects, before and after training; save a picture of it.

    It is the mean of the heads, at twice the resolution of the training. Raises UserError.
    """
    fix_random_seeds(args.seed)
    shape = args.arch, args.patch_size, args.global_crops_size, args.in_chans
    networks = {
        "random initialisation": load_backbone("random", None, *shape),
        "trained teacher": load_backbone(weights),
    }
    size = tuple(2 * side for side in height_and_width(args.global_crops_size))
    shapes, shown = MaskedShapes("val", 300), Shapes("val", 6, USUAL._replace(size=max(size)))
    batches, scores = {}, {}
    for name, frozen in networks.items():
        batches[name] = partial(resized_batches, frozen._replace(image_size=size), device=torch.device("cpu"))
        scores[name] = measure_attention(frozen.network, shapes, batches[name](shapes), 0.6)
    area = 100 * scores["trained teacher"].area.mean().item()
    log(f"attention on the object, which is {area:.1f} % of an image; mean of the heads, {max(size)} pixels")
    tiles = [shown[i][0] for i in range(len(shown))]
    rows = [("images that it was not trained on", tiles)]
    for (name, frozen), when in zip(networks.items(), ("before", "after"), strict=True):
        share = scores[name].on_objects.mean().item()
        log(f"  {name:22} {100 * share:5.1f} %")
        _, pixels = next(batches[name](shown))
        maps = attention_map(frozen.network, pixels).mean(dim=1)
        overlays = [glow(image, each) for image, each in zip(tiles, maps, strict=True)]
        rows.append((f"attention {when} training: {100 * share:.0f} % on the object", overlays))
    accuracies = [knn[name] for name in ("raw pixels", *networks)]
    title = "k-NN accuracy: raw pixels {:.0f} %, before training {:.0f} %, after {:.0f} %".format(*accuracies)
    path = Path(args.output_dir, "demo.png").expanduser()
    picture = titled_rows(f"DINO, trained without labels. {title}", rows)
    save_picture(picture, path, DEMO_MARK, optimize=True)
    log(f"picture: {path}")


def main(args: argparse.Namespace) -> None:
    """Train, or draw what the training would see; under `--demo`, also evaluate what was learned."""
    args = copy.copy(args)  # some flags get values that hold for this run alone
    if args.preview:
        if not cli.leaves_work_to_first():
            draw_preview(args)
        return
    train_dino(args)
    if args.demo:
        report_demo(args)


if __name__ == "__main__":
    cli.run_script(main, parse_args(), resumable=True)
