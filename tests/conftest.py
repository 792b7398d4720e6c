"""Shared fixtures: small images on disk, small flags, and real processes."""

import functools
import json
import math
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from support.lock import FolderLock, _started
from tests.data import eval_inputs

ROOT = Path(__file__).resolve().parent.parent

# The smallest network and crops that still exercise every part.
TINY = (
    "--arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 64 --head_hidden_dim 32 --head_bottleneck_dim 16 "
    "--batch_size_per_gpu 4 --num_workers 0 --epochs 2 --warmup_epochs 1 --precision fp32"
).split()


@pytest.fixture
def must_end():
    """Fail a test that hangs for a minute, instead of the whole suite."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs", pytrace=False))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pytest_addoption(parser):
    parser.addoption(
        "--gpu-device", default="cuda", help="the device of `-m gpu`: cuda, mps, or cpu for a trial"
    )


def pytest_configure(config):
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other tests compare numbers, and bits, of one CPU


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests are many small operations; threads would only fight for the cores."""
    torch.set_num_threads(1)


def save_images(folder: Path, count: int, size: int = 40, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")


def picture(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    """A smooth colourful image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def is_close_share(share: float, p: float, draws: int) -> bool:
    """Within four standard errors of a probability."""
    return abs(share - p) <= 4 * math.sqrt(p * (1 - p) / draws)


def ramps(size: tuple[int, int]) -> Image.Image:
    """An image whose red is twice the column and whose green is twice the row."""
    rows, columns = np.indices(size[::-1]) * 2
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def slopes(pixels: torch.Tensor) -> list[list[float]]:
    """Of red and green, (3, H, W): the mean change from row to row, and from column to column."""
    down, right = (pixels[:2].double().diff(dim=dim).mean((1, 2)) for dim in (1, 2))
    return torch.stack([down, right], dim=1).tolist()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Twenty images in a folder without classes."""
    folder = tmp_path_factory.mktemp("images")
    save_images(folder / "nested", 12, seed=1)
    save_images(folder, 8, seed=2)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """train/ and val/ with three classes."""
    folder = tmp_path_factory.mktemp("labelled")
    for seed, name in enumerate("abc"):
        save_images(folder / "train" / name, 5, seed=seed)
        save_images(folder / "val" / name, 3, seed=10 + seed)
    return folder


@pytest.fixture(scope="session")
def paper_inputs(tmp_path_factory) -> Path:
    """The inputs of the paper's other evaluations, for which data/evals.json has the published numbers."""
    folder = tmp_path_factory.mktemp("paper")
    eval_inputs.write(str(folder))
    return folder


@pytest.fixture(scope="session")
def published() -> dict:
    """What the published evaluations print for `paper_inputs`."""
    return json.loads((ROOT / "tests" / "data" / "evals.json").read_text())


class Call:
    """Unpickled, it calls a function, and sets the state of what it returns."""

    def __init__(self, function: Callable, *arguments, state: tuple | None = None):
        self.reduced = function, arguments, state

    def __reduce__(self):
        return self.reduced


def _forged() -> dict[str, tuple[object, str]]:
    """Data that would make an array over any address: what it is -> (data, what is said of it)."""
    reconstruct, arguments, _ = np.empty(0).__reduce__()
    scalar, address, fields = np.float64(0).__reduce__()[0], b"\0" * 8, {"a": (np.dtype("O"), 0)}
    structure = Call(np.dtype, "f8", False, True, state=(3, "<", None, ("a",), fields, 8, 8, 63))
    block = Call(np.dtype, "f8", False, True, state=(3, "<", (np.dtype("f8"), (2,)), None, None, 8, 8, 0))
    objects = (1, (1,), np.dtype("O"), False, address)
    return {
        "buffer": (Call(np.ndarray, (1,), np.dtype("f8"), bytearray(8)), "a call of numpy.ndarray"),
        "strides": (Call(np.ndarray, (2,), np.dtype("f8"), address, 0, (0,)), "a call of numpy.ndarray"),
        "no buffer": (Call(np.ndarray, (9,)), "a call of numpy.ndarray"),
        "objects in a buffer": (Call(np.ndarray, (1,), np.dtype("O"), bytearray(8)), "an array of type O8"),
        "objects by state": (Call(reconstruct, *arguments, state=objects), "an array of type O8"),
        "objects": (np.zeros(1, "O"), "an array of type O8"),
        "object": (Call(scalar, np.dtype("O"), address), "an array of type O8"),
        "type of objects": (np.dtype("O"), "an array of type O8"),
        "several types": (Call(np.dtype, "f8,O8", False, True), "an array of type f8,O8"),
        "structure": (np.zeros(1, [("a", "O")]), "an array of type V8"),
        "type with fields": (structure, "an array of (type O8|a structure)"),
        "type with a shape": (block, "an array of a structure"),
        "scalar with fields": (Call(scalar, structure, address), "an array of (type O8|a structure)"),
    }


FORGED = _forged()


def filled_twice(pickled: bytes) -> bytes:
    """Make a pickled array set its state again, over memory that a view of it may use."""
    state = pickle.dumps(np.ones(9).__reduce__()[2], 2)
    return pickled.removesuffix(b".") + state.removeprefix(b"\x80\x02").removesuffix(b".") + b"b."


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Indexes of archives are not left in the user's home; processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def log_of(folder: Path, name: str = "log.txt") -> list[dict]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def call(script: ModuleType, *flags):
    """What a script's `main` returns for these flags, of which paths and numbers become text."""
    return script.main(script.parse_args([*map(str, flags)]))


def train(*flags) -> None:
    """A training of the smallest network, without its curves: to draw them would take longer."""
    import main_dino  # not for the processes that only need another part of this file

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
        call(main_dino, *TINY, *flags)


def run(
    *command, check: bool = True, env: dict | None = None, timeout: float = 1200, **options
) -> subprocess.CompletedProcess:
    """A real process in the project's folder, with one thread and a bound on its time."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture
def permissions(tmp_path, monkeypatch):
    """Makes permissions bind root too, in `tmp_path`, by names relative to it."""
    monkeypatch.chdir(tmp_path)  # the folders above it are root's alone
    if os.geteuid() != 0:
        yield
        return
    tmp_path.chmod(0o777)
    try:
        os.setresuid(65_534, 65_534, 0)
    except OSError:
        pytest.skip("root may not become another user here")
    yield
    os.setresuid(0, 0, 0)


def limit_files(room: int) -> None:
    """Make it an OSError, as on a full disk, if this process writes more than `room` bytes to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


ON_FULL_DISK = """
import importlib, sys
from tests.conftest import limit_files
script, room = importlib.import_module(sys.argv.pop(1)), int(sys.argv.pop(1))
limit_files(room)
script.cli.run_script(script.main, script.parse_args())
"""


def run_on_full_disk(script: str, room: int, *flags) -> subprocess.CompletedProcess:
    """A script as a real process that can write no file of more than `room` bytes."""
    return run("-c", ON_FULL_DISK, script, room, *flags, check=False)


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(processes: int, *command, **kwargs) -> subprocess.CompletedProcess:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return run(*launcher, *command, **kwargs)


def same_of_one_and_of_two(words: str, *command) -> list[str]:
    """The lines that begin with these words, which one process prints, and two print the same."""
    one, two = (
        [line for line in ended.stdout.splitlines() if line.startswith(words)]
        for ended in (run(*command), torchrun(2, *command))
    )
    assert one == two
    return one


@functools.cache
def neighbour() -> subprocess.Popen:
    """Another process, which lives as long as this one."""
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)


def taken_by(lock: FolderLock, **changes) -> None:
    """Another process takes the folder."""
    lock._write(0)
    other = {"token": "another", "pid": neighbour().pid, "started": _started(neighbour().pid)} | changes
    lock.path.write_text(json.dumps(json.loads(lock.path.read_text()) | other))


def wait_for(condition: Callable, what: str, seconds: float = 300):
    """Ask until `condition()` gives something, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
    return found


def wait_for_words(words: str, said: Path, process: subprocess.Popen) -> None:
    """Until they are in a file that the process writes to."""

    def are_there() -> bool:
        ended, text = process.poll() is not None, said.read_text()
        assert words in text or not ended, text
        return words in text

    wait_for(are_there, f"{words!r} in {said}")
