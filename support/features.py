"""Computes frozen features of a set of images, on any number of processes."""

import argparse
import contextlib
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from support.data import Images
from support.distributed import all_gather, get_rank, get_world_size, same_error_on_all_ranks
from support.loading import EvalImages, make_loader
from support.logger import log
from support.weights import Frozen, load_backbone


def load_by_flags(args: argparse.Namespace) -> Frozen:
    """Load the network that the weights' flags and `--image_size` name, and log what was loaded.

    All ranks call this together. Raises UserError.
    """
    with same_error_on_all_ranks():
        frozen = load_backbone(
            args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.image_size
        )
    log(f"weights: {frozen.description}")
    log(f"preprocessing: {frozen.image_size} pixels, mean {frozen.mean}, deviation {frozen.std}")
    return frozen


def extract_features(
    model: Callable[[Tensor], Tensor],
    images: Images,
    transform: Callable[[Image.Image], Tensor],
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = 0,
    keep_on: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute features (N, D), float32, and labels (N,) of all images, in their order, on every rank.

    `transform` maps an RGB image to a tensor (3, H, W), e.g. `pixels.eval_transform()`; `model`, on the
    device, maps a batch (B, 3, H, W) to features (B, D). The results are kept on `keep_on`, by default the
    device. Raises UserError if an image cannot be read.
    """
    keep_on = keep_on or device
    dataset = EvalImages(images, transform)
    sampler: Sampler[int] = DistributedSampler(dataset, get_world_size(), get_rank(), shuffle=False)
    loader = make_loader(dataset, BatchSampler(sampler, batch_size, drop_last=False), num_workers, device)
    labels = torch.zeros(len(dataset), dtype=torch.long, device=keep_on)
    features = torch.empty(0)  # until the first batch shows D
    with contextlib.closing(iter(loader)) as batches:  # also ends the workers after an error of the model
        for batch, label, index in batches:
            with torch.inference_mode():
                feature = model(batch.to(device, non_blocking=True)).float()
            if len(features) < len(dataset):
                features = torch.zeros(len(dataset), feature.shape[1], device=keep_on)
            # The sampler repeats images to fill the last batch; these are written twice.
            index = all_gather(index.to(device)).to(keep_on)
            features[index] = all_gather(feature).to(keep_on)
            labels[index] = all_gather(label.to(device)).to(keep_on)
    return features, labels
