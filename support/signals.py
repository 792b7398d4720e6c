"""Which signals ask a run to stop, and which of its processes they reach."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from support.memory import keep_freed_memory

# Windows lacks some of them. A closed terminal sends SIGHUP, Ctrl-C SIGINT.
SCHEDULERS = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, n)]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
    SCHEDULERS.remove(signal.SIGHUP)
SIGNALS = [*SCHEDULERS, signal.SIGINT]


def begin_worker(*_) -> None:
    """Prepare a data-loading worker: it ignores signals, ends with its parent, and returns freed memory.

    Schedulers signal the whole job, but only the training stops. torch looks at a worker's parent process,
    which for the start method "forkserver" outlives the training. Each worker would keep as much memory as
    its largest image took.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory(False)  # a fork has its parent's setting


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals to stop. Processes that start within inherit that, and never get them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # Another thread may get the signal, and Python would run our handler in the middle of a fork.
    held: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: h for number in SIGNALS if is_main and callable(h := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in held:
            signal.raise_signal(number)


def start_helper() -> None:
    """Start the process that helps Python with "spawn" and "forkserver", where no signal to the job ends it.

    Else the first progress bar would start it; or the first worker, and Python would then let SIGINT and
    SIGTERM through to the others.
    """
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if method != "fork" and hasattr(signal, "pthread_sigmask"):  # Windows has no helper
        with signals_held():
            resource_tracker.ensure_running()
