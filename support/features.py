"""Computes frozen features of a set of images, on any number of processes."""

import contextlib
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from support.data import Images
from support.distributed import all_gather, get_rank, get_world_size
from support.loading import EvalImages, make_loader


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
