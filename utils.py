"""The method, in the order in which data flows through training:

augmentation - networks - loss - schedules - optimisation.

Shapes: B images, V views, C x H x W pixels, D backbone width, K prototypes (`out_dim`).
"Paper" is Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021),
https://arxiv.org/abs/2104.14294.
"""

import contextlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.distributed import all_gather, all_reduce_mean
from support.logger import log
from support.pixels import (
    Colour,
    Size,
    View,
    apply_colours,
    crop_and_resize,
    height_and_width,
    normalize,
    stack_colours,
    to_pixels,
)

# ---------------------------------------------------------------------------------------------
# Augmentation. `rng` has the methods of `random.Random`. The order of the draws determines the views.
# ---------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """What is done to the views of an image; the defaults are the paper's, with colours and blur as in BYOL.

    `blur_p` and `solarize_p` are for the first global view, the second, and the local ones.
    """

    jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1)  # strengths, in the order of `support.pixels.ADJUSTMENTS`
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: Sequence[float] = (1.0, 0.1, 0.5)
    blur_sigma: Sequence[float] = (0.1, 2.0)  # pixels
    solarize_p: Sequence[float] = (0.0, 0.2, 0.0)
    hflip_p: float = 0.5
    vflip_p: float = 0.0
    quarter_turns: bool = False  # turn by 0, 90, 180 or 270 degrees, equally often
    crop_aspect: Sequence[float] = (3 / 4, 4 / 3)  # width over height of the crop, divided by the view's


PAPER = Recipe()


class Kind(NamedTuple):
    """Parameters in which the kinds of views differ."""

    size: tuple[int, int]  # height and width in pixels
    scale: Sequence[float]  # smallest and largest share of the image's area
    blur_p: float
    solarize_p: float


def draw_view(width: int, height: int, kind: Kind, rng, recipe: Recipe = PAPER) -> View:
    """Draw the random numbers of one view of an image of this size (paper, Section 3.2, multi-crop)."""
    quarters = rng.randrange(4) if recipe.quarter_turns else 0
    high, wide = kind.size[::-1] if quarters % 2 else kind.size  # before the turn
    # Drawn in this order, also what is off; but flags that the paper lacks draw nothing while they are off.
    return View(
        size=kind.size,
        box=draw_box(width, height, kind.scale, rng, [wide / high * aspect for aspect in recipe.crop_aspect]),
        flip=happens(recipe.hflip_p, rng),
        vflip=recipe.vflip_p > 0 and happens(recipe.vflip_p, rng),
        quarters=quarters,
        colour=Colour(
            *draw_jitter(recipe.jitter_p, rng, recipe.jitter),
            grey=happens(recipe.gray_p, rng),
            blur=draw_radius(kind.blur_p, rng, *recipe.blur_sigma),
            solarize=happens(kind.solarize_p, rng),
        ),
    )


def happens(p: float, rng) -> bool:
    """True with probability `p`."""
    return rng.random() < p


def draw_box(
    width: int, height: int, scale: Sequence[float], rng, ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a crop of random area and aspect ratio.

    As in torchvision, returns a crop at the centre if ten draws do not fit into the image.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_jitter(p: float, rng, strengths: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """Draw `Colour.order` and `Colour.amounts`: with probability `p` all four, in random order; else none.

    As in torchvision, brightness, contrast and saturation change by a factor of 1 - strength to 1 + strength,
    the hue turns by at most its strength either way.
    """
    if not happens(p, rng):
        return (-1,) * 4, (0.0,) * 4
    ranges = [(max(0.0, 1 - s), 1 + s) for s in strengths[:3]] + [(-strengths[3], strengths[3])]
    order = rng.sample(range(4), 4)
    return order, [rng.uniform(*ranges[which]) for which in order]


def draw_radius(p: float, rng, smallest: float, largest: float) -> float:
    """Draw a radius of blur in pixels, with probability `p`; else 0."""
    return rng.uniform(smallest, largest) if happens(p, rng) else 0.0


class DataAugmentationDINO:
    """The views of one image: 2 global ones, then `local_crops_number` local ones.

    Scales are the smallest and the largest share of the image's area that a view may show; sizes are in
    pixels, one number for a square or height and width.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: Size = 224,
        local_crops_size: Size = 96,
        recipe: Recipe = PAPER,
    ):
        large, small = height_and_width(global_crops_size), height_and_width(local_crops_size)
        crops = [(large, global_crops_scale)] * 2 + [(small, local_crops_scale)]
        chances = zip(recipe.blur_p, recipe.solarize_p, strict=True)
        first, second, local = (Kind(*crop, *p) for crop, p in zip(crops, chances, strict=True))
        self.recipe, self.kinds = recipe, [first, second, *[local] * local_crops_number]
        if not all(0 < min(kind.scale) and max(kind.scale) <= 1 for kind in self.kinds):
            raise ValueError("scales are shares of the image's area, above 0 and at most 1")

    def __setattr__(self, name: str, value):
        if name in ("global_transfo1", "global_transfo2", "local_transfo", "local_crops_number"):
            raise AttributeError(f"setting {name} has no effect: give a Recipe, or override draw")
        super().__setattr__(name, value)

    def draw(self, width: int, height: int, rng) -> list[View]:
        """Draw the random numbers of the views of an image of this size."""
        return [draw_view(width, height, kind, rng, self.recipe) for kind in self.kinds]

    def crops(self, pixels: Tensor, rng=random) -> tuple[list[Tensor], list[Tensor]]:
        """uint8 (C, H, W) -> crops, and the colours that `normalized_views` applies to them.

        Crops are uint8 tensors, one (V, C, H, W) for each size; few tensors are cheap to pass
        between processes. The colours are one tensor over all views for each field of `Colour`.
        """
        views = self.draw(pixels.shape[2], pixels.shape[1], rng)
        crops = [torch.stack([crop_and_resize(pixels, view) for view in group]) for group in by_size(views)]
        return crops, stack_colours([view.colour for view in views])

    def views(self, pixels: Tensor, rng=random) -> tuple[list[Tensor], tuple[()]]:
        """uint8 (C, H, W) -> views, as `crops` gives them but with their colours applied, and no colours."""
        stacks = []
        for group in by_size(self.draw(pixels.shape[2], pixels.shape[1], rng)):
            views = np.empty((len(group), len(pixels), *group[0].size), np.uint8)
            for out, view in zip(views, group, strict=True):
                done = apply_colours(crop_and_resize(pixels, view)[None], [view.colour])[0]
                out[:] = done.numpy().astype(np.uint8)  # NumPy converts five times as fast as torch
            stacks.append(torch.from_numpy(views))
        return stacks, ()

    def __call__(self, image: Image.Image, rng=random) -> list[Tensor]:
        """An image -> a list of normalised views, float32 (3, H, W). Training calls `views` or `crops`."""
        views, _ = self.views(to_pixels(image), rng)
        return [normalize(view) for part in views for view in part]


def by_size(views: Iterable[View]) -> list[list[View]]:
    """Group consecutive views of one size."""
    return [list(group) for _, group in itertools.groupby(views, key=lambda view: view.size)]


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


class MultiCropWrapper(nn.Module):
    """Applies a backbone and a head to views of several sizes.

    Views of one size go through the backbone together, and all features through the head together:
    V views (B, 3, H, W) -> (V * B, K), in the order of the views. Removes the backbone's linear classifier,
    `fc` or `head`. If the backbone returns a tuple, takes the first element.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        for classifier in ("fc", "head"):
            # a `head` of timm's convnets contains the pooling, and no classifier by now
            if isinstance(layer := getattr(backbone, classifier, None), nn.Linear):
                shape = f"{layer.in_features} to {layer.out_features}"
                log(f"note: MultiCropWrapper leaves out the backbone's {classifier}, from {shape}")
                setattr(backbone, classifier, nn.Identity())
        self.backbone, self.head = backbone, head

    def forward(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        views = [views] if isinstance(views, Tensor) else views
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        features = [self.backbone(torch.cat(list(group))) for _, group in sizes]
        return self.head(torch.cat([each[0] if isinstance(each, tuple) else each for each in features]))


class WeightNormLinear(nn.Module):
    """x -> x W^T with W = g v / |v| row by row.

    Has the parameter names of `torch.nn.utils.weight_norm`, but not its hooks, which are deprecated and
    cannot be deep-copied.
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
    """The input and the weight of a student's last layer, whose output is `features @ weight.T`.

    That output would be the largest tensor of the step; `DINOLoss` computes it in parts.
    """

    features: Tensor  # (V*B, d), in the precision of the output; d is the head's bottleneck
    weight: Tensor  # (K, d)


class DINOHead(nn.Module):
    """Projection to K prototypes: (B, in_dim) -> (B, out_dim) (paper, Section 3.2).

    An MLP of `nlayers` layers, L2 normalisation, a weight-normalised linear layer. With
    `norm_last_layer` the prototypes keep unit length, which makes training more stable. With
    `defer_last_layer`, in training, the loss applies the last layer, and the output is `Prototypes`.
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
        return Prototypes(x.to(dtype), self.last_layer.weight)


# ---------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student over all pairs of different views.

    The teacher's outputs are centred, so that no prototype dominates, and sharpened by a low temperature,
    so that the outputs do not become uniform (paper, Section 3.1). The temperature warms up linearly over
    the first epochs. `centering` is "ema" (of the mean output over all ranks), "none", or "sinkhorn" over
    the batch of all ranks. `adapt_teacher_temp` lowers the temperature for outputs that hardly differ.

    A batch may consist of `accum_steps` parts of one size: the centre is updated after the last one, with
    the mean over all. Then `stats` holds means over the parts, as scalars on the device. In nats: "loss";
    the teacher's "entropy"; "kl", KL(teacher || student); the "spread" of its outputs over the images of
    all ranks, i.e. the entropy of their mean minus the mean of their entropies, which is 0 if all images
    get the same output. With `adapt_teacher_temp`, also the teacher's temperature, "temp". They are this
    rank's numbers, which `Monitor.check` averages; only the mean in "spread" is already that of all ranks.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,  # has no effect; the published signature has it
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        accum_steps: int = 1,
        centering: str = "ema",
        adapt_teacher_temp: float = 0.0,
    ):
        super().__init__()
        if centering not in ("ema", "none", "sinkhorn"):
            raise ValueError(f"centering is {centering!r}, not 'ema', 'none' or 'sinkhorn'")
        self.ncrops, self.student_temp, self.adapt_teacher_temp = ncrops, student_temp, adapt_teacher_temp
        self.accum_steps, self.centering, self.center_momentum = accum_steps, centering, center_momentum
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.stats: dict[str, Tensor] = {}
        self.teacher_temps = warmup_teacher_temp, teacher_temp
        self.warmup_epochs = warmup_teacher_temp_epochs

    def teacher_temp(self, epoch: float) -> float:
        """The teacher's temperature. It rises once per epoch in a warm-up of whole epochs, and continuously
        in a warm-up of a fraction of epochs.
        """
        first, last = self.teacher_temps
        if epoch >= self.warmup_epochs:
            return last
        if self.warmup_epochs == int(self.warmup_epochs):
            return float(np.linspace(first, last, int(self.warmup_epochs))[int(epoch)])
        return first + (last - first) * epoch / self.warmup_epochs

    def adapted_temp(self, outputs: Tensor, epoch: float) -> Tensor:
        """The teacher's temperature, at most the deviation of outputs (2*B, K) over `adapt_teacher_temp`.

        The deviation is over the images of all ranks, as a root mean square over prototypes.
        """
        mean, square = all_reduce_mean(torch.stack([outputs.mean(dim=0), outputs.square().mean(dim=0)]))
        deviation = (square - mean.square()).mean().clamp(min=0).sqrt()
        return (deviation / self.adapt_teacher_temp).clamp(1e-4, self.teacher_temp(epoch))  # avoids 0

    def forward(self, student_output: Tensor | Prototypes, teacher_output: Tensor, epoch: float) -> Tensor:
        """Mean loss over images and pairs; student (V*B, K), teacher (2*B, K). Moves the centre."""
        rows = len(student_output[0] if isinstance(student_output, Prototypes) else student_output)
        if 2 * rows != self.ncrops * len(teacher_output):
            raise ValueError(f"{rows} and {len(teacher_output)} rows are not {self.ncrops} and 2 views each")
        with torch.autocast(teacher_output.device.type, enabled=False):
            with torch.no_grad():
                teacher_logits = teacher_output.float() - (0 if self.centering == "none" else self.center)
                adapts = self.adapt_teacher_temp > 0
                temp = self.adapted_temp(teacher_logits, epoch) if adapts else self.teacher_temp(epoch)
                teacher_logits.div_(temp)
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

            numbers = {"loss": loss.detach(), "entropy": entropy, "kl": loss.detach() - entropy}
            if isinstance(temp, Tensor):  # adapted
                numbers["temp"] = temp
            self.end_part(numbers, teacher_output.float().mean(dim=0), teacher_p.mean(dim=(0, 1)))
        return loss

    @torch.no_grad()
    def end_part(self, numbers: dict[str, Tensor], output: Tensor, p: Tensor) -> None:
        """Keep a part's numbers and the means (K,) of the teacher's outputs and of their softmax; after the
        last part, set `stats` and move the centre.
        """
        self.parts.append((torch.stack(list(numbers.values())), output, p))
        if len(self.parts) < self.accum_steps:
            return
        values, outputs, ps = (torch.stack(kept) for kept in zip(*self.parts, strict=True))
        self.parts.clear()
        self.stats = dict(zip(numbers, values.mean(dim=0).unbind(), strict=True))
        p = all_reduce_mean(ps.mean(dim=0)[None])  # (1, K): before torch 2.11, MPS lacks (K,) @ (K,)
        self.stats["spread"] = _entropy(p, p.clamp(min=1e-30).log())[0] - self.stats["entropy"]
        self.update_center(outputs)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """EMA of the teacher's mean output, of (N, K), over the batches of all ranks."""
        if self.centering == "ema":
            mean = all_reduce_mean(teacher_output.mean(dim=0, keepdim=True))
            self.center = self.center.lerp(mean.to(self.center.dtype), 1 - self.center_momentum)


def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Change logits (N, K) so that their softmax uses all prototypes equally, over all ranks' batches.

    As in SwAV (Caron et al., 2020, https://arxiv.org/abs/2006.09882): alternately normalises each
    prototype's share of the batch and each image's probabilities.
    """
    for _ in range(iterations):
        share = all_gather(logits.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)  # (K,)
        logits = (logits - share).log_softmax(dim=-1)
    return logits


class _FusedCrossEntropy(torch.autograd.Function):
    """Last layer, softmax and cross-entropy of `DINOLoss` with their gradients, a few rows at a time, so
    that only one chunk of the (V*B, K) tensors that autograd would keep exists at any time.

    The loss is linear in the log-softmax, so its gradient with respect to the logits of one view of
    an image is (|q| softmax - q) / (temperature * terms), where q is the sum of the targets from the
    teacher's other views and |q| is their number.
    """

    CHUNK = 2**23  # elements; 32 MiB, about a CPU's cache
    GPU_CHUNK = 2**26  # 256 MiB: a GPU is faster with few large kernels (docs/gpu.md)
    # In half precision, gradients are scaled by a power of 2 for the matrix product. Otherwise the student's
    # smallest probabilities would underflow, whatever scale the loss has.
    HALF_SCALE = 2.0**10

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """(V*B, d), (K, d), (2, B, K) -> the mean over images and pairs of different views."""
        B, K = targets.shape[1:]
        w = weight.to(features.dtype)
        views = features.unflatten(0, (-1, B))  # (V, B, d)
        half = features.dtype in (torch.float16, torch.bfloat16)
        exact = torch.float32 if half else features.dtype
        scale = _FusedCrossEntropy.HALF_SCALE if half else 1.0
        # How many of the teacher's two views each view is compared with: all except itself.
        count = torch.full((len(views), 1, 1), 2.0, dtype=exact, device=features.device)
        count[:2] = 1.0
        grad_views = torch.empty_like(views, dtype=exact)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        total = torch.zeros((), dtype=exact, device=features.device)
        chunk = _FusedCrossEntropy.CHUNK if features.device.type == "cpu" else _FusedCrossEntropy.GPU_CHUNK
        images = max(1, chunk // (K * len(views)))
        for first in range(0, B, images):
            rows = slice(first, first + images)
            x = views[:, rows].flatten(0, 1)  # (V*b, d)
            logits = (x @ w.T).to(exact).div_(temperature).unflatten(0, (len(views), -1))  # (V, b, K)
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
            grad_views[:, rows] = (grad @ w).to(exact).unflatten(0, (len(views), -1))
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
        return grad_features * grad_loss, grad_weight.mul_(grad_loss), None, None  # (K, d) is large: in place


def _entropy(p: Tensor, logits: Tensor) -> Tensor:
    """Entropy in nats of p = softmax(logits) over the last dimension."""
    log_norm = logits.amax(dim=-1) - p.amax(dim=-1).log()  # because max p = exp(max logit) / norm
    return log_norm - torch.linalg.vecdot(p, logits)


class CollapseWatch:
    """Warns of a training that has collapsed, based on the numbers of `DINOLoss.stats`.

    Uniform collapse: the teacher's outputs are flat and the loss stays at ln K. Constant collapse: they
    are peaked, but the same for every image, so their spread is near 0 (paper, Section 5.3 and Figure 7),
    or differ only by a tiny adapted temperature. Warns once when either has lasted for `patience` steps.
    """

    ADVICE = {
        "uniform collapse": "try --centering sinkhorn with --teacher_temp 0.01 or --adapt_teacher_temp 2",
        "constant collapse": "try --centering sinkhorn, --use_bn_in_head true or a lower --lr",
    }

    def __init__(self, out_dim: int, patience: int = 200):
        self.max_entropy, self.patience = math.log(out_dim), patience
        self.lasted = dict.fromkeys(self.ADVICE, 0)

    def state_dict(self) -> dict[str, int]:
        """For how many steps each collapse has lasted."""
        return dict(self.lasted)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from what `state_dict` gave."""
        self.lasted = {name: int(state[name]) for name in self.ADVICE}

    def __call__(self, numbers: dict[str, float]) -> None:
        """Take the numbers of a step."""
        loss, entropy, small = numbers["loss"], numbers["entropy"], 0.005 * self.max_entropy
        flat = entropy > 0.995 * self.max_entropy
        found = {
            "uniform collapse": flat and abs(loss - self.max_entropy) < small,
            "constant collapse": not flat and (numbers["spread"] < small or numbers.get("temp", 1) < 1e-3),
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
# Schedules
# ---------------------------------------------------------------------------------------------


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: float = 0,
    start_warmup_value: float = 0,
) -> np.ndarray:
    """One value per global step: a linear warm-up, then half a cosine to the final value.

    The warm-up may be a fraction of an epoch. Raises ValueError if it is longer than the training.
    """
    if warmup_epochs > epochs:
        raise ValueError(f"a warm-up of {warmup_epochs} epochs does not fit into {epochs}")
    warmup = np.linspace(start_warmup_value, base_value, round(warmup_epochs * niter_per_ep))
    steps = epochs * niter_per_ep - len(warmup)
    cosine = 1 + np.cos(np.pi * np.arange(steps) / max(steps, 1))
    return np.concatenate([warmup, final_value + 0.5 * (base_value - final_value) * cosine])


# ---------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------


def get_params_groups(model: nn.Module) -> list[dict]:
    """Group trained parameters: weights, which decay, and biases and norms, which do not."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (plain if name.endswith(".bias") or param.ndim == 1 else decayed).append(param)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def set_schedules(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate, and the weight decay of the first group, as `get_params_groups` has it.

    Raises ValueError for other groups: timm's have first what does not decay; rates of layers would be lost.
    """
    if len(optimizer.param_groups) > 2 or any(p.ndim == 1 for p in optimizer.param_groups[0]["params"]):
        raise ValueError("takes the two groups of get_params_groups, without biases and norms first")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def in_parts(views: list[Tensor], count: int, model: nn.Module) -> Iterator[list[Tensor]]:
    """Split V views (B, ...) into `count` parts of V views (B / count, ...), for one backward pass each.

    Gradients add up; ranks average them in the last pass only. Raises ValueError if B does not divide.
    """
    if len(views[0]) % count:
        raise ValueError(f"{len(views[0])} images do not divide into {count} parts")
    for i, part in enumerate(zip(*(view.chunk(count) for view in views), strict=True)):
        ddp = model if isinstance(model, DistributedDataParallel) and i < count - 1 else None
        with ddp.no_sync() if ddp else contextlib.nullcontext():
            yield list(part)


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float) -> Tensor:
    """Scale each parameter's gradient separately to a norm of at most `clip`.

    Returns the norms before clipping, one per gradient, on the device, without waiting for it.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((clip / (norms + 1e-6)).clamp(max=1).unbind()))
    return norms


def cancel_gradients_last_layer(epoch: float, model: nn.Module, freeze_last_layer: float) -> None:
    """Freeze the head's last layer in the first `freeze_last_layer` epochs."""
    if epoch < freeze_last_layer:
        for name, param in model.named_parameters():
            if "last_layer" in name:
                param.grad = None


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """EMA: teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter."""
    teacher_params: list[Tensor] = list(teacher.parameters())
    student_params: list[Tensor] = list(student.parameters())
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
                    # If either norm is zero, the ratio is 0, infinite or NaN: then do not adapt.
                    update = update * ratio.where(ratio.isfinite() & (ratio > 0), 1.0)
                state = self.state[param]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(param)
                state["mu"].mul_(group["momentum"]).add_(update)
                param.add_(state["mu"], alpha=-group["lr"])
        return loss


# ---------------------------------------------------------------------------------------------
# Names of the published `utils` that are now in support/
# ---------------------------------------------------------------------------------------------

from support.backbones import has_batchnorms  # noqa: E402, F401
from support.cli import bool_flag  # noqa: E402, F401
from support.distributed import (  # noqa: E402, F401
    fix_random_seeds,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
)
from support.published import GaussianBlur, MetricLogger, SmoothedValue, Solarization  # noqa: E402, F401
