"""Train DINO: self-distillation with no labels (Caron et al., 2021).

    python main_dino.py --demo                                          # minutes on a CPU
    torchrun --nproc_per_node=8 main_dino.py --arch vit_small \\
        --data_path /data/imagenet/train --output_dir runs/vit_small    # one node, 8 GPUs
    srun python main_dino.py ...                                        # in a SLURM job

A run continues from `checkpoint.pth` in its `--output_dir` when there is one.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import utils
from eval_knn import PeriodicKNN, knn_top1
from support import backbones, cli, monitor
from support.cli import DefaultInt, bool_flag, cpu_has_bf16
from support.curves import Curves
from support.data import (
    EpochSampler,
    TrainingViews,
    ending_workers,
    open_train_and_val,
    open_training_images,
    sample_name,
    to_device,
)
from support.distributed import (
    barrier,
    fix_random_seeds,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
)
from support.errors import Interrupted, UserError
from support.logger import MetricLogger, log
from support.pixels import normalized_views
from support.restart import RandomStates, has_checkpoint, identity, resume, save_record, save_run
from support.weights import init_from, load_backbone
from utils import DataAugmentationDINO, DINOHead, DINOLoss, MultiCropWrapper
from vision_transformer import VITS
from visualize_attention import draw_views, stack


def demo_defaults() -> dict:
    """What `--demo` sets where the user does not say otherwise.

    The recipe for a tiny network and tiny images, in minutes on a CPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return dict(
        arch="vit_nano",
        patch_size=16,
        out_dim=64,
        use_bn_in_head=True,
        head_hidden_dim=512,
        head_bottleneck_dim=128,
        momentum_teacher=0.985,
        warmup_teacher_temp=0.02,
        teacher_temp=0.02,
        precision="bf16" if cpu_has_bf16() else "fp32",
        weight_decay=0.04,
        weight_decay_end=0.04,
        batch_size_per_gpu=16,
        epochs=5,
        freeze_last_layer=0,
        lr=0.006,
        warmup_epochs=1,
        min_lr=1e-5,
        drop_path_rate=0.0,
        local_crops_number=2,
        local_crops_scale=(0.15, 0.4),
        global_crops_size=64,
        local_crops_size=32,
        num_workers=1,
        cpu_threads=max(1, cores - 1),  # one draws the images
        output_dir="demo_run",
        saveckp_freq=0,
    )


def get_args_parser() -> argparse.ArgumentParser:
    """All training flags; a parent for other parsers, hence without `--help` of its own."""
    parser = cli.ArgumentParser("DINO", add_help=False)

    # fmt: off
    group = parser.add_argument_group("model")
    group.add_argument("--arch", default="vit_small",
        help="vit_nano, vit_tiny, vit_small, vit_base, or any torchvision classifier or timm "
             "model by name")
    group.add_argument("--patch_size", default=16, type=int,
        help="pixels per patch side of our ViTs; smaller patches learn better features and "
             "cost more time and memory; for torchvision and timm the name says it")
    group.add_argument("--out_dim", default=65536, type=int,
        help="number of prototypes; fewer do for small datasets")
    group.add_argument("--norm_last_layer", default=True, type=bool_flag,
        help="keep the prototypes at unit length: more stable; off can be better for ViT-S, "
             "not for ViT-B")
    group.add_argument("--momentum_teacher", default=0.996, type=float,
        help="first value of the teacher's EMA momentum, which rises to 1; raise it for "
             "small batches (e.g. 0.9995 at 256)")
    group.add_argument("--use_bn_in_head", default=False, type=bool_flag,
        help="batch norm in the projection head: helps a small network over a collapse at "
             "the start")
    group.add_argument("--head_hidden_dim", default=2048, type=int,
        help="width of the projection head's MLP; narrower for small networks and data, e.g. 512")
    group.add_argument("--head_bottleneck_dim", default=256, type=int,
        help="width of the head's output before the prototypes; narrower for few of them, e.g. 128")

    group = parser.add_argument_group("ablations (paper, Section 5)")
    group.add_argument("--teacher_update", default="ema", choices=["ema", "epoch", "copy"],
        help="what the teacher is: a moving average of the student; the student after the last epoch, "
             "which learns less; or after the last step, which collapses")
    group.add_argument("--centering", default="ema", choices=["ema", "none", "sinkhorn"],
        help="what keeps one prototype from winning always: the running mean of the teacher's outputs; "
             "nothing, which collapses; or Sinkhorn-Knopp over the batch")

    group = parser.add_argument_group("teacher temperature")
    group.add_argument("--warmup_teacher_temp", default=0.04, type=float,
        help="first value; lower it when the loss does not fall at the start")
    group.add_argument("--teacher_temp", default=0.04, type=float,
        help="value after the warm-up; above 0.07 training tends to be unstable")
    group.add_argument("--warmup_teacher_temp_epochs", default=DefaultInt(0), type=int,
        help="epochs of linear warm-up (the paper's long runs: 30)")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--use_fp16", default=True, type=bool_flag,
        help="float16 autocast with loss scaling on CUDA; turn off if the loss becomes NaN; "
             "--precision overrides it")
    group.add_argument("--precision", default=None, choices=cli.PRECISIONS,
        help="autocast precision on any device; without it, fp16 on CUDA as --use_fp16 says, "
             "else fp32")
    group.add_argument("--weight_decay", default=0.04, type=float,
        help="first value; weights only, not biases and norms; small, and the same at the end, for convnets "
             "(1e-4)")
    group.add_argument("--weight_decay_end", default=0.4, type=float,
        help="last value, reached along a cosine; a larger one helps ViTs")
    group.add_argument("--clip_grad", default=3.0, type=float,
        help="largest norm of each parameter's gradient; lower (0.3) if the loss becomes NaN; 0 turns "
             "clipping off")
    group.add_argument("--batch_size_per_gpu", default=64, type=int,
        help="images per process and forward pass: as many as fit; the learning rate follows")
    group.add_argument("--accum_steps", default=1, type=int,
        help="add up the gradients of so many batches before each update: like a larger batch than fits "
             "into memory, but for batch norms, Sinkhorn-Knopp and the draws of drop path")
    group.add_argument("--epochs", default=100, type=int,
        help="passes over the data; 100 for a first result, 300 and more are better")
    group.add_argument("--max_steps", default=0, type=int,
        help="stop after this many steps of the schedule, e.g. for a trial; 0: never")
    group.add_argument("--freeze_last_layer", default=1, type=int,
        help="epochs in which the prototypes stay fixed; raise it if the loss does not fall")
    group.add_argument("--lr", default=0.0005, type=float,
        help="peak learning rate for 256 images a step; scaled linearly with the batch of "
             "all processes")
    group.add_argument("--warmup_epochs", default=DefaultInt(10), type=int,
        help="epochs of linear warm-up of the learning rate")
    group.add_argument("--min_lr", default=1e-6, type=float,
        help="last learning rate, reached along a cosine; seldom worth a change")
    group.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"],
        help="adamw for ViTs, sgd or lars for convnets")
    group.add_argument("--drop_path_rate", default=0.1, type=float,
        help="stochastic depth of the student's last block; 0 for small networks or short runs; "
             "torchvision's models keep their own, in the teacher too")

    group = parser.add_argument_group("crops")
    group.add_argument("--global_crops_scale", default=(0.4, 1.0),
        type=float, nargs=2, metavar=("MIN", "MAX"),
        help="share of the image's area; (0.14, 1) without local crops")
    group.add_argument("--local_crops_number", default=8, type=int,
        help="small views per image, for the student only; 0 turns multi-crop off")
    group.add_argument("--local_crops_scale", default=(0.05, 0.4),
        type=float, nargs=2, metavar=("MIN", "MAX"),
        help="share of the image's area; larger where objects are small or fill the image")
    group.add_argument("--global_crops_size", default=224, type=int,
        help="pixels per side of a global view, a multiple of the patch; smaller for small images")
    group.add_argument("--local_crops_size", default=96, type=int,
        help="pixels per side of a local view, a multiple of the patch; smaller for small images")

    cli.add_data_flags(parser, "folder of images, with or without class folders",
        "train a small network on drawn shapes, evaluate it and save pictures: no data, no GPU, minutes")

    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=".",
        help="folder for checkpoints and log.txt; a run continues from the checkpoint in it")
    group.add_argument("--init_from", default="",
        help="begin a new run with the teacher's weights of a file, or a published model by name; a run "
             "that continues does not look at it")
    group.add_argument("--saveckp_freq", default=20, type=int,
        help="keep a numbered checkpoint every so many epochs; 0: never")
    group.add_argument("--save_every_steps", default=0, type=int,
        help="write the checkpoint also every so many steps, where epochs are long and machines "
             "die without a signal; 0: after each epoch only")
    group.add_argument("--allow_changed_args", action="store_true",
        help="resume although flags, or the number of processes or images, are not those that the "
             "run was started with")
    group.add_argument("--knn_every", default=0, type=int,
        help="epochs between k-NN evaluations of student and teacher, which go to log.txt and do not "
             "change the training; 0: none")
    group.add_argument("--knn_data", default="",
        help="folder with train/ and val/ of class folders to evaluate on; --dataset and --demo have "
             "their own")
    group.add_argument("--knn_share", default=0.1, type=float,
        help="an evaluation is left out as long as those before have taken more than this share of the "
             "time; 1: none is")
    group.add_argument("--tensorboard", action="store_true",
        help="write the numbers of log.txt also for TensorBoard, to OUTPUT_DIR/tensorboard")
    group.add_argument("--augment_on", default="worker", choices=["worker", "device"],
        help="where colours change; device, where the workers cannot keep up with it: they then only "
             "decode and crop")
    group.add_argument("--compile", action="store_true",
        help="torch.compile student and teacher: minutes at the start, faster steps on GPUs")
    group.add_argument("--grad_checkpointing", action="store_true",
        help="compute activations twice instead of keeping them: less memory, a third more time")
    group.add_argument("--cpu_threads", default=0, type=int,
        help="threads that compute on a CPU; 0: as torch decides; fewer leave cores to the workers")
    group.add_argument("--seed", default=0, type=int,
        help="decides weights, order, views and drop path; another one repeats the experiment")
    cli.add_launch_flags(group)
    # fmt: on
    return parser


def parse_args(
    argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """The command line; under `--demo`, flags not given take the demo's values.

    `parser` is that of a program with more flags.
    """
    if parser is None:
        parser = cli.ArgumentParser(description=__doc__.splitlines()[0], parents=[get_args_parser()])
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**demo_defaults())
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Checks before anything is built
# ---------------------------------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> None:
    """Settle what the flags leave open; UserError for values that contradict each other."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError("must be a number", f"--{name} {value}", "mend it")
        most = {"seed": 2**63, "num_workers": 2**10, "cpu_threads": 2**10}.get(name, 2**31)
        if isinstance(value, int) and value >= most:
            raise UserError(f"must be below {most}", f"--{name} {value}", "lower it")
    cli.check_least(
        args, 1, "batch_size_per_gpu", "accum_steps", "epochs", "out_dim", "patch_size", "global_crops_size",
        "local_crops_size", "head_hidden_dim", "head_bottleneck_dim",
    )  # fmt: skip
    for name in ("local_crops_number", "num_workers", "warmup_epochs", "warmup_teacher_temp_epochs",
                 "saveckp_freq", "save_every_steps", "max_steps", "cpu_threads", "seed", "clip_grad",
                 "freeze_last_layer", "lr", "min_lr", "weight_decay", "weight_decay_end",
                 "knn_every"):  # fmt: skip
        if getattr(args, name) < 0:
            raise UserError("must not be negative", f"--{name} {getattr(args, name)}", "raise it")
    for name in ("warmup_teacher_temp", "teacher_temp"):
        if not getattr(args, name) > 0:
            raise UserError("must be above 0", f"--{name} {getattr(args, name)}", "try 0.04")
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            raise UserError("must be 0 < MIN <= MAX <= 1", f"--{name} {low} {high}", "mend it")
    for name in ("momentum_teacher", "drop_path_rate", "knn_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError("must be between 0 and 1", f"--{name} {getattr(args, name)}", "mend it")

    if args.knn_every and not (args.knn_data or args.dataset or args.demo):
        raise UserError("needs labelled images", "--knn_every", "give --knn_data, with train/ and val/")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("needs TensorBoard", "--tensorboard", "pip install tensorboard")

    if args.arch in VITS:
        sizes = {"global_crops_size": args.global_crops_size}
        if args.local_crops_number:
            sizes["local_crops_size"] = args.local_crops_size
        for name, size in sizes.items():
            backbones.check_divides(name, size, args.patch_size)

    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        value = getattr(args, name)
        if value > args.epochs and not isinstance(value, DefaultInt):
            raise UserError(f"longer than --epochs {args.epochs}", f"--{name} {value}", "shorten it")
        if value > args.epochs:
            log(f"warning: --{name} shortened from its default {value} to --epochs {args.epochs}")
        setattr(args, name, min(int(value), args.epochs))


def check_batch(num_images: int, batch_size: int) -> None:
    """UserError if the images do not fill one batch of all processes."""
    if num_images < batch_size:
        raise UserError(
            f"a batch of {batch_size} over all processes is larger than the dataset of {num_images}",
            "--batch_size_per_gpu", "lower it",
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Builders
# ---------------------------------------------------------------------------------------------


def build_augmentation(args: argparse.Namespace) -> DataAugmentationDINO:
    """The views of an image, as the crop flags say."""
    return DataAugmentationDINO(
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
        args.global_crops_size,
        args.local_crops_size,
    )


def build_networks(
    arch: str,
    patch_size: int,
    crop_sizes: list[int],
    drop_path_rate: float,
    out_dim: int,
    use_bn_in_head: bool,
    norm_last_layer: bool,
    head_hidden_dim: int,
    head_bottleneck_dim: int,
) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher with the same weights; the teacher has no gradient, and drop path only where
    the name decides it (torchvision).
    """
    student, teacher = (
        backbones.build_backbone(arch, patch_size, crop_sizes[0], rate) for rate in (drop_path_rate, 0.0)
    )
    backbones.check_crop_sizes(teacher[0], arch, teacher[1], crop_sizes)
    student, teacher = (
        MultiCropWrapper(
            backbone,
            DINOHead(
                embed_dim,
                out_dim,
                use_bn=use_bn_in_head,
                norm_last_layer=norm_last_layer,
                hidden_dim=head_hidden_dim,
                bottleneck_dim=head_bottleneck_dim,
            ),
        )
        for backbone, embed_dim in (student, teacher)
    )
    teacher.load_state_dict(student.state_dict())
    student.head.defer_last_layer = True
    return student, teacher.requires_grad_(False)


def compile_in_place(*networks: MultiCropWrapper) -> None:
    """torch.compile backbones and heads, once for each shape; what it cannot compile is an error."""
    for network in networks:
        for part in (network.backbone, network.head):
            part.compile(fullgraph=True, dynamic=False)


def distribute(model: nn.Module, device: torch.device, crop_sizes: Iterable[int]) -> nn.Module:
    """Wrap the student so that ranks start from the same weights and average their gradients."""
    if get_world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # After its first backward pass, DDP groups the gradients anew, and the groups decide in which
    # order the ranks' sums are rounded. A blank pass first: else a restart would change a bit.
    model.eval()
    model([torch.zeros(1, 3, size, size, device=device) for size in crop_sizes]).sum().backward()
    model.zero_grad()
    return model.train()


def synchronize_batchnorms(model: nn.Module, device: torch.device) -> nn.Module:
    """Batch statistics over all ranks, where the model has batch norms and torch can."""
    if get_world_size() == 1 or not utils.has_batchnorms(model):
        return model
    if device.type == "cpu":
        log("warning: batch norms see each process's own images: torch synchronises them on GPUs only")
        return model
    return backbones.convert_batchnorms(model)


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer by name; learning rate and weight decay come from the schedules."""
    groups = utils.get_params_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return utils.LARS(groups)


def build_schedules(
    lr: tuple[float, float],
    weight_decay: tuple[float, float],
    momentum: float,
    warmup_epochs: int,
    epochs: int,
    steps_per_epoch: int,
    teacher_update: str = "ema",
) -> dict[str, np.ndarray]:
    """Learning rate, weight decay and teacher momentum, one value per global step.

    Pairs are (first or peak, last); the momentum rises to 1. Other teachers are other momenta: 0
    copies the student, 1 leaves the teacher as it is.
    """
    cosine = functools.partial(utils.cosine_scheduler, epochs=epochs, niter_per_ep=steps_per_epoch)
    steps = np.arange(1, epochs * steps_per_epoch + 1)
    momenta = {
        "ema": cosine(momentum, 1.0),
        "epoch": (steps % steps_per_epoch > 0).astype(float),
        "copy": np.zeros(len(steps)),
    }
    return {
        "lr": cosine(*lr, warmup_epochs=warmup_epochs),
        "wd": cosine(*weight_decay),
        "momentum": momenta[teacher_update],
    }


def autocast_dtype(precision: str | None, use_fp16: bool, device: torch.device) -> torch.dtype | None:
    """The precision of the forward passes; None for float32, without autocast."""
    return cli.PRECISIONS[precision or ("fp16" if use_fp16 and device.type == "cuda" else "fp32")]


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train_dino(args: argparse.Namespace) -> None:
    """Set up the pieces, resume if there is something to resume, train, log and save."""
    check_args(args)
    device = init_distributed_mode(args.dist_url)
    fix_random_seeds(args.seed)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)

    # ---- data
    images = open_training_images(args.data_path, args.dataset, args.download, args.demo)
    rank_batch_size = args.batch_size_per_gpu * args.accum_steps
    batch_size = rank_batch_size * get_world_size()
    check_batch(len(images), batch_size)
    dataset = TrainingViews(images, build_augmentation(args), args.seed, args.augment_on == "device")
    sampler = EpochSampler(dataset, get_world_size(), get_rank(), seed=args.seed)
    loader = DataLoader(
        dataset,
        batch_size=rank_batch_size,
        sampler=sampler,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=device.type == "cuda",
        drop_last=True,
        worker_init_fn=monitor.StopSignals.ignore,
        generator=torch.Generator(),  # its own, so that loading does not move the global stream
    )
    steps_per_epoch = sampler.num_samples // rank_batch_size

    # ---- student and teacher
    crop_sizes = [args.global_crops_size] + [args.local_crops_size] * bool(args.local_crops_number)
    student, teacher = build_networks(
        args.arch,
        args.patch_size,
        crop_sizes,
        args.drop_path_rate,
        args.out_dim,
        args.use_bn_in_head,
        args.norm_last_layer,
        args.head_hidden_dim,
        args.head_bottleneck_dim,
    )
    output_dir = cli.make_folder(args.output_dir)
    # Weights come from 1. the run to continue, below; 2. --init_from; 3. the random seed.
    if args.init_from and not has_checkpoint(output_dir):
        init_from(
            student.backbone, student.head, args.init_from, args.arch, args.patch_size, args.global_crops_size
        )
        log(f"starting from the weights of {args.init_from}")
    student, teacher = (synchronize_batchnorms(net, device).to(device) for net in (student, teacher))
    if args.grad_checkpointing:
        backbones.checkpoint_activations(student.backbone, args.arch)
    student_alone, student = student, distribute(student, device, crop_sizes)
    if args.compile:
        compile_in_place(student_alone, teacher)
    teacher.load_state_dict(student_alone.state_dict())  # the ranks now agree on the student

    # ---- loss, optimizer, schedules
    dino_loss = DINOLoss(
        args.out_dim,
        args.local_crops_number + 2,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        accum_steps=args.accum_steps,
        centering=args.centering,
    ).to(device)
    optimizer = build_optimizer(args.optimizer, student_alone)
    dtype = autocast_dtype(args.precision, args.use_fp16, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    schedules = build_schedules(
        (args.lr * batch_size / 256, args.min_lr),
        (args.weight_decay, args.weight_decay_end),
        args.momentum_teacher,
        args.warmup_epochs,
        args.epochs,
        steps_per_epoch,
        args.teacher_update,
    )

    # ---- evaluation
    signals = monitor.StopSignals()
    knn = None
    if args.knn_every:
        knn = PeriodicKNN(
            *open_knn_data(args.knn_data, args.data_path, args.dataset, args.download, args.demo),
            args.global_crops_size,
            device,
            dtype,
            args.num_workers,
            args.knn_every,
            args.knn_share,
            signals.asked,
        )

    # ---- resume
    guard = monitor.RunGuard(
        args.out_dim,
        # More than 1 % of an epoch is an error, but fewer than ten never are.
        unreadable_limit=max(9, len(images) // 100),
        name_of=functools.partial(sample_name, images),
        stop_asked=signals.asked,
    )
    logger = MetricLogger("", batch_size)
    pieces = {
        "student": student_alone,
        "teacher": teacher,
        "optimizer": optimizer,
        "dino_loss": dino_loss,
        "fp16_scaler": scaler,
        "random": RandomStates(),
        "guard": guard,
        "metrics": logger,
    }
    run_identity = identity(vars(args), len(images), dtype, schedules)
    epoch, seen = resume(output_dir, pieces, run_identity, args.allow_changed_args)
    step = epoch * steps_per_epoch + min(seen // batch_size, steps_per_epoch)
    last_step = min(args.max_steps or math.inf, args.epochs * steps_per_epoch)

    def save(step: int, record: dict | None = None, keep_as: str = "", last: bool = False) -> None:
        """All ranks come here, rank 0 writes."""
        state = {name: piece.state_dict() for name, piece in pieces.items()}
        state |= {"epoch": step // steps_per_epoch, "step": step, "args": vars(args)}
        state |= {"sampler": {"seen": step % steps_per_epoch * batch_size}, "identity": run_identity}
        if is_main_process():
            save_run(output_dir, state, record, keep_as, last)

    # ---- train
    curves = Curves(output_dir, args.tensorboard, step) if is_main_process() else None
    log(
        f"training {args.arch} on {len(images)} images, {get_world_size()} process(es) on "
        f"{device.type}, {dtype or torch.float32}, from step {step} to {last_step}"
    )
    with signals, ending_workers(loader):
        while step < last_step and not guard.stopping:
            epoch = step // steps_per_epoch
            epoch_end = min((epoch + 1) * steps_per_epoch, last_step)
            sampler.set_epoch(epoch)
            sampler.start = step % steps_per_epoch * rank_batch_size
            if step % steps_per_epoch == 0:  # else the sums go on from before the restart
                guard.start_epoch()
                logger.start_epoch()
            logger.header, logger.steps_after = f"epoch {epoch}", last_step - epoch_end
            batches = save_between(
                to_device(iter(loader), device), range(step, epoch_end), args.save_every_steps, save, guard
            )
            step = train_one_epoch(
                student,
                teacher,
                dino_loss,
                logger.log_every(batches, epoch_end - step),
                optimizer,
                scaler,
                schedules,
                step,
                epoch,
                device,
                dtype,
                args.accum_steps,
                args.clip_grad,
                args.freeze_last_layer,
                args.seed,
                guard,
                logger,
            )

            record, keep_as = None, ""
            if step == epoch_end:
                record = {f"train_{name}": value for name, value in logger.averages().items()}
                record |= {"epoch": epoch, "step": step, "unreadable": guard.unreadable}
                if step % steps_per_epoch == 0 and args.saveckp_freq and epoch % args.saveckp_freq == 0:
                    keep_as = f"checkpoint{epoch:04}.pth"
            save(step, record, keep_as, last=guard.stopping or step == last_step)
            if record and knn and not guard.stopping:  # now that nothing can be lost
                record |= knn(epoch, {"student": student_alone, "teacher": teacher})
            if record and curves:
                save_record(output_dir, record)
                curves.update(record)
    barrier()  # what was saved is there for every rank
    if step < last_step:
        cause = signals.received.name if signals.received else "a signal to another process"
        raise Interrupted(
            f"by {cause}, step {step} of {last_step} is saved", str(output_dir), "the same command resumes"
        )


def open_knn_data(
    knn_data: str, data_path: str, dataset: str, download: bool, demo: bool
) -> tuple[Dataset, Dataset]:
    """Labelled images to evaluate on during training. Raises UserError."""
    if knn_data:
        return open_train_and_val(knn_data)
    return open_train_and_val(data_path, dataset, download, demo)


def save_between(
    batches: Iterator, steps: range, save_every: int, save: Callable[[int], None], guard: monitor.RunGuard
) -> Iterator:
    """The batches of these steps; saves after each `save_every` steps, ends early if the ranks stop.

    The last save is left to the caller.
    """
    for step, batch in zip(steps, batches, strict=False):
        yield batch
        done = step + 1
        if guard.stopping or done == steps.stop:
            return
        if save_every and done % save_every == 0:
            save(done)


def train_one_epoch(
    student: nn.Module,
    teacher: nn.Module,
    dino_loss: DINOLoss,
    batches: Iterable[tuple[list[Tensor], Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedules: dict[str, np.ndarray],
    first_step: int,
    epoch: int,
    device: torch.device,
    dtype: torch.dtype | None,
    accum_steps: int,
    clip_grad: float,
    freeze_last_layer: int,
    seed: int,
    guard: monitor.RunGuard,
    logger: MetricLogger,
) -> int:
    """Algorithm 1 of the paper, from global step `first_step` to the end of `batches`.

    A batch is as `data.to_device` gives it: V uint8 views (B, 3, H, W) on the device, what is left
    to do to their colours, and (B,) indices of images that had to be replaced. Returns the step to
    go on from.
    """
    for step, (views, colours, unreadable) in enumerate(batches, first_step):
        # schedules and random numbers (drop path) of this step
        lr, wd, momentum = (float(schedules[name][step]) for name in ("lr", "wd", "momentum"))
        utils.set_schedules(optimizer, lr, wd)
        fix_random_seeds(seed, get_rank(), step)

        # forward: the teacher sees the global views, the student all; backward
        views = normalized_views(views, colours)
        optimizer.zero_grad()
        for part in utils.in_parts(views, accum_steps, student):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                teacher_output = teacher(part[:2])
                student_output = student(part)
            loss = dino_loss(student_output, teacher_output, epoch)
            scaler.scale(loss / accum_steps).backward()

        # check: on a GPU, the host waits here while the gradients are computed
        metrics = guard.check(step, dino_loss.stats, unreadable)

        # student
        scaler.unscale_(optimizer)
        if clip_grad:
            utils.clip_gradients(student, clip_grad)
        utils.cancel_gradients_last_layer(epoch, student, freeze_last_layer)
        scaler.step(optimizer)
        scaler.update()

        # teacher
        utils.update_teacher(student, teacher, momentum)

        # log
        logger.update(**metrics, lr=lr, wd=wd, momentum=momentum)
    return step + 1


# ---------------------------------------------------------------------------------------------
# Demo
# ---------------------------------------------------------------------------------------------


def report_demo(args: argparse.Namespace) -> None:
    """Print k-NN accuracy before and after training; save a picture of views, attention and curves."""
    output_dir = Path(args.output_dir)
    device = init_distributed_mode(args.dist_url)
    fix_random_seeds(args.seed)  # the weights that training started from
    untrained = backbones.build_backbone(args.arch, args.patch_size, args.global_crops_size)[0]
    networks = {"raw pixels": nn.Flatten(), "random initialisation": untrained}
    for key in ("student", "teacher"):
        weights = str(output_dir / "checkpoint.pth")
        networks[f"trained {key}"] = load_backbone(
            weights, key, args.arch, args.patch_size, args.global_crops_size
        ).network

    log("\nk-NN accuracy on shapes, 20 neighbours, chance 12.5 %")
    # Drawn once for all networks.
    train, val = ([part[i] for i in range(len(part))] for part in open_train_and_val("", demo=True))
    for name, network in networks.items():
        top1 = knn_top1(network.to(device).eval(), train, val, args.global_crops_size, device)
        log(f"  {name:22} {top1:5.1f} %")

    if not is_main_process():
        return
    try:
        picture = draw_views(val[1][0], build_augmentation(args), networks["trained teacher"])
    except UserError as error:  # no matplotlib, or a network without attention
        log(f"note: no picture: {error}")
        return
    with contextlib.suppress(OSError), Image.open(output_dir / "curves.png") as curves:
        picture = stack(
            [picture, curves.resize((picture.width, picture.width * curves.height // curves.width))]
        )
    picture.save(output_dir / "demo.png")
    log(f"picture: {output_dir / 'demo.png'}")


def main(args: argparse.Namespace) -> None:
    """Train; under `--demo`, show what was learned."""
    try:
        train_dino(args)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = f"cannot compile {args.arch}: {str(error).strip().splitlines()[0]}"
        raise UserError(reason, "--compile", "leave it out") from error
    if args.demo:
        report_demo(args)


def end_at_once(number: int, _) -> None:
    """For a signal before or after training, when there is nothing to finish and nothing to save."""
    name = signal.Signals(number).name
    cli.end_at_once(Interrupted(f"by {name}, outside of training", "", "the same command resumes"))


if __name__ == "__main__":
    for number in monitor.StopSignals.SCHEDULERS:
        signal.signal(number, end_at_once)
    cli.run_script(main, parse_args())
