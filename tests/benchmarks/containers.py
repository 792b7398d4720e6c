"""What it costs to read images from a folder, a list or an archive, and what smaller files gain."""

import contextlib
import functools
import os
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from support.data import ImageFiles, Source, open_training_images
from support.formats import load_pixels
from tests.benchmarks.photographs import write_photographs
from utils import DataAugmentationDINO

CLASSES = ("a", "b", "c", "d")


def pack(root: Path, count: int) -> dict[str, Path]:
    """Write photographs, `count` for each class, into a folder and all other containers; by name."""
    photos = root / "photos"
    for name in CLASSES:
        (photos / name).mkdir(parents=True)
        write_photographs(photos / name, count)
        shutil.make_archive(str(root / "parts" / name), "tar", photos, name)
    files = sorted(photos.rglob("*.jpg"))
    (root / "list.txt").write_text("".join(f"{path}\n" for path in files))
    shutil.make_archive(str(root / "plain"), "tar", photos)
    shutil.make_archive(str(root / "nested"), "tar", root / "parts")
    shutil.make_archive(str(root / "deflated"), "zip", photos)
    with zipfile.ZipFile(root / "stored.zip", "w") as stored:
        for path in files:
            stored.write(path, path.relative_to(photos))
    names = {
        "folder": "photos",
        "list": "list.txt",
        "tar": "plain.tar",
        "tar of tars": "nested.tar",
        "zip": "deflated.zip",
        "zip without compression": "stored.zip",
    }
    return {name: root / place for name, place in names.items()}


def forget(root: Path) -> None:
    """Make the kernel drop the pages of all files below a folder; the folders' entries stay in memory."""
    for path in root.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # it drops only pages that are on the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk() -> int:
    """The bytes that this process has caused to be read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextlib.contextmanager
def packed(count: int) -> Iterator[tuple[Path, dict[str, ImageFiles]]]:
    """The same photographs from each container, opened as the training opens them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["XDG_CACHE_HOME"] = folder  # for the indexes of the archives
        with contextlib.redirect_stdout(sys.stderr):
            sets = {name: open_training_images(Source(str(at))) for name, at in pack(root, count).items()}
        yield root, sets


def epoch_of(images: ImageFiles) -> Callable[[], None]:
    """Read and decode all images once, in a random order."""
    order = random.Random(0).sample(range(len(images)), len(images))

    def read() -> None:
        for index in order:
            images.pixels(index)

    return read


def check_cold(root: Path, images: ImageFiles) -> None:
    """End the benchmark if pages cannot be dropped, as in a file system in memory."""
    size = sum(images.paths.size(index) for index in range(len(images)))
    for drop in (False, True):
        if drop:
            forget(root)
        before = read_from_disk()
        epoch_of(images)()
        found = read_from_disk() - before
    if found < size:
        sys.exit(f"error: {found} of {size} bytes came from the disk: set TMPDIR to a folder on a disk")


def write_large(folder: Path, count: int) -> tuple[list[Path], list[Path]]:
    """Mosaics of photographs with 3000 x 2000 pixels, as from a camera, and the same reduced to 768 x 512.

    A mosaic has the fine detail that an enlarged photograph would lack.
    """
    tiles = [Image.open(path).resize((500, 400)) for path in write_photographs(folder, 24)]
    large, small, rng = [], [], random.Random(0)
    for i in range(count):
        mosaic = Image.new("RGB", (3000, 2000))
        for place in range(30):
            mosaic.paste(rng.choice(tiles), (place % 6 * 500, place // 6 * 400))
        for image, paths, kind in (
            (mosaic, large, "large"),
            (mosaic.resize((768, 512), Image.Resampling.LANCZOS), small, "small"),
        ):
            paths.append(folder / f"{kind}{i}.jpg")
            image.save(paths[-1], quality=90)
    return large, small


def run(compare: Callable, print_row: Callable, augment: DataAugmentationDINO, rounds: int) -> None:
    """Print a row for each container against the folder, warm and cold; then for reduced photographs."""
    with packed(count=60) as (root, sets):
        folder = sets.pop("folder")
        check_cold(root, folder)
        for images in sets.values():
            assert all(torch.equal(images.pixels(i), folder.pixels(i)) for i in range(len(folder)))
        for state, before in (("warm", None), ("cold", lambda: forget(root))):
            for name, images in sets.items():
                words = f"reading and decoding, {state}: {name} : folder"
                sides = epoch_of(images), epoch_of(folder)
                compare(words, *sides, rounds, len(folder), "img/s", before)
    with tempfile.TemporaryDirectory() as place:
        large, small = write_large(Path(place), 8)
        sizes = [sum(path.stat().st_size for path in paths) / len(paths) / 1e6 for paths in (small, large)]
        cells = f"{sizes[0]:.2f} MB", f"{sizes[1]:.2f} MB", f"**{sizes[1] / sizes[0]:.1f}x**"
        print_row("size of a photograph, 768 x 512 : 3000 x 2000", *cells)

        def decode(paths: list[Path]) -> None:
            for path in paths:
                load_pixels(str(path))

        def views(paths: list[Path]) -> None:
            for path in paths:
                augment.views(load_pixels(str(path)))

        for words, work in (("reading and decoding them, warm", decode), ("their views, one worker", views)):
            sides = functools.partial(work, small), functools.partial(work, large)
            compare(words, *sides, rounds, len(small), "img/s")
