"""Finds image files below folders, keeps their paths in memory that workers share; writes files whole."""

import array
import contextlib
import functools
import hashlib
import heapq
import io
import os
import posixpath
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np
from PIL import EpsImagePlugin, Image, ImageFile

from support.errors import UserError, reason_of
from support.logger import log

# PostScript is a program. Pillow would start Ghostscript for an EPS file, whatever its name.
EpsImagePlugin.gs_binary = False


def evenly_spread(count: int, most: int) -> list[int]:
    """Up to `most` integers below `count`, evenly spread, with the first and the last."""
    return np.linspace(0, count - 1, min(count, most), dtype=int).tolist()


def extension(path: str | Path) -> str:
    """The extension of a file's name, in lower case."""
    return os.path.splitext(path)[1].lower()


def by_number(path: str) -> list:
    """A key to sort names by, in which digits are numbers: "5" comes before "10", and words are last."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def file_id(path: str | Path) -> tuple[int, int]:
    """Identifies a file or a folder, whatever links or mounts lead to it. Raises OSError."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def without_links(path: str | Path) -> str:
    """Where a path leads now: a link in it, e.g. `current`, may lead to another version of the files later.

    A path without links stays as it is, relative or not.
    """
    real = os.path.realpath(path)
    return str(path) if real == os.path.abspath(path) else real


def lies_below(path: Path, folders: Iterable[str | Path]) -> bool:
    """Whether a file at this path would be found in a search of one of these folders."""
    above = path.expanduser().resolve().parents
    return any(Path(folder).expanduser().resolve() in above for folder in folders)


def open_file(path: str, content: bytes | None) -> IO[bytes]:
    """A file to read, or its content. Raises OSError."""
    if content is not None:
        return io.BytesIO(content)
    if not os.path.isfile(path):  # reading a pipe could block forever
        raise OSError("not a file")
    return open(path, "rb")


class Paths:
    """Paths of files below `root`, in one buffer.

    Workers share the buffer with the process that made it. They would copy a list of strings over time,
    because reading a Python object changes its reference count.
    """

    def __init__(self, names: Iterable[str], root: str = ""):
        self.root, buffer, ends = root, bytearray(), array.array("q", [0])
        for name in names:
            buffer += os.fsencode(name)
            ends.append(len(buffer))
        self.buffer, self.ends = np.frombuffer(bytes(buffer), np.uint8), np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name(self, index: int) -> str:
        """The path relative to `root`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.buffer[self.ends[index] : self.ends[index + 1]].tobytes())

    def names(self) -> Iterator[str]:
        """The paths relative to `root`."""
        return (self.name(index) for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def size(self, index: int) -> int:
        """The size of a file in bytes; -1 if there is none."""
        try:
            return os.path.getsize(self[index])
        except OSError:
            return -1

    def file(self, index: int) -> tuple[str, bytes | None]:
        """The path of a file, and its content if it does not lie at that path; see `formats.load_image`."""
        return self[index], None

    def middle(self, index: int, most: int) -> bytes:
        """At most so many bytes from the middle of a file; none if it cannot be read."""
        try:
            with open_file(*self.file(index)) as file:
                file.seek(max(0, self.size(index) - most) // 2)
                return file.read(most)
        except (OSError, zlib.error):
            return b""

    @functools.cached_property  # ranks compare it and the checkpoint records it: read the files once
    def digest(self) -> bytes:
        """Hash of the names, of the sizes in bytes of at most 10,000 files, and of 4 KB from the middle of at
        most 64 files; the files are evenly spread.

        The sizes alone do not tell arrays or uncompressed images of one shape apart.
        """
        sizes = np.array([self.size(index) for index in evenly_spread(len(self), 10_000)], np.int64)
        middles = (self.middle(index, 4096) for index in evenly_spread(len(self), 64))
        contents = [hashlib.sha256(middle).digest() for middle in middles]
        parts = (self.buffer.tobytes(), self.ends.tobytes(), sizes.tobytes(), b"".join(contents))
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


class JoinedPaths(Paths):
    """Several sets of paths, one after the other."""

    def __init__(self, parts: Sequence[Paths]):
        super().__init__(path for part in parts for path in part)
        self.parts, self.starts = parts, np.cumsum([0] + [len(part) for part in parts])

    def _part(self, index: int) -> tuple[Paths, int]:
        """The set of a path, and its number there."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def size(self, index: int) -> int:
        part, number = self._part(index)
        return part.size(number)

    def file(self, index: int) -> tuple[str, bytes | None]:
        part, number = self._part(index)
        return part.file(number)

    @functools.cached_property
    def digest(self) -> bytes:
        """Hash of the digests of the sets: moving one does not change it, their order does."""
        return hashlib.sha256(b"".join(part.digest for part in self.parts)).digest()


ARRAYS = (".npy",)  # extensions of NumPy's files, which are images only where a run says so


def all_extensions() -> frozenset[str]:
    """`readable_extensions` and those of arrays."""
    return readable_extensions() | set(ARRAYS)


@functools.cache
def readable_extensions() -> frozenset[str]:
    """The extensions of the image formats that the installed Pillow decodes, in lower case."""
    known = Image.registered_extensions()  # also loads all formats
    decoded = set()
    for name, (make, _) in Image.OPEN.items():
        stub = isinstance(make, type) and issubclass(make, ImageFile.StubImageFile)
        if not stub and name not in ("MPEG", "EPS"):  # Pillow cannot decode MPEG; EPS needs Ghostscript
            decoded.add(name)
    return frozenset(ending for ending, name in known.items() if name in decoded)


class Found(NamedTuple):
    """Files below a folder."""

    names: list[str]  # of the images, relative to the folder, with "/", sorted by folder, then by name
    folders: list[str]  # that hold images, relative to the folder
    taken: Counter[str]  # images by extension
    left_out: Counter[str]  # other files by extension
    hidden: int  # names that begin with a dot, of files and folders


def select_images(contents: Iterable[tuple[str, list[str], int]], readable: Set[str]) -> Found:
    """Sort and count the images in folders; for each its path, its files, and the number of hidden names."""
    taken: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    folders, hidden = [], 0
    for folder, names, skipped in contents:
        images = []
        for name in names:
            kind = extension(name)
            if kind in readable:
                images.append(name)
                taken[kind] += 1
            else:
                left_out[kind or "no extension"] += 1
        folders.append((folder, sorted(images)))
        hidden += skipped
    prefixed = ((posixpath.join(folder, ""), names) for folder, names in sorted(folders))
    found = [prefix + name for prefix, names in prefixed for name in names]
    return Found(found, [folder for folder, names in folders if names], taken, left_out, hidden)


def is_hidden(name: str) -> bool:
    """Whether a name is left out: one with a dot first, and the folder that a Mac adds to a zip."""
    return name.startswith(".") or name == "__MACOSX"


def _folders(root: str, entered: set[tuple[int, int]]) -> Iterator[tuple[str, list[str], int]]:
    """Yield `root` and each folder below it, following links: the path relative to `root`, the names of the
    files, and the number of hidden names.

    A folder that several links lead to is entered once, by its own path if that is below `root`. Folders in
    `entered` are left out; those that are entered are added to it.
    """
    waiting: list[str] = [""]
    links: list[str] = []
    while waiting or links:
        folder = waiting.pop() if waiting else heapq.heappop(links)  # by name: the same on every machine
        path, names, hidden = os.path.join(root, folder) if folder else root, [], 0
        try:
            own = file_id(path)
            if own in entered:
                continue
            entered.add(own)
            with os.scandir(path) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        hidden += 1
                    elif not entry.is_dir():
                        names.append(entry.name)
                    elif entry.is_symlink():
                        heapq.heappush(links, posixpath.join(folder, entry.name))
                    else:
                        waiting.append(posixpath.join(folder, entry.name))
        except OSError as error:
            fix = "make it readable, or give another folder"
            raise UserError(reason_of(error), error.filename or path, fix) from None
        yield folder, names, hidden


class Folder:
    """The image files below a folder, by names relative to it."""

    def __init__(self, root: str | Path):
        self.root = without_links(root)

    def __str__(self) -> str:
        return self.root

    def has(self, name: str) -> bool:
        """Whether it has a folder of this name."""
        return os.path.isdir(os.path.join(self.root, name))

    def below(self, name: str) -> "Folder":
        """A folder in it."""
        return Folder(os.path.join(self.root, name))

    def find_images(self, readable: Set[str], entered: set[tuple[int, int]] | None = None) -> Found:
        """Find all images, except hidden ones; `readable` are their extensions. Raises UserError.

        `entered` as in `_folders`, for searches of several folders that links may lead to.
        """
        return select_images(_folders(self.root, set() if entered is None else entered), readable)

    def class_folders(self) -> list[str]:
        """List the names of its folders, sorted, except hidden ones. Raises UserError."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
        except OSError as error:
            fix = "make it readable, or give another folder"
            raise UserError(reason_of(error), error.filename or self.root, fix) from None

    def entered(self) -> set[tuple[int, int]]:
        """The folder's entry in `entered`, so that `find_images` does not follow links back to it."""
        return {file_id(self.root)}

    def file_names(self) -> list[str]:
        """List the names of the files in the folder itself, except hidden ones."""
        with os.scandir(self.root) as entries:
            return [e.name for e in entries if e.is_file() and not is_hidden(e.name)]

    def paths(self, names: Iterable[str]) -> Paths:
        """The paths of files, given by their names relative to the folder."""
        return Paths(names, self.root)


# ---------------------------------------------------------------------------------------------
# Files that are written whole
# ---------------------------------------------------------------------------------------------


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing in the place of an old one, never through a link. Raises OSError."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that replaces `path` when the block ends without an error.

    At any moment, also after a power cut, `path` is either the old file or the complete new one. Creates
    the folder again if it has been removed. Raises OSError; the old file is then unchanged.
    """
    if not path.parent.is_dir():
        log(f"warning: {path.parent} was removed: creating it again")
        path.parent.mkdir(parents=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open_new(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # it would take room on a full disk
        # torch raises another error over it
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if isinstance(cause, OSError):
            if cause.errno:  # else it is a library's, with a text alone
                cause.filename = cause.filename or str(path)  # a failed write does not name its file
            raise cause from None
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Write the folder's list of names to the disk, because a power cut could undo a rename.

    Windows and many file systems cannot, and name the reason differently: EACCES, EINVAL, a Mac ENOTSUP for
    network folders, WSL EIO. No such error counts, since the file itself is on the disk.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `path` when the block ends; other processes see no file or the complete one.

    Any number of processes may write it at once. Raises OSError.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as part:
        try:
            yield part
            part.close()
            os.replace(part.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.close()  # Windows does not remove an open file
            os.unlink(part.name)
            raise
