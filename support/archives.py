"""Reads images in place from .tar and .zip files, by an index of where each member lies.

The index is built once with the standard library and kept in `$XDG_CACHE_HOME/dino/archives` (by default
in ~/.cache). A member is then one or two reads at a known place, so that item i is always the same image.
"""

import bisect
import contextlib
import hashlib
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from support.errors import UserError, WrongFormat, reason_of
from support.files import (
    Folder,
    Found,
    Paths,
    all_extensions,
    appearing,
    is_hidden,
    select_images,
    without_links,
)
from support.logger import log

ARCHIVES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
BLOCK = 512  # bytes of a tar's block

# How a member is stored: bytes in a tar, or in a zip as they are or deflated, behind a local header.
TAR, STORED, DEFLATED = range(3)
LONGEST = 4096  # bytes of a link's target; a small archive may unpack to gigabytes
UNKNOWN = -1  # the size of a link that leads out of its archive, and the checksum in a tar, which has none


class File(NamedTuple):
    """An archive as it was when it was opened."""

    path: str
    size: int  # in bytes
    modified: int  # in nanoseconds

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> "File":
        """The archive at a path, in the state that the system gives."""
        return cls(path, status.st_size, status.st_mtime_ns)


class Index(NamedTuple):
    """The members of archives."""

    names: list[str]  # with "/" between folders; a name that ends with "/" is a folder's
    # (N, 6) int64: number of the archive, offset, stored bytes, bytes, how it is stored, checksum
    places: np.ndarray


# ---------------------------------------------------------------------------------------------
# What the scripts use
# ---------------------------------------------------------------------------------------------


def is_archive(path: str | Path) -> bool:
    """Whether a file's name is an archive's, also one that `open_archives` refuses."""
    return str(path).lower().endswith((*ARCHIVES, *COMPRESSED)) and os.path.isfile(path)


def shards_in(root: str | Path) -> list[str]:
    """The archives in a folder that has nothing else but hidden names, sorted; otherwise none."""
    found = []
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if not is_archive(entry.path):
                return []
            found.append(entry.path)
    return sorted(found)


def open_archives(root: str | Path, paths: list[str]) -> "Archive":
    """Open archives as one tree of folders, called `root` in messages. Raises UserError."""
    files, parts = [], []
    for number, path in enumerate(paths):
        file, index = _indexed(path)
        index.places[:, 0] = number
        files.append(file)
        parts.append((Path(path).stem, index))
    (stem, first), *others = parts
    index = _merge(parts, str(root)) if others else _without_own_folder(first, stem)
    return Archive(str(root), files, index, _tree(index.names))


class Archive(Folder):
    """The image files in archives, below the folder `inside` of them, by names relative to it."""

    def __init__(self, root: str, files: list[File], index: Index, tree: "Tree", inside: str = ""):
        super().__init__(root)
        self.files, self.index, self.tree, self.inside = files, index, tree, inside

    def _below(self) -> Iterator[tuple[str, list[str], int]]:
        """Yield the folder `inside` and those below it, sorted: the path relative to it, the names of the
        files, and the number of hidden names.
        """
        start = bisect.bisect_left(self.tree.folders, self.inside)
        for folder in self.tree.folders[start:]:
            if not folder.startswith(self.inside):
                return
            names, hidden = self.tree.contents[folder]
            yield folder[len(self.inside) : -1], names, len(hidden)

    def has(self, name: str) -> bool:
        return f"{self.inside}{name}/" in self.tree.contents

    def below(self, name: str) -> "Archive":
        root = os.path.join(self.root, name)
        return Archive(root, self.files, self.index, self.tree, f"{self.inside}{name}/")

    def find_images(self, readable: Set[str], entered: set | None = None) -> Found:
        return select_images(self._below(), readable)

    def class_folders(self) -> list[str]:
        return sorted(name for name, _, _ in self._below() if name and "/" not in name)

    def entered(self) -> set[tuple[int, int]]:
        """Nothing, since an archive has no links to folders."""
        return set()

    def file_names(self) -> list[str]:
        return self.tree.contents[self.inside][0]

    def paths(self, names: Iterable[str]) -> "Members":
        """The places of images, given by their names relative to the folder."""
        names = list(names)
        rows = {name: row for row, name in enumerate(self.index.names)}
        places = self.index.places[[rows[self.inside + name] for name in names]]
        return Members(names, self.root, self.files, places.reshape(-1, 6))


class Members(Paths):
    """Members of archives: their paths, as in a folder called as the archive, and their places (N, 6)."""

    MOST_OPEN = 64  # archives that a process keeps open

    def __init__(self, names: Iterable[str], root: str, files: list[File], places: np.ndarray):
        super().__init__(names, root)
        self.files, self.places = files, places
        self._real = [without_links(file.path) for file in files]
        self._open: dict[int, IO[bytes]] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def size(self, index: int) -> int:
        """The bytes of a file, as if it were unpacked."""
        return int(self.places[index, 3])

    def file(self, index: int) -> tuple[str, bytes]:
        """The path of a file, and its content. Raises OSError, or zlib.error if it is damaged; WrongFormat if
        the archive was changed after it was opened.
        """
        archive, offset, stored, size, how, checksum = self.places[index].tolist()
        if size == UNKNOWN:
            raise OSError("is a link out of the archive")
        if how != TAR:
            header = self._read(archive, offset, 30)
            if header[:4] != b"PK\3\4":
                raise OSError("the archive is damaged")
            offset += 30 + sum(struct.unpack("<HH", header[26:30]))  # lengths of the name and the extra field
        content = self._read(archive, offset, stored)
        if how == DEFLATED:  # at most one byte too many: a damaged file may unpack to gigabytes
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if len(content) != size or checksum not in (UNKNOWN, zlib.crc32(content)):
            raise OSError("the archive is damaged")
        return self[index], content

    def _read(self, archive: int, offset: int, size: int) -> bytes:
        """Read bytes at a place; after a fork with a new handle, since processes share an old one's place."""
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
        file = self._open.get(archive)
        if file is None:
            if len(self._open) >= self.MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            file = self._open[archive] = open(self._real[archive], "rb", buffering=0)
        file.seek(offset)
        content = file.read(size)
        opened = self.files[archive]
        # After each read, because a tool may write into the open file.
        if File.of(opened.path, os.fstat(file.fileno())) != opened:
            what, fix = "archive was changed after it was opened", "run the same command again"
            raise WrongFormat(what, opened.path, fix)
        if len(content) != size:
            raise OSError("the archive is cut short")
        return content


# ---------------------------------------------------------------------------------------------
# Names of members
# ---------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """The folders of an archive, except hidden ones. Their names end with "/"; the root is ""."""

    folders: list[str]  # sorted
    contents: dict[str, tuple[list[str], set[str]]]  # by folder: the names of its files, and hidden names


def _in_hidden(path: str) -> bool:
    """Whether a member, or a folder above it, is hidden."""
    return any(map(is_hidden, path.split("/")))


def _tree(names: list[str]) -> Tree:
    """Sort members into folders."""
    contents: dict[str, tuple[list[str], set[str]]] = {"": ([], set())}
    hidden: set[str] = set()

    def enter(folder: str) -> bool:
        """Add a folder and those above it, unless it is hidden."""
        if folder in contents or folder in hidden:
            return folder in contents
        above, _, name = folder[:-1].rpartition("/")
        above += "/" * bool(above)
        if enter(above) and not is_hidden(name):
            contents[folder] = ([], set())
            return True
        hidden.add(folder)
        if above in contents:
            contents[above][1].add(name)
        return False

    for path in names:
        folder, separator, name = path.rpartition("/")
        if enter(folder + separator) and name:
            if is_hidden(name):
                contents[folder + separator][1].add(name)
            else:
                contents[folder + separator][0].append(name)
    return Tree(sorted(contents), contents)


def _clean(name: str) -> str:
    """A member's name as it would be below the folder into which it is unpacked, e.g. without "./"."""
    clean = posixpath.normpath(name).lstrip("/")
    return "" if clean == "." else clean


def _without_own_folder(index: Index, stem: str) -> Index:
    """Leave out a folder that is called as the archive and holds everything, as in x.zip with x/..."""
    own = f"{stem}/"

    # The cheap test first, since an archive may have millions of names.
    holds_everything = all(name.startswith(own) or _in_hidden(name) for name in index.names)
    if not holds_everything or all(map(_in_hidden, index.names)):
        return index
    names = [name.removeprefix(own) for name in index.names]
    kept = [row for row, name in enumerate(names) if name]
    return Index([names[row] for row in kept], index.places[kept])


def _has_images(index: Index) -> bool:
    """Whether an archive has images at its top level."""
    readable = tuple(all_extensions())
    return any("/" not in x and x.lower().endswith(readable) and not is_hidden(x) for x in index.names)


def _merge(parts: list[tuple[str, Index]], where: str) -> Index:
    """The index of several archives, as if all were unpacked into one folder; or, if one has images at its
    top level, each into a folder of its name (ImageNet's training set is one archive per class). Raises
    UserError for a name that occurs twice.
    """
    own_folders = any(_has_images(index) for _, index in parts)
    parts = [(stem, _without_own_folder(index, stem)) for stem, index in parts]
    # Images that lay in their archive's own folder lie there again.
    prefixes = [f"{stem}/" if own_folders or _has_images(index) else "" for stem, index in parts]
    names = [
        prefix + name for prefix, (_, index) in zip(prefixes, parts, strict=True) for name in index.names
    ]
    files = [name for name in names if not name.endswith("/")]
    if twice := [name for name, count in Counter(files).items() if count > 1 and not _in_hidden(name)]:
        fix = "give one of them as --data_path, or remove it"  # e.g. train.zip beside val.zip
        raise UserError(f"two archives contain {twice[0]}", where, fix)
    folders = list(filter(None, prefixes))  # a class without images has a folder too
    places = [*(index.places for _, index in parts), np.zeros((len(folders), 6), np.int64)]
    return Index(names + folders, np.concatenate(places))


# ---------------------------------------------------------------------------------------------
# Where members lie
# ---------------------------------------------------------------------------------------------


def _indexed(path: str) -> tuple[File, Index]:
    """An archive and its index, from the cache if there is one. Raises UserError."""
    try:
        status = os.stat(path)
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"  # a tool may restore the first
        key = f"11\0{os.path.realpath(path)}\0{status.st_size}\0{times}"
        cache = _cache_folder() / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.npz"
        opened = File.of(path, status)
        with contextlib.suppress(Exception), np.load(cache) as kept:  # a broken file may raise anything
            names = os.fsdecode(kept["names"].tobytes()).split("\0")[:-1]
            if kept["places"].shape == (len(names), 6):
                return opened, Index(names, kept["places"])
        with open(path, "rb") as file:
            index = _index(file, path, status.st_size)
    except OSError as error:
        raise UserError(reason_of(error), path, "make it readable") from None
    with contextlib.suppress(OSError):  # without a cache, the next run builds the index again
        _keep(index, cache)
    log(f"{path}: built the index of {len(index.names):,} members")
    return opened, index


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dino", "archives")


def _keep(index: Index, cache: Path) -> None:
    """Write an index. Raises OSError."""
    if not cache.is_absolute():
        raise FileNotFoundError("no home directory")
    cache.parent.mkdir(parents=True, exist_ok=True)
    names = np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in index.names), np.uint8)
    with appearing(cache) as file:
        np.savez(file, names=names, places=index.places)


def _index(file: IO[bytes], path: str, size: int) -> Index:
    """Read the names and places of an archive's members. Raises UserError."""
    if path.lower().endswith(COMPRESSED) or file.read(6).startswith(MAGIC):
        fix = "decompress it to a .tar, or pack the images into a .zip"
        raise UserError("a compressed tar cannot be read in place", path, fix)
    places = _zip_places(file, path, size) if path.lower().endswith(".zip") else _tar_places(file, path, size)
    parts = []
    inner_tars = [
        name for name, (_, _, length, how, _) in places.items()
        if name.lower().endswith(".tar") and how == TAR and length != UNKNOWN and not _in_hidden(name)
    ]  # fmt: skip
    for name in inner_tars:
        start, stored, *_ = places.pop(name)
        members = _tar_places(file, f"{path}, {name}", start + stored, start)
        parts.append((Path(name).stem, _as_index(members)))
    own, inner = _as_index(places), _merge(parts, path)
    return Index(own.names + inner.names, np.concatenate([own.places, inner.places]))


Places = dict[str, tuple[int, int, int, int, int]]


def _as_index(places: Places) -> Index:
    rows = np.array([(0, *place) for place in places.values()], np.int64).reshape(-1, 6)
    return Index(list(places), rows)


def _tar_places(file: IO[bytes], path: str, end: int, start: int = 0) -> Places:
    """Index the tar that lies in a file between two places. Raises UserError if it does not end properly."""
    places: Places = {}
    links: dict[str, str] = {}
    offset, name, fix = start, "the beginning", "download or pack it again"
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file)
        while tar.offset > start and (member := tar.next()):  # Python 3.10 fails in a tar without members
            tar.members.clear()  # type: ignore[attr-defined]  # about a kilobyte for each
            name = _clean(member.name)
            links.pop(name, None)  # the last member of a name counts
            if member.size < 0 or member.offset_data + member.size * member.isreg() > end:
                raise UserError(f"archive is cut short in {name}", path, fix)
            if member.isdir() and name:
                places[f"{name}/"] = (0, 0, 0, TAR, UNKNOWN)
            elif member.islnk() and (target := _clean(member.linkname)) in places and target not in links:
                places[name] = places[target]  # the last member of that name before the link
            elif member.islnk() or member.issym():
                folder = posixpath.dirname(name) if member.issym() else ""
                target = _clean(posixpath.join(folder, member.linkname))
                links[name], places[name] = target, (0, 0, UNKNOWN, TAR, UNKNOWN)
            elif member.isreg() and member.sparse is None:
                places[name] = (member.offset_data, member.size, member.size, TAR, UNKNOWN)
            elif member.isreg():
                raise UserError(f"{member.name} is a sparse file", path, "pack it without --sparse")
        offset = tar.offset
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(f"archive is cut short or damaged after {name}: {error}", path, fix) from None
    file.seek(max(offset, start))
    # tarfile takes a damaged header for the end.
    if not start <= offset <= end - BLOCK or file.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"archive is cut short or damaged at byte {offset - start:,}", path, fix)
    while rest := file.read(min(1 << 20, end - file.tell())):  # usually some blocks of zeros
        if rest.strip(b"\0"):
            what = "data follows the end of the archive, as if several were joined by cat"
            raise UserError(what, path, "give them in a folder, or unpack it with tar --ignore-zeros")
    _resolve(links, places, path, "pack it with --dereference")
    return places


def _resolve(links: dict[str, str], places: Places, path: str, fix: str) -> None:
    """Give links to files their places. Raises UserError for a link to a folder with images: they, and the
    class that it stands for, would be lost.
    """
    if not links:
        return
    for _ in range(8):  # links to links
        for name, target in links.items():
            places[name] = places.get(target, places[name])
    readable = tuple(all_extensions())
    folders = {posixpath.dirname(name) for name in places if name.lower().endswith(readable)}
    folders |= {str(above) for folder in folders for above in PurePosixPath(folder).parents}
    for name, target in links.items():
        is_loop = name.startswith(f"{target}/")
        if target and target in folders and not is_loop and not _in_hidden(name):
            raise UserError(f"{name} is a link to a folder with images", path, fix)


def _zip_name(member: zipfile.ZipInfo) -> str:
    """A member's name. Linux's zip writes UTF-8 without the flag for it, so that Python reads cp437.

    Windows' PowerShell 5 writes a backslash between folders; in other names without that flag, a backslash
    may be half of a Chinese or Japanese character.
    """
    name, is_utf8 = member.filename, member.flag_bits & 0x800
    if not member.create_system and (is_utf8 or name.isascii()):
        name = name.replace("\\", "/")
    if not is_utf8:
        with contextlib.suppress(UnicodeError):
            return name.encode("cp437").decode()
    return name


def _zip_places(file: IO[bytes], path: str, size: int) -> Places:
    """Index a zip. Raises UserError."""
    places: Places = {}
    links: dict[str, str] = {}
    readable = tuple(all_extensions())
    methods = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        targets = {
            member.header_offset: os.fsdecode(archive.open(member).read(LONGEST))
            for member in members
            if stat.S_ISLNK(member.external_attr >> 16) and not member.flag_bits & 1
        }
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, zlib.error) as error:
        what = f"archive is cut short or damaged: {error}"
        raise UserError(what, path, "download or pack it again") from None
    for member in members:
        full_name = _zip_name(member)
        name = _clean(full_name)
        links.pop(name, None)  # the last member of a name counts
        if full_name.endswith("/") and name:
            places[f"{name}/"] = (0, 0, 0, STORED, UNKNOWN)
            continue
        if member.flag_bits & 1:
            raise UserError(f"archive is encrypted: {member.filename}", path, "pack it without a password")
        if member.header_offset + member.compress_size > size:
            raise UserError(f"archive is cut short in {member.filename}", path, "download or pack it again")
        if member.compress_type not in methods and name.lower().endswith(readable):
            known = {12: "bzip2", 14: "LZMA"}.get(member.compress_type, f"method {member.compress_type}")
            what = f"cannot read in place, compressed by {known}: {member.filename}"
            raise UserError(what, path, "pack it with the usual method, or none")
        method = methods.get(member.compress_type, STORED)
        sizes = member.compress_size, member.file_size
        places[name] = (member.header_offset, *sizes, method, member.CRC)
        if target := targets.get(member.header_offset):
            links[name] = _clean(posixpath.join(posixpath.dirname(name), target))
    _resolve(links, places, path, "pack it without --symlinks (-y)")
    return places
