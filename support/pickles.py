"""Reads pickled data: arrays, numbers, text and containers. Anything else in a file is refused.

The array types here stand in for NumPy's, with which a file could set an array's pointers and flags at will.
"""

import collections
import pickle
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from support.errors import UserError, reason_of


class PlainType:
    """The type of an array of numbers or text, as a pickle describes it."""

    def __init__(self, code: str, *_):
        self.code = code
        self.order: Any = "="

    def __setstate__(self, state: tuple):
        self.order = state[1]

    def dtype(self) -> np.dtype:
        """NumPy's type. Raises ValueError for Python objects and for structures, which may hold them."""
        if not re.fullmatch(r"[biufcSU]\d+", self.code):
            raise ValueError(f"array of type {self.code}")
        return np.dtype(self.code).newbyteorder(self.order)


class PlainArray(np.ndarray):
    """An array that a pickle fills; it is empty when it is made."""

    def __new__(cls, *_):
        """Ignore what a file gives here, such as an address."""
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple):
        version, shape, kind, fortran, data = state
        super().__setstate__((version, shape, kind.dtype(), fortran, data))


def _scalar(kind: PlainType, data: bytes) -> np.generic:
    return np.frombuffer(data, kind.dtype())[0]


def _from_buffer(data: bytes, kind: PlainType, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(data, kind.dtype()).reshape(shape, order=order)


def _latin1(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


# What a pickle may name: (module, name) -> what is used for it.
KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): PlainType,
    ("numpy", "ndarray"): PlainArray,
    ("_codecs", "encode"): _latin1,  # how the protocols before 3 write bytes
    **{("builtins", kind.__name__): kind for kind in (complex, bytes, bytearray, set, frozenset)},
    **{("collections", kind.__name__): kind for kind in (collections.OrderedDict, collections.deque)},
}
for core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    KNOWN[f"{core}.multiarray", "_reconstruct"] = PlainArray
    KNOWN[f"{core}.multiarray", "scalar"] = _scalar
    KNOWN[f"{core}.numeric", "_frombuffer"] = _from_buffer  # protocol 5


class PlainUnpickler(pickle.Unpickler):
    """Raises UserError, which gives the name, if the file uses anything that is not in `KNOWN`."""

    def __init__(self, file: IO[bytes], source: str):
        """`source` stands for the file in messages."""
        super().__init__(file, encoding="latin1")  # for arrays that Python 2 has written
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        """Return what is used for a name in the file."""
        module = "builtins" if module == "__builtin__" else module  # Python 2's name
        if (module, name) not in KNOWN:
            what = f"file contains {module}.{name}, which may run code, and was not loaded"
            raise UserError(what, self.source, "save arrays, numbers, text and containers only")
        return KNOWN[module, name]


def load_pickle(path: str | Path) -> Any:
    """Read a pickle of arrays, numbers, text and containers. Raises UserError for any other file."""
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, str(path)).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(reason_of(error), str(path), "check the path and its permissions") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the file: {reason}", str(path), "use another file") from None
