"""Real photographs, as JPEG files of the sizes of ImageNet's."""

import random
import sys
from pathlib import Path

from PIL import Image


def write_photographs(folder: Path, count: int = 24) -> list[Path]:
    """JPEGs of about 500 x 375 pixels, cut from real photographs."""
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError:
        sys.exit("error: no photographs: pip install -r tests/benchmarks/requirements.txt")

    photographs = [data.astronaut(), data.coffee(), data.chelsea(), *load_sample_images().images]
    rng, paths = random.Random(0), []
    for i in range(count):
        image = Image.fromarray(photographs[i % len(photographs)])
        width = rng.randint(300, image.width)
        height = min(image.height, round(width * 0.75))
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        size = (500 + rng.randint(-40, 40), 375 + rng.randint(-30, 30))
        paths.append(folder / f"{i:02}.jpg")
        image.crop((left, top, left + width, top + height)).resize(size).save(paths[-1], quality=90)
    return paths
