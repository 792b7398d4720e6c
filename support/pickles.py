"""Reads pickled data: arrays, numbers, text and containers. Anything else in a file is refused.

The array types here stand in for NumPy's, with which a file could set an array's pointers and flags at will;
`support/checkpoints.py` uses them too.
"""

import collections
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from support.errors import UserError, first_line, reason_of


class Refused(Exception):
    """A file contains something unsafe; the message completes "file contains"."""

    def __str__(self) -> str:
        return repr(super().__str__())[1:-1]  # in one line, whatever the names in a file are


class PlainType:
    """The type of an array of numbers or text, as a pickle describes it. NumPy takes it for a dtype."""

    __slots__ = ("dtype",)  # so that a file cannot make another object one of these

    def __init__(self, code: str, *_):
        """Raises Refused for Python objects, for structures, which may hold them, and for dates."""
        if not re.fullmatch(r"[biufcSU]\d+", code):
            raise Refused(f"an array of type {code}, neither numbers nor text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        _, order, *parts = state
        if any(part is not None for part in parts[:3]):  # the shape, names or fields of a structure
            raise Refused("an array of a structure, neither numbers nor text")
        self.dtype = self.dtype.newbyteorder(order)

    def __reduce__(self):
        return self.dtype.__reduce__()  # a file names NumPy's type


def _dtype(kind: PlainType) -> np.dtype:
    if not isinstance(kind, PlainType):  # any other object's attribute may be the file's own
        raise Refused("an array without a type")
    return kind.dtype


class PlainArray(np.ndarray):
    """An array that a pickle fills, once; it is empty when it is made."""

    def __new__(cls, *arguments):
        """Raises Refused for arguments, since they may be an address."""
        if arguments:
            raise Refused("a call of numpy.ndarray, which may forge an address")
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple):
        if self.shape != (0,):  # to fill it again would free memory that a view may use
            raise Refused("an array that is filled twice")
        version, shape, kind, fortran, data = state
        super().__setstate__((version, shape, _dtype(kind), fortran, data))

    def __reduce__(self):
        return np.asarray(self).__reduce__()  # a file names NumPy's array


def _reconstruct(*_) -> PlainArray:
    return PlainArray()


def _scalar(kind: PlainType, data: bytes | str) -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
    return np.ndarray((), _dtype(kind), data)[()]


def _from_buffer(data: bytes, kind: PlainType, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(data, _dtype(kind)).reshape(shape, order=order)


def _latin1(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


# What a pickle may name: (module, name) -> what is used for it.
NUMPY: dict[tuple[str, str], Any] = {("numpy", "dtype"): PlainType, ("numpy", "ndarray"): PlainArray}
for core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    NUMPY[f"{core}.multiarray", "_reconstruct"] = _reconstruct
    NUMPY[f"{core}.multiarray", "scalar"] = _scalar
    NUMPY[f"{core}.numeric", "_frombuffer"] = _from_buffer  # protocol 5
KNOWN = {
    **NUMPY,
    ("_codecs", "encode"): _latin1,  # how the protocols before 3 write bytes
    **{("builtins", kind.__name__): kind for kind in (complex, bytes, bytearray, set, frozenset)},
    **{("collections", kind.__name__): kind for kind in (collections.OrderedDict, collections.deque)},
}


class PlainUnpickler(pickle.Unpickler):
    """Raises Refused if the file uses anything that is not in `KNOWN`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what is used for a name in the file."""
        module = "builtins" if module == "__builtin__" else module  # Python 2's name
        if (module, name) not in KNOWN:
            raise Refused(f"{module}.{name}, which may run code")
        return KNOWN[module, name]


def load_pickle(path: str | Path) -> Any:
    """Read a pickle of arrays, numbers, text and containers. Raises UserError for any other file."""
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding="latin1").load()  # for arrays that Python 2 has written
    except Refused as error:
        what = f"file contains {error}, and was not loaded"
        raise UserError(what, str(path), "save arrays, numbers, text and containers only") from None
    except OSError as error:
        raise UserError(reason_of(error), str(path), "check the path and its permissions") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"cannot read the file: {first_line(error)}", str(path), "use another file") from None
