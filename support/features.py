"""Computes frozen features of a set of images, on any number of processes; and features of patches.

Shapes: B images, N images of a set, H x W pixels, R x C patches, D features.
"""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from support.data import Images
from support.distributed import agree, all_gather, get_rank, get_world_size, same_error_on_all_ranks
from support.errors import UserError, first_line
from support.loading import EvalImages, Loader
from support.logger import log
from support.pixels import AnyImage, copy_to, size_words
from support.weights import Frozen, digest_weights, load_backbone
from vision_transformer import VisionTransformer


def load_by_flags(args: argparse.Namespace) -> Frozen:
    """Load the network that the weights' flags and `--image_size` name, and log what was loaded.

    All ranks call this together. Raises UserError.
    """
    with same_error_on_all_ranks():
        frozen = load_backbone(
            args.pretrained_weights,
            args.checkpoint_key,
            args.arch,
            args.patch_size,
            args.image_size,
            args.in_chans,
            args.value_range,
        )
    confirm_network(frozen, f"{size_words(frozen.image_size)} pixels")
    return frozen


SAME = 1e-4  # distance of unit features of one image: rounding changes less


def confirm_network(frozen: Frozen, *sizes: str) -> None:
    """Log what was loaded, and how images become its input; `sizes` say how they are resized.

    All ranks call this together. Raises UserError if they have different weights.
    """
    if get_world_size() > 1:
        agree("weights", digest_weights(frozen.network))
    log(f"weights: {frozen.description}")
    log(f"preprocessing: {', '.join([*sizes, frozen.value_words])}")


def extract_features(
    model: Callable[[Tensor], Tensor],
    images: Images,
    transform: Callable[[AnyImage], Tensor],
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = 0,
    keep_on: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute features (N, D), float32, and labels (N,) of all images, in their order, on every rank.

    `transform` maps an image to a tensor (C, H, W), e.g. `pixels.eval_transform()`; `model`, on the
    device, maps a batch (B, C, H, W) to features (B, D). The results are kept on `keep_on`, by default the
    device. Raises UserError if an image cannot be read, and for features that are not finite.
    """
    if getattr(model, "training", False):
        log("warning: the network is in training mode, in which batch norm and dropout act: call its eval()")
    keep_on = keep_on or device
    dataset = EvalImages(images, transform)
    sampler: Sampler[int] = DistributedSampler(dataset, get_world_size(), get_rank(), shuffle=False)
    loader = Loader(dataset, BatchSampler(sampler, batch_size, drop_last=False), num_workers, device)
    labels = torch.zeros(len(dataset), dtype=torch.long, device=keep_on)
    features = torch.empty(0)  # until the first batch shows D
    with contextlib.closing(iter(loader)) as batches:  # also ends the workers after an error of the model
        for batch, label, index in batches:
            with torch.inference_mode():
                feature = model(copy_to(batch, device)).float()
            if len(features) < len(dataset):
                features = torch.zeros(len(dataset), feature.shape[1], device=keep_on)
            # The sampler repeats images to fill the last batch; these are written twice.
            index = all_gather(copy_to(index, device)).to(keep_on)
            features[index] = all_gather(feature).to(keep_on)
            labels[index] = all_gather(copy_to(label, device)).to(keep_on)
    some = features[:: len(features) // 10_000 + 1]
    are_alike = some.std(dim=0, correction=0).norm() < 1e-3 * some.norm(dim=1).mean()
    broken, alike = torch.stack([~all_finite(features), are_alike]).tolist()  # the same on all ranks
    if broken:
        raise UserError("the network's features are not finite", "", "give weights that did not diverge")
    if alike and len(features) > 1:
        log(f"warning: the features of {len(features)} images are nearly equal: collapsed weights?")
    return features, labels


def all_finite(features: Tensor) -> Tensor:
    """Whether all values are finite, as a scalar; in parts of the rows, as `isfinite` copies its values."""
    return torch.stack([part.isfinite().all() for part in features.split(4096)]).all()


@torch.inference_mode()
def compute(
    features: Callable[[nn.Module, Tensor], Tensor],
    network: nn.Module,
    images: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`features(network, images)` of normalised images (B, C, H, W), float32; `dtype` is for autocast."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return features(network, images).float()


def frozen_features(
    backbone: nn.Module, images: Tensor, n_last_blocks: int, avgpool_patchtokens: bool
) -> Tensor:
    """Features of the linear probe: normalised images (B, C, H, W) -> (B, F).

    For our ViTs, the CLS tokens of the last blocks, F = n D, and with `avgpool_patchtokens` also the mean
    of the last block's patches, F = (n + 1) D; for other networks, their output.
    """
    if not isinstance(backbone, VisionTransformer):
        return backbone(images)
    layers = backbone.get_intermediate_layers(images, n_last_blocks)
    classes = [layer[:, 0].float() for layer in layers]
    if avgpool_patchtokens:
        classes[-1] = with_mean(classes[-1], _grid(backbone, images, layers[-1]))
    return torch.cat(classes, dim=-1)


def concat_patches(network: nn.Module, images: Tensor) -> Tensor:
    """The last block's normed patch tokens, one after another: (B, C, H, W) -> (B, R C D).

    Raises UserError as `patch_tokens` does.
    """
    return patch_tokens(network, images).flatten(1)


def with_mean(cls: Tensor, patches: Tensor) -> Tensor:
    """The CLS token (B, D) and the mean of the patches (B, ..., D), float32: (B, 2 D), interleaved.

    The published ViT-B classifiers expect this order.
    """
    mean = patches.flatten(1, -2).float().mean(dim=1)
    return torch.stack([cls.float(), mean], dim=-1).flatten(1)


def patch_size_of(network: nn.Module) -> int:
    """Patch size in pixels; 1 for networks without patches."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return size if isinstance(size, int) else size[0]


def cls_and_patches(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last block's normed tokens: the CLS token (B, D) and the patches (B, R, C, D).

    For timm's networks that do not give a CLS token, the output stands for it. Raises UserError as
    `patch_tokens` does.
    """
    if isinstance(network, VisionTransformer):
        tokens = network.get_intermediate_layers(images, 1)[0]
        return tokens[:, 0], _grid(network, images, tokens)
    with contextlib.suppress(UserError):
        patches, cls = _timm_patches_and_cls(network, images, 1, "NCHW")[0]
        return cls, patches.permute(0, 2, 3, 1)
    patches = patch_tokens(network, images)
    return network(images), patches


def patch_tokens(network: Any, images: Tensor, layer: int = 1) -> Tensor:
    """Normed patch tokens after a block, counted from the end: (B, channels, H, W) -> (B, R, C, D).

    Works for our ViTs and for timm's networks. Raises UserError for other networks, for a layer that is
    not there, and for an image size that the network does not take.
    """
    if isinstance(network, VisionTransformer):
        if layer > len(network.blocks):
            depth = len(network.blocks)
            raise UserError(f"network has {depth} blocks", f"--layer {layer}", f"give 1 to {depth}")
        return _grid(network, images, network.get_intermediate_layers(images, layer)[0])
    return _timm_layers(network, images, layer, output_fmt="NCHW")[0].permute(0, 2, 3, 1)


def has_cls(network: Any) -> bool:
    """Whether a ViT has a CLS token, and not registers alone; NaFlexViT keeps it in `embeds`."""
    return getattr(getattr(network, "embeds", network), "cls_token", None) is not None


def last_cls_tokens(network: Any, images: Tensor, n: int) -> list[Tensor]:
    """Normed CLS tokens after each of the last `n` blocks: n times (B, D).

    Works for our ViTs and for timm's that have a CLS token. Raises UserError as `patch_tokens` does, and for
    networks whose first token is another one, e.g. a register.
    """
    if isinstance(network, VisionTransformer):
        return [layer[:, 0] for layer in network.get_intermediate_layers(images, n)]
    return [cls for _, cls in _timm_patches_and_cls(network, images, n, "NLC")]


def _timm_patches_and_cls(
    network: Any, images: Tensor, n: int, output_fmt: str
) -> list[tuple[Tensor, Tensor]]:
    """For each of the last `n` blocks, normed: its patches in timm's format, and its CLS token (B, D).

    Raises UserError as `last_cls_tokens` does.
    """
    layers: list = []
    if has_cls(network):
        layers = _timm_layers(network, images, n, output_fmt=output_fmt, return_prefix_tokens=True)
    if not layers or not all(isinstance(layer, tuple) and layer[1].shape[1] for layer in layers):
        what = f"{type(network).__name__} has no CLS token in its blocks"
        raise UserError(what, fix="use another ViT")
    return [(patches, prefix[:, 0]) for patches, prefix in layers]


def _timm_layers(network: Any, images: Tensor, n: int, **kwargs) -> list:
    """What timm's `forward_intermediates` gives for the last `n` blocks, normed. Raises UserError."""
    name = type(network).__name__
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"{name} has no patch tokens", fix="use one of our ViTs or a timm model")
    try:
        return network.forward_intermediates(images, indices=n, norm=True, intermediates_only=True, **kwargs)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        fix = "choose another image size, layer or network"
        raise UserError(f"{name}: {first_line(error)}", fix=fix) from None


def _grid(network: VisionTransformer, images: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, D), the R C patches last -> (B, R, C, D)."""
    patch = network.patch_embed.patch_size
    rows, cols = (side // patch for side in images.shape[-2:])
    return tokens[:, -rows * cols :].unflatten(1, (rows, cols))
