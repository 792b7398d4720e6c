"""Watches a training run: its numbers, and the signals that ask it to stop."""

import math
import signal
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from support.distributed import all_reduce_mean, get_world_size
from support.errors import TrainingError, UserError
from support.logger import log


class RunGuard:
    """Looks at every step's numbers: ends a run that cannot go on, names one that has collapsed.

    It also tells the ranks when one of them was asked to stop: `stopping` then turns true on all
    of them at the same step.

    Uniform collapse: the teacher's outputs are flat, the loss sits at ln K. Constant collapse:
    they are peaked, but the same for every image, so that the entropy of their mean over the
    batch is no larger than their own (paper, Section 5.3 and Figure 7). Either is named once,
    when it has lasted for `patience` steps.
    """

    ADVICE = {
        "uniform collapse": "try --use_bn_in_head true, a lower --teacher_temp or another --lr",
        "constant collapse": "try --use_bn_in_head true, a higher --teacher_temp or a lower --lr",
    }

    def __init__(
        self,
        out_dim: int,
        unreadable_limit: int,
        name_of: Callable[[int], str] = str,
        patience: int = 200,
        stop_asked: Callable[[], bool] = lambda: False,
    ):
        """`name_of` an index is the image's name; `unreadable_limit` holds for one epoch;
        `stop_asked` says whether this rank was asked to stop.
        """
        self.max_entropy = math.log(out_dim)
        self.unreadable_limit, self.name_of, self.patience = unreadable_limit, name_of, patience
        self.lasted = dict.fromkeys(self.ADVICE, 0)
        self.stop_asked, self.stopping = stop_asked, False
        self.named: set[int] = set()
        self.unreadable = 0

    def start_epoch(self) -> None:
        """Count unreadable images anew."""
        self.unreadable = 0

    def state_dict(self) -> dict:
        """The counts that a restart has to keep."""
        return {"unreadable": self.unreadable, "lasted": dict(self.lasted)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.unreadable = int(state["unreadable"])
        self.lasted = {name: int(state["lasted"][name]) for name in self.ADVICE}

    def check(self, step: int, stats: Tensor, unreadable: Tensor) -> dict[str, float]:
        """The step's numbers as means over ranks; the one place where the host waits for the device.

        `stats` as in DINOLoss; `unreadable` (B,) holds indices of replaced images, else -1.
        Raises TrainingError, on all ranks together, for a loss that is not finite.
        """
        failed = [index for index in unreadable.tolist() if index >= 0]
        for index in sorted(set(failed) - self.named):
            tqdm.write(f"warning: cannot read {self.name_of(index)}: another image takes its place")
        self.named.update(failed)

        counts = [len(failed), self.stop_asked()]
        # Zeros are made on the device; a copy to it would wait.
        counts = stats.new_tensor(counts) if any(counts) else torch.zeros_like(stats[:2])
        numbers = torch.cat([stats, counts])
        loss, entropy, batch_entropy, kl, mean_failed, stop = all_reduce_mean(numbers).tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss}", f"step {step}",
                "try --use_fp16 false, --precision fp32, a lower --lr or --clip_grad 0.3",
            )  # fmt: skip
        self.stopping = stop > 0
        self.unreadable += round(mean_failed * get_world_size())
        if self.unreadable > self.unreadable_limit:
            raise UserError(
                f"{self.unreadable} images of this epoch cannot be read", "--data_path", "mend the data"
            )
        self.watch_collapse(loss, entropy, batch_entropy)
        return {"loss": loss, "entropy": entropy, "spread": batch_entropy - entropy, "kl": kl}

    def watch_collapse(self, loss: float, entropy: float, batch_entropy: float) -> None:
        """Warn when one of the two collapses has lasted long enough."""
        flat, same = entropy > 0.995 * self.max_entropy, 0.005 * self.max_entropy
        found = {
            "uniform collapse": flat and abs(loss - self.max_entropy) < same,
            "constant collapse": not flat and batch_entropy - entropy < same,
        }
        for name, present in found.items():
            self.lasted[name] = self.lasted[name] + 1 if present else 0
            if self.lasted[name] == self.patience:
                log(
                    f"warning: {name}: for {self.patience} steps the teacher's outputs were "
                    f"{'flat' if flat else 'the same for every image'} (loss {loss:.4f}, ln out_dim "
                    f"{self.max_entropy:.4f}, teacher entropy {entropy:.4f}): {self.ADVICE[name]}"
                )


class StopSignals:
    """Within its block, a signal that asks to stop is noted and does not end the process.

    Schedulers send SIGTERM, SIGUSR1 or SIGUSR2; Ctrl-C sends SIGINT. A second Ctrl-C stops at once.
    """

    SCHEDULERS = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, n)]
    SIGNALS = [*SCHEDULERS, signal.SIGINT]

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _):
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    @classmethod
    def ignore(cls, *_) -> None:
        """In a data-loading worker: schedulers signal the whole job, but only the training stops."""
        for number in cls.SIGNALS:
            signal.signal(number, signal.SIG_IGN)


ignore_signals = StopSignals.ignore
