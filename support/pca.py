"""Colours patches by their principal components, fitted over any number of images in constant memory.

The sign of the first component of all patches separates the foreground from the background. The first three
components of the foreground are its red, green and blue, as in Oquab et al., "DINOv2" (2023),
https://arxiv.org/abs/2304.07193, Figure 1; background is black.

Shapes: N rows, D features, k components, R x C patches.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from support.errors import UserError

SIDES = ("positive", "negative", "all")  # of the first component, that can be foreground


class Components(NamedTuple):
    """The first principal components of some rows, in float64 on the CPU."""

    mean: Tensor  # (D,)
    directions: Tensor  # (D, k), columns of length 1
    deviations: Tensor  # (k,): of the rows along each direction

    def scores(self, rows: Tensor) -> Tensor:
        """Rows (..., D) in units of the deviations: (..., k)."""
        return (rows.cpu().double() - self.mean) @ self.directions / self.deviations


class Moments:
    """The mean and the covariance of rows that are added in parts. Keeps D x D numbers."""

    def __init__(self):
        self.count, self.total, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add rows (N, D)."""
        rows = rows.cpu().double()
        self.count += len(rows)
        self.total = self.total + rows.sum(dim=0)
        self.products = self.products + rows.T @ rows

    def components(self, k: int) -> Components:
        """The first k components. Raises UserError if the rows span fewer.

        The largest entry of each direction is positive, so that its sign does not depend on the machine.
        """
        mean = self.total / self.count
        rank = 0
        if self.count:
            covariance = self.products / self.count - torch.outer(mean, mean)
            values, vectors = torch.linalg.eigh(covariance)  # in ascending order
            rank = int((values > 1e-12 * self.products.trace() / self.count).sum())  # beyond rounding
        if rank < k:
            what = f"{self.count} patches have {rank} of the {k} principal components needed"
            raise UserError(what, "--pca", "give more or larger images, or another --foreground")
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        return Components(mean, vectors * largest.sign(), values.sqrt())


class PatchColours:
    """Colours of patch tokens (R, C, D); equal tokens have equal colours in every image.

    `tokens()` yields the tokens of each image; it is called once for each fit: two, or one if `side` is
    "all". `side` of the first component is the foreground, one of `SIDES`; its sign is such that the mean of
    the patches at the images' borders is on the negative side. `share` of all patches is in the foreground.
    Raises UserError if there are too few patches.
    """

    def __init__(self, tokens: Callable[[], Iterable[Tensor]], side: str = "positive"):
        self.side, self.first = side, None if side == "all" else _fit_first(tokens())
        inside, count = Moments(), 0
        for grid in tokens():
            inside.add(grid[self.foreground(grid)])
            count += grid.shape[0] * grid.shape[1]
        self.components, self.share = inside.components(3), inside.count / count

    def foreground(self, grid: Tensor) -> Tensor:
        """Whether each patch is in the foreground: (R, C, D) -> bool (R, C), on the CPU."""
        if self.first is None:
            return torch.ones(grid.shape[:2], dtype=torch.bool)
        score = self.first.scores(grid)[..., 0]
        return score > 0 if self.side == "positive" else score < 0

    def __call__(self, grid: Tensor) -> Tensor:
        """(R, C, D) -> uint8 (R, C, 3). The full colour stands for two deviations from the mean, and more."""
        levels = 140 + 115 * (self.components.scores(grid) / 2).clamp(-1, 1)  # only the background is black
        return (levels * self.foreground(grid)[..., None]).round().to(torch.uint8)


def _fit_first(tokens: Iterable[Tensor]) -> Components:
    """The first component of all patches, with the mean of those at the images' borders on its negative side.

    Where that mean is at 0, e.g. because all patches are at the border, the sign stays as `Moments` gives it.
    """
    patches, border, images = Moments(), torch.zeros(()), 0
    for grid in tokens:
        patches.add(grid.flatten(0, 1))
        edges = torch.cat([grid[0], grid[-1], grid[:, 0], grid[:, -1]])
        border = border + edges.cpu().double().mean(dim=0)
        images += 1
    first = patches.components(1)
    if first.scores(border / images).item() > 1e-6:
        return first._replace(directions=-first.directions)
    return first
