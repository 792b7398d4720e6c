"""Prints a run's messages, and averages the numbers of an epoch."""

import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from support.distributed import is_first
from support.errors import printable


def log(message: str) -> None:
    """Print from the first process only, above a progress bar if there is one."""
    if is_first():
        write(message)


# The first error of the disk that the output goes to, if any. It does not end a training.
lost: list[OSError] = []


def write(message: str | None = None) -> None:
    """Print a line from this process, above a progress bar if there is one; flush what was printed before.

    Control characters, as names in a file of others may have, are escaped. Puts the first error of the disk
    into `lost`.
    """
    try:
        if sys.stdout is None:  # the shell has closed it; tqdm 4.66 would fail
            return
        if message is not None:
            tqdm.write(printable(message))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has ended
        raise
    except OSError as error:
        if not lost:
            lost.append(error.with_traceback(None))  # which would keep the callers' tensors


class SmoothedValue:
    """A series: its mean over the last `window_size` values and over all."""

    def __init__(self, window_size: int = 20):
        self.recent: deque[float] = deque(maxlen=window_size)
        self.total, self.count = 0.0, 0

    def update(self, value: float | Tensor, n: int = 1) -> None:
        """Append a value, the mean of `n`. A tensor must have one element; the host waits for it."""
        value = float(value)  # a tensor would sum in its own precision
        self.recent.append(value)
        self.total += value * n
        self.count += n

    @property
    def avg(self) -> float:
        """Mean over the window."""
        return sum(self.recent) / max(len(self.recent), 1)

    @property
    def global_avg(self) -> float:
        """Mean over all values."""
        return self.total / max(self.count, 1)


class MetricLogger:
    """Shows an epoch while it runs: a progress bar on a terminal, else a line every `print_freq` steps."""

    series: type[SmoothedValue] = SmoothedValue

    def __init__(self, delimiter: str = "  ", images_per_step: float = 0):
        """`images_per_step` counts all ranks, for the speed; 0 leaves the speed out."""
        self.delimiter, self.images_per_step = delimiter, images_per_step
        self.start_epoch()

    def update(self, **values: float | Tensor) -> None:
        """Append one step's value to each named series."""
        for name, value in values.items():
            self.meters[name].update(value)

    def start_epoch(self) -> None:
        """Empty all series."""
        self.meters: dict[str, SmoothedValue] = defaultdict(self.series)
        self.step_time, self.data_time = SmoothedValue(50), SmoothedValue(50)

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Sum and length of each series, so that a restart within an epoch keeps its averages."""
        series = self.meters | {"step_time": self.step_time}
        return {name: (meter.total, meter.count) for name, meter in series.items()}

    def load_state_dict(self, state: dict[str, tuple[float, int]]) -> None:
        """Continue from what `state_dict` gave."""
        for name, (total, count) in state.items():
            own = self.step_time if name == "step_time" else self.meters[name]
            own.total, own.count = float(total), int(count)

    def averages(self) -> dict[str, float]:
        """The mean of each series over the epoch, and the images per second."""
        speed = self.images_per_step / self.step_time.global_avg if self.step_time.total else 0.0
        return {n: m.global_avg for n, m in self.meters.items()} | {"images_per_second": speed}

    def log_every(
        self,
        iterable: Any,
        print_freq: int = 10,
        header: str | None = "",
        length: int | None = None,
        steps_after: int = 0,
        numbers: range | None = None,
    ) -> Iterator:
        """Yield the batches; time them and show the meters, at least once a minute if steps are slow.

        `length` is the number of batches in an epoch; if not given, it is `len(iterable)`. `numbers` are the
        places of the batches in it, by default 1 to `length`. The remaining time counts `steps_after` more
        steps than the epoch's.
        """
        length, header = len(iterable) if length is None else length, header or ""
        numbers = range(1, length + 1) if numbers is None else numbers
        digits = len(str(length))
        show_bar = is_first() and sys.stderr is not None and sys.stderr.isatty()
        begun = numbers.start - 1
        with tqdm(total=length, initial=begun, desc=header, leave=False, disable=not show_bar) as bar:
            asked = said = time.perf_counter()
            said_at = -print_freq  # the step of the last line
            for step, batch in enumerate(iterable, numbers.start):
                got = time.perf_counter()
                yield batch
                done = time.perf_counter()
                self.data_time.update(got - asked)
                self.step_time.update(done - asked)
                asked = done
                bar.update()
                left = length - step + steps_after
                if show_bar:
                    bar.set_postfix_str(self.status(left), refresh=False)
                    continue
                is_due = step % print_freq == 0 and step - said_at >= print_freq
                if is_due or step == numbers.stop - 1 or done - said > 60:
                    log(f"{header} [{step:{digits}d}/{length}] {self.status(left)}")
                    said, said_at = done, step

    def status(self, steps_left: int) -> str:
        """Meters, speed, share of time spent waiting for data, time left, peak GPU memory."""
        seconds = max(self.step_time.avg, 1e-9)
        eta = timedelta(seconds=int(seconds * steps_left))
        parts = [f"{name} {meter.avg:.4g}" for name, meter in self.meters.items()]
        if self.images_per_step:
            parts.append(f"{self.images_per_step / seconds:.0f} img/s")
        parts += [f"data {self.data_time.avg / seconds:.0%}", f"eta {eta}"]
        if torch.cuda.is_available():
            parts.append(f"mem {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        return self.delimiter.join(parts)
