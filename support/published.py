"""Classes of the published code as it has them, for other code; `utils` hands them on."""

import random
import statistics
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from support import logger
from support.distributed import all_gather_object


class SmoothedValue(logger.SmoothedValue):
    """A series, printed by `fmt`."""

    def __init__(self, window_size: int = 20, fmt: str | None = None):
        super().__init__(window_size)
        self.deque, self.fmt = self.recent, fmt or "{median:.6f} ({global_avg:.6f})"

    @property
    def median(self) -> float:
        """Of the window; of an even number, the lower one of the two in the middle."""
        return statistics.median_low(self.recent)

    @property
    def max(self) -> float:
        """Of the window."""
        return max(self.recent)

    @property
    def value(self) -> float:
        """The last one."""
        return self.recent[-1]

    def synchronize_between_processes(self) -> None:
        """Make the mean over all values that of all ranks; the window stays as it is."""
        totals, counts = zip(*all_gather_object((self.total, self.count)), strict=True)
        self.total, self.count = sum(totals), sum(counts)

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger(logger.MetricLogger):
    """Series by name, also as attributes: `logger.loss.global_avg`."""

    series = SmoothedValue
    meters: Any  # a dict of series

    def __init__(self, delimiter: str = "\t"):
        super().__init__(delimiter)

    def __getattr__(self, name: str) -> SmoothedValue:
        if name in self.__dict__.get("meters", {}):
            return self.meters[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Add a series; `str(logger)` uses its `fmt`, the lines of `log_every` do not."""
        self.meters[name] = meter

    def synchronize_between_processes(self) -> None:
        """Make the mean of each series that of all ranks."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())


class GaussianBlur:
    """With probability `p`, blur a PIL image with a radius (in pixels) from the given range."""

    def __init__(self, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0):
        self.prob, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.radius_min, self.radius_max)))


class Solarization:
    """With probability `p`, invert the levels of a PIL image from 128 on."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, 128) if random.random() < self.p else image
