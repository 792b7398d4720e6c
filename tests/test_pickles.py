"""Pickled ground truth: data of any protocol is read, and nothing else."""

import collections
import pathlib
import pickle

import numpy as np
import pytest

from support.errors import UserError
from support.pickles import load_pickle
from tests.conftest import FORGED, Call, filled_twice

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
    np.zeros((2, 0, 3)),
    np.array(0.5),
    np.float16([[1, 2]]),
    np.array([1 + 2j], dtype=np.complex64),
    np.str_("ü"),
    np.str_(""),
    np.bool_(True),
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


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_each_numpy_are_read(core, tmp_path):
    path, own = tmp_path / "data.pkl", np.empty(0).__reduce__()[0].__module__.encode()
    path.write_bytes(pickle.dumps(ARRAYS, 2).replace(own, core))
    np.testing.assert_array_equal(load_pickle(path)[0], ARRAYS[0])


PYTHON_2 = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
    b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10"
)


def test_arrays_of_python_2_are_read(tmp_path):
    """It writes bytes as text, whose encoding the file does not say."""
    path, array = tmp_path / "data.pkl", np.array([0.5, -1])
    path.write_bytes(PYTHON_2 + array.tobytes() + b"tb.")
    np.testing.assert_array_equal(load_pickle(path), array)
    dtype = PYTHON_2[PYTHON_2.index(b"cnumpy\ndtype") : PYTHON_2.index(b"\x89U\x10")]
    number = b"\x80\x02cnumpy.core.multiarray\nscalar\n" + dtype + b"U\x08" + array[:1].tobytes() + b"\x86R."
    path.write_bytes(number)
    assert load_pickle(path) == 0.5


def test_what_may_run_code_is_refused_before_it_runs(tmp_path):
    owned, path = tmp_path / "owned", tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps({"imlist": Call(pathlib.Path.touch, owned)}))
    with pytest.raises(UserError, match=r"file contains .*, which may run code.*data.pkl"):
        load_pickle(path)
    assert not owned.exists()
    pickle.loads(path.read_bytes())
    assert owned.exists()  # so it would have


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_file_cannot_forge_an_arrays_pointers(name, protocol, tmp_path):
    data, message = FORGED[name]
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(data, protocol))
    with pytest.raises(UserError, match=rf"file contains {message}.* was not loaded \(.*data.pkl\)"):
        load_pickle(path)


def test_dates_are_refused(tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(np.zeros(2, "M8[s]")))
    with pytest.raises(UserError, match="file contains an array of type M8, neither numbers nor text"):
        load_pickle(path)


def test_names_in_a_file_do_not_break_the_line(tmp_path):
    path = tmp_path / "data.pkl"
    for content in (b"\x80\x04\x8c\x02o\n\x8c\x06system\x93.", b"\x80\x04cnumpy\ndtype\n\x8c\x02O\n\x85R."):
        path.write_bytes(content)
        with pytest.raises(UserError, match="was not loaded") as error:
            load_pickle(path)
        assert "\n" not in str(error.value)


def test_a_file_cannot_free_an_arrays_memory(tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(filled_twice(pickle.dumps(np.ones(3), 2)))
    with pytest.raises(UserError, match="file contains an array that is filled twice"):
        load_pickle(path)


def test_what_was_read_can_be_saved_again(tmp_path):
    path, data = tmp_path / "data.pkl", [np.arange(3.0), np.dtype(">i4")]
    path.write_bytes(pickle.dumps(data))
    array, kind = pickle.loads(pickle.dumps(load_pickle(path)))
    assert type(array) is np.ndarray and array.tolist() == [0, 1, 2] and kind is not data[1]
    assert isinstance(kind, np.dtype) and kind == data[1]


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(ARRAYS[0])[:-20]])
def test_a_damaged_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "data.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the file: .*data.pkl"):
        load_pickle(path)
    with pytest.raises(UserError, match="^No such file .*nowhere.*: check the path"):
        load_pickle(tmp_path / "nowhere.pkl")
