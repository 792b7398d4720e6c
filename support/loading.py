"""Loads batches of images in worker processes, for training and evaluation; copies them to the device.

Shapes: B images, V views, H x W pixels.
"""

import atexit
import contextlib
import errno
import functools
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from support.data import Images, pixels_of, read_labelled, sample_name, transformed, why_unreadable
from support.distributed import env_number, fix_cpu_seeds, get_rank, get_world_size
from support.errors import ImageError, Interrupted, UserError, WrongFormat, counted, lacks_resources
from support.logger import log, write
from support.memory import return_freed_memory
from support.pixels import AnyImage, copy_to
from support.signals import begin_worker, signals_held, start_helper


class TrainingViews(Dataset):
    """Views of images. Item (epoch, i) depends on the seed, the epoch and i alone, also if the images or
    `make_views` draw random numbers of their own. Seeds this process.

    An item is (views, colours, unreadable). `make_views(pixels, rng)` takes uint8 (C, H, W) and a
    `random.Random`; it returns uint8 views, one tensor (V, C, H, W) for each size, and the colours that
    `pixels.normalized_views` still has to apply. `unreadable` is -1, or the index of an image that cannot be
    read and that another one replaces, so that training can name and count it.
    """

    TRIES = 30  # other images, before the data as a whole is considered unreadable

    def __init__(
        self,
        images: Images,
        make_views: Callable[[Tensor, random.Random], tuple[list[Tensor], Sequence[Tensor]]],
        seed: int,
    ):
        self.images, self.make_views, self.seed = images, make_views, seed

    def __len__(self) -> int:
        return len(self.images)

    def readable(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """Read an image: its pixels and -1; if that fails, the pixels of a random other one and `index`."""
        others = random.Random(f"{self.seed} {epoch} {index} instead")
        for candidate in [index] + [others.randrange(len(self)) for _ in range(self.TRIES)]:
            try:
                return pixels_of(self.images, candidate), -1 if candidate == index else index
            except WrongFormat:  # the images are not what the flags say, or not those of the start
                raise
            except Exception as error:  # a broken file can raise nearly anything
                if lacks_resources(error):
                    raise
        name, reason = sample_name(self.images, index), why_unreadable(self.images, index)
        raise ImageError(f"no image can be read, in {self.TRIES + 1} tries: {reason}", name, "check the data")

    def __getitem__(self, item: tuple[int, int]) -> tuple[list[Tensor], Sequence[Tensor], int]:
        epoch, index = item
        rng = random.Random(f"{self.seed} {epoch} {index}")
        fix_cpu_seeds(self.seed, epoch, index)  # what others' images and transforms draw from
        pixels, unreadable = self.readable(epoch, index)
        return *self.make_views(pixels, rng), unreadable


class EvalImages(Dataset[tuple[Tensor, int, int]]):
    """Transformed images with label and index."""

    def __init__(self, images: Images, transform: Callable[[AnyImage], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = read_labelled(self.images, index)
        return transformed(image, self.transform, self.images, index), label, index


class EpochBatches:
    """This rank's batches of (epoch, index) for the global steps of a run, epoch after epoch.

    A batch sampler. The seed determines a different order for each epoch, which is split among the ranks
    as by `DistributedSampler` with `set_epoch(epoch)`. With `drop_last`, an epoch's incomplete last
    batch is left out. `first_step` may lie anywhere in an epoch; without `last_step` the batches never end.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        last_step: int = sys.maxsize,
        drop_last: bool = True,
    ):
        """`batch_size` counts the images of one rank."""
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.first_step, self.last_step = first_step, last_step
        self.per_rank = math.ceil(num_images / get_world_size())  # some images are used twice
        steps = self.per_rank / batch_size
        self.steps_per_epoch = math.floor(steps) if drop_last else math.ceil(steps)

    def order(self, epoch: int) -> np.ndarray:
        """The indices of this rank's images in an epoch, (per_rank,)."""
        whole = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed + epoch))
        places = np.arange(self.per_rank) * get_world_size() + get_rank()
        return whole.numpy()[places % self.num_images]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps = range(self.first_step, self.last_step)
        for epoch, of_epoch in itertools.groupby(steps, lambda step: step // self.steps_per_epoch):
            order = self.order(epoch)
            for step in of_epoch:
                first = step % self.steps_per_epoch * self.batch_size
                yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


def num_cores() -> int:
    """How many cores this process may use; the quota of a container counts in whole cores, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    with contextlib.suppress(OSError, ValueError):  # not a container with cgroup v2; "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split())
        cores = min(cores, max(1, quota // period))
    return cores


@functools.cache
def _note_workers(num_workers: int) -> None:
    cores = num_cores()
    processes = env_number("LOCAL_WORLD_SIZE") or 1 if get_world_size() > 1 else 1
    if num_workers * processes > max(cores, processes):
        enough = max(cores // processes, 1)
        what = f"{num_workers * processes} workers on {counted(cores, 'core')}"
        log(f"note: {what}: --num_workers {enough} is enough")


class Loader(DataLoader):
    """A DataLoader that does not wait forever for a batch, and whose workers end with each pass.

    A pass raises Interrupted if a worker or a batch was lost, and if no batch arrives for `patience` seconds.
    If `stop_asked()` during a wait, a single process ends the pass after `grace` seconds. One of several
    waits for the batch, because all of them have to finish the step before they can save; if it does not
    arrive for `last_wait` seconds, the pass raises Interrupted.
    """

    # Seconds; torchrun kills 30 s after SIGTERM, as SLURM usually does.
    patience, warn_every, grace, last_wait, poll = 600.0, 60.0, 5.0, 25.0, 1.0

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable[list],
        num_workers: int,
        device: torch.device,
        stop_asked: Callable[[], bool] = lambda: False,
    ):
        """`batches` yields the items of each batch; `stop_asked()` returns whether this process was asked to
        stop. Raises UserError if workers cannot send their batches.
        """
        # A worker sends them by TMPDIR/pymp-XXXXXXXX/listener-XXXXXXXX, a socket of up to 107 bytes.
        if num_workers and os.name != "nt" and len(os.fsencode(tempfile.gettempdir())) > 75:
            what, fix = "path is too long for sockets", "set TMPDIR to a shorter one, e.g. /tmp"
            raise UserError(what, f"TMPDIR {tempfile.gettempdir()}", fix)
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # its own: loading does not change the global random stream
            timeout=self.poll if num_workers else 0,
        )
        self.stop_asked = stop_asked

    def check_worker_number_rationality(self) -> None:
        """Replace torch's warning about more workers than cores, which it gives twice for each loader."""
        _note_workers(self.num_workers)

    def __iter__(self) -> Any:  # a generator; torch says that it is a private class
        others = set(multiprocessing.active_children())
        return_freed_memory()  # forks would hold it: a page is copied before it is written to
        start_helper()
        with _explained(), signals_held():
            batches = super().__iter__()  # starts the workers now, not when the first batch is asked for
        running = self._pass(batches, set(multiprocessing.active_children()) - others)
        next(running)
        return running

    def _pass(self, batches: Iterator, workers: set[BaseProcess]) -> Iterator:
        end = functools.partial(kill_workers, workers)
        atexit.register(end)  # at its exit, Python would wait for the workers of a pass that was kept open
        try:
            yield  # to `__iter__`: from here on, the end of this process and `close` end the workers
            while (batch := self._next(batches, workers)) is not None:
                yield batch
        finally:
            del batches  # torch then ends the workers that respond
            end()
            atexit.unregister(end)

    def _next(self, batches: Iterator, workers: set[BaseProcess]):
        """Return the next batch; None at the end, and if this process is asked to stop while it waits."""
        # Adds up the polls: a clock also counts the time in which `scontrol` or Ctrl-Z suspends the process.
        waited, warned, asked = 0.0, 0, math.inf
        while True:
            try:
                with _explained():
                    return next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):  # after `poll` seconds
                    raise
            pins = getattr(batches, "_pin_memory_thread", None)  # with CUDA, workers' batches come through it
            if pins and not pins.is_alive():
                what = "the thread that pins memory died, as its error above says"
                fix = "raise ulimit -n, give /dev/shm more room, or lower --num_workers"
                raise Interrupted(what, "", fix, alone=True)
            waited += self.poll
            if self.stop_asked():
                asked = min(asked, waited)
                if get_world_size() == 1 and waited > self.grace:
                    kill_workers(workers)  # at the end of a pass, torch would wait for each
                    return None
            if waited - asked > self.last_wait:
                what = f"asked to stop, and no batch of images for {waited:.0f} s, so nothing was saved"
                fix = "run the same command to resume from the last checkpoint"
                raise Interrupted(what, "", fix, alone=True)
            if waited > self.patience:
                raise Interrupted(f"no batch of images for {waited:.0f} s", "", SLOW_ADVICE, alone=True)
            if waited > (warned + 1) * self.warn_every:
                warned += 1
                write(f"warning: no batch of images for {waited:.0f} s: {SLOW_ADVICE}")


SLOW_ADVICE = "check that the file system of --data_path responds, or lower --num_workers"

WORKER_DIED = "DataLoader worker (pid"  # how torch's words begin; an exception in a worker reads differently

# Patterns in the message of a lost worker or batch, and what to do in each case.
CAUSES = {
    "Too many open files|ancdata": "raise the limit of open files (ulimit -n), or lower --num_workers",
    "Resource temporarily unavailable": "raise the limit of processes (ulimit -u), or lower --num_workers",
    "Bus error|shared memory|No space left on device|Cannot allocate memory": (
        "give /dev/shm more room (docker run --shm-size 8g), or lower --num_workers"
    ),
    "^" + re.escape(WORKER_DIED): (
        "run the same command to resume; if memory was short, lower --num_workers; if shared memory was, "
        "give /dev/shm more room (docker run --shm-size 8g)"
    ),
}


@contextlib.contextmanager
def _explained():
    """Turn an error that loses a worker or a batch into Interrupted, with the cause and what to do."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        message = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        for cause, fix in CAUSES.items():
            if re.search(cause, message):
                raise Interrupted(f"data loading failed: {message}", "", fix, alone=True) from error
        # Semaphores and sockets of workers have no file names.
        refused = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ECONNREFUSED}
        if isinstance(error, OSError) and error.errno in refused and not error.filename:
            what, places = f"data loading failed: {message}", f"/dev/shm, {tempfile.gettempdir()}"
            fix = "keep them writable during the run, or give --num_workers 0"
            raise Interrupted(what, places, fix, alone=True) from error
        raise


def collate(items: list):
    """Collate as torch's default_collate does; a worker first checks that it can open enough files.

    It sends tensors from another thread. An error there would lose the batch and not reach the training, as
    an OSError here does.
    """
    if get_worker_info():
        with contextlib.ExitStack() as opened:
            for _ in range(32):
                opened.enter_context(open(os.devnull, "rb", buffering=0))
    return default_collate(items)


def kill_workers(workers: Iterable[BaseProcess]) -> None:
    """Kill data-loading workers that still run; they ignore SIGTERM, which Python would send at its exit."""
    alive = [worker for worker in workers if worker.is_alive()]
    if not alive:
        return
    # torch's handler of SIGCHLD would report their end as a crash.
    watched = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if watched else None
    for worker in alive:
        worker.kill()
        worker.join(timeout=5)  # one that waits for a file system may not end at once
    if watched:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def to_device(batches: Iterable[tuple], device: torch.device) -> Generator[tuple, None, None]:
    """Batches of `TrainingViews` with the views on the device, copied one batch ahead.

    On CUDA the copy runs on a separate stream, during the step before.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(batch: tuple) -> tuple:
        views, *rest = batch
        # `torch.cuda.stream(None)` fails on a Mac (https://github.com/pytorch/pytorch/issues/150091).
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            copies = [copy_to(view, device) for view in views]
            return copies, rest, stream and stream.record_event()

    def hand_over(views: list[Tensor], rest: list, copied) -> tuple:
        if copied:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for view in views:
                view.record_stream(current)  # keeps its memory until the step is done
        return views, *rest

    ahead = None
    for batch in batches:
        ready, ahead = ahead, copy(batch)
        if ready:
            yield hand_over(*ready)
    if ahead:
        yield hand_over(*ahead)
