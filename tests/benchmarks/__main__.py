"""How much faster and lighter than the textbook: both sides interleaved, in one run.

    python -m tests.benchmarks [augmentation|containers|step|training|loss|knn|linear|memory|start|all]
    python -m tests.benchmarks --device cuda        # the training step on a GPU: device.py

Run it in the repository's folder, with nothing else running. Needs the photographs of
tests/benchmarks/requirements.txt. With `--device`, one side is measured after the other. A row
gives the medians of both sides, the median of their ratios round by round, and the smallest and
largest ratio; "a : b" compares with b instead of the textbook. Peak memory is that of separate
processes, above what they held before.
"""

import argparse
import contextlib
import functools
import importlib.util
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import decode_image

import utils
from eval_knn import knn_accuracies
from eval_linear import LinearClassifiers, build_optimizer, train
from support import backbones
from support.cli import number
from support.data import ImageFiles
from support.features import frozen_features
from support.formats import load_pixels
from support.loading import EpochBatches, Loader, TrainingViews, to_device
from support.memory import keep_freed_memory
from support.pixels import to_pixels
from tests.benchmarks import containers, device, textbook
from tests.benchmarks.photographs import write_photographs
from utils import DataAugmentationDINO

Side = Callable[[], object]
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# ---- measuring


def seconds(side: Side, before: Side | None = None) -> float:
    if before:
        before()
    begin = time.perf_counter()
    side()
    return time.perf_counter() - begin


@contextlib.contextmanager
def apart(name: str, *words: object) -> Iterator[Side]:
    """A side of `SIDES` in a process of its own, since ours changes what a process does with freed memory."""
    command = [sys.executable, "-m", "tests.benchmarks", "--side", name, *map(str, words)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:

        def side() -> None:
            process.stdin.write("go\n")
            if "done\n" not in iter(process.stdout.readline, ""):
                raise RuntimeError(f"{' '.join(command)} has ended")

        yield side
        process.stdin.close()


def serve(name: str, *words: str) -> None:
    """The process of `apart`."""
    side = SIDES[name](*words)
    for _ in sys.stdin:
        side()
        print("done", flush=True)


def print_row(*cells: str) -> None:
    print(f"| {' | '.join([*cells, *[''] * (5 - len(cells))])} |", flush=True)


def compare(
    name: str,
    ours: Side,
    theirs: Side,
    rounds: int,
    amount: float = 1.0,
    unit: str = "s",
    before: Side | None = None,
) -> None:
    """Time both in turn, `before` each without the clock; show amounts per second of an `amount` of work."""
    ours(), theirs()  # warm-up
    pairs = [(seconds(ours, before), seconds(theirs, before)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    if unit != "s":
        a, b = amount / a, amount / b
    spread = f"{ratios[0]:.2f} - {ratios[-1]:.2f}"
    print(
        f"| {name} | {a:.3g} {unit} | {b:.3g} {unit} | **{statistics.median(ratios):.2f}x** | {spread} |",
        flush=True,
    )


def compare_peaks(name: str, benchmark: str, rounds: int = 3) -> None:
    """Peak memory of both sides, each in a process of its own."""
    peaks = {}
    for side in ("our", "textbook"):
        command = [sys.executable, "-m", "tests.benchmarks", "--peak", f"{side}_{benchmark}"]
        runs = [
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            for _ in range(rounds)
        ]
        peaks[side] = sorted(float(run.stdout.split()[-1]) for run in runs)
    a, b = (statistics.median(peak) for peak in peaks.values())
    spread = f"{peaks['textbook'][0] / peaks['our'][-1]:.2f} - {peaks['textbook'][-1] / peaks['our'][0]:.2f}"
    print(f"| {name}, peak memory | {a:.0f} MiB | {b:.0f} MiB | **{b / a:.2f}x** | {spread} |", flush=True)


def resident(field: str) -> float:
    """This process's VmRSS or VmHWM, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def print_peak(name: str) -> None:
    """How much more memory than before a side of `SIDES` needs."""
    INPUTS[name.split("_")[1]]()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    SIDES[name]()()
    print(resident("VmHWM") - before)


# ---- augmentation


def recipe() -> DataAugmentationDINO:
    return DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)


def augmentation(rounds: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder))
        ours, plain, n = recipe(), textbook.Views(), len(paths)

        def read(path: Path) -> Image.Image:
            with Image.open(path) as image:
                return image.convert("RGB")

        def all_of(make: Callable) -> Side:
            return lambda: [make(path) for path in paths]

        theirs = all_of(lambda path: plain(read(path)))
        rows = {
            "views from JPEG, one worker": lambda path: ours.views(load_pixels(str(path))),
            "its share with `--augment_on device`": lambda path: ours.crops(load_pixels(str(path))),
        }
        for name, make in rows.items():
            compare(name, all_of(make), theirs, rounds, n, "img/s")
        image = read(paths[0])
        a, b = (sum(v.nbytes for v in views) for views in (ours.views(to_pixels(image))[0], plain(image)))
        print_row(
            "what a worker ships per image", f"{a / 1e6:.2f} MB", f"{b / 1e6:.2f} MB", f"**{b / a:.2f}x**"
        )
        for path in paths:
            Image.open(path).save(path.with_suffix(".png"))
        for kind in (".jpg", ".png"):
            files = [path.with_suffix(kind) for path in paths]
            assert all(torch.equal(to_pixels(read(f)), decode_image(str(f))) for f in files)
            compare(
                f"decoding {kind[1:]}, torchvision : Pillow, same pixels",
                lambda files=files: [decode_image(str(f)) for f in files],
                lambda files=files: [to_pixels(read(f)) for f in files],
                rounds,
                n,
                "img/s",
            )
    torch.set_num_threads(threads)


def reading(rounds: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    containers.run(compare, print_row, recipe(), rounds)
    torch.set_num_threads(threads)


# ---- the step


def cpu_has_bf16() -> bool:
    """Whether bfloat16 is faster than float32 on this CPU: where it is emulated, it is far slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def gemm_peak() -> float:
    """The machine's float32 matrix product, flop/s."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ a) for _ in range(10))


def step(rounds: int) -> None:
    for arch, images in (("vit_tiny", 8), ("vit_small", 4)):
        compare_steps(arch, images, rounds)


def our_step(arch: str, images: str, precision: str, *flags: str) -> Side:
    batch, trainer = device.random_batch(int(images), CPU), device.OurTrainer(arch, precision, CPU, *flags)
    return lambda: trainer.step(batch)


def textbook_step(arch: str, images: str, precision: str) -> Side:
    views = device.textbook_views(device.random_batch(int(images), CPU))
    dtype = None if precision == "fp32" else device.DTYPES[precision]
    return functools.partial(textbook.Trainer(arch, device.PROTOTYPES, dtype=dtype).step, views)


def compare_steps(arch: str, images: int, rounds: int) -> None:
    with contextlib.ExitStack() as processes:

        def side(name: str, *words: str) -> Side:
            return processes.enter_context(apart(name, arch, images, *words))

        ours, theirs = side("our_step", "fp32"), side("textbook_step", "fp32")
        compare(f"step {arch}/16 fp32", ours, theirs, rounds, images, "img/s")
        with FlopCounterMode(display=False) as counter:
            our_step(arch, str(images), "fp32")()
        share = counter.get_total_flops() / min(seconds(ours) for _ in range(3)) / gemm_peak()
        print_row("its share of the machine's fp32 GEMM peak", f"{share:.0%}")
        if cpu_has_bf16():
            ours = side("our_step", "bf16")
            compare(f"step {arch}/16 bf16 : textbook fp32", ours, theirs, rounds, images, "img/s")
            both, halved = f"step {arch}/16, both bf16", side("textbook_step", "bf16")
            compare(both, ours, halved, rounds, images, "img/s")
        else:
            print_row(f"step {arch}/16 bf16", "this CPU has no bfloat16")
        ours = side("our_step", "fp32", "--compile")
        compare(f"step {arch}/16 fp32 `--compile`", ours, theirs, rounds, images, "img/s")


class PlainImages(Dataset):
    """Files, and the textbook's views of them."""

    def __init__(self, paths: list[Path]):
        self.paths, self.views = paths, textbook.Views()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with Image.open(self.paths[index]) as image:
            return self.views(image.convert("RGB"))


# A training uses one loading worker, which each turn starts and ends: else it would go on loading while the
# other side computes.


def our_training(arch: str, batch: str, steps: str, folder: str, precision: str) -> Side:
    dataset = TrainingViews(ImageFiles(folder), recipe().views, 0)
    batches = EpochBatches(len(dataset), int(batch), 0, last_step=int(steps))
    loader, trainer = Loader(dataset, batches, 1, CPU), device.OurTrainer(arch, precision, CPU)
    return lambda: trainer.steps(to_device(loader, CPU))


def textbook_training(arch: str, batch: str, folder: str) -> Side:
    images = PlainImages(sorted(Path(folder).iterdir()))
    loader = DataLoader(images, int(batch), shuffle=True, num_workers=1, drop_last=True)
    trainer = textbook.Trainer(arch, device.PROTOTYPES)
    return lambda: [trainer.step(views) for views in loader]


def end_to_end(rounds: int, arch: str = "vit_tiny", batch: int = 8, steps: int = 10) -> None:
    """Files to weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), steps * batch)
        with apart("textbook_training", arch, batch, folder) as theirs:
            for precision in ["fp32", *["bf16"] * cpu_has_bf16()]:
                with apart("our_training", arch, batch, steps, folder, precision) as ours:
                    name = f"files to weights, {arch}/16 {precision} : textbook fp32"
                    compare(name, ours, theirs, rounds, steps * batch, "img/s")


# ---- last layer and loss


@functools.cache
def loss_inputs(images: int = 64) -> tuple:
    torch.manual_seed(0)
    K = device.PROTOTYPES
    head = utils.DINOHead(384, K)
    teacher = F.normalize(torch.randn(2 * images, 256), dim=1) @ head.last_layer.weight.detach().T
    return (
        head,
        torch.randn(10 * images, 384),
        teacher,
        utils.DINOLoss(K, 10, 0.04, 0.04, 0, 1),
    )


def our_loss() -> None:
    head, features, teacher, loss = loss_inputs()
    head.defer_last_layer = True
    loss(head(features), teacher, 0).backward()
    head.zero_grad()


def plain_loss() -> None:
    head, features, teacher, loss = loss_inputs()
    head.defer_last_layer = False
    textbook.pair_loss(head(features), teacher, loss.center, 10).backward()
    head.zero_grad()


def loss(rounds: int) -> None:
    with apart("our_loss") as ours, apart("textbook_loss") as theirs:
        compare("head and loss, B = 64, K = 65536", ours, theirs, rounds)
    compare_peaks("head and loss, B = 64, K = 65536", "loss")


# ---- k-NN and linear probe


@functools.cache
def knn_inputs() -> tuple:
    generator = torch.Generator().manual_seed(0)
    train, test = (F.normalize(torch.randn(n, 384, generator=generator), dim=1) for n in (50_000, 5_000))
    return train, torch.arange(50_000) % 1000, test, torch.arange(5_000) % 1000


KS = [10, 20, 100, 200]


def our_knn() -> list[float]:
    return [top1 for top1, _ in knn_accuracies(*knn_inputs(), KS, 0.07, 1000).values()]


def plain_knn() -> list[float]:
    return [textbook.knn(*knn_inputs(), k, 1000) for k in KS]


def knn(rounds: int) -> None:
    assert our_knn() == plain_knn()
    with apart("our_knn") as ours, apart("textbook_knn") as theirs:
        compare("k-NN, 50k x 5k x 384, four k", ours, theirs, rounds)
    compare_peaks("k-NN, 50k x 5k x 384, four k", "knn")


def linear(rounds: int) -> None:
    """Five learning rates: in one pass over the images, or in five."""
    torch.manual_seed(0)
    vit, _ = backbones.build_backbone("vit_tiny")
    images, labels, rates = (
        torch.randn(64, 3, 224, 224),
        torch.arange(64) % 10,
        [0.001, 0.003, 0.01, 0.03, 0.1],
    )

    def probe(rates: list[float]) -> None:
        classifiers = LinearClassifiers(len(rates), 4 * 192, 10)
        with torch.no_grad():
            features = frozen_features(vit.eval(), images, 4, False)
        list(train(classifiers, build_optimizer(classifiers, rates), [(features, labels)]))

    compare(
        "linear probe, five learning rates", lambda: probe(rates), lambda: [probe([r]) for r in rates], rounds
    )


def features() -> Side:
    network, _ = backbones.build_backbone("vit_small")
    images = torch.randn(64, 3, 224, 224)
    return torch.inference_mode()(functools.partial(network.eval(), images))


def memory(rounds: int) -> None:
    """Ours, and ours without `keep_freed_memory`."""
    steps = [("step", "vit_tiny", 8, precision) for precision in ["fp32", *["bf16"] * cpu_has_bf16()]]
    for words in [*steps, ("features",)]:
        with apart(f"our_{words[0]}", *words[1:]) as kept, apart(f"default_{words[0]}", *words[1:]) as given:
            compare(f"{' '.join(map(str, words))}: memory kept : returned", kept, given, rounds)


def start(rounds: int) -> None:
    def process(*command: str) -> Side:
        return lambda: subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)

    imports = process("-c", "import torch, torchvision")
    compare(
        "`main_dino.py --help` : `import torch, torchvision`",
        process("main_dino.py", "--help"),
        imports,
        rounds,
    )


BENCHMARKS = {
    "augmentation": [augmentation], "containers": [reading], "step": [step], "training": [end_to_end],
    "loss": [loss], "knn": [knn], "linear": [linear], "memory": [memory], "start": [start],
}  # fmt: skip
SIDES: dict[str, Callable[..., Side]] = {
    "our_step": our_step, "textbook_step": textbook_step,
    "our_training": our_training, "textbook_training": textbook_training,
    "our_loss": lambda: our_loss, "textbook_loss": lambda: plain_loss,
    "our_knn": lambda: our_knn, "textbook_knn": lambda: plain_knn,
    "our_features": features, "default_step": our_step, "default_features": features,
}  # fmt: skip
INPUTS = {"loss": loss_inputs, "knn": knn_inputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count = number(int, at_least=1)
    parser.add_argument("which", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--rounds", type=count, default=7, help="how often both sides are timed")
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "mps"], help="measure the training step on this device instead"
    )
    parser.add_argument("--images", type=count, default=64, help="images per step, with --device")
    for flag in "--peak", "--side":  # the processes of `compare_peaks` and `apart`
        parser.add_argument(flag, nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device and args.which != "all":
        parser.error("--device measures the step of all networks: leave the name out")
    if args.device and not getattr(torch, args.device).is_available():
        parser.error(f"--device {args.device}: there is none here")
    if args.device:
        device.run(torch.device(args.device), args.images, args.rounds)
        return
    if not importlib.util.find_spec("skimage"):
        parser.error("needs photographs: pip install -r tests/benchmarks/requirements.txt")
    if "".join(args.peak + args.side).startswith("our"):
        keep_freed_memory()  # as our scripts do
    if args.peak:
        print_peak(*args.peak)
        return
    if args.side:
        serve(*args.side)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    print("\n| work | ours | textbook | ratio | spread |\n|---|---|---|---|---|")
    for name, benchmarks in BENCHMARKS.items():
        if args.which in (name, "all"):
            for benchmark in benchmarks:
                benchmark(args.rounds)


if __name__ == "__main__":
    main()
