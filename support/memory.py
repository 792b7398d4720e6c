"""What becomes of the memory that a process frees."""

import ctypes
import sys

# Parameters of mallopt in glibc (man mallopt). By default it changes the last two as blocks are freed, up to
# these values; once one is set, it changes none.
M_MMAP_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -4, -1, -3
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
RETURN = {M_MMAP_MAX: 2**16, M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25}


def keep_freed_memory(keep: bool = True) -> None:
    """Keep the memory that is freed for what this process allocates next; or return large blocks of it.

    By default, the system gets it back and has to clear each page of the next tensor, which takes up to a
    fifth of the time on a CPU (docs/speed.md). Has no effect where the C library is not glibc.
    """
    for parameter, value in (KEEP if keep else RETURN).items():
        _glibc("mallopt", parameter, value)


def return_freed_memory() -> None:
    """Return what has been freed so far. Has no effect where the C library is not glibc."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux" and (call := getattr(ctypes.CDLL(None), function, None)):
        call(*arguments)
