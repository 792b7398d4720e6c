"""What the scripts share, in the order in which data flows through training:

networks - loss - schedules - optimisation - distributed - logging - run.

Shapes: B images, V views, C x H x W pixels, D backbone width, K prototypes (`out_dim`).
"Paper" is Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021),
https://arxiv.org/abs/2104.14294.
"""

import argparse
import contextlib
import itertools
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import rendezvous
from augmentation import (  # noqa: F401  (the published layout has these here)
    DataAugmentationDINO,
    GaussianBlur,
    Solarization,
)

# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


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
            # timm's convnets have their pooling in a `head`, and no classifier in it any more
            if isinstance(getattr(backbone, classifier, None), nn.Linear):
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
    Section 3.1). The temperature warms up linearly over the first epochs. `centering` is "ema" (of
    the mean output over all ranks), "none", or "sinkhorn" over the batch of all ranks.

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
        centering: str = "ema",
    ):
        super().__init__()
        self.accum_steps, self.parts = accum_steps, []
        self.centering = centering
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
                if self.centering == "sinkhorn":
                    teacher_logits = sinkhorn(teacher_logits)
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
        if self.centering == "ema":
            self.center.lerp_(all_reduce_mean(batch_center), 1 - self.center_momentum)


def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Logits (N, K) whose softmax uses all prototypes alike, over the batches of all ranks.

    As in SwAV (Caron et al., 2020, https://arxiv.org/abs/2006.09882): by turns, prototypes get equal
    shares of the batch, and each image probabilities.
    """
    for _ in range(iterations):
        share = all_gather(logits.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)  # (K,)
        logits = (logits - share).log_softmax(dim=-1)
    return logits


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
            if half:  # in float16 the sum over rows that are alike could overflow
                room = 2.0 ** max(0, math.ceil(math.log2(len(x) * 2 * scale / 2**15)))
                grad_weight.add_(grad.T @ (x / room), alpha=room)
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


def init_distributed_mode(dist_url: str = "env://") -> torch.device:
    """Choose this process's device, and join the group if there are several. Raises UserError."""
    rank, world_size, local_rank = rendezvous.launched_as()
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if 1 < gpus < processes:  # 1: perhaps each process is shown another one
            raise UserError(f"{processes} processes for {gpus} GPUs", "torchrun", "start one process per GPU")
        # SLURM may show each task one GPU of its own, which is then number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif world_size == 1 and torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            store = rendezvous.meet(dist_url, rank, world_size)
        except TimeoutError as error:
            raise Interrupted(str(error), "", "start them together") from error
        dist.init_process_group(
            backend,
            store=store,
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


# ---------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. Printed as `error: <what> (<where>): <fix>`, exit code 2."""

    label, exit_code = "error", 2
    alone = False  # whether only the process that raises it knows of it, and so has to say it

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what + (f" ({where})" if where else "") + (f": {fix}" if fix else ""))


class ImageError(UserError):
    """An image that cannot be read."""

    alone = True


class TrainingError(UserError):
    """Training cannot go on as asked; what was saved stays. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """The run was stopped from outside; the same command resumes it. Exit code 75, EX_TEMPFAIL."""

    label, exit_code = "stopped", 75


class StoppedAtOnce(Interrupted):
    """Not even the step was finished. Exit code 130, as a shell has it for SIGINT."""

    exit_code = 130


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


def cpu_has_bf16() -> bool:
    """Whether bfloat16 is faster than float32 on this CPU: where it is emulated, it is far slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
