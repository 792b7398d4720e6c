"""The demo's images: a textured polygon over a smooth colour field; the texture is the class.

An image follows from the split and the index alone, so nothing has to be downloaded and their number is
unlimited. Place, size, outline, rotation, phase, polarity and colours are independent of the class, so raw
pixels say little about it, and features of colour or position do not help.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

SPLITS = {"train": 0, "val": 1}
Range = tuple[float, float]


class Scene(NamedTuple):
    """How images are drawn. Lengths are in sides of the image; brightness is from 0 to 1.

    An image can be drawn in any size: the size changes nothing else.
    """

    size: int = 96  # pixels
    radius: Range = (0.23, 0.31)  # of the object
    center: Range = (0.28, 0.72)  # its coordinates
    contrast: Range = (0.35, 0.5)  # of the texture
    periods: tuple[float, float, float] = (0.25, 0.14, 0.085)  # of broad, usual and fine stripes and checks
    warps: tuple[float, float, float] = (0.4, 0.6, 1.2)  # of the same, in periods
    blobs: tuple[int, int] = (8, 28)  # cells of noise per side, for blobs and fine blobs
    shades: tuple[float, float] = (0.05, 0.2)  # grey and coloured noise in the object
    ground: tuple[float, float] = (0.14, 0.08)  # and in the background


USUAL = Scene()


class Shapes(Dataset):
    """Endless labelled images, each with the exact mask of its object.

    Item i is (RGB image, class number). Splits never share an image.
    """

    classes = (
        "broad stripes", "stripes", "fine stripes", "broad checks", "checks", "fine checks",
        "blobs", "fine blobs",
    )  # fmt: skip

    def __init__(self, split: str, length: int, scene: Scene = USUAL):
        self.split = SPLITS[split]
        self.length, self.scene, self.size = length, scene, scene.size
        self.y, self.x = np.mgrid[: self.size, : self.size].astype(np.float32) + 0.5

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels, label = _drawn(self.split, index, self.scene)
        return Image.fromarray(pixels), label

    def mask(self, index: int) -> np.ndarray:
        """Where the object of image `index` is: (H, W), bool."""
        return self.draw(index)[2]

    def draw(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Pixels (H, W, 3) uint8, class number, and mask (H, W)."""
        rng, scene = np.random.default_rng([self.split, index]), self.scene
        label = int(rng.integers(len(self.classes)))
        center = self.size * rng.uniform(*scene.center, 2)
        cover = self._polygon(rng, center)[..., None]
        tone = self._texture(rng, self.classes[label], center)[..., None]
        tone -= (cover * tone).sum() / cover.sum()  # brightness is independent of the class
        contrast = rng.uniform(*scene.contrast) * rng.choice([-1, 1])
        object_ = 0.5 + contrast * tone + self._noise(rng, 4, scene.shades)
        ground = 0.5 + self._noise(rng, 5, scene.ground)
        pixels = (cover * object_ + (1 - cover) * ground).clip(0, 1) * 255
        return pixels.astype(np.uint8), label, cover[..., 0] > 0.5

    def _polygon(self, rng: np.random.Generator, center: np.ndarray) -> np.ndarray:
        """Share of each pixel that a random regular polygon covers: (H, W) in [0, 1]."""
        corners = int(rng.integers(3, 8))
        radius = self.size * rng.uniform(*self.scene.radius) * (1.15 if corners == 3 else 1)
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
        outline = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        mask = Image.new("L", (2 * self.size, 2 * self.size))
        ImageDraw.Draw(mask).polygon([tuple(point) for point in 2 * outline], fill=255)
        return np.asarray(mask.resize((self.size, self.size), Image.Resampling.BOX), np.float32) / 255

    def _texture(self, rng: np.random.Generator, name: str, center: np.ndarray) -> np.ndarray:
        """A two-tone pattern, rotated, shifted and gently warped: (H, W) in [-1, 1]."""
        kind = {"broad": 0, "fine": 2}.get(name.split()[0], 1)
        period = self.size * self.scene.periods[kind] * rng.uniform(0.9, 1.1)
        angle, (phase_u, phase_v) = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1, 2)
        x, y = self.x - center[0], self.y - center[1]
        warp = self.scene.warps[kind] * self._field(rng, 5, 2)
        u = (x * np.cos(angle) + y * np.sin(angle)) / period + warp[..., 0]
        v = (y * np.cos(angle) - x * np.sin(angle)) / period + warp[..., 1]

        def wave(position, phase):
            return np.sin(2 * np.pi * (position + phase))

        if name.endswith("stripes"):
            tone = 2 * wave(u, phase_u)
        elif name.endswith("checks"):
            tone = 3 * wave(u, phase_u) * wave(v, phase_v)
        else:
            tone = 4 * self._field(rng, self.scene.blobs["fine" in name])[..., 0]
        return tone.clip(-1, 1)

    def _noise(self, rng: np.random.Generator, cells: int, amplitudes: Range) -> np.ndarray:
        """Smooth noise in grey and in colour: (H, W, 3)."""
        grey, coloured = amplitudes
        return grey * self._field(rng, cells) + coloured * self._field(rng, cells, 3)

    def _field(self, rng: np.random.Generator, cells: int, channels: int = 1) -> np.ndarray:
        """Smooth noise with a mean of about 0: (H, W, channels), mostly in [-1, 1]."""
        coarse = rng.uniform(-1, 1, (channels, cells, cells)).astype(np.float32)
        coarse -= coarse.mean(axis=(1, 2), keepdims=True)
        size = (self.size, self.size)
        return np.stack(
            [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in coarse], axis=-1
        )


@functools.lru_cache(maxsize=8_192)  # 230 MB; a drawing takes 3 ms, and each epoch asks again
def _drawn(split: int, index: int, scene: Scene) -> tuple[np.ndarray, int]:
    pixels, label, _ = Shapes(list(SPLITS)[split], 1, scene).draw(index)
    return pixels, label
