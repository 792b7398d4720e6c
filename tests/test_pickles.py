"""Pickled ground truth: data of any protocol is read, and nothing else."""

import collections
import pathlib
import pickle

import numpy as np
import pytest

from support.errors import UserError
from support.pickles import load_pickle

DATA = {
    "text": ["a", "ü"],
    "bytes": b"\x00\xff",
    "empty": b"",
    "numbers": (1, -2.5, 3j, True, None, 2**70),
    "sets": [{1, 2}, frozenset("a")],
    "deque": collections.deque([1, 2], maxlen=2),
    "ordered": collections.OrderedDict(a=1),
    "buffer": bytearray(b"x"),
}
ARRAYS = [
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.array([1, 2, 3], dtype=">u2"),
    np.array(["ab", "ü"]),
    np.array([b"ab", b"c"]),
    np.array([True, False]),
    np.array([], dtype=int),
    np.float64(0.5),
    np.int32(7),
]


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_numbers_text_and_containers_are_read(tmp_path, protocol):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps([DATA, *ARRAYS], protocol))
    loaded, *arrays = load_pickle(path)
    assert loaded == DATA
    for array, original in zip(arrays, ARRAYS, strict=True):
        np.testing.assert_array_equal(array, original)
        kinds = (value.dtype.newbyteorder("=") for value in (array, original))
        assert next(kinds) == next(kinds)


def test_arrays_of_numpy_1_are_read(tmp_path):
    path, content = tmp_path / "data.pkl", pickle.dumps(ARRAYS, 2)
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(load_pickle(path)[0], ARRAYS[0])


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_what_may_run_code_is_refused_before_it_runs(tmp_path):
    owned, path = tmp_path / "owned", tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps({"imlist": Touch(owned)}))
    with pytest.raises(UserError, match=r"file contains .*, which may run code.*data.pkl") as error:
        load_pickle(path)
    assert "\n" not in str(error.value) and not owned.exists()
    pickle.loads(path.read_bytes())
    assert owned.exists()  # so it would have


def reduced(function, *arguments) -> bytes:
    """A pickle that calls the function."""

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps(Call())


def test_a_file_cannot_forge_an_arrays_pointers(tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(reduced(np.ndarray, (1,), np.dtype("O"), b"\x01" * 8))  # one object, at this address
    assert load_pickle(path).shape == (0,)
    for forged in ("O", [("a", "O")]):
        path.write_bytes(pickle.dumps(np.zeros(1, forged)))
        with pytest.raises(UserError, match="array of type"):
            load_pickle(path)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(ARRAYS[0])[:-20]])
def test_a_damaged_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "data.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the file: .*data.pkl") as error:
        load_pickle(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file .*nowhere"):
        load_pickle(tmp_path / "nowhere.pkl")
