"""Frozen features of a set of images, on any number of processes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from support.data import EvalImages, ending_workers
from support.distributed import all_gather, get_rank, get_world_size
from support.monitor import ignore_signals
from support.pixels import eval_transform


def extract_features(
    model: Callable[[Tensor], Tensor],
    images: Dataset,
    image_size: int,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = 0,
    normalized: bool = True,
    keep_on: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of all images, on every rank, in the order of the images.

    They are kept on the device, unless on another. `model`, on the device, maps images (B, 3, H, W)
    to (B, D); `normalized` features have length 1.
    """
    dataset = EvalImages(images, eval_transform(image_size))
    sampler = DistributedSampler(dataset, get_world_size(), get_rank(), shuffle=False)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # `ending_workers` knows no others
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,  # a training that evaluates is not to lose them
        generator=torch.Generator(),  # its own: the global stream is a training's
    )
    keep_on = keep_on or device
    features, labels = None, torch.zeros(len(dataset), dtype=torch.long, device=keep_on)
    with ending_workers(loader):
        for batch, label, index in loader:
            with torch.inference_mode():
                feature = model(batch.to(device, non_blocking=True)).float()
                if normalized:
                    feature = F.normalize(feature, dim=1)
            if features is None:
                features = torch.zeros(len(dataset), feature.shape[1], device=keep_on)
            # The sampler repeats images to fill the last batch; a repetition overwrites itself.
            index = all_gather(index.to(device)).to(keep_on)
            features[index] = all_gather(feature).to(keep_on)
            labels[index] = all_gather(label.to(device)).to(keep_on)
    return features, labels
