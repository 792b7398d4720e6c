import contextlib
import errno
import gc
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from support import loading
from support.data import ImageFiles, why_unreadable
from support.errors import Interrupted, UserError
from support.loading import EpochBatches, EvalImages, Loader, TrainingViews
from support.pixels import eval_transform, normalized_views
from support.signals import signals_held
from tests.conftest import ROOT, TINY, run, save_images, wait_for, wait_for_words
from utils import DataAugmentationDINO


def small_views(images, seed: int = 0, method: str = "views") -> TrainingViews:
    augmentation = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 2, 16, 8)
    return TrainingViews(ImageFiles(images), getattr(augmentation, method), seed)


def test_views_depend_on_seed_epoch_and_index_alone(images):
    dataset = small_views(images)
    first = dataset[3, 7][0]
    random.seed(99), torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, dataset[3, 7][0], strict=True))
    for other in (dataset[4, 7], dataset[3, 8], small_views(images, seed=1)[3, 7]):
        assert not torch.equal(first[0], other[0][0])


def test_what_others_draw_depends_on_seed_epoch_and_index_alone(images):
    """As torchvision's RandomErasing in the views, or a dataset that takes a random frame of a video."""

    def draw(pixels, rng):
        return [torch.tensor([random.random(), np.random.rand(), torch.rand(())])], ()

    dataset = TrainingViews(ImageFiles(images), draw, seed=1)
    first = dataset[3, 7][0][0]
    dataset[3, 8]
    assert torch.equal(dataset[3, 7][0][0], first)
    for other in (dataset[4, 7], dataset[3, 8], TrainingViews(ImageFiles(images), draw, seed=2)[3, 7]):
        assert (other[0][0] != first).all()


def test_batches_do_not_depend_on_the_number_of_workers(images):
    dataset = small_views(images)
    batches = []
    for workers in (0, 2):
        sampler = EpochBatches(20, 4, seed=5, first_step=8, last_step=13)
        loader = Loader(dataset, sampler, workers, torch.device("cpu"))
        batches.append([part for views, _, _ in loader for part in views])
    assert len(batches[0]) == 5 * 2  # views of two sizes
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_views_are_the_same_wherever_their_colours_change(images):
    """Those of one size travel as one tensor: each costs open files in the worker and in the training."""
    batches = []
    for method in ("views", "crops"):
        dataset = small_views(images, method=method)
        views, colours, _ = next(iter(DataLoader(dataset, batch_sampler=EpochBatches(20, 20, seed=5))))
        assert [tuple(part.shape) for part in views] == [(20, 2, 3, 16, 16), (20, 2, 3, 8, 8)]
        assert all(part.dtype == torch.uint8 for part in views) and bool(colours) == (method == "crops")
        batches.append(normalized_views(views, colours))
        assert [tuple(view.shape) for view in batches[-1]] == [(20, 3, 16, 16)] * 2 + [(20, 3, 8, 8)] * 2
    for worker, device in zip(*batches, strict=True):
        grey_levels = (worker - device).abs() * 255 * 0.225
        assert grey_levels.max() < 1.1 and grey_levels.mean() < 0.001  # a rounding here and there


@pytest.mark.parametrize(
    ("num_images", "drop_last"), [(20, True), (20, False), (21, True), (21, False), (3, False)]
)
def test_batches_are_those_of_distributed_sampler(monkeypatch, num_images, drop_last):
    """Ranks, epochs, incomplete batches and images that come twice, from any step on."""
    world = 4
    for rank in range(world):
        monkeypatch.setattr(loading, "get_world_size", lambda: world)
        monkeypatch.setattr(loading, "get_rank", lambda rank=rank: rank)
        sampler = DistributedSampler(range(num_images), world, rank, seed=5)
        expected = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            expected += [[(epoch, i) for i in b] for b in BatchSampler(sampler, 2, drop_last=drop_last)]
        batches = EpochBatches(num_images, 2, seed=5, last_step=len(expected), drop_last=drop_last)
        assert batches.steps_per_epoch == len(expected) / 3
        assert list(batches) == list(batches) == expected
        for first in range(len(expected)):
            part = EpochBatches(num_images, 2, 5, first, len(expected), drop_last)
            assert list(part) == expected[first:]
        endless = itertools.islice(EpochBatches(num_images, 2, seed=5, drop_last=drop_last), len(expected))
        assert list(endless) == expected


class Waiting(torch.utils.data.Dataset):
    """Items that are there at once, but for one that never comes."""

    def __init__(self, length: int, never: int = -1):
        self.length, self.never = length, never

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        while index == self.never:
            time.sleep(1)
        return index


@pytest.mark.slow
@pytest.mark.parametrize("never", [-1, 5])
def test_workers_end_with_the_pass_over_the_loader(never):
    """At its end, when it is closed early, and when a worker hangs; workers ignore SIGTERM."""
    loader = Loader(Waiting(8, never), [[i] for i in range(8)], 2, torch.device("cpu"))
    other = multiprocessing.Process(target=time.sleep, args=(300,), daemon=True)
    other.start()
    for taken in (3, 8) if never < 0 else (3,):
        batches = iter(loader)
        assert [int(batch) for batch in itertools.islice(batches, taken)] == list(range(taken))
        assert len(multiprocessing.active_children()) > 1 or taken == 8
        batches.close()
        assert multiprocessing.active_children() == [other]
    other.kill()
    other.join()


def test_unreadable_images_are_replaced_and_named(tmp_path):
    save_images(tmp_path, 4)
    (tmp_path / "001.png").write_bytes(b"not an image")
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])
    dataset = small_views(tmp_path)
    assert [dataset[0, i][2] for i in range(4)] == [-1, 1, 2, -1]
    assert sum(len(part) for part in dataset[0, 1][0]) == 4
    assert why_unreadable(dataset.images, 1) == "cannot identify image file"
    assert "truncated" in why_unreadable(dataset.images, 2)
    assert why_unreadable(dataset.images, 3) == "it can be read now"
    assert why_unreadable([{"image": 1, "label": 2}], 0) == "KeyError(0)"  # a dataset of another kind
    evaluation = EvalImages(ImageFiles(tmp_path), eval_transform(16))
    with pytest.raises(UserError, match="002.png"):
        evaluation[2]
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no image can be read, in 31 tries: cannot identify .*000.png"):
        dataset[0, 0]


def test_more_workers_than_cores_are_said_once(images, capsys, monkeypatch):
    loading._note_workers.cache_clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # for torch too
    evaluation = EvalImages(ImageFiles(images), eval_transform(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own
        for _ in range(2):
            assert len(list(Loader(evaluation, [[0], [1]], 2, torch.device("cpu")))) == 2
    assert capsys.readouterr().out == "note: 2 workers on 1 core: --num_workers 1 is enough\n"


def test_the_workers_of_all_processes_of_a_machine_share_its_cores(monkeypatch, capsys):
    loading._note_workers.cache_clear()
    monkeypatch.setattr(loading, "get_world_size", lambda: 64)
    monkeypatch.setattr(loading, "num_cores", lambda: 8)
    for processes, workers in ((2, 4), (2, 5), (16, 1)):  # each needs one at least
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        loading._note_workers(workers)
    loading._note_workers.cache_clear()
    assert capsys.readouterr().out == "note: 10 workers on 8 cores: --num_workers 4 is enough\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not a Linux")
def test_cores_that_a_job_may_not_use_do_not_count():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert loading.num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


class MostlyBroken(ImageFiles):
    """A block of files that cannot be read; counts how many are opened."""

    def pixels(self, index):
        self.opened += 1
        if index >= 10:
            raise OSError("broken")
        return super().pixels(index)


def test_a_block_of_unreadable_images_costs_few_tries_and_draws_its_replacements(images):
    """Each broken image is replaced by a drawn one, not by its neighbours one after the other."""
    dataset = small_views(images)
    dataset.images = MostlyBroken(images)
    dataset.images.opened, replaced = 0, []
    for index in range(10, 20):
        views, _, unreadable = dataset[0, index]
        assert unreadable == index and torch.equal(views[0], dataset[0, index][0][0])  # drawn by the seed
        replaced.append(views[0])
    assert dataset.images.opened <= 2 * 10 * 31
    assert len({view.numpy().tobytes() for view in replaced}) > 3


def test_the_last_image_of_a_large_dataset_costs_what_the_first_one_does():
    class Large(torch.utils.data.Dataset):
        def __len__(self):
            return 10**6

        def __getitem__(self, index):
            return Image.new("RGB", (40, 40)), 0

    dataset = TrainingViews(Large(), DataAugmentationDINO((0.4, 1), (0.05, 0.4), 2, 32, 16).views, 0)
    tracemalloc.start()
    dataset[0, 10**6 - 1]
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def wait_patiently(monkeypatch, **seconds) -> None:
    for name, value in seconds.items():
        monkeypatch.setattr(Loader, name, value)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stop_signal_ends_a_wait_for_a_batch_that_never_comes(monkeypatch, num_workers):
    wait_patiently(monkeypatch, grace=0.3, poll=0.2)
    asked = []
    loader = Loader(
        Waiting(8, never=3), [[i] for i in range(8)], num_workers, torch.device("cpu"), lambda: bool(asked)
    )
    taken = []
    for batch in loader:
        taken.append(int(batch))
        asked += [True] * (len(taken) == 3)
    assert taken == [0, 1, 2] and multiprocessing.active_children() == []


def test_one_of_several_processes_waits_for_a_slow_batch_when_asked_to_stop(monkeypatch):
    """Else it could not finish the step with the others, and nothing would be saved."""
    assert Loader.last_wait < 30  # when torchrun kills
    monkeypatch.setattr(loading, "get_world_size", lambda: 2)
    wait_patiently(monkeypatch, grace=0.1, poll=0.1)
    loader = Loader(Slow(), [[i] for i in range(3)], 1, torch.device("cpu"), lambda: True)
    assert [int(batch) for batch in loader] == [0, 1, 2]
    wait_patiently(monkeypatch, last_wait=0.3)
    loader = Loader(Waiting(8, never=0), [[0]], 1, torch.device("cpu"), lambda: True)
    with pytest.raises(Interrupted, match="asked to stop, and no batch of images for"):
        next(iter(loader))


def test_slow_batches_are_waited_for_and_a_stop_does_not_cut_them_off(monkeypatch):
    """`stop_asked` alone ends nothing: the training ends after a step, on all ranks together."""
    wait_patiently(monkeypatch, poll=0.05)
    loader = Loader(Slow(), [[i] for i in range(3)], 1, torch.device("cpu"), lambda: True)
    assert [int(batch) for batch in loader] == [0, 1, 2]


class Slow(Waiting):
    def __init__(self):
        super().__init__(3)

    def __getitem__(self, index):
        time.sleep(0.3)
        return index


def test_a_batch_that_never_comes_ends_the_run_with_a_line(monkeypatch, capsys):
    wait_patiently(monkeypatch, patience=1.5, warn_every=0.5, poll=0.2, last_wait=0.1)
    loader = Loader(Waiting(8, never=3), [[i] for i in range(8)], 2, torch.device("cpu"))
    with pytest.raises(Interrupted, match=r"no batch of images for \d+ s: .*file system") as error:
        list(loader)
    assert error.value.exit_code == 75 and multiprocessing.active_children() == []
    assert 1 <= capsys.readouterr().out.count("warning: no batch of images for ") <= 3


class Suspends(Waiting):
    """Items that come after their reader was suspended for seconds."""

    def __getitem__(self, index):
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(3)
        os.kill(os.getppid(), signal.SIGCONT)
        time.sleep(0.5)
        return index


SUSPENDED = """
import torch
from support.loading import Loader
from tests.test_loading import Suspends
Loader.patience, Loader.poll = 2.0, 0.2
print(len(list(Loader(Suspends(1), [[0]], 1, torch.device("cpu")))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows suspends otherwise")
def test_a_process_that_was_suspended_waits_on_for_its_batch():
    """As `scontrol suspend`, `docker pause` and Ctrl-Z do. Its clock has gone on meanwhile."""
    assert run("-c", SUSPENDED).stdout == "1\n"


def test_a_dead_thread_of_pinned_memory_ends_the_run_with_the_reason(images):
    """torch's iterator with CUDA does not notice it: it only times out."""

    class TimesOut:
        _pin_memory_thread = threading.Thread()  # not alive

        def __next__(self):
            raise RuntimeError("DataLoader timed out after 1 seconds")

    loader = Loader(images, [[0]], 0, torch.device("cpu"))
    with pytest.raises(Interrupted, match=r"pins memory died.*ulimit -n.*/dev/shm") as error:
        loader._next(TimesOut(), set())
    assert error.value.exit_code == 75


LOAD = """
import sys
import torch
from support import cli
from support.data import ImageFiles
from support.loading import EpochBatches, Loader, TrainingViews
from utils import DataAugmentationDINO

def main(_):
    make_views = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 8, 224, 96).views
    views = TrainingViews(ImageFiles(sys.argv[1]), make_views, 0)
    batches = EpochBatches(len(views), 4, 0, last_step=20)
    print(len(list(Loader(views, batches, 2, torch.device("cpu")))), "batches")

cli.run_script(main, None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "fix"),
    [
        (["sh", "-c", 'ulimit -n 20; exec "$@"', "sh"], r"Too many open files.*ulimit -n"),
        (
            ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm; exec "$@"', "sh"],
            r"/dev/shm more room \(docker run --shm-size",
        ),
        (
            ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o ro none /dev/shm; exec "$@"', "sh"],
            r"Read-only file system \(/dev/shm, .*--num_workers 0",
        ),
    ],
)
def test_a_batch_lost_for_lack_of_files_or_shared_memory_ends_with_the_fix(images, limit, fix):
    """Real limits. An error of the thread that sends a batch would only lose the batch."""
    if subprocess.run([*limit, "true"], capture_output=True).returncode:
        pytest.skip("not allowed here")
    command = [*limit, sys.executable, "-c", LOAD, str(images)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = re.search("^\0?stopped: data loading failed: .*" + fix, ended.stderr, re.M)  # NUL: of older torch
    assert ended.returncode == 75 and said, ended.stderr


QUOTAS = """
import pathlib
from support.loading import num_cores
for quota in ("50000 100000", "max 100000"):
    pathlib.Path("/sys/fs/cgroup/cpu.max").write_text(quota)
    print(num_cores())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not a Linux")
def test_the_cores_of_a_container_are_those_of_its_quota():
    box = ["unshare", "-Urm", "sh", "-ec", 'mount -t tmpfs none /sys/fs/cgroup; exec "$@"', "sh"]
    if subprocess.run([*box, "true"], capture_output=True).returncode:
        pytest.skip("not allowed here")
    said = subprocess.run([*box, sys.executable, "-c", QUOTAS], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == f"1\n{len(os.sched_getaffinity(0))}\n", said.stderr


def test_a_folder_for_sockets_whose_path_is_too_long_is_refused(images, monkeypatch):
    """The thread of a worker that sends a batch would fail, and the batch be lost."""
    for length, fits in ((75, True), (76, False)):
        monkeypatch.setattr(loading.tempfile, "gettempdir", lambda length=length: "x" * length)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="TMPDIR x.*a shorter one"):
            Loader(images, [[0]], 1, torch.device("cpu"))
    Loader(images, [[0]], 0, torch.device("cpu"))  # no worker, no socket


KILLED = """
import multiprocessing, os, sys
import torch
from support.loading import Loader
from tests.test_loading import Waiting

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = iter(Loader(Waiting(8, never=3), [[i] for i in range(8)], 2, torch.device("cpu")))
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc here")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_end_with_a_training_that_is_killed(method, tmp_path):
    """With "forkserver", Python 3.14's default on Linux, their parent is the server, which lives on."""
    (tmp_path / "killed.py").write_text(KILLED)
    killed = subprocess.run(
        [sys.executable, tmp_path / "killed.py", method],
        stdout=subprocess.PIPE, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    workers = killed.stdout.split()
    assert killed.returncode == -signal.SIGKILL and len(workers) == 2

    def runs(worker: str) -> bool:
        with contextlib.suppress(OSError):  # it has ended
            return Path("/proc", worker, "stat").read_text().rpartition(") ")[2][0] != "Z"
        return False

    wait_for(lambda: not any(map(runs, workers)), "end of the workers")


def test_a_process_ends_with_a_pass_that_is_kept_open():
    """As a notebook keeps it, in a variable or after an error. Python would wait for the workers for ever."""
    body = "import torch; from support.loading import Loader; from tests.test_loading import Waiting; "
    body += "new, begun = (iter(Loader(Waiting(2), [[0]], 1, torch.device('cpu'))) for _ in range(2)); "
    body += "next(begun)"
    run("-c", body, timeout=120)


def test_nothing_is_kept_of_a_pass_that_has_ended():
    batches = iter(Loader(Waiting(2), [[0], [1]], 1, torch.device("cpu")))
    workers = [weakref.ref(worker) for worker in multiprocessing.active_children()]
    assert len(list(batches)) == 2
    del batches
    gc.collect()
    assert workers and not any(worker() for worker in workers)


SIGNALLED = """
import multiprocessing, os, signal, sys
import torch
from support import cli
from support.loading import Loader
from support.logger import log
from support.monitor import Monitor
from tests.test_loading import Waiting

def main(_):
    log("begun")  # for which tqdm makes a lock between processes
    with Monitor(0) as monitor:
        batches = iter(Loader(Waiting(8), [[i] for i in range(8)], 2, torch.device("cpu")))
        next(batches)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.killpg(0, number)
        print(len(list(batches)))

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    cli.run_script(main, None)
"""


def test_a_signal_that_another_thread_gets_waits_for_the_workers_too():
    """Else Python would run our handler, which may end the program, while a worker starts."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    started, end = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), end.wait()))
    thread.start()
    started.wait()
    with signals_held():
        signal.pthread_kill(thread.ident, signal.SIGTERM)
        time.sleep(0.1)
        assert got == []
    end.set()
    thread.join()
    signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_signal_to_the_whole_job_ends_no_process_of_the_loader(method, tmp_path):
    """As SLURM sends it, also to the processes that Python starts for "spawn" and "forkserver"."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    path = {"PYTHONPATH": str(ROOT)}
    ended = run(tmp_path / "signalled.py", method, check=False, env=path, start_new_session=True)
    # Seldom, Python also names a semaphore that was being removed when the program ended.
    said = re.findall(r"^SIG\w+|Traceback|died unexpectedly", ended.stderr, re.M)
    assert (ended.stdout, said) == ("begun\n7\n", ["SIGUSR1", "SIGTERM", "SIGINT"]), ended.stderr


def test_a_batch_is_copied_to_the_device_while_the_one_before_is_used():
    loaded = []
    source = (([torch.full((1,), i)], loaded.append(i)) for i in range(3))
    used = [(views[0].item(), len(loaded)) for views, _ in loading.to_device(source, torch.device("cpu"))]
    assert used == [(0, 2), (1, 3), (2, 3)]


STALLED = """
import os, time
from torch.utils.data import get_worker_info
import main_dino
from support import cli, data, loading
load_pixels = data.load_pixels

def load(path, *content):
    while get_worker_info() and path.endswith("007.png") and os.path.exists(os.environ["STALLED"]):
        time.sleep(0.1)
    return load_pixels(path, *content)

data.load_pixels, loading.Loader.warn_every, loading.Loader.last_wait = load, 1, 3
cli.run_script(main_dino.main, main_dino.parse_args())
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_waits_for_a_stalled_file_stops_when_asked(tmp_path, processes):
    """It saves the steps that it has made if it is alone, and the same command resumes it."""
    save_images(tmp_path / "images", 40)
    (tmp_path / "stalled.py").write_text(STALLED)
    stalled, said = tmp_path / "stalled", tmp_path / "said.txt"
    stalled.touch()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    flags = [*TINY, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out", "--epochs", 3]
    command = [sys.executable, *launcher, tmp_path / "stalled.py", *flags, "--num_workers", 1]
    env = os.environ | {"STALLED": str(stalled), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(said, "w") as file:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=file, stderr=file)
    wait_for_words("warning: no batch of images", said, process)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=200)
    if processes == 2:
        assert "stopped: asked to stop, and no batch of images for" in said.read_text(), said.read_text()
    else:
        assert code == 75, said.read_text()
        assert re.search(r"stopped: by SIGTERM, saved step \d+ of 30", said.read_text())
        stalled.unlink()
        again = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0 and "from step 0 " not in again.stdout, again.stderr


class Broken(ImageFiles):
    def pixels(self, index):
        if index == 3:
            raise OSError("broken")
        return super().pixels(index)


def test_an_unreadable_image_has_another_replacement_in_each_epoch_and_with_each_seed(images):
    datasets = small_views(images), small_views(images, seed=1)
    for dataset in datasets:
        dataset.images = Broken(images)
    drawn = {datasets[0].readable(epoch, 3)[0].numpy().tobytes() for epoch in range(9)}
    assert len(drawn) > 3
    first, second = (dataset.readable(0, 3)[0] for dataset in datasets)
    assert first.tolist() != second.tolist()


def test_a_loader_does_not_touch_the_global_random_stream():
    state = torch.get_rng_state()
    assert len(list(Loader(Waiting(2), [[0], [1]], 0, torch.device("cpu")))) == 2
    assert torch.equal(torch.get_rng_state(), state)


class Refused(ImageFiles):
    def pixels(self, index):
        raise self.error


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_an_image_that_the_machine_has_no_room_to_read_is_not_replaced(images, error):
    """It may be sound: each machine would train on other images."""
    dataset = small_views(images)
    dataset.images = Refused(images)
    dataset.images.error = error
    with pytest.raises(type(error)):
        dataset[0, 3]


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (
            RuntimeError("Caught in a worker:\nToo many open files"),
            "raise the limit of open files (ulimit -n)",
        ),
        (RuntimeError("received 0 items of ancdata"), "raise the limit of open files (ulimit -n)"),
        (
            OSError(errno.EAGAIN, "Resource temporarily unavailable"),
            "raise the limit of processes (ulimit -u)",
        ),
        (RuntimeError("unable to write: No space left on device (28)"), "give /dev/shm more room"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "give /dev/shm more room"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "),
            "give /dev/shm more room",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "run the same command to"),
        (PermissionError(errno.EACCES, "Permission denied"), "keep them writable during the run"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "keep them writable during the run"),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), None),  # a file's own error
        (RuntimeError("No space left on device\nKeyError: 'label'"), None),  # the last line is the error
        (RuntimeError("an error of DataLoader worker (pid 7)"), None),
    ],
)
def test_what_lost_a_worker_or_a_batch_comes_with_its_fix(error, fix):
    with pytest.raises(Interrupted if fix else type(error)) as raised, loading._explained():
        raise error
    if fix:
        assert f": {fix}" in str(raised.value).replace("DataLoader worker (pid 7) is killed by signal: ", "")
    else:
        assert raised.value is error


def test_a_workers_trial_of_open_files_leaves_none_open(monkeypatch):
    monkeypatch.setattr(loading, "get_worker_info", lambda: True)
    before = os.listdir("/dev/fd")
    loading.collate([0])
    assert os.listdir("/dev/fd") == before


def test_workers_that_are_killed_are_not_reported_as_dead_and_later_ones_are():
    """By torch's handler of SIGCHLD."""
    ended = []
    before = signal.signal(signal.SIGCHLD, lambda *_: ended.append("worker"))
    try:
        for kill in (lambda worker: loading.kill_workers([worker]), multiprocessing.Process.kill):
            worker = multiprocessing.Process(target=time.sleep, args=(300,), daemon=True)
            worker.start()
            kill(worker)
            worker.join()
            assert bool(ended) == (kill is multiprocessing.Process.kill)
    finally:
        signal.signal(signal.SIGCHLD, before)
