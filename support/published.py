"""Classes of the published code that ours does without; `utils` hands them on."""

import random

from PIL import Image, ImageFilter, ImageOps


class GaussianBlur:
    """With probability `p`, blur a PIL image with a radius (in pixels) from the given range."""

    def __init__(self, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0):
        self.p, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.radius_min, self.radius_max)))


class Solarization:
    """With probability `p`, invert the levels of a PIL image from 128 on."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, 128) if random.random() < self.p else image
