"""What the scripts share, in the order in which data flows through training:

networks - loss - schedules - optimisation - distributed - logging - run.

Shapes: B images, V views, C x H x W pixels, D backbone width, K prototypes (`out_dim`).
"Paper" is Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021),
https://arxiv.org/abs/2104.14294.
"""

import argparse
import contextlib
import difflib
import io
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from augmentation import (  # noqa: F401  (the published layout has these here)
    DataAugmentationDINO,
    GaussianBlur,
    Solarization,
)
from vision_transformer import VITS, VisionTransformer

# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the known names most like `name`."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else "check the name"


def canonical(arch: str) -> str:
    """The one name of a network that the published code calls otherwise; other names as they are."""
    if arch in VITS:
        return VITS[arch].__name__  # deit_small -> vit_small
    return re.sub(r"^(xcit_\w+_p\d+)$", r"\1_224", arch)  # XCiT's own repository -> timm


def build_backbone(
    arch: str, patch_size: int = 16, img_size: int = 224, drop_path_rate: float = 0.0
) -> tuple[nn.Module, int]:
    """A backbone by name, randomly initialised, without classifier: (B, 3, H, W) -> (B, D).

    The name is looked up among our ViTs, then torchvision's classifiers, then timm's models.
    `patch_size` and `img_size` (of the position embedding) shape our ViTs only; elsewhere the
    name says it. Returns the model, whose `dropped_classifiers` names the layers that it lacks, and
    D. Raises UserError for an unknown name.
    """
    arch = canonical(arch)
    if arch in VITS:
        model = VITS[arch](patch_size, img_size=img_size, drop_path_rate=drop_path_rate)
        model.dropped_classifiers = ("head",)
        return model, model.embed_dim
    if arch in torchvision.models.list_models(module=torchvision.models):
        return _torchvision_backbone(arch)
    import timm  # half a second, so only when it is needed

    if not timm.is_model(arch):
        known = [*VITS, *torchvision.models.list_models(module=torchvision.models), *timm.list_models()]
        raise UserError("unknown architecture", f"--arch {arch}", nearest(arch, known))
    kwargs = {"dynamic_img_size": True, "drop_path_rate": drop_path_rate}
    while True:
        try:
            model = timm.create_model(arch, pretrained=False, num_classes=0, **kwargs)
            names = model.default_cfg["classifier"]  # two for a distilled ViT
            model.dropped_classifiers = (names,) if isinstance(names, str) else tuple(names)
            return model, model.num_features
        except TypeError as error:  # most convnets know neither argument
            unknown = [name for name in kwargs if f"'{name}'" in str(error)]
            if not unknown:
                raise
            del kwargs[unknown[0]]


def _torchvision_backbone(arch: str) -> tuple[nn.Module, int]:
    auxiliary = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(arch, weights=None, **auxiliary)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("architecture has no linear classifier to drop", f"--arch {arch}")
    parent, _, name = linear[-1].rpartition(".")
    embed_dim = model.get_submodule(linear[-1]).in_features
    setattr(model.get_submodule(parent), name, nn.Identity())
    model.dropped_classifiers = (linear[-1],)
    return model, embed_dim


def check_divides(name: str, size: int, patch_size: int) -> None:
    """See that patches tile an image; `name` is the flag that gave its size. Raises UserError."""
    if size % patch_size:
        below = size - size % patch_size
        fix = f"try {below or patch_size} or {below + patch_size}"
        raise UserError(f"does not divide by --patch_size {patch_size}", f"--{name} {size}", fix)


def check_crop_sizes(backbone: nn.Module, arch: str, embed_dim: int, sizes: Iterable[int]) -> None:
    """See that the backbone maps images of each size to (B, D). Raises UserError."""
    training = backbone.training
    backbone.eval()
    for size in sorted(set(sizes)):
        fix = "choose other crop sizes or another --arch"
        try:
            with torch.no_grad():
                shape = tuple(backbone(torch.zeros(2, 3, size, size)).shape)
        except Exception as error:  # whatever a foreign model raises on a size it cannot take
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{arch} takes no {size}-pixel crops: {reason}", "--arch", fix) from None
        if shape != (2, embed_dim):
            raise UserError(f"{arch} gives {shape[1:]} per image, not a vector", "--arch", fix)
    backbone.train(training)


def checkpoint_activations(backbone: nn.Module, arch: str) -> None:
    """Save memory: compute activations again for the gradients. Raises UserError where it cannot be."""
    if isinstance(backbone, VisionTransformer):
        backbone.grad_checkpointing = True
    elif hasattr(backbone, "set_grad_checkpointing"):  # timm's
        backbone.set_grad_checkpointing()
    else:
        raise UserError(f"{arch} cannot do it", "--grad_checkpointing", "use a ViT or a model of timm")


def has_batchnorms(model: nn.Module) -> bool:
    """Whether any module normalises over the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


class MultiCropWrapper(nn.Module):
    """A backbone and a head over views of several sizes.

    Views of one size go through the backbone together, all features through the head together:
    V views (B, 3, H, W) -> (V * B, K), in the order of the views.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        for classifier in ("fc", "head"):
            if hasattr(backbone, classifier):
                setattr(backbone, classifier, nn.Identity())
        self.backbone = backbone
        self.head = head

    def forward(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(views, Tensor):
            views = [views]
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        return self.head(torch.cat([self.backbone(torch.cat(list(group))) for _, group in sizes]))


class WeightNormLinear(nn.Module):
    """x -> x W^T with W = g v / |v| row by row.

    As `torch.nn.utils.weight_norm` makes it, whose parameter names it keeps, without that
    function's hooks: they are deprecated and cannot be deep-copied.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())

    @property
    def weight(self) -> Tensor:
        """W, (out_features, in_features)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Prototypes(NamedTuple):
    """A student's output before its last layer, whose output is `features @ weight.T`.

    That would be the largest tensor of the step: `DINOLoss` never holds it whole.
    """

    features: Tensor  # (N, bottleneck)
    weight: Tensor  # (K, bottleneck)


class DINOHead(nn.Module):
    """Projection to K prototypes: (B, in_dim) -> (B, out_dim) (paper, Section 3.2).

    An MLP of `nlayers` layers, L2 normalisation, a weight-normalised linear layer. With
    `norm_last_layer` the prototypes keep unit length, which makes training more stable. With
    `defer_last_layer`, in training, the last layer is left to the loss: `Prototypes` come out.
    """

    defer_last_layer = False

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        width = in_dim
        for _ in range(max(nlayers, 1) - 1):
            layers.append(nn.Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            width = hidden_dim
        layers.append(nn.Linear(width, bottleneck_dim))
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor | Prototypes:
        x = F.normalize(self.mlp(x), dim=-1)
        if not (self.defer_last_layer and self.training):
            return self.last_layer(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return Prototypes(x.to(dtype), self.last_layer.weight.to(dtype))


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student over all pairs of different views.

    The teacher's outputs are centred, which keeps one prototype from winning always, and
    sharpened by a low temperature, which keeps the outputs from becoming uniform (paper,
    Section 3.1). The temperature warms up linearly over the first epochs.

    A batch may come in `accum_steps` parts of one size: the centre moves after the last of them, by
    the mean over all. Then `stats` holds means over the parts, (4,), on the device: the loss, and
    what tells a collapse: the teacher's entropy, the entropy of its mean over the images, and
    KL(teacher || student), in nats.
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        accum_steps: int = 1,
    ):
        super().__init__()
        self.accum_steps, self.parts = accum_steps, []
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.stats = torch.zeros(4)
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        constant = np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp)
        self.teacher_temp_schedule = np.concatenate([warmup, constant])

    def forward(self, student_output: Tensor | Prototypes, teacher_output: Tensor, epoch: int) -> Tensor:
        """Mean loss over images and pairs; student (V*B, K), teacher (2*B, K). Moves the centre."""
        temp = float(self.teacher_temp_schedule[epoch])
        with torch.autocast(teacher_output.device.type, enabled=False):
            with torch.no_grad():
                teacher_logits = (teacher_output.float() - self.center).div_(temp)
                teacher_p = teacher_logits.softmax(dim=-1)
                entropy = _entropy(teacher_p, teacher_logits).mean()
                del teacher_logits
                teacher_p = teacher_p.unflatten(0, (2, -1))  # (2, B, K)
            if isinstance(student_output, Prototypes):
                loss = _FusedCrossEntropy.apply(*student_output, teacher_p, self.student_temp)
            else:
                student_logp = F.log_softmax(student_output.float() / self.student_temp, dim=-1)
                student_logp = student_logp.unflatten(0, (self.ncrops, -1))  # (V, B, K)
                # Summed over the other views of each teacher view: all but the same view.
                others = student_logp.sum(dim=0) - student_logp[:2]  # (2, B, K)
                loss = -(teacher_p * others).sum(dim=-1).mean() / (self.ncrops - 1)

            with torch.no_grad():
                mean_p = teacher_p.mean(dim=(0, 1))
                batch_entropy = _entropy(mean_p, mean_p.clamp(min=1e-30).log())
                stats = torch.stack([loss, entropy, batch_entropy, loss - entropy])
                self.parts.append((stats, teacher_output.float().mean(dim=0, keepdim=True)))
                if len(self.parts) == self.accum_steps:
                    self.stats, batch_center = (
                        torch.stack(part).mean(0) for part in zip(*self.parts, strict=True)
                    )
                    self.update_center(batch_center)
                    self.parts.clear()
        return loss

    @torch.no_grad()
    def update_center(self, batch_center: Tensor) -> None:
        """EMA of the teacher's mean output (1, K) over the batches of all ranks."""
        self.center.lerp_(all_reduce_mean(batch_center), 1 - self.center_momentum)


class _FusedCrossEntropy(torch.autograd.Function):
    """Last layer, softmax and cross-entropy of `DINOLoss` in one, with their gradients, a few rows
    at a time: of the (V*B, K) tensors that autograd would keep, there is never more than one chunk.

    The loss is linear in the log-softmax, so its gradient with respect to the logits of one view of
    an image is (|q| softmax - q) / (temperature * terms), q being the sum of the targets from the
    teacher's other views, |q| their number.
    """

    CHUNK = 2**23  # elements; 32 MiB
    # In half precision, gradients are made larger by a power of 2 on their way through the GEMM: the
    # student's smallest probabilities would be lost, whatever scale the loss has.
    HALF_SCALE = 2.0**10

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """(V*B, d), (K, d), (2, B, K) -> the mean over images and pairs of different views."""
        B, K = targets.shape[1:]
        views = features.unflatten(0, (-1, B))  # (V, B, d)
        half = features.dtype in (torch.float16, torch.bfloat16)
        exact = torch.float32 if half else features.dtype
        scale = _FusedCrossEntropy.HALF_SCALE if half else 1.0
        # How many of the teacher's two views each view is compared with: all but itself.
        count = torch.full((len(views), 1, 1), 2.0, dtype=exact, device=features.device)
        count[:2] = 1.0
        grad_views = torch.empty_like(views, dtype=exact)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        total = torch.zeros((), dtype=exact, device=features.device)
        images = max(1, _FusedCrossEntropy.CHUNK // (K * len(views)))
        for first in range(0, B, images):
            rows = slice(first, first + images)
            x = views[:, rows].flatten(0, 1)  # (V*b, d)
            logits = (x @ weight.T).to(exact).div_(temperature).unflatten(0, (len(views), -1))  # (V, b, K)
            logits -= logits.amax(dim=-1, keepdim=True)
            both = targets[0, rows] + targets[1, rows]
            q = [targets[1, rows], targets[0, rows], *[both] * (len(views) - 2)]
            for view_logits, view_q in zip(logits, q, strict=True):
                total -= torch.linalg.vecdot(view_q, view_logits).sum()
            p = logits.exp_()
            norm = p.sum(dim=-1, keepdim=True)
            total += (count * norm.log()).sum()
            p.mul_(count * scale / norm)
            for view_p, view_q in zip(p, q, strict=True):
                view_p.sub_(view_q, alpha=scale)
            grad = p.flatten(0, 1).to(features.dtype)
            grad_views[:, rows] = (grad @ weight).to(exact).unflatten(0, (len(views), -1))
            if half:
                grad_weight += grad.T @ x
            else:
                grad_weight.addmm_(grad.T, x)
        terms = 2 * B * (len(views) - 1)
        grads = [grad.div_(scale * temperature * terms) for grad in (grad_views.flatten(0, 1), grad_weight)]
        ctx.save_for_backward(*grads)
        return total / terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_weight = ctx.saved_tensors
        return grad_features * grad_loss, grad_weight * grad_loss, None, None


def _entropy(p: Tensor, logits: Tensor) -> Tensor:
    """Entropy in nats of p = softmax(logits) over the last dimension."""
    log_norm = logits.amax(dim=-1) - p.amax(dim=-1).log()
    return log_norm - torch.linalg.vecdot(p, logits)


# ---------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0,
) -> np.ndarray:
    """One value per global step: a linear warm-up, then half a cosine down (or up) to the final.

    Raises ValueError when the warm-up is longer than the training.
    """
    if warmup_epochs > epochs:
        raise ValueError(f"a warm-up of {warmup_epochs} epochs does not fit into {epochs}")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    steps = (epochs - warmup_epochs) * niter_per_ep
    cosine = 1 + np.cos(np.pi * np.arange(steps) / max(steps, 1))
    return np.concatenate([warmup, final_value + 0.5 * (base_value - final_value) * cosine])


# ---------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------


def get_params_groups(model: nn.Module) -> list[dict]:
    """Trained parameters in two groups: weights, which decay; biases and norms, which do not."""
    decayed, plain = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (plain if name.endswith(".bias") or param.ndim == 1 else decayed).append(param)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def set_schedules(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """This step's learning rate, and the weight decay of the group that decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def in_parts(views: list[Tensor], count: int, model: nn.Module) -> Iterator[list[Tensor]]:
    """V views (B, ...) as `count` times V views (B / count, ...), one backward pass each.

    Gradients add up; ranks average them in the last pass only.
    """
    for i, part in enumerate(zip(*(view.chunk(count) for view in views), strict=True)):
        last = i == count - 1 or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if last else model.no_sync():
            yield list(part)


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float) -> Tensor:
    """Scale each parameter's gradient, by itself, to a norm of at most `clip`.

    Returns the norms before, one per gradient, on the device: nothing waits for them.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((clip / (norms + 1e-6)).clamp(max=1).unbind()))
    return norms


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """In the first `freeze_last_layer` epochs, leave the head's last layer as it is."""
    if epoch < freeze_last_layer:
        for name, param in model.named_parameters():
            if "last_layer" in name:
                param.grad = None


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """EMA: teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter."""
    teacher_params, student_params = list(teacher.parameters()), list(student.parameters())
    torch._foreach_mul_(teacher_params, momentum)
    torch._foreach_add_(teacher_params, student_params, alpha=1 - momentum)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, for large batches of convnets: You et al. (2017),
    https://arxiv.org/abs/1708.03888. Biases and norms (1-D) are neither decayed nor adapted.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim != 1:
                    update = update.add(param, alpha=group["weight_decay"])
                    ratio = group["eta"] * param.norm() / update.norm()
                    # A zero norm of either gives 0, infinity or NaN: then do not adapt.
                    update = update * ratio.where(ratio.isfinite() & (ratio > 0), 1.0)
                state = self.state[param]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(param)
                state["mu"].mul_(group["momentum"]).add_(update)
                param.add_(state["mu"], alpha=-group["lr"])
        return loss


# ---------------------------------------------------------------------------------------------
# Distributed
# ---------------------------------------------------------------------------------------------


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment, SLURM's, or for one process.

    SLURM counts only inside a step started by `srun`: in the batch script itself, the other tasks
    do not exist.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def rendezvous_port(job: int, attempt: int) -> int:
    """A port that jobs on one machine, and attempts at one job, do not share."""
    return 20000 + (97 * job + attempt) % 20000


def _slurm_rendezvous() -> None:
    """Set MASTER_ADDR and MASTER_PORT as torchrun would: the step's first node, a port per step."""

    def scontrol(*arguments: str) -> str:
        command = ["scontrol", "show", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    env = os.environ
    first = scontrol("hostnames", env["SLURM_STEP_NODELIST"]).split()[0]
    # A node's name need not resolve; its address does.
    address = re.search(r"NodeAddr=(\S+)", scontrol("node", first))[1]
    env.setdefault("MASTER_ADDR", address)
    attempt = int(env["SLURM_STEP_ID"]) + 10 * int(env.get("SLURM_RESTART_COUNT", 0))
    env.setdefault("MASTER_PORT", str(rendezvous_port(int(env["SLURM_JOB_ID"]), attempt)))


def _fresh_store(store: dist.Store, rank: int, world_size: int, patience: float = 600) -> dist.Store:
    """The store under a prefix that no earlier attempt has used.

    torchrun's store outlives a restart of its processes, which would read their dead
    predecessors' addresses; the count of restarts that it gives may differ between machines. So
    rank 0 draws a name, and tells it to each rank under a key that this rank has just drawn.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question of {rank}", question)
        name = store.get(question).decode()  # waits for the key
        store.add(f"{name} heard", 1)
        return dist.PrefixStore(name, store)
    name, deadline = uuid.uuid4().hex, time.monotonic() + patience
    while store.add(f"{name} heard", 0) < world_size - 1:  # until then, a question may be an old one
        for other in range(1, world_size):
            if store.check([f"question of {other}"]):
                store.set(store.get(f"question of {other}").decode(), name)
        if time.monotonic() > deadline:
            raise Interrupted(f"not all of {world_size} processes have come", "", "start them together")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def init_distributed_mode(dist_url: str = "env://", use_cuda: bool = True) -> torch.device:
    """Choose this process's device, and join the group if there are several processes."""
    rank, world_size, local_rank = launched_as()
    if use_cuda and torch.cuda.is_available():
        # SLURM may show each task one GPU of its own, which is then number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif use_cuda and world_size == 1 and torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        if "RANK" not in os.environ and dist_url == "env://":
            _slurm_rendezvous()
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = next(dist.rendezvous(dist_url, rank, world_size))[0]
        dist.init_process_group(
            backend,
            store=_fresh_store(store, rank, world_size),
            rank=rank,
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )
    return device


def get_rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """How many processes train together, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process logs and saves."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    if get_world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """The main process runs the block, then the others do."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:
        if is_main_process():
            barrier()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks, in place; the tensor itself without a group."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors of the same shape from all ranks, concatenated along the first dimension."""
    if get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_object(value) -> list:
    """Small picklable values of all ranks, in their order."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------


def log(message: str) -> None:
    """Print once, from the main process, above a progress bar if there is one."""
    if is_main_process():
        tqdm.write(message)
        sys.stdout.flush()


class SmoothedValue:
    """A series: its mean over the last `window` values and over all."""

    def __init__(self, window: int = 20):
        self.recent: deque[float] = deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.recent.append(value)
        self.total += value
        self.count += 1

    @property
    def avg(self) -> float:
        return sum(self.recent) / max(len(self.recent), 1)

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)


class MetricLogger:
    """Shows an epoch while it runs: a progress bar on a terminal, else a line every 10 steps."""

    def __init__(self, header: str, images_per_step: int, steps_after: int = 0, print_freq: int = 10):
        """`images_per_step` counts all ranks; `steps_after`, for the ETA, follow this epoch."""
        self.header, self.images_per_step = header, images_per_step
        self.steps_after, self.print_freq = steps_after, print_freq
        self.meters: dict[str, SmoothedValue] = {}
        self.step_time, self.data_time = SmoothedValue(50), SmoothedValue(50)

    def update(self, **values: float) -> None:
        """Add one step's value to each named series."""
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def start_epoch(self) -> None:
        """Begin all series anew."""
        self.meters.clear()
        self.step_time, self.data_time = SmoothedValue(50), SmoothedValue(50)

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Sum and length of each series, so that a restart within an epoch keeps its averages."""
        series = self.meters | {"step_time": self.step_time}
        return {name: (meter.total, meter.count) for name, meter in series.items()}

    def load_state_dict(self, state: dict[str, tuple[float, int]]) -> None:
        """Go on from what `state_dict` gave."""
        for name, (total, count) in state.items():
            own = self.step_time if name == "step_time" else self.meters.setdefault(name, SmoothedValue())
            own.total, own.count = float(total), int(count)

    def averages(self) -> dict[str, float]:
        """Each series' mean over the epoch, and its images/s."""
        speed = self.images_per_step / self.step_time.global_avg if self.step_time.total else 0.0
        return {n: m.global_avg for n, m in self.meters.items()} | {"images_per_second": speed}

    def log_every(self, batches: Iterable, length: int) -> Iterator:
        """Yield the batches; time them and show the meters in between."""
        digits = len(str(length))
        show_bar = is_main_process() and sys.stderr.isatty()
        with tqdm(total=length, desc=self.header, leave=False, disable=not show_bar) as bar:
            asked = time.perf_counter()
            for step, batch in enumerate(batches, 1):
                got = time.perf_counter()
                yield batch
                done = time.perf_counter()
                self.data_time.update(got - asked)
                self.step_time.update(done - asked)
                asked = done
                bar.update()
                if show_bar:
                    bar.set_postfix_str(self.status(length - step), refresh=False)
                elif step % self.print_freq == 0 or step == length:
                    log(f"{self.header} [{step:{digits}d}/{length}] {self.status(length - step)}")

    def status(self, steps_left: int) -> str:
        """Meters, speed, share of time spent waiting for data, time left, peak GPU memory."""
        seconds = max(self.step_time.avg, 1e-9)
        eta = time.strftime("%H:%M:%S", time.gmtime(seconds * (steps_left + self.steps_after)))
        days = int(seconds * (steps_left + self.steps_after) // 86400)
        parts = [f"{name} {meter.avg:.4g}" for name, meter in self.meters.items()]
        parts += [
            f"{self.images_per_step / seconds:.0f} img/s",
            f"data {self.data_time.avg / seconds:.0%}",
            f"eta {f'{days}d ' if days else ''}{eta}",
        ]
        if torch.cuda.is_available():
            parts.append(f"mem {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        return "  ".join(parts)


class RunGuard:
    """Looks at every step's numbers: ends a run that cannot go on, names one that has collapsed.

    It also tells the ranks when one of them was asked to stop: `stopping` then turns true on all
    of them at the same step.

    Uniform collapse: the teacher's outputs are flat, the loss sits at ln K. Constant collapse:
    they are peaked, but the same for every image, so that the entropy of their mean over the
    batch is no larger than their own (paper, Section 5.3 and Figure 7). Either is named once,
    when it has lasted for `patience` steps.
    """

    ADVICE = {
        "uniform collapse": "try --use_bn_in_head true, a lower --teacher_temp or another --lr",
        "constant collapse": "try --use_bn_in_head true, a higher --teacher_temp or a lower --lr",
    }

    def __init__(
        self,
        out_dim: int,
        unreadable_limit: int,
        name_of: Callable[[int], str] = str,
        patience: int = 200,
        stop_asked: Callable[[], bool] = lambda: False,
    ):
        """`name_of` an index is the image's name; `unreadable_limit` holds for one epoch;
        `stop_asked` says whether this rank was asked to stop.
        """
        self.max_entropy = math.log(out_dim)
        self.unreadable_limit, self.name_of, self.patience = unreadable_limit, name_of, patience
        self.lasted = dict.fromkeys(self.ADVICE, 0)
        self.stop_asked, self.stopping = stop_asked, False
        self.named: set[int] = set()
        self.unreadable = 0

    def start_epoch(self) -> None:
        """Count unreadable images anew."""
        self.unreadable = 0

    def state_dict(self) -> dict:
        """The counts that a restart has to keep."""
        return {"unreadable": self.unreadable, "lasted": dict(self.lasted)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.unreadable = int(state["unreadable"])
        self.lasted = {name: int(state["lasted"][name]) for name in self.ADVICE}

    def check(self, step: int, stats: Tensor, unreadable: Tensor) -> dict[str, float]:
        """The step's numbers as means over ranks; the one place where the host waits for the device.

        `stats` as in DINOLoss; `unreadable` (B,) holds indices of replaced images, else -1.
        Raises TrainingError, on all ranks together, for a loss that is not finite.
        """
        failed = [index for index in unreadable.tolist() if index >= 0]
        for index in sorted(set(failed) - self.named):
            tqdm.write(f"warning: cannot read {self.name_of(index)}: another image takes its place")
        self.named.update(failed)

        counts = [len(failed), self.stop_asked()]
        # Zeros are made on the device; a copy to it would wait.
        counts = stats.new_tensor(counts) if any(counts) else torch.zeros_like(stats[:2])
        numbers = torch.cat([stats, counts])
        loss, entropy, batch_entropy, kl, mean_failed, stop = all_reduce_mean(numbers).tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss}", f"step {step}",
                "try --use_fp16 false, --precision fp32, a lower --lr or --clip_grad 0.3",
            )  # fmt: skip
        self.stopping = stop > 0
        self.unreadable += round(mean_failed * get_world_size())
        if self.unreadable > self.unreadable_limit:
            raise UserError(
                f"{self.unreadable} images of this epoch cannot be read", "--data_path", "mend the data"
            )
        self.watch_collapse(loss, entropy, batch_entropy)
        return {"loss": loss, "entropy": entropy, "spread": batch_entropy - entropy, "kl": kl}

    def watch_collapse(self, loss: float, entropy: float, batch_entropy: float) -> None:
        """Warn when one of the two collapses has lasted long enough."""
        flat, same = entropy > 0.995 * self.max_entropy, 0.005 * self.max_entropy
        found = {
            "uniform collapse": flat and abs(loss - self.max_entropy) < same,
            "constant collapse": not flat and batch_entropy - entropy < same,
        }
        for name, present in found.items():
            self.lasted[name] = self.lasted[name] + 1 if present else 0
            if self.lasted[name] == self.patience:
                log(
                    f"warning: {name}: for {self.patience} steps the teacher's outputs were "
                    f"{'flat' if flat else 'the same for every image'} (loss {loss:.4f}, ln out_dim "
                    f"{self.max_entropy:.4f}, teacher entropy {entropy:.4f}): {self.ADVICE[name]}"
                )


# ---------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. Printed as `error: <what> (<where>): <fix>`, exit code 2."""

    label, exit_code = "error", 2

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what + (f" ({where})" if where else "") + (f": {fix}" if fix else ""))


class TrainingError(UserError):
    """Training cannot go on as asked; what was saved stays. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """The run was stopped from outside; the same command resumes it. Exit code 75, EX_TEMPFAIL."""

    label, exit_code = "stopped", 75


class StoppedAtOnce(Interrupted):
    """Not even the step was finished. Exit code 130, as a shell has it for SIGINT."""

    exit_code = 130


class StopSignals:
    """Within its block, a signal that asks to stop is noted and does not end the process.

    Schedulers send SIGTERM, SIGUSR1 or SIGUSR2; Ctrl-C sends SIGINT. A second Ctrl-C stops at once.
    """

    SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT") if hasattr(signal, n)]

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _):
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    @classmethod
    def ignore(cls, *_) -> None:
        """In a data-loading worker: schedulers signal the whole job, but only the training stops."""
        for number in cls.SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class ArgumentParser(argparse.ArgumentParser):
    """Full flag names only, defaults in the help, and errors in one line from one process."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("usage", "%(prog)s [--flag value ...]")
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        exit_with(UserError(message, "", "see --help"))


def add_data_flags(parser: argparse.ArgumentParser, folder: str, demo: str) -> None:
    """The flags that say what the images are; `folder` and `demo` complete their help."""
    # fmt: off
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="",
        help=f"{folder}; with --dataset, the folder that holds the dataset")
    group.add_argument("--dataset", default="",
        help="a torchvision dataset by class name, e.g. FashionMNIST or Flowers102")
    group.add_argument("--download", action="store_true",
        help="let --dataset fetch what is missing")
    group.add_argument("--demo", action="store_true", help=demo)
    group.add_argument("--num_workers", default=10, type=int,
        help="data-loading workers per process")
    # fmt: on


def add_weights_flags(parser: argparse.ArgumentParser, patch_size: int = 16) -> None:
    """The flags that say which frozen network is looked at."""
    # fmt: off
    group = parser.add_argument_group("weights")
    group.add_argument("--pretrained_weights", default="",
        help="a checkpoint; or a published model by name (dino_vits16, ...), which is downloaded; or a "
             "baseline: random (a network as --arch says) or pixels (no network)")
    group.add_argument("--checkpoint_key", default=DefaultStr("teacher"),
        help="teacher or student; the teacher is better")
    group.add_argument("--arch", default=DefaultStr("vit_small"),
        help="architecture; the checkpoint knows its own")
    group.add_argument("--patch_size", default=DefaultInt(patch_size), type=int,
        help="patch size; the checkpoint knows its own")
    # fmt: on


def add_launch_flags(group) -> None:
    """The flags of the process group."""
    # fmt: off
    group.add_argument("--dist_url", default="env://",
        help="rendezvous of the process group, as in torch.distributed")
    group.add_argument("--local_rank", "--local-rank", default=0, type=int,
        help="accepted and ignored; the launcher's environment decides")
    # fmt: on


# Autocast's type by the name a flag gives it; None: no autocast.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class DefaultInt(int):
    """A flag's default, told from the same number given by the user."""


class DefaultStr(str):
    """A flag's default, told from the same word given by the user."""


def bool_flag(value: str) -> bool:
    """`true`, `on`, `1` or `false`, `off`, `0`."""
    words = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if value.lower() not in words:
        raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")
    return words[value.lower()]


def fix_random_seeds(*entropy: int) -> None:
    """Seed Python, NumPy and torch on every device from a few numbers, e.g. (seed, rank, step)."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_folder(path: str) -> Path:
    """The folder for a run's files, made if it is not there. Raises UserError if it cannot be written."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(error.strerror, f"--output_dir {path}", "choose another") from None
    return folder


def say(error: UserError) -> None:
    """The error in one line, from the first rank."""
    if launched_as()[0] == 0:
        # An error from a data-loading worker comes with that worker's traceback before it.
        line = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        print(f"{error.label}: {line}", file=sys.stderr, flush=True)


def exit_with(error: UserError):
    """End the process; the first rank says why."""
    say(error)
    sys.exit(error.exit_code)


def from_outside(error: Exception) -> UserError | None:
    """One clear line for what the machine, not the program, did wrong; None for anything else."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message:
        return TrainingError(
            f"out of memory: {message}", "", "lower --batch_size_per_gpu, --out_dim or the network"
        )
    if "DataLoader worker" in message:
        return Interrupted(f"a data-loading worker died: {message}", "", "the same command resumes")
    if isinstance(error, dist.DistError) or "/gloo/" in message:
        message = re.sub(r"^\[\S+\] ", "", message).split(". ")[0]  # without gloo's place in its source
        return Interrupted(f"lost another process: {message}", "", "the same command resumes")
    if isinstance(error, OSError):
        where = str(error.filename or "")
        return TrainingError(error.strerror or message, where, "mend it and start again")
    return None


def run_script(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`; end in one clear line when the user can mend what went wrong."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        end_at_once(StoppedAtOnce("at once, by Ctrl-C", "", "the same command goes on from what is saved"))
    except Exception as error:
        outside = from_outside(error)
        if outside is None:
            raise
        end_at_once(outside)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def end_at_once(error: UserError):
    """End the process; leaving a group in order would wait for processes that may be dead."""
    if dist.is_initialized():
        say(error)
        os._exit(error.exit_code)
    exit_with(error)
