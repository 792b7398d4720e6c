"""Errors that the user can correct, each in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. Printed as `error: <what> (<where>): <fix>`, exit code 2."""

    label, exit_code = "error", 2
    alone = False  # whether only the process that raises it knows of it, and so has to say it

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what + (f" ({where})" if where else "") + (f": {fix}" if fix else ""))


class ImageError(UserError):
    """An image that cannot be read."""

    alone = True


class TrainingError(UserError):
    """Training cannot go on as asked; what was saved stays. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """The run was stopped from outside; the same command resumes it. Exit code 75, EX_TEMPFAIL."""

    label, exit_code = "stopped", 75


class StoppedAtOnce(Interrupted):
    """Not even the step was finished. Exit code 130, as a shell has it for SIGINT."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the known names most like `name`."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else "check the name"
