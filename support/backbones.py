"""Networks by name (ours, torchvision's, timm's), and checks that they suit DINO."""

import contextlib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.errors import UserError, first_line, nearest
from support.logger import log
from support.pixels import Size, height_and_width, size_words
from vision_transformer import VITS, VisionTransformer


def canonical(arch: str) -> str:
    """Map a name from the published code to ours or timm's; other names stay unchanged."""
    if arch in VITS:
        return next(name for name, make in VITS.items() if make is VITS[arch])  # deit_small -> vit_small
    return re.sub(r"^(xcit_\w+_p\d+)$", r"\1_224", arch)  # XCiT's own repository -> timm


def is_known(arch: str) -> bool:
    """Whether this is the name of a network that `build_backbone` builds."""
    arch = canonical(arch)
    if arch in VITS or arch in torchvision_names():
        return True
    import timm  # half a second, so only when it is needed

    return timm.is_model(arch)


def check_known(arch: str) -> None:
    """Raise UserError unless this is the name of a network."""
    if is_known(arch):
        return
    import timm

    short = re.fullmatch(r"(?:dino_)?vit[-_]?(t|s|b|tiny|small|base)[-_/]?([1-9]\d?)", arch.lower())
    if short:
        ours = next(name for name in VITS if name.startswith(f"vit_{short[1]}"))
        hint = f"did you mean --arch {ours} --patch_size {short[2]}?"
    else:
        hint = nearest(arch, [*VITS, *torchvision_names(), *timm.list_models()])
    raise UserError("unknown architecture", f"--arch {arch}", hint)


def torchvision_names() -> list[str]:
    """The names of torchvision's classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def build_backbone(
    arch: str, patch_size: int = 16, img_size: Size = 224, drop_path_rate: float = 0.0, in_chans: int = 3
) -> tuple[nn.Module, int]:
    """Build a backbone by name, randomly initialised, without classifier: (B, in_chans, H, W) -> (B, D).

    The name is looked up among our ViTs, then torchvision's classifiers, then timm's models.
    `patch_size` and `img_size` (of the position embedding) apply to our ViTs only; the names of other
    networks determine theirs. `drop_path_rate` applies to our ViTs and timm's models; torchvision's keep
    their own.
    Returns the model, whose attribute `dropped_classifiers` names the removed layers, and D. Raises
    UserError for an unknown name.
    """
    arch = canonical(arch)
    model: Any  # of timm's models, few attributes are declared
    if arch in VITS:
        settings = {"img_size": img_size, "in_chans": in_chans, "drop_path_rate": drop_path_rate}
        model = VITS[arch](patch_size=patch_size, **settings)  # by name: an own network has its own order
        model.dropped_classifiers = ("head",)
        return model, model.embed_dim
    if arch in torchvision_names():
        if drop_path_rate:
            log(f"note: --drop_path_rate has no effect on torchvision's {arch}")
        return _torchvision_backbone(arch, in_chans)
    check_known(arch)
    import timm

    kwargs: dict[str, Any] = {"dynamic_img_size": True, "drop_path_rate": drop_path_rate}
    if in_chans != 3:
        kwargs["in_chans"] = in_chans
    while True:
        try:
            model = timm.create_model(arch, pretrained=False, num_classes=0, **kwargs)
            names = model.default_cfg["classifier"]  # two for a distilled ViT
            model.dropped_classifiers = (names,) if isinstance(names, str) else tuple(names or ())
            # MobileNetV3 and similar networks have a layer after the pooling.
            return model, getattr(model, "head_hidden_size", None) or model.num_features
        except TypeError as error:  # most convnets accept neither argument
            unknown = [name for name in kwargs if f"'{name}'" in str(error)]
            if "in_chans" in unknown:
                fix = "use another, or --in_chans 3"
                raise UserError("network takes three channels only", f"--arch {arch}", fix) from None
            if not unknown:
                raise
            if drop_path_rate and unknown[0] == "drop_path_rate":
                log(f"note: --drop_path_rate has no effect on {arch}")
            del kwargs[unknown[0]]


def _torchvision_backbone(arch: str, in_chans: int) -> tuple[nn.Module, int]:
    auxiliary = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(arch, weights=None, **auxiliary)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("network has no linear classifier to remove", f"--arch {arch}", "use another")
    parent, _, name = linear[-1].rpartition(".")
    embed_dim = model.get_submodule(linear[-1]).in_features
    setattr(model.get_submodule(parent), name, nn.Identity())
    model.dropped_classifiers = (linear[-1],)
    if in_chans != 3:
        _widen_first_conv(model, in_chans)
    return model, embed_dim


def _widen_first_conv(model: nn.Module, in_chans: int) -> None:
    """Make the first convolution take other than three channels, with random weights of a fitting size."""
    name, old = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    shape = {"stride": old.stride, "padding": old.padding, "bias": old.bias is not None}
    new = nn.Conv2d(in_chans, old.out_channels, old.kernel_size, **shape)  # type: ignore[arg-type]
    nn.init.normal_(new.weight, std=old.weight.std().item() * math.sqrt(3 / in_chans))
    if new.bias is not None:
        new.bias = old.bias
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def check_divides(name: str, size: Size, patch_size: int) -> None:
    """Raise UserError if patches do not tile an image; `name` is the flag that gives its size."""
    sides = size if isinstance(size, Sequence) else [size]
    if any(side % patch_size for side in sides):
        below = " ".join(str(side // patch_size * patch_size or patch_size) for side in sides)
        above = " ".join(str(math.ceil(side / patch_size) * patch_size) for side in sides)
        fix = f"try {below}" + (f" or {above}" if above != below else "")
        where = f"--{name} {' '.join(map(str, sides))}"
        raise UserError(f"not a multiple of --patch_size {patch_size}", where, fix)


def check_crop_sizes(
    backbone: nn.Module, arch: str, embed_dim: int, sizes: Iterable[Size], in_chans: int = 3
) -> None:
    """Raise UserError unless the backbone maps images of each size to (B, D)."""
    for size in sizes:
        fix = "choose another image size or --arch"
        try:
            output = features_of_blanks(backbone, size, in_chans)
        except Exception as error:  # a model may raise anything for a size that it does not accept
            what = f"{arch} takes no images of {size_words(size)} pixels: {first_line(error)}"
            raise UserError(what, "--arch", fix) from None
        if not isinstance(output, torch.Tensor):
            what, fix = f"{arch} gives a {type(output).__name__}", "return features (B, D) in evaluation mode"
            raise UserError(what, "--arch", fix)
        shape = tuple(output.shape)
        if shape != (2, embed_dim):
            raise UserError(f"{arch} gives {shape[1:]} per image, not ({embed_dim},)", "--arch", fix)


@torch.no_grad()
def features_of_blanks(backbone: nn.Module, size: Size, in_chans: int) -> torch.Tensor:
    """What a backbone on the CPU gives for two blank images of this size, in evaluation mode."""
    training = backbone.training
    try:
        return backbone.eval()(torch.zeros(2, in_chans, *height_and_width(size)))
    finally:
        backbone.train(training)


class _PaddedPools(TorchDispatchMode):
    """Notes whether an average pool pads its input."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.avg_pool2d.default and len(args) > 3:
            self.found |= any(args[3])  # after the input, the kernel's size and the stride
        return func(*args, **(kwargs or {}))


def has_dropout(model: nn.Module) -> bool:
    """Whether any module drops values in training."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())


def has_batchnorms(model: nn.Module) -> bool:
    """Whether any module normalises over the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def pads_average_pools(backbone: nn.Module, size: Size, in_chans: int = 3) -> bool:
    """Whether average pools of a backbone on the CPU pad their inputs, for images of this size."""
    with _PaddedPools() as pools:
        features_of_blanks(backbone, size, in_chans)
    return pools.found


def checkpoint_activations(backbone: nn.Module, arch: str) -> None:
    """Recompute activations in the backward pass to save memory. Raises UserError if it cannot."""
    if isinstance(backbone, VisionTransformer):
        backbone.grad_checkpointing = True
        return
    enable = getattr(backbone, "set_grad_checkpointing", None)  # timm's
    with contextlib.suppress(AttributeError, AssertionError):  # how other models refuse
        if enable:
            return enable()
    what = f"{arch} cannot recompute activations"
    raise UserError(what, "--grad_checkpointing", "leave it out, or use a ViT")


def convert_batchnorms(model: nn.Module) -> nn.Module:
    """Replace batch norms by ones that use the statistics of all ranks' images; these work on GPUs only.

    Changes the model in place unless it is itself a batch norm; returns it.
    """
    if "timm" in sys.modules:  # timm's batch norms contain the activation, which torch would drop
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
