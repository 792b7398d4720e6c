"""The images: opened by path or name, and served as views to train on or whole to evaluate.

Shapes: B images, V views, H x W pixels.
"""

import argparse
import inspect
import itertools
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from support.distributed import get_rank, get_world_size, main_process_first
from support.errors import ImageError, UserError, nearest
from support.monitor import ignore_signals
from support.pixels import to_pixels
from support.shapes import Shapes


def load_image(path: str) -> Image.Image:
    """The first frame of an image file, in RGB; as stored, whatever EXIF says of its rotation.

    16-bit grey values keep their upper 8 bits, where PIL would turn nearly all of them white.
    Raises nearly anything for a file that cannot be read.
    """
    if not os.path.isfile(path):  # a pipe would never end
        raise OSError("not a file")
    with open(path, "rb") as file, Image.open(file) as image:
        if image.mode.startswith("I"):
            values = np.asarray(image)
            if values.max() > 65_535:
                raise ValueError("32-bit values have no agreed range")
            image = Image.fromarray((values >> 8).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point values have no agreed range")
        if "transparency" in image.info:  # in a palette, PIL warns of it
            image = image.convert("RGBA")
        return image.convert("RGB")


def load_pixels(path: str) -> Tensor:
    """An image file as uint8 (3, H, W), with `load_image`'s pixels.

    torchvision decodes JPEGs 1.5 times as fast as Pillow. It is left out where it no longer does so
    (deprecated since 0.29), and where the file is not a whole JPEG in colour: Pillow sees to those.
    """
    decode = getattr(torchvision.io, "decode_jpeg", None)
    if decode and path.lower().endswith((".jpg", ".jpeg")) and os.path.isfile(path):
        with Image.open(path) as image:  # the header only; refuses decompression bombs
            in_colour = image.format == "JPEG" and image.mode == "RGB"
        file = np.fromfile(path, np.uint8) if in_colour else np.empty(0, np.uint8)
        if file[-2:].tobytes() == b"\xff\xd9":
            return decode(torch.from_numpy(file))
    return to_pixels(load_image(path))


def find_images(root: str | Path) -> Iterator[str]:
    """Paths of all image files below a folder, sorted, links followed. Raises UserError."""

    def unlistable(error: OSError):
        raise UserError(error.strerror, error.filename, "mend it, or give another folder")

    def leads_up(folder: str, name: str) -> bool:
        target = os.path.realpath(os.path.join(folder, name))
        return (os.path.realpath(folder) + os.sep).startswith(target + os.sep)

    is_image = torchvision.datasets.folder.is_image_file
    found = []
    for folder, folders, names in os.walk(root, onerror=unlistable, followlinks=True):
        found.append((folder, sorted(filter(is_image, names))))
        # A link to a folder above would lead round and round.
        folders[:] = [n for n in folders if not (os.path.islink(f"{folder}/{n}") and leads_up(folder, n))]
    return (os.path.join(folder, name) for folder, names in sorted(found) for name in names)


class ImageFiles(Dataset):
    """The given image files, and all those below the given folders, sorted; without labels."""

    def __init__(self, *roots: str | Path):
        self.paths = []
        for root in roots:
            self.paths += [str(root)] if os.path.isfile(root) else find_images(root)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.paths[index]), 0

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 (3, H, W)."""
        return load_pixels(self.paths[index])


class Source(NamedTuple):
    """Where images come from: a folder, a torchvision dataset by class name in a folder, or the demo."""

    data_path: str = ""
    dataset: str = ""
    download: bool = False
    demo: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Source":
        """What the data flags say."""
        return cls(**{name: value for name, value in vars(args).items() if name in cls._fields})


def open_training_images(source: Source) -> Dataset:
    """Images to train on; items are (PIL image, label), and training ignores the label.

    Raises UserError.
    """
    if source.demo:
        return Shapes("train", 3_584)  # five minutes of 2 cores
    if source.dataset:
        return _torchvision_dataset(source, "train")
    root = _existing_folder(source.data_path)
    if os.path.isdir(root / "train") and os.path.isdir(root / "val"):
        raise UserError(
            "folder has train/ and val/", f"--data_path {root}", f"give --data_path {root / 'train'}"
        )
    images = ImageFiles(root)
    if not len(images):
        raise UserError("no images found", f"--data_path {root}", "give a folder of image files")
    return images


def open_labelled_images(source: Source, split: str) -> Dataset:
    """The "train" or "val" images to evaluate on, with `.classes`. Raises UserError."""
    if source.demo:  # few enough to be evaluated in seconds
        return Shapes(split, {"train": 4_096, "val": 1_000}[split])
    if source.dataset:
        return _torchvision_dataset(source, split)
    root = _existing_folder(source.data_path) / split
    if not os.path.isdir(root):
        raise UserError(f"no folder {split}/", f"--data_path {source.data_path}", "make train/ and val/")
    try:
        return torchvision.datasets.ImageFolder(str(root), loader=load_image)
    except OSError as error:  # no class folders, or one that is empty or cannot be listed
        raise UserError(str(error).splitlines()[0], str(root), "give each class images") from None


def open_train_and_val(source: Source) -> tuple[Dataset, Dataset]:
    """Both parts of a labelled dataset. Raises UserError, also where their classes differ."""
    train, val = (open_labelled_images(source, split) for split in ("train", "val"))
    if getattr(train, "classes", None) != getattr(val, "classes", None):
        differ = sorted(set(train.classes) ^ set(val.classes))
        names = ", ".join(map(str, differ[:5]))
        raise UserError(f"train and val differ in classes: {names}", "--data_path", "make them agree")
    return train, val


def _existing_folder(data_path: str) -> Path:
    if not data_path:
        raise UserError(
            "no data given", "--data_path", "give a folder of images, or try --demo, which needs none"
        )
    root = Path(data_path).expanduser()
    if not os.path.isdir(root):
        raise UserError("no such folder", f"--data_path {root}", "check the path")
    return root


def _torchvision_dataset(source: Source, split: str) -> Dataset:
    """A torchvision dataset by class name; its own name for the held-out part is found out."""
    name, root, known = source.dataset, source.data_path, torchvision.datasets.__all__
    if name not in known:
        raise UserError("unknown dataset", f"--dataset {name}", nearest(name, known))
    if not root:
        raise UserError("no folder given", "--data_path", f"name the folder that holds {name}")
    make = getattr(torchvision.datasets, name)
    with main_process_first():  # only one unpacks or downloads
        for archive in Path(root, name, "raw").glob("*-ubyte.gz"):  # MNIST's layout, not yet unpacked
            if not archive.with_suffix("").exists():
                torchvision.datasets.utils.extract_archive(str(archive))
        return _open_split(make, name, root, split, source.download)


def _open_split(make: Callable, name: str, root: str, split: str, download: bool) -> Dataset:
    # MNIST and its like hide their arguments behind **kwargs of a parent.
    takes = {p for cls in make.__mro__ for p in inspect.signature(cls.__init__).parameters}
    kwargs = {"download": True} if download and "download" in takes else {}
    if "train" in takes:
        choices = [{"train": split == "train"}]
    elif "split" in takes:
        names = {"train": ["train", "trainval"], "val": ["val", "valid", "test"]}[split]
        choices = [{"split": n} for n in names]
    else:
        raise UserError("dataset has no train/val split", f"--dataset {name}", "use a folder instead")
    for choice in choices:
        try:
            return make(root, **choice, **kwargs)
        except ValueError as error:  # this dataset calls its split by another name
            reason = error
        except TypeError as error:  # it wants to know more than where it is
            raise UserError(str(error), f"--dataset {name}", "use a folder instead") from None
        except (RuntimeError, OSError) as error:
            fix = "check the folder, or add --download" if not download else "check the network"
            raise UserError(str(error).splitlines()[0], f"--dataset {name}", fix) from None
    raise UserError(f"no {split} split: {reason}", f"--dataset {name}", "use a folder instead")


def sample_name(dataset: Dataset, index: int) -> str:
    """What to call a sample in a message: its file, if it has one."""
    if isinstance(dataset, ImageFiles):
        return dataset.paths[index]
    if isinstance(dataset, torchvision.datasets.ImageFolder):
        return dataset.samples[index][0]
    return f"image {index}"


class TrainingViews(Dataset):
    """Views of images. Item (epoch, i) depends on the seed, the epoch and i alone.

    It is V uint8 views (3, H, W), what is left to do to their colours, (V, 11) for `recolour` or
    (V, 0) for nothing, and an index: an image that cannot be read is replaced by the next one that
    can, and its index comes along (-1 when all went well), so that training can name and count it.
    """

    def __init__(self, images: Dataset, augmentation, seed: int, recolour_later: bool = False):
        self.images, self.augmentation, self.seed = images, augmentation, seed
        self.recolour_later = recolour_later

    def __len__(self) -> int:
        return len(self.images)

    def _pixels(self, index: int) -> Tensor:
        if isinstance(self.images, ImageFiles):
            return self.images.pixels(index)
        return to_pixels(self.images[index][0].convert("RGB"))

    def __getitem__(self, item: tuple[int, int]) -> tuple[list[Tensor], Tensor, int]:
        epoch, index = item
        rng = random.Random(f"{self.seed} {epoch} {index}")
        unreadable = -1
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            try:
                pixels = self._pixels(candidate)
                break
            except Exception:  # a broken file can raise nearly anything
                unreadable = index
        else:
            raise UserError("no image can be read", sample_name(self.images, index))
        if self.recolour_later:
            return *self.augmentation.crops(pixels, rng), unreadable
        views = self.augmentation.uint8_views(pixels, rng)
        return views, torch.empty(len(views), 0), unreadable


def read_labelled(images: Dataset, index: int) -> tuple[Image.Image, int]:
    """An RGB image and its class number. Raises ImageError for one that cannot be read, else UserError."""
    try:
        image, label = images[index]
        image = image.convert("RGB")
    except Exception as error:  # a broken file can raise nearly anything
        name = sample_name(images, index)
        raise ImageError(f"cannot read image: {error}", name, "repair or remove it") from None
    try:
        return image, int(label)
    except TypeError:
        raise UserError("labels are not class numbers", "--dataset", "use another") from None


class EvalImages(Dataset):
    """Transformed images with label and index."""

    def __init__(self, images: Dataset, transform: Callable[[Image.Image], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = read_labelled(self.images, index)
        return self.transform(image), label, index


class EpochBatches:
    """This rank's batches of (epoch, index) for the global steps of a run, epoch after epoch.

    A batch sampler. Each epoch has an order of its own, which the seed decides, and the ranks share it:
    the order of `DistributedSampler` with `set_epoch(epoch)`. With `drop_last`, an epoch's incomplete last
    batch is left out. `first_step` may lie anywhere in an epoch; without `last_step` there is no end.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        last_step: int | None = None,
        drop_last: bool = True,
    ):
        """`batch_size` is that of one rank."""
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.first_step, self.last_step = first_step, last_step
        self.per_rank = -(-num_images // get_world_size())  # rounded up: some images come twice
        self.steps_per_epoch = self.per_rank // batch_size if drop_last else -(-self.per_rank // batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The indices of this rank's images in an epoch, (per_rank,)."""
        whole = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed + epoch))
        places = np.arange(self.per_rank) * get_world_size() + get_rank()
        return whole.numpy()[places % self.num_images]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while self.last_step is None or step < self.last_step:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = self.order(epoch)
            for place in range(first, self.steps_per_epoch):
                if step == self.last_step:
                    return
                batch = order[place * self.batch_size :][: self.batch_size]
                yield [(epoch, index) for index in batch.tolist()]
                step += 1


class Loader(DataLoader):
    """A DataLoader whose workers end with each pass over it, however the pass ends."""

    def __iter__(self) -> Iterator:
        others = set(multiprocessing.active_children())
        batches = super().__iter__()  # starts the workers now, not when the first batch is asked for
        return self._batches(batches, set(multiprocessing.active_children()) - others)

    def _batches(self, batches: Iterator, workers: set) -> Iterator:
        try:
            yield from batches
        finally:
            del batches  # with it, torch ends workers that are well
            kill_workers(workers)


def make_loader(dataset: Dataset, batches: Iterable[list], num_workers: int, device: torch.device) -> Loader:
    """The DataLoader of training and of evaluation; `batches` gives the items of each batch."""
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,  # a scheduler signals the whole job, but only the training stops
        generator=torch.Generator(),  # its own: loading does not change the global random stream
    )


def kill_workers(workers: Iterable[multiprocessing.Process]) -> None:
    """End data-loading workers that still run. They ignore SIGTERM, by which Python would end them."""
    alive = [worker for worker in workers if worker.is_alive()]
    if not alive:
        return
    # torch's handler of SIGCHLD would take their end for an accident.
    watched = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if watched else None
    for worker in alive:
        worker.kill()
        worker.join()
    if watched:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def to_device(batches: Iterable[tuple], device: torch.device) -> Iterator[tuple]:
    """Batches of `TrainingViews` with the views on the device, copied one batch ahead.

    On CUDA the copy has a stream of its own, so that it goes on during the step before.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(batch: tuple) -> tuple:
        views, *rest = batch
        with torch.cuda.stream(stream):  # None: no stream, no effect
            return (
                [view.to(device, non_blocking=True) for view in views],
                rest,
                stream and stream.record_event(),
            )

    def hand_over(views: list[Tensor], rest: list, copied) -> tuple:
        if copied:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for view in views:
                view.record_stream(current)  # its memory is not free before the step is through
        return views, *rest

    ahead = None
    for batch in batches:
        ready, ahead = ahead, copy(batch)
        if ready:
            yield hand_over(*ready)
    if ahead:
        yield hand_over(*ahead)


def describe(images: Dataset) -> str:
    return f"{len(images)} images"


def digest(images: Dataset) -> str:
    return "0"
