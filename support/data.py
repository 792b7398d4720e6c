"""Opens sets of images by path or by name, reads images, and describes them.

Shapes: H x W pixels.
"""

import argparse
import contextlib
import gzip
import hashlib
import inspect
import operator
import os
import re
import shutil
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms.functional import to_pil_image

from support.archives import Archive, Members, is_archive, open_archives, shards_in
from support.distributed import agree, main_process_first, same_error_on_all_ranks
from support.errors import (
    ImageError,
    UserError,
    WrongFormat,
    counted,
    few,
    first_line,
    lacks_resources,
    nearest,
    reason_of,
)
from support.files import (
    ARRAYS,
    Folder,
    JoinedPaths,
    Paths,
    all_extensions,
    appearing,
    extension,
    lies_below,
    select_images,
    without_links,
)
from support.formats import RGB, ImageFormat, extensions_of, load_image, load_pixels
from support.logger import log
from support.pixels import AnyImage, as_tensor, in_channels, to_pixels, to_rgb
from support.shapes import Shapes

LABELS = ("labels", "targets", "_labels")  # the attributes in which datasets keep all labels


# ---------------------------------------------------------------------------------------------
# Sets of images
# ---------------------------------------------------------------------------------------------


class Images(Protocol):
    """Any dataset of images: its length, and items (image, label).

    An image is a PIL image or, for other numbers of channels than three, uint8 (C, H, W).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[AnyImage, Any]: ...


class ImageFiles(Dataset):
    """The given image files, and all those below the given folders, sorted; without classes.

    All are of the format `form`, which may be set later; its default leaves out `.npy` files in folders.
    """

    taken: Counter[str]
    left_out: Counter[str]
    folders: list[str]  # that hold images, relative to the root
    classes: list[str]  # subclasses may have some
    labels: np.ndarray  # (N,) numbers of classes; has no effect without classes

    def __init__(self, *roots: str | Path | Folder, form: ImageFormat = RGB):
        self.form = form
        self.taken, self.left_out, self.hidden, self.folders = Counter(), Counter(), 0, []
        self.classes, self.labels = [], np.zeros(0, int)
        if len(roots) == 1 and (isinstance(roots[0], Folder) or not os.path.isfile(roots[0])):
            folder = roots[0] if isinstance(roots[0], Folder) else Folder(roots[0])
            self.paths = folder.paths(self._found(folder))
        else:
            self.paths = Paths(path for root in roots for path in self._named(str(root)))

    def _named(self, root: str) -> list[str]:
        if os.path.isfile(root):
            return [root]
        return [os.path.join(root, name) for name in self._found(Folder(root))]

    def _found(self, folder: Folder, entered: set[tuple[int, int]] | None = None) -> list[str]:
        """Find and count the image files below a folder; paths relative to it. Raises UserError."""
        found = folder.find_images(extensions_of(self.form), entered)
        self.taken, self.left_out = self.taken + found.taken, self.left_out + found.left_out
        self.hidden += found.hidden
        self.folders += found.folders
        return found.names

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[AnyImage, int]:
        return self.image(index), int(self.labels[index]) if self.classes else 0

    def image(self, index: int) -> AnyImage:
        """The image as RGB; for another number of channels, as uint8 (C, H, W)."""
        path, content = self.paths.file(index)
        if self.form.is_default and extension(path) not in ARRAYS:
            return load_image(path, content)
        pixels = load_pixels(path, content, self.form)
        return to_pil_image(pixels) if self.form.channels == 3 else pixels

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 (C, H, W)."""
        return load_pixels(*self.paths.file(index), self.form)

    def renumber(self, classes: list[str]) -> None:
        """Number the classes as `classes` does, which has to contain all of them."""
        self.labels = np.array([classes.index(name) for name in self.classes])[self.labels]
        self.classes = classes


def _class_files(images: ImageFiles, folder: Folder, classes: Iterable[str]) -> str:
    """The extension of files beside the images that hold their classes, as in WebDataset's shards; "" if
    there are none. With such files, `classes`, the names of folders or archives, are not those of the images.
    """
    if images.left_out[".cls"]:
        return ".cls"
    shards = {Path(file.path).stem for file in folder.files} if isinstance(folder, Archive) else set()
    if not all(name in shards and name[-1].isdigit() for name in classes):
        return ""
    count = images.taken.total()
    return next((name for name in (".json", ".txt") if 0 < count == images.left_out[name]), "")


class LabelledFiles(ImageFiles):
    """Image files below class folders; the classes are the names of the folders, sorted.

    Raises UserError, also for a class without images.
    """

    def __init__(self, folder: Folder, form: ImageFormat = RGB):
        super().__init__(form=form)
        self.classes = folder.class_folders()
        if not self.classes:
            raise UserError("no class folders", str(folder), "put the images of each class into a folder")
        entered = folder.entered()  # a link to it would give all images another class
        found = [self._found(folder.below(name), entered) for name in self.classes]
        beside = select_images([("", folder.file_names(), 0)], extensions_of(form))
        self.left_out += beside.left_out + Counter({"images beside class folders": len(beside.names)})
        if kind := _class_files(self, folder, self.classes):
            what = f"classes in {kind} files beside the images, as in WebDataset's shards, are not read"
            raise UserError(what, str(folder), "unpack the images into class folders")
        if empty := [name for name, names in zip(self.classes, found, strict=True) if not names]:
            raise UserError(f"no images in class folders {few(empty)}", str(folder), "give each class images")
        names = (f"{name}/{path}" for name, paths in zip(self.classes, found, strict=True) for path in paths)
        self.paths = folder.paths(names)
        self.labels = np.repeat(np.arange(len(found)), [len(names) for names in found])


class FolderFiles(ImageFiles):
    """All image files below a folder. If all of them lie in folders of it, these folders are the classes.

    `classes` is empty, and labels are 0, if there are images beside the folders, or files of classes
    beside the images.
    """

    def __init__(self, folder: Folder, form: ImageFormat = RGB):
        super().__init__(folder, form=form)
        folders = [name.partition("/") for name in self.paths.names()]
        self.labels = np.zeros(len(self), int)
        beside = [name for name, separator, _ in folders if not separator]
        if 0 < len(beside) < len(folders):
            log(f"note: {folder}: no classes, because images lie beside folders, e.g. {beside[0]}")
        if folders and not beside:
            names, labels = np.unique([first for first, _, _ in folders], return_inverse=True)
            if kind := _class_files(self, folder, names):
                log(f"note: {folder}: no classes, because {kind} files lie beside the images, as in shards")
            else:
                self.classes, self.labels = names.tolist(), labels


class ListedFiles(ImageFiles):
    """The image files that a text file lists, one per line, in that order.

    A line is a path, or a path and a class, separated by a tab or comma; the classes are sorted by name, and
    without them `classes` is empty and labels are 0. Relative paths start at the list's folder. Empty lines
    are skipped. Raises UserError for a line that names no file, and for one without a class if other lines
    have one or if `labelled`.
    """

    def __init__(self, path: str | Path, labelled: bool = False, form: ImageFormat = RGB):
        super().__init__(form=form)
        root, names, classes, lacking = without_links(os.path.dirname(path)), [], [], []
        for number, line in text_lines(path):
            name, label = _path_and_class(line, root)
            if not os.path.isfile(os.path.join(root, name)):
                fix = "give one image file per line, relative to the list's folder"
                raise UserError(f"no such file: {name:.200}", f"{path}, line {number}", fix)
            if not label:
                lacking.append(number)
            names.append(name)
            classes.append(label)
            self.taken[extension(name) or "no extension"] += 1
        if lacking and (labelled or any(classes)):
            fix = "write path and class in each line, separated by a tab or comma"
            raise UserError("no class", f"{path}, line {lacking[0]}", fix)
        distinct = len(set(names))
        if distinct < len(names):
            log(f"note: {path}: {len(names) - distinct} of {len(names)} lines repeat an image")
            if several := len(set(zip(names, classes, strict=True))) - distinct:
                log(f"warning: {path}: lines that give an image a second class: {several}")
        self.paths = Paths(names, root)
        found, self.labels = np.unique([name for name in classes if name], return_inverse=True)
        self.classes = found.tolist()

    @property
    def kind(self) -> str:
        """The type in `digest`: as for the same files in a folder."""
        return "LabelledFiles" if self.classes else "ImageFiles"


def text_lines(path: str | Path, fix: str = "make it readable") -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers. Raises UserError."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(reason_of(error), str(path), fix) from None
    for number, line in enumerate(lines, 1):
        if b"\0" in line:
            raise UserError("is not a text file", str(path), "give a folder, or a text file of paths")
        try:
            text = os.fsdecode(line.strip())
        except UnicodeError:  # on Windows; elsewhere names are any bytes
            where, fix = f"{path}, line {number}", "save it as UTF-8"
            raise UserError("is not UTF-8 text", where, fix) from None
        if text:
            yield number, text


def read_names(path: Path, fix: str) -> list[str]:
    """The names in a text file, one per line, each once. Raises UserError, with `fix` if there is no file."""
    names = [line for _, line in text_lines(path, fix)]
    if not names:
        raise UserError("no name in the list", str(path), "write one name per line, without extension")
    if repeated := len(names) - len(set(names)):
        log(f"note: {path}: {counted(repeated, 'repeated line')} left out")
    return list(dict.fromkeys(names))


def _path_and_class(line: str, root: str) -> tuple[str, str]:
    """Split a line of a list; the class is "" if there is none. A file's name may contain commas."""
    if "\t" in line:
        name, _, label = line.rpartition("\t")
    elif "," in line and not os.path.isfile(os.path.join(root, line)):
        name, _, label = line.rpartition(",")
    else:
        name, label = line, ""
    return name.strip(), label.strip()


class JoinedFiles(ImageFiles):
    """Several sets of image files, one after the other, with the classes of all, sorted.

    `classes` is empty, and labels are 0, if one of the sets has no classes.
    """

    def __init__(self, sets: list[ImageFiles]):
        super().__init__(form=sets[0].form)
        self.paths = JoinedPaths([images.paths for images in sets])
        if all(images.classes for images in sets):
            self.classes = sorted({name for images in sets for name in images.classes})
            for images in sets:
                images.renumber(self.classes)
            self.labels = np.concatenate([images.labels for images in sets])


class Grey(Dataset[tuple[Tensor, Any]]):
    """A dataset's images in grey: items are uint8 (1, H, W) and the label."""

    def __init__(self, images: Images):
        self.images = images
        for name in ("classes", "split", "train", *LABELS):
            if hasattr(images, name):
                setattr(self, name, getattr(images, name))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.images[index]
        return as_tensor(in_channels(image, 1)), label


def in_format(images: Images, form: ImageFormat, flag: str) -> Images:
    """A dataset of 8-bit RGB images in a format; `flag` names it in messages. Raises UserError."""
    if form.value_range is not None:
        raise UserError("the images have 8 bits", f"{flag} with --value_range", "leave --value_range out")
    if form.channels not in (1, 3):
        what = f"the images have three channels, not {form.channels}"
        raise UserError(what, flag, "give image files, or a network of 3 channels or 1")
    return images if form.channels == 3 else Grey(images)


# ---------------------------------------------------------------------------------------------
# Opening what the flags name
# ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where images come from: a folder, a torchvision dataset by class name in a folder, or the demo."""

    data_path: str = ""
    dataset: str = ""
    download: bool = False
    demo: bool = False
    split: str = ""  # to train on; empty: as `open_training_images` chooses
    more: tuple[str, ...] = ()  # further data paths
    form: ImageFormat = RGB
    flag: str = "--data_path"  # what a message calls the path

    @classmethod
    def of(cls, args: argparse.Namespace, form: ImageFormat = RGB) -> "Source":
        """Read the data flags, for images of a format. Raises UserError."""
        if args.demo and (args.data_path or args.dataset):
            given = "--data_path" if args.data_path else f"--dataset {args.dataset}"
            raise UserError("--demo draws its own images", given, "leave out one of the two")
        if args.download and not args.dataset:
            log("warning: --download has no effect: only --dataset downloads")
        values = {name: value for name, value in vars(args).items() if name in cls._fields}
        if isinstance(args.data_path, list):
            values["data_path"], *more = args.data_path
            values["more"] = tuple(more)
            if args.dataset:
                raise UserError("--dataset takes one folder", f"--data_path {more[0]}", "leave it out")
        return cls(**values)._replace(form=form)

    def each(self) -> list["Source"]:
        """One source for each data path."""
        return [self._replace(data_path=path, more=()) for path in (self.data_path, *self.more)]

    def check_outside(self, path: Path, where: str, fix: str = "give a folder outside --data_path") -> None:
        """Raise UserError if a file at this path would become one of these images."""
        if self.dataset or self.demo or extension(path) not in extensions_of(self.form):
            return
        if lies_below(path, [Path(part.data_path, part.split) for part in self.each() if part.data_path]):
            raise UserError(f"{path.name} would become one of the images", where, fix)


def open_training_images(source: Source) -> Images:
    """Open the images to train on; their labels are ignored.

    From a torchvision dataset, takes `source.split` if given, else a split of unlabelled images if there is
    one, else the training split. Logs what was taken. Raises UserError.
    """
    if source.demo:
        if source.split:
            raise UserError("has no effect with --demo", f"--split {source.split}", "leave it out")
        return in_format(Shapes("train", 2_048), source.form, "--demo")  # minutes on 2 cores
    if source.dataset:
        return _torchvision_dataset(source, "unlabelled", "training images")
    sets = [_open_part(part, ImageFiles, "training images") for part in source.each()]
    return _join(sets, "training images")


def _open_part(source: Source, files: Callable[..., ImageFiles], called: str) -> ImageFiles:
    """Open the images of one data path; log them as `called`. Raises UserError."""
    place = _one_part(source)
    images = _listed(place, source.form) if isinstance(place, Path) else files(place, form=source.form)
    _check_not_empty(images, place, source.flag)
    _check_one_part(images, place)
    log(f"{called}: {place}: {_selection(images)}")
    return images


def _join(sets: list[ImageFiles], called: str) -> ImageFiles:
    """The images of all data paths."""
    if len(sets) == 1:
        return sets[0]
    images = JoinedFiles(sets)
    log(f"{called}: {len(sets)} sets: {describe(images)}")
    if not images.classes and any(map(class_names, sets)):
        log("note: some sets have no classes: labels ignored")
    return images


def _one_part(source: Source) -> Folder | Path:
    """Where the images of `source`, or of its split, are. Raises UserError."""
    root = _existing_path(source)
    if source.split and os.path.isfile(root) and not is_archive(root):
        raise UserError("has no effect on a file", f"--split {source.split}", "leave it out")
    return _split_of(root, source.split, source.flag) if source.split else _open_place(root)


def _existing_path(source: Source) -> Path:
    if not source.data_path:
        fix = "give a folder of images, or try --demo, which needs none"
        raise UserError("no data given", source.flag, fix)
    root = Path(source.data_path).expanduser()
    if not os.path.isdir(root) and not os.path.isfile(root):
        raise UserError("no such file or folder", f"{source.flag} {root}", "check the path")
    return root


# A word in the names of folders that hold the parts of a dataset; COCO's have a year.
PART = re.compile(
    r"(?<![^\W_])(train(ing)?|val(id(ation)?)?|dev|eval|test(ing)?)(\d{4})?(?![^\W_])", re.IGNORECASE
)


def _check_one_part(images: ImageFiles, place: Folder | Path) -> None:
    """Raise UserError if images of train/ and of another part of a dataset, e.g. val/, are mixed.

    Looks at any depth for training. For features it looks at the top only, whose folders would be the
    classes. For training, also warns if all images lie in one part other than train/.
    """
    top = isinstance(images, FolderFiles)
    archives = [[Path(file.path).stem] for file in place.files] if isinstance(place, Archive) else []
    parts: dict[tuple[str, str], set[str]] = {}  # by the folder around them and the rest of their name
    for levels in [*(folder.split("/") for folder in images.folders), *archives]:
        for depth, name in enumerate(levels[:1] if top else levels):
            if PART.search(name):
                key = "/".join(levels[:depth]), PART.sub("", name).lower()
                parts.setdefault(key, set()).add(name)
    mixed: dict[str, str] = {}  # by the path of the training part: what is there
    for (around, _), names in sorted(parts.items()):
        train = sorted(name for name in names if "train" in name.lower())
        if train and len({name.lower() for name in names}) > 1:
            there = "/ and ".join([*train, *sorted(names - set(train))])
            mixed[os.path.join(around, train[0])] = f"{around or 'folder'} has {there}/"
    lone = parts.get(("", ""), set())
    if len(lone) == 1 and not top and all(folder.split("/")[0] in lone for folder in images.folders):
        (name,) = lone
        if "train" not in name.lower():
            log(f"warning: {place}: all images lie in {name}/: check that they are for training")
    if mixed:
        first, what = next(iter(mixed.items()))
        what += f"; {len(mixed) - 1} more like it" * (len(mixed) > 1)
        paths = "give --data_path " + " ".join(f"{place}/{path}" for path in mixed)
        raise UserError(what, f"--data_path {place}", f"add --split {first}" if archives else paths)


def _open_place(root: Path) -> Folder | Path:
    """A folder; archives are read as one. Otherwise the path of an image or of a list of images."""
    if is_archive(root):
        return open_archives(root, [str(root)])
    if os.path.isfile(root):
        return root
    shards = shards_in(root)
    return open_archives(root, shards) if shards else Folder(root)


def _listed(path: Path, form: ImageFormat) -> ImageFiles:
    """The images in a list; for an image file, that image."""
    is_image = extension(path) in all_extensions()
    return ImageFiles(path, form=form) if is_image else ListedFiles(path, form=form)


def _check_not_empty(images: ImageFiles, place: Folder | Path, flag: str) -> None:
    if not len(images):
        only = f", only {_by_extension(images.left_out)}" if images.left_out else ""
        arrays = any(images.left_out[name] for name in ARRAYS)
        fix = "for .npy files train with --value_range" if arrays else "give image files"
        raise UserError(f"no images found{only}", f"{flag} {place}", fix)


def open_any_images(source: Source) -> Images:
    """Open any images, labelled or not, e.g. to compute features of.

    `data_path` is a folder, an archive, an image or a list of images; see `FolderFiles` and `ListedFiles`.
    Of a dataset or the demo, takes `source.split`, where "train" (also the default) and "val" are the parts
    that evaluations take. Logs what was taken. Raises UserError.
    """
    split = source.split or "train"
    if source.demo or source.dataset:
        if split in ("train", "val"):
            return open_labelled_images(source, split)
        if source.demo:
            raise UserError("the demo has train and val", f"--split {split}", "name one of them")
        return _torchvision_dataset(source, "unlabelled", "images")
    return _join([_open_part(part, FolderFiles, "images") for part in source.each()], "images")


def open_labelled_images(source: Source, split: str) -> Images:
    """Open the "train" or "val" images of an evaluation, with `.classes`. Logs them. Raises UserError."""
    if source.demo:  # few, so that an evaluation takes seconds
        return in_format(Shapes(split, {"train": 2_048, "val": 1_000}[split]), source.form, "--demo")
    if source.dataset:
        return _torchvision_dataset(source, split, f"{split} images")
    sets: list[ImageFiles] = []
    for part in source.each():
        place, form = _split_of(_existing_path(part), split, source.flag), source.form
        images = ListedFiles(place, True, form) if isinstance(place, Path) else LabelledFiles(place, form)
        _check_not_empty(images, place, source.flag)
        log(f"{split} images: {place}: {_selection(images)}")
        sets.append(images)
    return _join(sets, f"{split} images")


def open_train_and_val(source: Source) -> tuple[Images, Images]:
    """Open both parts of a labelled dataset, with the same class numbers. Raises UserError.

    The validation part may lack classes; the training part has to have all classes.
    """
    train, val = (open_labelled_images(source, split) for split in ("train", "val"))
    known, seen = class_names(train), class_names(val)
    if len(known) == 1:
        log(f"warning: only one class, {known[0]}: every prediction is right; check the class folders")
    where = f"{source.flag} {source.data_path}"
    match_classes(known, seen, where)
    if known == seen:
        return train, val
    if not isinstance(val, ImageFiles):
        raise UserError("train and val number their classes differently", where, "use a folder instead")
    val.renumber(known)
    return train, val


def match_classes(known: list[str], seen: list[str], where: str) -> list[int]:
    """The numbers that the classes of val have among those of train; logs those that val lacks.

    Raises UserError if val has others, and for two that look the same, as "é" and "e" with an accent do.
    Names of files are often of the second kind if they come from a Mac.
    """
    forms: dict[str, str] = {}
    for name in known + seen:
        other = forms.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            what = f"two classes look the same: {ascii(other)} and {ascii(name)}"
            raise UserError(what, where, "give them one name, e.g. with convmv")
    numbers = {name: number for number, name in enumerate(known)}
    unknown = [name for name in seen if name not in numbers]
    if unknown:
        fix = "give train/ images of these classes, or remove them from val/"
        raise UserError(f"val has classes that train lacks: {few(unknown)}", where, fix)
    absent = sorted(numbers.keys() - set(seen), key=known.index)
    if absent:
        log(f"note: val lacks {len(absent)} of {len(known)} classes: {few(absent)}")
    return [numbers[name] for name in seen]


# Besides a folder, what a part of a dataset may be, e.g. train.txt.
PART_FILES = (".tar", ".zip", ".txt", ".tsv", ".csv")


def _split_of(root: Path, split: str, flag: str) -> Folder | Path:
    """One part of a dataset: a folder, or a file named as the part. Raises UserError."""
    files = [root / f"{split}{ending}" for ending in PART_FILES]
    files = [path for path in files if os.path.isfile(path)]
    if os.path.isdir(root / split):
        if files:
            unused = " and ".join(path.name for path in files)
            log(f"note: {root}: reads the folder {split}/, and not {unused}")
        return _open_place(root / split)
    if len(files) > 1:
        what = f"folder has both {files[0].name} and {files[1].name}"
        raise UserError(what, f"{flag} {root}", "keep one of them")
    if files:
        return _open_place(files[0])
    place = _open_place(root)
    if isinstance(place, Path):
        fix = f"give the folder that holds {split}.txt"
        raise UserError("a list is one part of a dataset", f"{flag} {root}", fix)
    if place.has(split):  # in an archive
        return place.below(split)
    fix = f"give the folder that holds {split}/, {split}.tar, {split}.zip or the list {split}.txt"
    raise UserError(f"no folder {split}/", f"{flag} {root}", fix)


# ---------------------------------------------------------------------------------------------
# What a set of images is, in words and in digits
# ---------------------------------------------------------------------------------------------


def _by_extension(files: Counter) -> str:
    """List counts by extension, the most frequent first, e.g. ".jpg 20, .txt 4"."""
    common = sorted(files.items(), key=lambda pair: (-pair[1], pair[0]))[:6]
    return ", ".join([f"{name} {count:,}" for name, count in common] + ["..."] * (len(files) > len(common)))


def class_names(images: Images) -> list[str]:
    """The names of the classes, in the order of the labels; [] if the set does not name them."""
    return list(map(str, getattr(images, "classes", None) or []))


def describe(images: Images) -> str:
    """State the numbers of images and classes, e.g. "1,281,167 images, 1,000 classes"."""
    classes = class_names(images)
    return counted(len(images), "image") + (f", {counted(len(classes), 'class')}" if classes else "")


def _selection(images: ImageFiles) -> str:
    """State also how many files were taken and left out, by extension."""
    left_out = []
    if images.left_out:
        count = counted(images.left_out.total(), "file")
        left_out.append(f"{count} ({_by_extension(images.left_out)})")
    if images.hidden:
        left_out.append(counted(images.hidden, "hidden name"))
    archives = len(images.paths.files) if isinstance(images.paths, Members) else 0
    place = f" in {counted(archives, 'archive')}" if archives else ""
    words = describe(images) + place + (f" ({_by_extension(images.taken)})" if images.taken else "")
    return words + "; left out " * bool(left_out) + " and ".join(left_out)


def digest(images: Images) -> str:
    """12 hex digits that identify a set of images; moving its folder does not change them.

    For files, also those of torchvision's ImageFolder, they depend on names relative to the folder, sizes, a
    sample of the contents (see `Paths.digest`) and classes; for other datasets on the kind, the split, the
    length, the classes and, where the dataset has them as an array, the labels; for a subset on its indices.
    """
    kind = getattr(images, "kind", type(images).__name__)
    facts = [kind, len(images), getattr(images, "split", getattr(images, "train", None))]
    facts += [getattr(images, "size", None), class_names(images)]
    summary = hashlib.sha256(repr(facts).encode())
    if isinstance(images, ImageFiles):
        summary.update(images.paths.digest)
    if isinstance(images, torchvision.datasets.DatasetFolder):
        folder = os.path.join(images.root, "")
        names = (path.removeprefix(folder) for path, _ in images.samples)  # `relpath` takes 6 s for ImageNet
        summary.update(Paths(names, str(images.root)).digest)
    if isinstance(images, Subset):
        summary.update(repr((digest(images.dataset), images.indices)).encode())  # type: ignore[arg-type]
    for name in LABELS:
        labels = getattr(images, name, None)
        if isinstance(labels, np.ndarray | Tensor | list):
            with contextlib.suppress(ValueError, TypeError):  # labels that are not numbers
                summary.update(np.asarray(labels, dtype=np.float64).tobytes())
    return summary.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------
# torchvision's datasets
# ---------------------------------------------------------------------------------------------


def _torchvision_dataset(source: Source, split: str, called: str) -> Images:
    """Open a torchvision dataset by class name, and try the usual names of its splits; log it as `called`."""
    name, known = source.dataset, _torchvision_names()
    root = source.data_path and without_links(os.path.expanduser(source.data_path))
    if name in ("ImageFolder", "DatasetFolder"):
        fix = "leave it out: --data_path alone reads class folders"
        raise UserError("this is not the name of a dataset", f"--dataset {name}", fix)
    if name == "LSUN":
        what = "torchvision reads a pickle of the working folder for it, which may run code"
        raise UserError(what, f"--dataset {name}", "save its images as files, and leave --dataset out")
    if name not in known:
        raise UserError("unknown dataset", f"--dataset {name}", nearest(name, known))
    if not root:
        raise UserError("no folder given", "--data_path", f"name the folder that holds {name}")
    make = getattr(torchvision.datasets, name)
    with main_process_first():  # only one unpacks or downloads
        for archive in Path(root, name, "raw").glob("*-ubyte.gz"):  # MNIST's layout, not yet unpacked
            if not archive.with_suffix("").exists():
                _unpack(archive)
        images, taken = _open_split(make, source._replace(data_path=root), split)
    log(f"{called}: {name}{taken}: {describe(images)}")
    return in_format(images, source.form, f"--dataset {name}")


def _torchvision_names() -> list[str]:
    """The names of torchvision's datasets that lie in a folder."""
    known = {name: getattr(torchvision.datasets, name) for name in torchvision.datasets.__all__}
    del known["VisionDataset"]  # what the others inherit from
    return [name for name, make in known.items() if "root" in inspect.signature(make).parameters]


def _unpack(archive: Path) -> None:
    """Decompress a .gz file into its folder."""
    try:
        with appearing(archive.with_suffix("")) as file, gzip.open(archive) as packed:
            shutil.copyfileobj(packed, file)
            shutil.copymode(archive, file.name)
    except (OSError, EOFError, zlib.error) as error:
        fix = "download it again, and leave its folder writable"
        raise UserError(f"cannot unpack: {error}", str(archive), fix) from None


# Names that datasets have for their splits, in the order in which they are tried.
SPLITS = {
    "unlabelled": ["unlabeled", "train", "trainval"],
    "train": ["train", "trainval"],
    "val": ["val", "valid", "test"],
}


def _open_split(make: Any, source: Source, split: str) -> tuple[Images, str]:
    """Open the dataset; also returns words that name the split taken, for a message."""
    name, part = source.dataset, "val" if split == "val" else "train"
    # Subclasses of MNIST pass their arguments on as **kwargs.
    takes = {p for cls in make.__mro__ for p in inspect.signature(cls.__init__).parameters}
    kwargs = {"download": source.download} if "download" in takes else {}  # some would by default
    if source.download and not kwargs and split != "val":  # said once
        log(f"note: --download has no effect: torchvision does not download {name}")
    own = source.split if split == "unlabelled" else ""  # evaluations choose the split themselves
    choices: list[dict[str, bool | str]]
    if "train" in takes:
        if own not in ("", "train", "test"):
            raise UserError("dataset has train and test", f"--split {own}", "name one of them")
        choices = [{"train": part == "train" and own != "test"}]
    elif "split" in takes:
        choices = [{"split": n} for n in ([own] if own else SPLITS[split])]
    elif split == "unlabelled" and not own:
        choices = [{}]  # training needs no split
    else:
        raise UserError("dataset has no train/val split", f"--dataset {name}", "use a folder instead")
    refusal = ""
    for choice in choices:
        taken = choice.get("split") or ("train" if choice.get("train") else "test")
        words = f", split {taken}" if choice else ""
        try:
            return make(source.data_path, **choice, **kwargs), words
        except ValueError as error:  # this dataset calls its split by another name
            refusal = str(error)
        except TypeError as error:  # it needs more arguments
            raise UserError(str(error), f"--dataset {name}", "use a folder instead") from None
        except (RuntimeError, OSError, ImportError) as error:
            raise _explained(error, source, "download" in takes) from None
    if own:
        raise UserError(refusal, f"--split {own}", "name one of the dataset's splits")
    raise UserError(f"no {part} split: {refusal}", f"--dataset {name}", "use a folder instead")


def _explained(error: Exception, source: Source, downloads: bool) -> UserError:
    """The error for a dataset that torchvision does not open; `downloads` says whether it downloads it."""
    where = f"--dataset {source.dataset}"
    missing = error if isinstance(error, ImportError) else error.__context__
    if isinstance(missing, ModuleNotFoundError) and missing.name:
        return UserError(f"needs the package {missing.name}", where, f"pip install {missing.name}")
    what, fix = first_line(error), "check the folder"
    if "download=True" in what:  # torchvision's advice, for its own callers
        what = "not found, or damaged, in this folder"
    if downloads:
        fix = "check the network" if source.download else f"{fix}, or add --download"
    return UserError(what, f"{where} --data_path {source.data_path}", fix)


# ---------------------------------------------------------------------------------------------
# Opening on all ranks
# ---------------------------------------------------------------------------------------------

# What a function that opens images returns.
Opened = TypeVar("Opened", Images, tuple[Images, Images])


def on_all_ranks(open_images: Callable[..., Opened], *args) -> Opened:
    """Return `open_images(*args)`: a set of images, or several.

    Raises its error on all ranks if one rank meets it, and a UserError if ranks see different images.
    """
    with same_error_on_all_ranks():
        opened = open_images(*args)
        sets = opened if isinstance(opened, tuple) else (opened,)
        seen = "; ".join(f"{describe(images)}, digest {digest(images)}" for images in sets)
    agree("images", seen)
    return opened


# ---------------------------------------------------------------------------------------------
# Single images
# ---------------------------------------------------------------------------------------------


def sample_name(dataset: Images, index: int) -> str:
    """The name of a sample in messages: its file, if it has one."""
    if isinstance(dataset, ImageFiles):
        return dataset.paths[index]
    if isinstance(dataset, torchvision.datasets.ImageFolder):
        return dataset.samples[index][0]
    if isinstance(dataset, Subset):
        return sample_name(dataset.dataset, dataset.indices[index])  # type: ignore[arg-type]
    return f"image {index}"


def short_name(dataset: Images, index: int) -> str:
    """The name of a sample, for a file relative to the folder that was given."""
    if isinstance(dataset, ImageFiles):
        return dataset.paths.name(index)
    return sample_name(dataset, index)


def pixels_of(images: Images, index: int) -> Tensor:
    """The pixels of a sample as training sees them, uint8 (C, H, W), without its label."""
    return images.pixels(index) if isinstance(images, ImageFiles) else to_pixels(images[index][0])


def why_unreadable(images: Images, index: int) -> str:
    """Read a sample once more, to find out why it cannot be read."""
    try:
        pixels_of(images, index)
    except Exception as error:  # a broken file can raise nearly anything
        return first_line(error)
    return "it can be read now"


def name_and_reason(images: Images, index: int) -> str:
    """The name of an image that cannot be read, and the reason, for a warning."""
    return f"{sample_name(images, index)} ({why_unreadable(images, index)})"


def read_image(images: Images, index: int) -> tuple[AnyImage, Any]:
    """Read an image, RGB or uint8 (C, H, W), and its label, of any kind.

    A dataset's images of wider values stay as they are, because a transform may map them. Raises ImageError
    if the image cannot be read, WrongFormat if it is of another format than the others.
    """
    try:
        image, label = images[index]
        if isinstance(image, Tensor):
            return image, label
        image.load()
        return image if image.mode.startswith(("I", "F")) else to_rgb(image), label
    except WrongFormat:
        raise
    except Exception as error:  # a broken file can raise nearly anything
        if lacks_resources(error):
            raise
        name = sample_name(images, index)
        raise ImageError(f"cannot read image: {first_line(error)}", name, "repair or remove it") from None


def transformed(
    image: AnyImage, transform: Callable[[AnyImage], Tensor], images: Images, index: int
) -> Tensor:
    """`transform(image)` of a sample. Raises ImageError for values that it does not take."""
    try:
        return transform(image)
    except ValueError as error:
        name, fix = sample_name(images, index), "convert or remove it"
        raise ImageError(f"cannot use image: {first_line(error)}", name, fix) from None


def class_number(label: Any) -> int:
    """The label as a class number, -1 if it is none: several labels, or a regression target."""
    try:
        return max(-1, operator.index(label))
    except (TypeError, RuntimeError, ValueError):
        return -1


def read_labelled(images: Images, index: int) -> tuple[AnyImage, int]:
    """Read an image, as `read_image` does, and its class number.

    Raises UserError also if its label is not a class number.
    """
    image, label = read_image(images, index)
    number = class_number(label)
    if number < 0:
        where, fix = f"{sample_name(images, index)}: {label!r:.40}", "use a dataset with one class per image"
        raise UserError("label is not a class number", where, fix)
    return image, number
