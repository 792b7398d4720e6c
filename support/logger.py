"""What a run says: lines on the terminal and the numbers of an epoch."""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from support.distributed import is_main_process


def log(message: str) -> None:
    """Print once, from the main process, above a progress bar if there is one."""
    if is_main_process():
        tqdm.write(message)
        sys.stdout.flush()


class SmoothedValue:
    """A series: its mean over the last `window` values and over all."""

    def __init__(self, window: int = 20):
        self.recent: deque[float] = deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.recent.append(value)
        self.total += value
        self.count += 1

    @property
    def avg(self) -> float:
        return sum(self.recent) / max(len(self.recent), 1)

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)


class MetricLogger:
    """Shows an epoch while it runs: a progress bar on a terminal, else a line every 10 steps."""

    def __init__(self, header: str, images_per_step: int, steps_after: int = 0, print_freq: int = 10):
        """`images_per_step` counts all ranks; `steps_after`, for the ETA, follow this epoch."""
        self.header, self.images_per_step = header, images_per_step
        self.steps_after, self.print_freq = steps_after, print_freq
        self.meters: dict[str, SmoothedValue] = {}
        self.step_time, self.data_time = SmoothedValue(50), SmoothedValue(50)

    def update(self, **values: float) -> None:
        """Add one step's value to each named series."""
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def start_epoch(self) -> None:
        """Begin all series anew."""
        self.meters.clear()
        self.step_time, self.data_time = SmoothedValue(50), SmoothedValue(50)

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Sum and length of each series, so that a restart within an epoch keeps its averages."""
        series = self.meters | {"step_time": self.step_time}
        return {name: (meter.total, meter.count) for name, meter in series.items()}

    def load_state_dict(self, state: dict[str, tuple[float, int]]) -> None:
        """Go on from what `state_dict` gave."""
        for name, (total, count) in state.items():
            own = self.step_time if name == "step_time" else self.meters.setdefault(name, SmoothedValue())
            own.total, own.count = float(total), int(count)

    def averages(self) -> dict[str, float]:
        """Each series' mean over the epoch, and its images/s."""
        speed = self.images_per_step / self.step_time.global_avg if self.step_time.total else 0.0
        return {n: m.global_avg for n, m in self.meters.items()} | {"images_per_second": speed}

    def log_every(self, batches: Iterable, length: int) -> Iterator:
        """Yield the batches; time them and show the meters in between."""
        digits = len(str(length))
        show_bar = is_main_process() and sys.stderr.isatty()
        with tqdm(total=length, desc=self.header, leave=False, disable=not show_bar) as bar:
            asked = time.perf_counter()
            for step, batch in enumerate(batches, 1):
                got = time.perf_counter()
                yield batch
                done = time.perf_counter()
                self.data_time.update(got - asked)
                self.step_time.update(done - asked)
                asked = done
                bar.update()
                if show_bar:
                    bar.set_postfix_str(self.status(length - step), refresh=False)
                elif step % self.print_freq == 0 or step == length:
                    log(f"{self.header} [{step:{digits}d}/{length}] {self.status(length - step)}")

    def status(self, steps_left: int) -> str:
        """Meters, speed, share of time spent waiting for data, time left, peak GPU memory."""
        seconds = max(self.step_time.avg, 1e-9)
        eta = time.strftime("%H:%M:%S", time.gmtime(seconds * (steps_left + self.steps_after)))
        days = int(seconds * (steps_left + self.steps_after) // 86400)
        parts = [f"{name} {meter.avg:.4g}" for name, meter in self.meters.items()]
        parts += [
            f"{self.images_per_step / seconds:.0f} img/s",
            f"data {self.data_time.avg / seconds:.0%}",
            f"eta {f'{days}d ' if days else ''}{eta}",
        ]
        if torch.cuda.is_available():
            parts.append(f"mem {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        return "  ".join(parts)
