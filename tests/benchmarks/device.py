"""The training step of the default recipe on one device: `python -m tests.benchmarks --device cuda`.

For each network and precision, and for bf16 also with `--compile`: images per second, peak memory, and the
share of the device's matrix rate, beside the textbook's step on the same device. Then the images per second
of one data-loading worker, and where the time of a step goes. A row that the device cannot run says why.
"""

import functools
import gc
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import main_dino
from support.distributed import fix_random_seeds
from support.formats import load_pixels
from support.logger import MetricLogger
from support.monitor import Monitor
from support.pixels import normalized_views
from tests.benchmarks import textbook
from tests.benchmarks.photographs import write_photographs
from utils import DataAugmentationDINO

PROTOTYPES = 65536
NETWORKS = ("vit_small", "vit_base", "resnet50")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADER = "| network | precision | images/s | textbook | ratio | peak memory | textbook | matrix rate |"


def random_batch(images: int, device: torch.device) -> tuple:
    """The views of the default recipe, as `to_device` gives them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(images, count, 3, side, side) for count, side in ((2, 224), (8, 96))]
    views = [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    return [view.to(device) for view in views], (), torch.full((images,), -1)


def textbook_views(batch: tuple) -> list[torch.Tensor]:
    """The views of a batch as torchvision's transforms give them: normalised, contiguous."""
    return [view.contiguous() for view in normalized_views(batch[0])]


class Quiet(MetricLogger):
    """Prints nothing."""

    def log_every(self, iterable, **_):
        return iterable


class OurTrainer:
    """The pieces of `main_dino.train_dino`, and its epoch function on batches made before."""

    def __init__(self, arch: str, precision: str, device: torch.device, *flags: str):
        fix_random_seeds(0)
        words = (
            f"--arch {arch} --out_dim {PROTOTYPES} --epochs 1 --warmup_epochs 0 --freeze_last_layer 0 "
            f"--drop_path_rate {0 if arch.startswith('resnet') else 0.1} --precision {precision}"
        )
        args = main_dino.parse_args([*words.split(), *flags])
        steps = main_dino.Steps(1, 1, per_epoch=10_000, last=10_000)
        self.training = main_dino.build_training(args, device, steps, resumes=False)

    def steps(self, batches: Iterator[tuple]) -> None:
        stretch = range(self.training.steps.last)
        main_dino.train_one_epoch(self.training, batches, stretch, Monitor(1), Quiet())

    def step(self, batch: tuple) -> None:
        self.steps(iter([batch]))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of `work`, after two calls that are not timed."""
    times = []
    for _ in range(rounds + 2):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def peak_memory(work: Callable[[], object], device: torch.device) -> str:
    if device.type != "cuda":
        return "not counted"
    torch.cuda.reset_peak_memory_stats()
    work()
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def matrix_rate(dtype: torch.dtype, device: torch.device, side: int) -> float:
    """Flop/s of a square product."""
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / seconds(lambda: a @ a, device, 10)


class Measured(NamedTuple):
    """What one trainer's step gives on a device; `reason` says why it could not run."""

    speed: float = math.nan  # images per second
    peak: str = ""
    flops: float = math.nan
    reason: str = ""


def measure(
    make: Callable[[], Callable], device: torch.device, images: int, rounds: int, count: bool = True
) -> Measured:
    """Measure the step that `make()` returns; `count` its operations, which a compiled one does not show."""
    torch._dynamo.reset()  # a compiled trainer would stay in memory
    gc.collect()
    try:
        step = make()
        speed = images / seconds(step, device, rounds)
        peak = peak_memory(step, device)
        if not count:
            return Measured(speed, peak)
        with FlopCounterMode(display=False) as counter:
            step()
        return Measured(speed, peak, counter.get_total_flops())
    except Exception as error:  # what a device lacks can raise anything; the table goes on
        return Measured(reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}")


def print_rows(arch: str, device: torch.device, images: int, rounds: int) -> None:
    """Print the rows of one network."""
    batch = random_batch(images, device)
    views = textbook_views(batch)
    for precision, dtype in DTYPES.items():
        if device.type == "cpu" and dtype != torch.float32:
            continue  # many CPUs emulate it, a hundred times slower
        rate = matrix_rate(dtype, device, 8192 if device.type == "cuda" else 1024)
        autocast = None if precision == "fp32" else dtype
        # The textbook runs with PyTorch's defaults, which `build_training` changes for the process.
        torch.backends.cudnn.deterministic = False
        torch.backends.cuda.enable_cudnn_sdp(True)
        plain = functools.partial(textbook.Trainer, arch, PROTOTYPES, device, autocast)
        theirs = measure(lambda plain=plain: functools.partial(plain().step, views), device, images, rounds)
        flops = math.nan
        for flags in ([], ["--compile"]) if precision == "bf16" else ([],):  # a minute to compile
            ours = functools.partial(OurTrainer, arch, precision, device, *flags)
            found = measure(
                lambda ours=ours: functools.partial(ours().step, batch), device, images, rounds, not flags
            )
            flops = found.flops if not flags else flops  # a compiled step hides some from the counter
            cells = [f"{found.speed:.3g}", f"{theirs.speed:.3g}", f"**{found.speed / theirs.speed:.2f}x**"]
            cells += [found.peak, theirs.peak, f"{flops * found.speed / images / rate:.0%}"]
            words = " ".join([precision, *(f"`{flag}`" for flag in flags)])
            print(f"| {arch} | {words} | {found.reason or ' | '.join(cells)} |", flush=True)


def worker_speed() -> float:
    """Images per second of one data-loading worker, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    augmentation = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder))
        time_of_all = seconds(
            lambda: [augmentation.views(load_pixels(str(path))) for path in paths], torch.device("cpu"), 3
        )
    torch.set_num_threads(threads)
    return len(paths) / time_of_all


def print_profile(arch: str, precision: str, device: torch.device, images: int) -> None:
    """Print the operations that take the most time of the device in three steps."""
    ours, batch = OurTrainer(arch, precision, device), random_batch(images, device)
    for _ in range(2):
        ours.step(batch)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as profiler:
        for _ in range(3):
            ours.step(batch)
        synchronize(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def run(device: torch.device, images: int, rounds: int, networks: tuple[str, ...] = NETWORKS) -> None:
    print(f"torch {torch.__version__}, {name_of(device)}, {images} images per step, 2 x 224 + 8 x 96\n")
    print(f"{HEADER}\n|---|---|---|---|---|---|---|---|", flush=True)
    for arch in networks:
        print_rows(arch, device, images, rounds)
    has_photographs = importlib.util.find_spec("skimage")  # a GPU machine may be offline
    speed = f"{worker_speed():.0f} images/s" if has_photographs else "not measured without scikit-image"
    print(f"\nviews from JPEG, one data-loading worker: {speed}\n", flush=True)
    print_profile(networks[0], "bf16" if device.type == "cuda" else "fp32", device, images)
