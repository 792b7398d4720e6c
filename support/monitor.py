"""Watches a training run: the signals that ask it to stop, and the numbers of every step."""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from support.distributed import all_reduce_mean, get_world_size, is_first
from support.errors import Interrupted, TrainingError, UserError
from support.logger import write
from support.signals import SIGNALS


class Watch(Protocol):
    """Receives the numbers of each step, by name; its state is kept over restarts."""

    def __call__(self, numbers: dict[str, float]) -> None: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Monitor:
    """Checks every step: ends a run that cannot continue, counts unreadable images, notes signals.

    Within its `with` block, a signal to stop is noted, said, and does not end the process; a second Ctrl-C
    ends it at once. `stopping` becomes true on all ranks at the same step after any rank got a signal.
    """

    def __init__(
        self,
        unreadable_limit: int,
        name_of: Callable[[int], str] = str,
        watch: Watch | None = None,
        advice: str = "lower the learning rate",
    ):
        """`unreadable_limit` applies per epoch; `name_of(index)` returns what a warning calls an image.

        `watch` gets the numbers of each step; `advice` is what to try when the loss is not finite.
        """
        self.unreadable_limit, self.name_of = unreadable_limit, name_of
        self.watch, self.advice = watch, advice
        self.advice_at_first = ""  # for the first step that is checked, if other than `advice`
        self.received: signal.Signals | None = None
        self.stopping = False
        self.named: set[int] = set()
        self.unreadable = 0
        self._handlers_before: dict = {}

    # ---- signals

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        # Without stderr, Python's is None, and number 2 is another file, such as a checkpoint.
        if number != self.received and is_first() and sys.stderr is not None:
            again = "; a second Ctrl-C stops at once, without saving" if number == signal.SIGINT else ""
            words = f"{signal.Signals(number).name}: stopping after this step{again}\n"
            words = "\n" * os.isatty(2) + words  # below a progress bar
            with contextlib.suppress(OSError):
                os.write(2, words.encode())  # a signal can interrupt `print`, which cannot be called again
        self.received = signal.Signals(number)

    def stop_asked(self) -> bool:
        """Whether this process got a signal."""
        return self.received is not None

    def raise_if_stopped(self, step: int, last_step: int, folder: Path) -> None:
        """Raise Interrupted for a run that ends before its last step."""
        if step < last_step:
            cause = self.received.name if self.received else "a signal to another process"
            what = f"by {cause}, saved step {step} of {last_step}"
            raise Interrupted(what, str(folder), "run the same command to resume")

    # ---- the numbers of a step

    def start_epoch(self) -> None:
        """Restart the count of unreadable images."""
        self.unreadable = 0

    def state_dict(self) -> dict:
        """The counts that a restart keeps."""
        return {"unreadable": self.unreadable, "lasted": self.watch.state_dict() if self.watch else {}}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave."""
        self.unreadable = int(state["unreadable"])
        if self.watch:
            self.watch.load_state_dict(state["lasted"])

    def check(self, step: int, stats: dict[str, Tensor], unreadable: Tensor) -> dict[str, float]:
        """Average the step's numbers over the ranks; the only place where the host waits for the device.

        `stats` are scalars on the device, among them "loss"; `unreadable` (B,) holds the indices of
        replaced images, else -1. Raises TrainingError, on all ranks together, for a number that is
        not finite, and UserError for too many unreadable images.
        """
        failed = [index for index in unreadable.tolist() if index >= 0]
        for index in sorted(set(failed) - self.named):
            write(f"warning: cannot read {self.name_of(index)}: another image takes its place")
        self.named.update(failed)

        values = torch.stack(list(stats.values()))
        own = [len(failed), self.stop_asked()]
        # Zeros are made on the device; a copy to it would wait.
        counts = values.new_tensor(own) if any(own) else values.new_zeros(2)
        *means, mean_failed, stop = all_reduce_mean(torch.cat([values, counts])).tolist()
        numbers = dict(zip(stats, means, strict=True))
        for name, value in numbers.items():
            if not math.isfinite(value):
                advice = self.advice_at_first or self.advice
                raise TrainingError(f"{name} is {value}", f"step {step}", advice)
        self.advice_at_first = ""
        self.stopping = stop > 0
        self.unreadable += round(mean_failed * get_world_size())
        if self.unreadable > self.unreadable_limit:
            what = f"{self.unreadable} images of this epoch cannot be read"
            raise UserError(what, "--data_path", "repair or remove these images")
        if self.watch:
            self.watch(numbers)
        return numbers
