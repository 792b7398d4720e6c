"""Errors that the user can correct, each in one line."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator, Sequence

import torch


class UserError(Exception):
    """Something the user can correct. Printed as `error: <what> (<where>): <fix>`, exit code 2.

    `alone`: raised by one process only, which therefore prints it itself.
    """

    label, exit_code, alone = "error", 2, False

    def __init__(self, what: str, where: str = "", fix: str = "", alone: bool = False):
        self.alone = alone or type(self).alone
        what, where, fix = (printable(str(part)) for part in (_of_worker(what), where, fix))
        super().__init__(what + (f" ({where})" if where else "") + (f": {fix}" if fix else ""))


def _of_worker(text: str) -> str:
    """An error's text, without the traceback that torch puts before that of a data-loading worker."""
    return text.strip().rpartition("\n")[2].partition(": ")[2] if text.startswith("Caught ") else text


def printable(text: str) -> str:
    """Text in one line: a file's name may hold line breaks and a terminal's control characters."""
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


class ImageError(UserError):
    """An image that cannot be read."""

    alone = True  # a class attribute, because torch rebuilds a worker's error from its text alone


class WrongFormat(UserError):
    """An image of another kind than the flags or the weights say, or a changed archive; no other image is
    taken instead.
    """

    alone = True


class TrainingError(UserError):
    """Training cannot continue; what was saved is kept. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """The run was stopped from outside; the same command resumes it. Exit code 75, EX_TEMPFAIL."""

    label, exit_code = "stopped", 75


def lacks_memory(error: Exception) -> bool:
    """Whether the machine or the device has too little memory."""
    words = re.search("out of memory|can't allocate memory", str(error))  # MPS has no class for it
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return bool(words) or refused or isinstance(error, MemoryError | torch.OutOfMemoryError)


def lacks_resources(error: Exception) -> bool:
    """Whether the machine lacks memory or open files, so that an image that cannot be read may be sound."""
    lacks_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return lacks_files or lacks_memory(error)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type; without Pillow's description of the open file."""
    text = repr(error) if isinstance(error, KeyError) else _of_worker(str(error))  # `str` is the key alone
    return re.sub(r" <_io\.[^>]*>", "", text.strip() or type(error).__name__).splitlines()[0]


def reason_of(error: OSError) -> str:
    """Why the system refused, e.g. "No space left on device"; else the error's own text, in one line."""
    return (error.strerror or str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def reading(kind: str, path: object, fix: str = "repair or replace it") -> Iterator[None]:
    """Raise UserError for a file, of this kind, that the block cannot read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a broken file can raise nearly anything
        raise UserError(f"cannot read {kind}: {first_line(error)}", str(path), fix) from None


def few(names: Sequence) -> str:
    """The first three names, for a message."""
    return ", ".join(map(str, names[:3])) + ", ..." * (len(names) > 3)


def counted(number: int, noun: str) -> str:
    """A number with its noun, e.g. "1 image", "1,000 images", "2 classes" or "2 queries"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}{'es' if noun.endswith('s') else 's'}"
    return f"{number:,} {noun if number == 1 else plural}"


def similar(name: str, known: Sequence[str], cutoff: float = 0.6) -> list[str]:
    """Up to three known names that begin with `name`, or are similar."""
    longer = sorted((each for each in known if name and each.startswith(name)), key=len)
    return list(dict.fromkeys([*longer, *difflib.get_close_matches(name, known, cutoff=cutoff)]))[:3]


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint with known names that are similar to `name`."""
    near = similar(name, known)
    return f"did you mean {', '.join(near)}?" if near else "check the name"
