"""The paper's claims in miniature: train the variants, evaluate them, write a table and figures.

    python -m tests.miniature                     # shapes, three seeds: three hours on two cores
    python -m tests.miniature --data_path data    # and data/FashionMNIST: hours
    python -m tests.miniature --quick             # one seed, less of everything: nine minutes

Each run has a folder below `--output_dir`; the same command started again does what is missing. The
table is `results.md`, the figures are beside it. A claim that does not show stands there like the rest.

Variants see equally many images, but for the long ones, which show what the others are too short for: those
with 0 to 10 local crops take about the same time; the one with a constant learning rate, the longest, is
compared with labels. k-NN (20 neighbours) looks up held-out images among the training's.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import eval_knn
import eval_linear
import main_dino
import utils
from eval_segmentation import MaskedShapes, measure_attention, resized_batches
from support import backbones
from support.checkpoints import save_checkpoint
from support.cli import number
from support.data import Source, open_labelled_images
from support.distributed import fix_random_seeds
from support.loading import kill_workers
from support.pixels import normalize, to_pixels
from support.shapes import Scene, Shapes
from support.weights import load_backbone
from tests.conftest import ROOT

# ---------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------

COMMON = (
    "--arch vit_nano --local_crops_number 2 --head_hidden_dim 512 "
    "--head_bottleneck_dim 128 --freeze_last_layer 0 --drop_path_rate 0 --weight_decay_end 0.04 "
    "--precision fp32 --cpu_threads 1 --num_workers 0 --saveckp_freq 0"
).split()
SHAPES = (
    "--patch_size 16 --global_crops_size 64 --local_crops_size 32 --local_crops_scale 0.15 0.4 --out_dim 64 "
    "--momentum_teacher 0.96 --centering sinkhorn --warmup_teacher_temp 0.01 --teacher_temp 0.01 "
    "--batch_size_per_gpu 32 --lr 0.008 --min_lr 1e-5"
).split()
DEMO = "--demo --num_workers 0 --cpu_threads 1".split()
FASHION = [
    f"@{ROOT / 'recipes' / 'small_images.txt'}",
    *"--dataset FashionMNIST --save_every_steps 200".split(),
]
LONG = "--momentum_teacher 0.98"
# What a variant on shapes has other than the recipe.
VARIANTS = {
    "base": "",
    "last_epoch": "--teacher_update epoch",
    "copy": "--teacher_update copy",
    # the student's temperature: no sharpening
    "centering": "--warmup_teacher_temp 0.1 --teacher_temp 0.1",
    "sharpening": "--centering none",
    # the published scale without multi-crop
    "long_crops_0": f"{LONG} --local_crops_number 0 --global_crops_scale 0.14 1",
    "long_crops_2": LONG,
    "long_crops_6": f"{LONG} --local_crops_number 6",
    "long_crops_10": f"{LONG} --local_crops_number 10",
    "patch_32": "--patch_size 32",
    "constant_rate": "--min_lr 0.001 --momentum_teacher 0.9 --knn_every 4",
}
# What `--sweeps` varies: flags, their values, among them the recipe's, and the title of the table.
SWEEPS = {
    "batch": ("--batch_size_per_gpu {0}", (8, 16, 32, 64), "batch size, at equal images (Table 9)"),
    "temperature": (
        "--warmup_teacher_temp {0} --teacher_temp {0}",
        (0.01, 0.02, 0.04, 0.07),
        "teacher temperature (Appendix D)",
    ),
    "prototypes": ("--out_dim {0}", (16, 64, 256, 1024), "prototypes (Appendix C)"),
    "start": (
        "--warmup_teacher_temp 0.04 --teacher_temp 0.04 {0}",
        tuple(
            f"{head_and_centre} --adapt_teacher_temp {deviations}"
            for head_and_centre in (
                "--use_bn_in_head false --centering ema",
                "--use_bn_in_head true --centering ema",
                "--use_bn_in_head false --centering sinkhorn",
            )
            for deviations in (0, 2)
        ),
        "the paper's temperature of 0.04, and",
    ),
}
CROPS = {number: f"long_crops_{number}" for number in (0, 2, 6, 10)}
COLLAPSES = {"base": "both", "centering": "centering alone", "sharpening": "sharpening alone"}


class Budget(NamedTuple):
    """How much is done on shapes: close-ups of them, and for the attention also the demo's."""

    seeds: int
    images: int
    held_out: int
    epochs: int
    knn_every: int  # divides all numbers of epochs, so that the end is measured
    long_epochs: dict[str, int]  # of the long variants: those with 0, 2, 6 and 10 local crops, of which an
    # image costs 0.7, 1, 1.4 and 1.7, take the same time
    demo_epochs: int


DEMO_EPOCHS = main_dino.demo_defaults()["epochs"]
FULL = Budget(
    seeds=3,
    images=1024,
    held_out=512,
    epochs=20,
    knn_every=2,
    demo_epochs=DEMO_EPOCHS,
    long_epochs=dict(constant_rate=160, long_crops_0=76, long_crops_2=60, long_crops_6=42, long_crops_10=32),
)
QUICK = Budget(
    seeds=1,
    images=1024,
    held_out=256,
    epochs=4,
    knn_every=1,
    demo_epochs=2,
    long_epochs=dict(constant_rate=12, long_crops_0=10, long_crops_2=8, long_crops_6=6, long_crops_10=4),
)
TINY = Budget(  # to try this program
    seeds=2,
    images=64,
    held_out=16,
    epochs=2,
    knn_every=1,
    demo_epochs=1,
    long_epochs=dict(constant_rate=4, long_crops_0=5, long_crops_2=4, long_crops_6=3, long_crops_10=2),
)


# Objects that fill nearly half of an image, in strong colours: for images of 4 x 4 patches.
CLOSE_UP = Scene(
    size=64, radius=(0.38, 0.5), center=(0.4, 0.6), contrast=(0.25, 0.4), periods=(0.36, 0.19, 0.1),
    warps=(0.4, 0.4, 0.4), blobs=(9, 24), shades=(0.1, 0.3), ground=(0.6, 0.3),
)  # fmt: skip


def draw_shapes(folder: Path, counts: dict[str, int]) -> None:
    """Files of shapes in folders of classes: drawn but once, and as many as we like."""
    if folder.exists():
        return
    unfinished = folder.with_suffix(".part")
    for split, count in counts.items():
        shapes = Shapes(split, count, CLOSE_UP)
        for name in shapes.classes:
            (unfinished / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, label = shapes[i]
            image.save(unfinished / split / shapes.classes[label] / f"{i:05}.png")
    unfinished.rename(folder)


# ---------------------------------------------------------------------------------------------
# Trainings
# ---------------------------------------------------------------------------------------------


def train_dino(folder: Path, flags: list[str]) -> None:
    """`main_dino.py` with these flags, unless it has been through with them; a killed one goes on."""
    finished = folder / "finished.txt"
    if finished.exists() and finished.read_text() == " ".join(flags):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "said.txt", "a") as said:
        command = [sys.executable, "main_dino.py", *flags, "--output_dir", str(folder)]
        code = subprocess.run(command, cwd=ROOT, stdout=said, stderr=said).returncode
    if code:
        raise RuntimeError(f"main_dino.py ended with {code}: see {folder / 'said.txt'}")
    finished.write_text(" ".join(flags))


def train_supervised(folder: Path, flags: list[str], data: Source) -> None:
    """The flags' backbone and a linear layer by cross-entropy; saves the backbone, unless it is there.

    Images, epochs, batches, optimizer and schedules are DINO's with these flags. Of each image it sees
    one view, as the second global one: the first is always blurred.
    """
    if (folder / "checkpoint.pth").exists():
        return
    args = main_dino.parse_args(flags)
    images = open_labelled_images(data, "train")
    pixels = [to_pixels(images[i][0].convert("RGB")) for i in range(len(images))]
    labels = torch.tensor([images[i][1] for i in range(len(images))])
    fix_random_seeds(args.seed)
    backbone, width = backbones.build_backbone(args.arch, args.patch_size, args.global_crops_size)
    model = nn.Sequential(backbone, nn.Linear(width, len(images.classes)))
    augmentation = main_dino.build_augmentation(args)
    augmentation.kinds = augmentation.kinds[1:2]
    optimizer = main_dino.build_optimizer(args.optimizer, model)
    steps = main_dino.count_steps(args, len(images))
    schedules = main_dino.build_schedules(args, steps)
    rng = random.Random(args.seed)
    for step in range(steps.last):
        if step % steps.per_epoch == 0:
            batches = iter(torch.randperm(len(images)).split(args.batch_size_per_gpu))
        batch = next(batches)
        views = torch.cat([augmentation.views(pixels[i], rng)[0][0] for i in batch])
        utils.set_schedules(optimizer, float(schedules["lr"][step]), float(schedules["wd"][step]))
        optimizer.zero_grad()
        F.cross_entropy(model(normalize(views)), labels[batch]).backward()
        utils.clip_gradients(model, args.clip_grad)
        optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(backbone.state_dict(), folder / "checkpoint.pth")


# ---------------------------------------------------------------------------------------------
# Evaluations
# ---------------------------------------------------------------------------------------------


def keep(path: Path, measure: Callable[[], dict[str, float]]) -> None:
    """Write to `path` what `measure` gives, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".said"), "w") as said, contextlib.redirect_stdout(said):
        value = measure()
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").replace(path)


def evaluate_knn(folder: Path, argv: list[str]) -> None:
    """Top-1 of `eval_knn.py` in percent."""
    args = eval_knn.parse_args([*argv, "--nb_knn", "20", "--num_workers", "0"])
    keep(folder / "knn.json", lambda: {"top1": eval_knn.main(args)[20][0]})


def evaluate_linear(folder: Path, argv: list[str]) -> None:
    """Best top-1 of `eval_linear.py` in percent, over learning rates and epochs, as it reports it."""
    flags = "--lr 0.001 0.01 0.1 1 --epochs 20 --val_freq 5 --cache_features --num_workers 0".split()
    args = eval_linear.parse_args([*argv, *flags, "--output_dir", str(folder / "linear")])
    keep(folder / "linear.json", lambda: {"top1": max(best["acc1"] for best in eval_linear.main(args))})


def evaluate_attention(folder: Path, weights: str, flags: list[str], count: int) -> None:
    """On shapes of the demo, at twice the resolution of the training with these flags: the best head's share
    of attention on the object; Jaccard index where 60 or 90 % of the attention are kept, of each object's
    best head, as in the paper. Beside them, the object's share of the image.
    """
    args = main_dino.parse_args(flags)

    def measure() -> dict[str, float]:
        fix_random_seeds(args.seed)
        size, shapes = args.global_crops_size, MaskedShapes("val", count)
        frozen = load_backbone(weights, None, args.arch, args.patch_size, size)
        frozen = frozen._replace(image_size=(2 * size, 2 * size))
        batches = [*resized_batches(frozen, shapes, torch.device("cpu"))]
        less, more = (measure_attention(frozen.network, shapes, batches, t) for t in (0.6, 0.9))
        found = {
            "on_object": less.on_objects.mean(dim=0).max(),
            "jaccard60": less.classes.mean(),
            "jaccard90": more.classes.mean(),
            "object": less.area.mean(),
        }
        return {name: 100 * share.item() for name, share in found.items()}

    keep(folder / "segmentation.json", measure)


# ---------------------------------------------------------------------------------------------
# What there is to do
# ---------------------------------------------------------------------------------------------

Jobs = tuple[list[Callable[[], None]], list[Callable[[], None]]]


def shapes_jobs(out: Path, budget: Budget) -> Jobs:
    """Trainings, and the evaluations that come after them."""
    trainings, evaluations, data = [], [], out / "shapes"
    watch = watching(data, budget.knn_every)
    for seed in range(budget.seeds):
        flags = on_shapes(data, seed)
        for name, changes in VARIANTS.items():
            folder, epochs = out / f"{name}_seed{seed}", budget.long_epochs.get(name, budget.epochs)
            own = [*flags, *watch, *lasting(epochs), *changes.split()]
            trainings.append(functools.partial(train_dino, folder, own))
        folder = out / f"supervised_seed{seed}"
        flags += lasting(budget.long_epochs["constant_rate"])
        trainings.append(functools.partial(train_supervised, folder, flags, Source(str(data))))
        for _, folder, weights in networks(out, "", seed, "constant_rate"):
            look_up = [*weights, "--image_size", "64", "--patch_size", "16", "--data_path", str(data)]
            evaluations.append(functools.partial(evaluate_knn, folder, look_up))
    return trainings, evaluations


def demo_jobs(out: Path, budget: Budget) -> Jobs:
    """The same of the demo, whose smaller objects leave the attention a choice."""
    trainings, evaluations = [], []
    for seed in range(budget.seeds):
        flags = [*DEMO, "--epochs", str(budget.demo_epochs), "--seed", str(seed)]
        trainings.append(functools.partial(train_dino, out / f"demo_base_seed{seed}", flags))
        folder = out / f"demo_supervised_seed{seed}"
        trainings.append(functools.partial(train_supervised, folder, flags, Source(demo=True)))
        for name, folder, weights in networks(out, "demo_", seed):
            look_up = [*weights, "--image_size", "96", "--patch_size", "16", "--demo"]
            evaluations.append(functools.partial(evaluate_knn, folder, look_up))
            if name != "pixels":
                look_at = [folder, weights[1], flags, budget.held_out]
                evaluations.append(functools.partial(evaluate_attention, *look_at))
    return trainings, evaluations


def sweep_runs(keys: Iterable[str]) -> dict[str, str]:
    """Names and flags of the runs of these `SWEEPS`; the recipe's own values are one run, `base`."""
    runs = {}
    for key in keys:
        flags, values, _ = SWEEPS[key]
        for value in values:
            name = sweep_run(key, value)
            runs[name] = "" if name == "base" else flags.format(value)
    return runs


def sweep_run(key: str, value: object) -> str:
    """The name of the run with this value."""
    changed = [*SHAPES, *SWEEPS[key][0].format(value).split()]
    is_base = main_dino.parse_args(changed) == main_dino.parse_args(SHAPES)
    return "base" if is_base else re.sub(r"[^\w.]+", "_", f"{key} {value}")


def sweep_jobs(out: Path, budget: Budget, keys: Iterable[str]) -> list[Callable[[], None]]:
    """Trainings, seed by seed; k-NN at the end alone."""
    data = out / "shapes"
    jobs = []
    for seed in range(budget.seeds):
        flags = [*on_shapes(data, seed), *watching(data, budget.epochs), *lasting(budget.epochs)]
        for name, changes in sweep_runs(keys).items():
            folder = out / "sweeps" / f"{name}_seed{seed}"
            jobs.append(functools.partial(train_dino, folder, [*flags, *changes.split()]))
    return jobs


def on_shapes(data: Path, seed: int) -> list[str]:
    """Flags of the recipe."""
    return [*COMMON, *SHAPES, "--seed", str(seed), "--data_path", str(data / "train")]


def watching(data: Path, every: int) -> list[str]:
    """Flags for k-NN every few epochs."""
    return ["--knn_every", str(every), "--knn_share", "1", "--knn_data", str(data)]


def lasting(epochs: int) -> list[str]:
    """Flags. A long warm-up: networks that see few images collapse easily at the start."""
    return ["--epochs", str(epochs), "--warmup_epochs", str(min(5, max(1, round(epochs / 4))))]


def fashion_jobs(out: Path, data_path: str, seeds: int) -> Jobs:
    """The same for Fashion-MNIST."""
    trainings, evaluations = [], []
    data = ["--dataset", "FashionMNIST", "--data_path", data_path]
    for seed in range(seeds):
        flags = [*COMMON, *FASHION, *data, "--seed", str(seed)]
        trainings.append(functools.partial(train_dino, out / f"fashion_base_seed{seed}", flags))
        folder = out / f"fashion_supervised_seed{seed}"
        trainings.append(
            functools.partial(train_supervised, folder, flags, Source(data_path, "FashionMNIST"))
        )
        for _, folder, weights in networks(out, "fashion_", seed):
            argv = [*weights, *data, "--image_size", "28", "--patch_size", "7"]
            evaluations += [functools.partial(f, folder, argv) for f in (evaluate_knn, evaluate_linear)]
    return trainings, evaluations


def networks(
    out: Path, prefix: str, seed: int, trained: str = "base"
) -> Iterator[tuple[str, Path, list[str]]]:
    """Name, folder and flags of what is evaluated of one seed; pixels have but one."""
    for name in (trained, "supervised", "random", "pixels")[: 3 if seed else 4]:
        folder = out / f"{prefix}{name}_seed{seed}"
        weights = name if name in ("random", "pixels") else str(folder / "checkpoint.pth")
        yield name, folder, ["--pretrained_weights", weights, "--arch", "vit_nano", "--seed", str(seed)]


def do(jobs: list[Callable[[], None]], at_a_time: int) -> None:
    """Each in a process of one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_a_time, context, torch.set_num_threads, (1,)) as pool:
        try:
            for done in [pool.submit(job) for job in jobs]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            kill_workers(multiprocessing.active_children())  # else they go on with the next jobs
            raise


# ---------------------------------------------------------------------------------------------
# What was measured
# ---------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict]:
    """What a training has logged, by epoch, with the seconds so far at the speed of its fastest epoch.

    Evaluation is left out, and so is what else the machine had to do, which only slows.
    """
    found = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    flags = (folder / "finished.txt").read_text().split()
    batch = int(flags[flags.index("--batch_size_per_gpu") + 1])
    fastest = max(record["train_images_per_second"] for record in found)
    for record in found:
        record["seconds"] = record["step"] * batch / fastest
    return found


class Runs(NamedTuple):
    """The runs of all seeds, by name."""

    out: Path
    seeds: int

    def folders(self, name: str) -> list[Path]:
        return [self.out / f"{name}_seed{seed}" for seed in range(self.seeds)]

    def curves(self, name: str, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """(seeds, points) of two logged numbers, where both were measured."""
        logs = [[(r[x], r[y]) for r in records(folder) if x in r and y in r] for folder in self.folders(name)]
        return np.array(logs)[..., 0], np.array(logs)[..., 1]

    def last(self, name: str, y: str = "knn_teacher") -> np.ndarray:
        """(seeds,) of a logged number at the end."""
        return self.curves(name, "step", y)[1][:, -1]

    def kept(self, name: str, file: str, key: str = "top1") -> np.ndarray:
        """(seeds,) of a number that an evaluation kept; pixels are the same for all."""
        folders = self.folders(name) if "pixels" not in name else self.folders(name)[:1] * self.seeds
        return np.array([json.loads((folder / f"{file}.json").read_text())[key] for folder in folders])


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table; values are (seeds,)."""

    claim: str
    measured: str
    values: dict[str, np.ndarray]
    shows: str


def spread(values: np.ndarray, sign: str = "") -> str:
    """As "71.2 ± 0.8": mean and deviation over the seeds, of which one has none."""
    mean = f"{np.mean(values):{sign}.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def in_seeds(shown: np.ndarray) -> str:
    """Whether something shows in all seeds, in none, or in some."""
    return "yes" if all(shown) else f"in {sum(shown)} of {len(shown)} seeds" if any(shown) else "no"


def compare(values: dict[str, np.ndarray], *pairs: tuple[str, str]) -> str:
    """Of each pair of names, whether the first has more than the second, seed by seed, and by how much."""
    gains = {f"{more} > {less}": values[more] - values[less] for more, less in pairs}
    return "; ".join(f"{pair}: {in_seeds(gain > 0)}, {spread(gain, '+')}" for pair, gain in gains.items())


def shapes_rows(runs: Runs) -> list[Row]:
    """The claims of which shapes tell."""
    teachers = {
        "momentum": runs.last("base"),
        "momentum's student": runs.last("base", "knn_student"),
        "last epoch": runs.last("last_epoch"),
        "copy": runs.last("copy"),
        "untrained": runs.kept("random", "knn"),
    }
    works = ("momentum", "untrained"), ("last epoch", "untrained"), ("momentum's student", "last epoch")
    fails = ("momentum", "copy"), ("last epoch", "copy")
    most = math.log(main_dino.parse_args(SHAPES).out_dim)
    copied = 100 * runs.last("copy", "train_entropy") / most
    both = {who: runs.curves("constant_rate", "step", f"knn_{who}")[1] for who in ("teacher", "student")}
    ahead = both["teacher"] > both["student"]
    rows = [
        Row("A momentum teacher works best, the student of the last epoch works (Fig. 6)",
            "teacher's k-NN at the end, %; the last epoch's is its student", teachers,
            compare(teachers, *works)),
        Row("copying the student fails (Fig. 6)", "teacher's entropy at the end, % of ln K; k-NN as above",
            {"copy": copied}, f"uniform collapse: {in_seeds(copied > 95)}; {compare(teachers, *fails)}"),
        Row("Teacher is better than the student throughout (Fig. 6)",
            "k-NN, %, at a constant rate: mean over the training",
            means := {who: values.mean(axis=1) for who, values in both.items()},
            f"{compare(means, ('teacher', 'student'))}; in {ahead.sum()} of {ahead.size} evaluations"),
    ]  # fmt: skip

    for name, claim in {
        "centering": "Centering alone (here Sinkhorn-Knopp): uniform collapse (Fig. 7)",
        "sharpening": "sharpening alone: one-dimension collapse (Fig. 7)",
        "base": "both: neither (Fig. 7)",
    }.items():
        entropy, differs = (100 * runs.last(name, f"train_{y}") / most for y in ("entropy", "spread"))
        shown = {"centering": entropy > 95, "sharpening": (entropy < 5) & (differs < 5),
                 "base": (entropy < 95) & (differs > 5)}[name]  # fmt: skip
        values = {"entropy": entropy, "more over all images": differs, "KL": runs.last(name, "train_kl")}
        rows.append(Row(claim, "teacher's entropy at the end, % of ln K; KL, nats", values, in_seeds(shown)))

    crops = {f"{number} local": runs.last(name) for number, name in CROPS.items()}
    took = [f"{runs.last(name, 'seconds').min():.0f}" for name in CROPS.values()]
    pairs = [(name, "0 local") for name in list(crops)[1:]]
    measured = (
        f"teacher's k-NN, %, long: after {', '.join(took)} s; without local crops, global ones of 14 to 100 %"
    )
    rows.append(Row("Multi-crop helps at equal time (Table 8)", measured, crops, compare(crops, *pairs)))
    patches = {"patch 16": runs.last("base"), "patch 32": runs.last("patch_32")}
    speeds = [
        f"{runs.curves(n, 'step', 'train_images_per_second')[1].max():.0f}" for n in ("base", "patch_32")
    ]
    rows.append(Row("Smaller patches help (Fig. 5)", f"teacher's k-NN, %, at {' and '.join(speeds)} images/s",
                    patches, compare(patches, ("patch 16", "patch 32"))))  # fmt: skip

    names = {"DINO": "demo_base", "supervised": "demo_supervised", "untrained": "demo_random"}
    pairs = ("DINO", "supervised"), ("DINO", "untrained")
    area = f"{runs.kept('demo_base', 'segmentation', 'object')[0]:.0f} %"
    for key, measured in {
        "on_object": f"demo: best head's share of attention on the object, %, which is {area} of the image",
        "jaccard60": "demo: Jaccard index of 60 % of the best head's attention, as in the paper, %",
        "jaccard90": "of 90 %",
    }.items():
        values = {label: runs.kept(name, "segmentation", key) for label, name in names.items()}
        claim = "Attention contains segmentation (Fig. 4)" if key == "on_object" else ""
        rows.append(Row(claim, measured, values, compare(values, *pairs)))
    return [
        *rows,
        feature_row(
            runs, "", "knn", "k-NN of DINO rivals supervised features (Table 2: 5.3 less for ViT-S)",
            "shapes: k-NN, %, at a constant rate; supervised: same epochs, one view an image",
            "constant_rate",
        ),
        feature_row(runs, "demo_", "knn", "", "demo: k-NN, %"),
    ]  # fmt: skip


def feature_row(runs: Runs, prefix: str, kind: str, claim: str, measured: str, trained: str = "base") -> Row:
    """DINO's features against others."""
    names = {"pixels": "pixels", "untrained": "random", "supervised": "supervised", "DINO": trained}
    values = {label: runs.kept(prefix + name, kind) for label, name in names.items()}
    rival = f"DINO - supervised: {spread(values['DINO'] - values['supervised'], '+')}"
    better = compare(values, ("DINO", "untrained"), ("DINO", "pixels"))
    return Row(claim, measured, values, f"{rival}; {better}")


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        "| claim in the paper | measured | mean ± deviation over seeds | does it show |",
        "|---|---|---|---|",
    ]
    for row in rows:
        values = ", ".join(f"{name} {spread(each)}" for name, each in row.values.items())
        lines.append(f"| {row.claim} | {row.measured} | {values} | {row.shows} |")
    return "\n".join(lines)


def sweep_table(runs: Runs, key: str) -> str:
    """In Markdown: a line for each value."""
    lines = [
        f"| {SWEEPS[key][2]} | steps | teacher, k-NN % | student, k-NN % "
        "| entropy, % of ln K | spread, nats |",
        "|---|---|---|---|---|---|",
    ]
    for value in SWEEPS[key][1]:
        name = sweep_run(key, value)
        prototypes = value if key == "prototypes" else main_dino.parse_args(SHAPES).out_dim
        numbers = [
            runs.last(name, "knn_teacher"),
            runs.last(name, "knn_student"),
            100 * runs.last(name, "train_entropy") / math.log(prototypes),
        ]
        cells = [f"{runs.last(name, 'step')[0]:.0f}", *map(spread, numbers)]
        outputs = runs.last(name, "train_spread")
        lines.append(f"| {value} | {' | '.join(cells)} | {outputs.mean():.2f} |")
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict]:
    """What `results.json` holds: the rows, with one number for each seed."""
    return [row._asdict() | {"values": {k: v.tolist() for k, v in row.values.items()}} for row in rows]


def differences(rows: list[Row], before: list[dict]) -> str:
    """What has changed since the run that wrote `before`, in Markdown; rows that only one has say so."""
    lines = ["| claim | measured | before | now | difference of means |", "|---|---|---|---|---|"]

    def key(claim: str, measured: str) -> tuple[str, str]:
        return claim, re.sub(r"\d+", "", measured)  # without the times and speeds of the run

    old = {key(row["claim"], row["measured"]): row for row in before}
    for row in rows:
        known = old.pop(key(row.claim, row.measured), None)
        if known is None:
            lines.append(f"| {row.claim} | {row.measured} | not measured | | |")
            continue
        if known["shows"] != row.shows:
            lines.append(f"| {row.claim} | does it show | {known['shows']} | {row.shows} | |")
        for name, now in row.values.items():
            then = np.array(known["values"].get(name, [np.nan]))
            cells = f"{spread(then)} | {spread(now)} | {now.mean() - then.mean():+.1f}"
            lines.append(f"| {row.claim} | {row.measured}: {name} | {cells} |")
    lines += [f"| {row['claim']} | {row['measured']} | | not measured | |" for row in old.values()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The figures: teachers.png as Figure 6 of the paper, collapse.png as Figure 7, crops.png as Table 8
# ---------------------------------------------------------------------------------------------


def save_figures(runs: Runs) -> None:
    """Lines are means over the seeds, bands their extremes."""
    from matplotlib.figure import Figure

    def figure(file: str, *panels: tuple[str, str, list[tuple[str, str, str, str]]]) -> None:
        """Each panel is what x and y are, and lines: a label, a style, a run's name and a logged number."""
        picture = Figure((5 * len(panels), 3.6), layout="constrained")
        for axes, (x, unit, lines) in zip(
            np.atleast_1d(picture.subplots(1, len(panels))), panels, strict=True
        ):
            for label, style, name, y in lines:
                xs, ys = runs.curves(name, x, y)  # steps are alike, and of seconds the least count
                (line,) = axes.plot(xs.min(axis=0), ys.mean(axis=0), style, label=label)
                axes.fill_between(
                    line.get_xdata(), *np.quantile(ys, (0, 1), axis=0), alpha=0.1, fc=line.get_color()
                )
            axes.set(xlabel=x, ylabel=unit)
            axes.legend(fontsize="small")
        picture.savefig(runs.out / file, dpi=150)

    def lines(names: dict, y: str) -> list[tuple[str, str, str, str]]:
        return [(label, f"C{i}-", name, y) for i, (name, label) in enumerate(names.items())]

    teachers = {"base": "momentum", "last_epoch": "last epoch", "copy": "copy"}
    styles = {"teacher": "-", "student": "--"}
    both = [(f"{label}: {who}", f"C{i}{style}", name, f"knn_{who}")
            for i, (name, label) in enumerate(teachers.items()) for who, style in styles.items()]  # fmt: skip
    constant = [(who, f"C0{style}", "constant_rate", f"knn_{who}") for who, style in styles.items()]
    figure("teachers.png", ("step", "k-NN, %", both), ("step", "k-NN at a constant rate, %", constant))
    figure("collapse.png", ("step", "teacher entropy, nats", lines(COLLAPSES, "train_entropy")),
           ("step", "KL(teacher || student), nats", lines(COLLAPSES, "train_kl")))  # fmt: skip
    crops = {name: f"{number} local crops" for number, name in CROPS.items()}
    figure("crops.png", ("seconds", "teacher's k-NN, %", lines(crops, "knn_teacher")))


def main() -> None:
    """Do what is not yet done, then write the table and the figures."""
    count = number(int, at_least=1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_path", default="", help="folder with FashionMNIST/raw; without it, shapes only"
    )
    parser.add_argument(
        "--output_dir", default="miniature", help="for a folder per budget, in it one per run"
    )
    parser.add_argument(
        "--jobs", default=os.cpu_count() or 1, type=count, help="processes at a time, of one thread"
    )
    parser.add_argument("--seeds", type=count, help="how many; 3, or 1 if quick, unless given")
    parser.add_argument("--quick", action="store_true", help="one seed, a quarter of the epochs, shapes only")
    parser.add_argument("--compare", metavar="FILE", help="results.json of an earlier run, to compare with")
    parser.add_argument(
        "--sweeps",
        nargs="*",
        choices=SWEEPS,
        help="instead: batch sizes, teacher temperatures, prototypes, ways to start; all, or those named",
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data_path and (args.quick or args.tiny or args.sweeps is not None):
        parser.error("--data_path has no effect here: only the whole miniature trains on Fashion-MNIST")
    if args.data_path and not Path(args.data_path, "FashionMNIST", "raw").is_dir():
        parser.error(f"--data_path {args.data_path}: no folder FashionMNIST/raw in it")
    if not importlib.util.find_spec("matplotlib"):
        parser.error("draws figures: pip install matplotlib")
    if args.compare and not Path(args.compare).is_file():
        parser.error(f"--compare {args.compare}: no such file")
    before = json.loads(Path(args.compare).read_text()) if args.compare else None
    os.environ["OMP_NUM_THREADS"] = "1"  # for the trainings
    name, budget = ("tiny", TINY) if args.tiny else ("quick", QUICK) if args.quick else ("full", FULL)
    budget = budget._replace(seeds=args.seeds or budget.seeds)
    out = Path(args.output_dir, name).absolute()
    begun = time.monotonic()

    draw_shapes(out / "shapes", {"train": budget.images, "val": budget.held_out})
    if args.sweeps is not None:
        keys = args.sweeps or SWEEPS
        do(sweep_jobs(out, budget, keys), args.jobs)
        runs = Runs(out / "sweeps", budget.seeds)
        text = "\n\n".join(sweep_table(runs, key) for key in keys)
        (runs.out / "results.md").write_text(f"{text}\n")
        print(text)
        return
    jobs = [shapes_jobs(out, budget), demo_jobs(out, budget)]
    if args.data_path:
        jobs.append(fashion_jobs(out, str(Path(args.data_path).absolute()), budget.seeds))
    for together in zip(*jobs, strict=True):  # first all trainings, then all evaluations
        do([*itertools.chain(*together)], args.jobs)

    runs = Runs(out, budget.seeds)
    rows = shapes_rows(runs)
    if args.data_path:
        rows += [feature_row(runs, "fashion_", kind, "", f"Fashion-MNIST: {what}, %")
                 for kind, what in {"knn": "k-NN", "linear": "linear probe"}.items()]  # fmt: skip
    text = (
        f"{budget.seeds} seed(s); {budget.epochs} epochs of {budget.images} shapes, {budget.held_out} held "
        f"out; Fashion-MNIST {'in' if args.data_path else 'left out'}; torch {torch.__version__}, "
        f"{args.jobs} processes of one thread; {(time.monotonic() - begun) / 60:.1f} minutes for what was "
        f"left to do\n\n{table(rows)}\n"
    )
    if before:
        text += f"\n{differences(rows, before)}\n"
    (out / "results.md").write_text(text)
    (out / "results.json").write_text(json.dumps(as_json(rows), indent=1) + "\n")
    save_figures(runs)
    print(f"{text}\ntable and figures: {out}")


if __name__ == "__main__":
    main()
