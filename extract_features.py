"""Compute features of any images and save them to files, which may be larger than memory.

    python extract_features.py --pretrained_weights runs/vits16/checkpoint.pth --data_path photos \\
        --output_dir features
    torchrun --nproc_per_node=8 extract_features.py --pretrained_weights dino_vits16 \\
        --data_path /data/imagenet --split train --output_dir features/train

`--data_path` is a folder or an archive, labelled or not, an image, or a text file that lists images. Writes
`features.npy`, `names.txt` with the name of each row, `labels.npy` if there are classes, and
`features.json`, which says what was taken. `features.npy` appears when it is complete; the same command
continues a run that was stopped, and gives the same file. With `torchrun`, each process writes its own rows.
`eval_knn.py --load_features` reads the folder of a train/ and a val/ that were written by two calls.

Shapes: N images, B images of a batch, D features, R x C patches.
"""

import argparse
import contextlib
import errno
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

from support import cli
from support.checkpoints import load_file
from support.checks import check_on_first_rank
from support.data import (
    ImageFiles,
    Images,
    Source,
    class_names,
    class_number,
    digest,
    name_and_reason,
    on_all_ranks,
    open_any_images,
    read_image,
    short_name,
    transformed,
)
from support.distributed import (
    all_gather_object,
    barrier,
    fix_random_seeds,
    get_rank,
    get_world_size,
    is_main_process,
    main_process_first,
    same_error_on_all_ranks,
)
from support.errors import ImageError, UserError, first_line, reason_of
from support.features import (
    cls_and_patches,
    compute,
    has_cls,
    last_cls_tokens,
    load_by_flags,
    patch_tokens,
    with_mean,
)
from support.files import open_new, replacing
from support.loading import Loader
from support.lock import FolderLock
from support.logger import MetricLogger, log
from support.pixels import copy_to
from support.restart import comparable
from support.weights import Frozen, digest_weights


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    cli.add_weights_flags(parser)
    group = parser.add_argument_group("features")
    group.add_argument("--kind", default="cls", choices=KINDS,
        help="cls: the network's output, for ViTs the CLS token, (D,); patches: the last block's patch "
             "tokens, (R, C, D); last4: the CLS tokens of the last four blocks, (4 D,); avgpool: CLS token "
             "and mean of the patch tokens, interleaved, (2 D,), for networks without patches their output")
    cli.add_size_flag(group, "--image_size", None,
        "image size in pixels: one length, or height and width (default: the file's, else 224)")
    group.add_argument("--precision", default="fp32", choices=cli.PRECISIONS,
        help="precision of the network's forward pass")
    group.add_argument("--batch_size_per_gpu", default=128, type=cli.number(int, at_least=1),
        help="images per process and forward pass")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="features",
        help="folder for the files; a run that was stopped continues from there")
    group.add_argument("--format", default="npy", choices=("npy", "pt"),
        help="NumPy files, which need not fit into memory to be read; or torch files, which take twice their "
             "size on the disk while they are written")
    group.add_argument("--dtype", default="float32", choices=("float32", "float16"),
        help="type of the saved features; float16 halves the file")
    group.add_argument("--skip_unreadable", action="store_true",
        help="give an image that cannot be read a row of NaN, with a warning, instead of stopping there")
    cli.add_data_flags(parser,
        "a folder, .tar or .zip of images, or a text file that lists images, one per line",
        "the drawn shapes of main_dino.py --demo, as the evaluations take them",
        "the folder, archive or list in --data_path, or the split of --dataset or --demo, e.g. train or val")
    cli.add_launch_flags(parser)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------


def _output_and_mean(network: nn.Module, images: Tensor) -> Tensor:
    if isinstance(network, torchvision.models.VisionTransformer):
        what = "torchvision's ViT does not give its patch tokens"
        raise UserError(what, "--kind avgpool", "give timm's name of the architecture")
    if not has_cls(network):  # its output is its average pool
        return network(images)
    return with_mean(*cls_and_patches(network, images))


# --kind -> features (B, ...) of a network and normalised images (B, C, H, W).
KINDS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "cls": lambda network, images: network(images),
    "patches": patch_tokens,
    "last4": lambda network, images: torch.cat(last_cls_tokens(network, images, 4), dim=1),
    "avgpool": _output_and_mean,
}


class Rows(Dataset[tuple[Tensor, int, bool]]):
    """Transformed images, each with its class number, -1 for none, and whether it could be read.

    With `skip_unreadable`, an image that cannot be read is blank; without, raises ImageError.
    """

    def __init__(self, images: Images, frozen: Frozen, skip_unreadable: bool):
        self.images, self.skip_unreadable = images, skip_unreadable
        self.transform, self.blank = frozen.transform, frozen.zeros(1)[0]
        # Image files without classes have the label 0.
        self.labelled = bool(class_names(images)) or not isinstance(images, ImageFiles)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        try:
            image, label = read_image(self.images, index)
            pixels = transformed(image, self.transform, self.images, index)
        except ImageError as error:
            if self.skip_unreadable:
                return self.blank, -1, False
            raise ImageError(f"{error}, or add --skip_unreadable") from None
        return pixels, class_number(label) if self.labelled else -1, True


# ---------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------

PAGE = 4096  # bytes
RECORD = 1024  # rows of each process between two records of the progress


class Store(contextlib.AbstractContextManager):
    """The files of a set of features: its progress and its completion.

    Blocks of rows are computed in rounds: a round gives each process one block. `features.json` records how
    many of the first blocks are on the disk. All processes map `features.npy.partial` into memory. Its rows
    begin at a page and a block fills whole pages, because two machines that change the same page of a network
    file system would undo each other's changes. At the end, `features.npy.partial` becomes `features.npy`,
    or is written as `features.pt`.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], identity: dict[str, Any]):
        """`shape` is (N, ...). `identity` holds everything that determines the features, by name."""
        self.folder, self.shape, self.identity = folder, shape, identity
        self.dtype = np.dtype(identity["dtype"])
        self.suffix = f".{identity['format']}"
        self.final, self.record_file = folder / f"features{self.suffix}", folder / "features.json"
        self.final_labels, self.names_file = folder / f"labels{self.suffix}", folder / "names.txt"
        self.partial = folder / "features.npy.partial"
        self.partial_labels = folder / "labels.npy.partial"
        row = math.prod(shape[1:]) * self.dtype.itemsize  # bytes
        self.block = math.lcm(identity["batch_size_per_gpu"], PAGE // math.gcd(row, PAGE))  # rows
        self.blocks = math.ceil(shape[0] / self.block)
        self.done, self.complete = 0, False  # blocks; whether the final files are there
        self.unreadable: list[str] = []
        self.lock = FolderLock(folder / ".features.lock")

    def __exit__(self, *_):
        self.lock.release()

    def begin(self) -> None:
        """Create the files, or find the progress; all ranks call this together. Raises UserError.

        From here to the end of the `with` block no other run can use the folder.
        """
        with same_error_on_all_ranks(), main_process_first():
            if is_main_process():
                self.lock.acquire()
                self._begin()
        self.done, self.complete = all_gather_object((self.done, self.final.exists()))[0]
        with same_error_on_all_ranks():
            if not self.complete:
                self.array = _map(self.partial, self.shape, self.dtype)
                self.labels = _map(self.partial_labels, self.shape[:1], np.dtype(np.int64))

    def _begin(self) -> None:
        record = read_record(self.folder)
        known = record.get("identity", self.identity)
        changed = [name for name in self.identity if known.get(name) != self.identity[name]]
        if changed:
            listed = ", ".join(f"{name} {known.get(name)} -> {self.identity[name]}" for name in changed)
            fix = "give the old values or another --output_dir"
            raise UserError(f"this differs from the features in it: {listed}", str(self.folder), fix)
        for path in (self.final, self.final_labels, self.names_file) if not record else ():
            if path.exists():
                what = "would overwrite a file that this script did not write"
                raise UserError(what, str(path), "give another --output_dir")
        self.done, self.unreadable = record.get("blocks", 0), record.get("unreadable", [])
        if self.final.exists():
            self._remove_partial()
        elif self.done and self.partial.exists() and self.partial_labels.exists():
            log(f"resuming {self.partial} at row {self.rows(self.done).start:,} of {self.shape[0]:,}")
        else:
            self.done, self.unreadable = 0, []
            self.record()  # before the files, whose rows are from now on worth nothing
            _create(self.partial, self.shape, self.dtype)
            _create(self.partial_labels, self.shape[:1], np.dtype(np.int64))

    def rows(self, block: int) -> range:
        """The rows of a block; none for a block after the last."""
        first, end = (min(number * self.block, self.shape[0]) for number in (block, block + 1))
        return range(first, end)

    def record(self, **values: Any) -> None:
        """Record the progress."""
        record = {"identity": self.identity, "blocks": self.done, "unreadable": self.unreadable, **values}
        with replacing(self.record_file) as file:
            file.write(json.dumps(record, indent=1).encode())

    def finish(self, names: list[str], classes: list[str], weights: str) -> None:
        """Write the final files; the features appear last. `weights` is a description of the network's."""
        with replacing(self.names_file) as file:
            file.writelines(os.fsencode(name) + b"\n" for name in names)
        if (self.labels >= 0).any():
            self._save(self.final_labels, self.labels)
        else:  # of earlier features
            self.final_labels.unlink(missing_ok=True)
        self.record(classes=classes, weights=weights)
        if self.suffix != ".npy":
            self._save(self.final, self.array)
        self.unmap()
        if self.suffix == ".npy":
            os.replace(self.partial, self.final)
        self._remove_partial()

    def unmap(self) -> None:
        """Let go of the files: Windows neither renames nor removes one that a process has mapped."""
        del self.array, self.labels

    def _save(self, path: Path, array: np.ndarray) -> None:
        with replacing(path) as file:
            if self.suffix == ".npy":
                np.save(file, array)
            else:
                torch.save(torch.from_numpy(array), file)

    def _remove_partial(self) -> None:
        for path in (self.partial, self.partial_labels):
            path.unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder's `features.json` holds, {} if there is none. Raises UserError."""
    path = folder / "features.json"
    try:
        record = json.loads(path.read_text("utf-8"))
        if isinstance(record["identity"], dict) and isinstance(record["blocks"], int):
            return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    fix = "run extract_features.py with another --output_dir"
    raise UserError("file does not say what the features are", str(path), fix)


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Create a `.npy` file whose values begin at `PAGE`, and reserve its room on the disk.

    The room is reserved because a process that writes to a mapped file on a full disk would be killed.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    begin = np.lib.format.magic(1, 0) + (PAGE - 10).to_bytes(2, "little") + repr(header).encode()
    size = _size(shape, dtype)
    try:
        with open_new(path) as file:
            file.write(begin.ljust(PAGE - 1) + b"\n")
            _lengthen(file, size)
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        what = f"cannot reserve {size / 1e9:.3g} GB: {reason_of(error)}"
        raise UserError(what, str(path), "give another --output_dir") from None


def _lengthen(file: BinaryIO, size: int) -> None:
    """Lengthen a file to this size, and reserve room for all of it. Raises OSError."""
    if hasattr(os, "posix_fallocate"):
        file.truncate(size)
        os.posix_fallocate(file.fileno(), 0, size)
        return
    # on a Mac and on Windows
    if size > shutil.disk_usage(file.name).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    zeros = bytes(2**20)
    for left in range(size - file.tell(), 0, -len(zeros)):
        file.write(zeros[:left])


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Map a file of `_create` into memory, to be written. Raises UserError if it is another one."""
    with contextlib.suppress(OSError, ValueError):
        if path.stat().st_size == _size(shape, dtype):  # NumPy would lengthen the file
            array = np.lib.format.open_memmap(path, mode="r+")
            if (array.shape, array.dtype) == (shape, dtype):
                return array
    raise UserError("file is damaged", str(path), "remove it to begin again")


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The size of a file of `_create` in bytes."""
    return PAGE + math.prod(shape) * dtype.itemsize


class Features(NamedTuple):
    """A saved set of features."""

    features: Tensor  # (N, ...)
    labels: Tensor | None  # (N,)
    classes: list[str]  # their names, [] if unknown
    identity: dict[str, Any]  # what determined the features, by name
    weights: str  # of the network, in words; "" if unknown


def read_features(folder: str | Path) -> Features:
    """Read the complete files of a folder. Raises UserError."""
    folder = Path(folder)
    found = [path for path in (folder / "features.npy", folder / "features.pt") if path.exists()]
    if not found:
        unfinished = (folder / "features.npy.partial").exists()
        what = "features are not complete" if unfinished else "no features"
        fix = f"run extract_features.py {'again ' if unfinished else ''}with this --output_dir"
        raise UserError(what, str(folder), fix)
    record = read_record(folder)
    labels = folder / f"labels{found[0].suffix}"
    return Features(
        _read_array(found[0]),
        _read_array(labels) if labels.exists() else None,
        record.get("classes", []),
        record.get("identity", {}),
        record.get("weights", ""),
    )


def _read_array(path: Path) -> Tensor:
    if path.suffix == ".pt":
        return load_file(path)
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, TypeError, EOFError) as error:  # TypeError: words
        what = f"cannot read: {first_line(error)}"
        raise UserError(what, str(path), "run extract_features.py again with another --output_dir") from None


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def fill(store: Store, dataset: Rows, model: Callable[[Tensor], Tensor], num_workers: int, device) -> None:
    """Compute the rows that are missing, (B, C, H, W) -> (B, ...) by `model`, and record the progress.

    All ranks call this together. Raises UserError.
    """
    ranks, batch_size, first = get_world_size(), store.identity["batch_size_per_gpu"], store.done
    rounds = math.ceil((store.blocks - first) / ranks)
    blocks = [store.rows(first + ranks * number + get_rank()) for number in range(rounds)]
    loader = Loader(dataset, [list(rows) for rows in blocks if rows], num_workers, device)
    images_left = store.shape[0] - first * store.block
    logger = MetricLogger(images_per_step=images_left / max(rounds, 1))
    every = max(1, RECORD // store.block)
    with contextlib.closing(iter(loader)) as loaded:
        # In the last round, some ranks may have no block.
        work = zip(blocks, itertools.chain(loaded, itertools.repeat(None)), strict=False)
        for number, (rows, batch) in enumerate(logger.log_every(work, 10, "features", rounds), 1):
            labels, skipped = [], []
            if batch is not None:
                pixels, classes, readable = batch
                parts = [model(copy_to(part, device)).cpu() for part in pixels.split(batch_size)]
                found = torch.cat(parts).to(getattr(torch, store.dtype.name))
                check_finite(found[readable], dataset.images, rows)
                found[~readable] = torch.nan
                store.array[rows.start : rows.stop] = found.numpy()
                labels = classes.tolist()
                skipped = [row for row, could in zip(rows, readable.tolist(), strict=True) if not could]
            to_record = number % every == 0 or number == rounds
            if to_record:
                store.array.flush()
            gathered = all_gather_object((rows.start, labels, skipped))  # all ranks have flushed
            store.done = min(first + number * ranks, store.blocks)
            if is_main_process():
                note(store, dataset.images, gathered)
                if to_record:
                    store.labels.flush()
                    store.record()


def note(store: Store, images: Images, gathered: list[tuple[int, list[int], list[int]]]) -> None:
    """Note a round's labels and unreadable images, which each rank gives with its first row."""
    for start, labels, skipped in gathered:
        store.labels[start : start + len(labels)] = labels
        for row in skipped:
            log(f"warning: row {row} is NaN: {name_and_reason(images, row)}")
            store.unreadable.append(short_name(images, row))


def check_finite(features: Tensor, images: Images, rows: range) -> None:
    """Raise UserError if a value is infinite or NaN."""
    if not features.isfinite().all():
        where = f"{short_name(images, rows.start)} to {short_name(images, rows[-1])}"
        raise UserError("features are not finite", where, "give --precision fp32 --dtype float32", alone=True)


def names_of(images: Images) -> list[str]:
    """The name of each row, in one line. Raises UserError."""
    names = [short_name(images, index) for index in range(len(images))]
    for name in names:
        if name.splitlines() != [name]:
            raise UserError("file name has a line break", repr(name), "rename it")
    return names


def main(args: argparse.Namespace) -> Path:
    """Compute the features that are missing; returns the file of the complete set."""
    device = cli.join_processes(args)
    fix_random_seeds(args.seed)
    with same_error_on_all_ranks():
        folder = cli.make_folder(args.output_dir)
    frozen = load_by_flags(args)
    source = Source.of(args, frozen.form)
    source.check_outside(folder / f"features.{args.format}", f"--output_dir {folder}")
    images = on_all_ranks(open_any_images, source)
    check_on_first_rank(images, alike=False)
    names = names_of(images)
    network = frozen.network.to(device)
    model = functools.partial(compute, KINDS[args.kind], network, dtype=cli.PRECISIONS[args.precision])
    shape = len(images), *model(frozen.zeros(1).to(device)).shape[1:]
    flags = ("kind", "precision", "batch_size_per_gpu", "dtype", "format")
    identity = {name: getattr(args, name) for name in flags} | {
        "network": digest_weights(network),
        "images": digest(images),
        "shape": shape,
        "pixels": frozen.image_size,
        "mean": frozen.mean,
        "std": frozen.std,
        "value_range": frozen.value_range,
    }
    with Store(folder, shape, comparable(identity)) as store:
        store.begin()
        gigabytes = math.prod(shape) * store.dtype.itemsize / 1e9
        words = f"features: {args.kind}, {shape} {args.dtype}, {gigabytes:.3g} GB"
        if store.complete:
            log(f"{words}: {store.final} is complete already")
            return store.final
        log(words)
        fill(store, Rows(images, frozen, args.skip_unreadable), model, args.num_workers, device)
        if not is_main_process():
            store.unmap()
        barrier()
        with main_process_first():
            if is_main_process():
                store.finish(names, class_names(images), frozen.description)
        if store.unreadable:
            log(f"warning: rows that are NaN: {len(store.unreadable)}; features.json lists the images")
        log(f"written: {store.final}")
    return store.final


if __name__ == "__main__":
    cli.run_script(main, parse_args(), resumable=True)
