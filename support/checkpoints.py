"""Files of tensors: written completely or not at all, read without running code, downloaded by name."""

import argparse
import datetime
import errno
import http.client
import json
import os
import re
import types
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from support.distributed import main_process_first
from support.errors import UserError, few, lacks_memory, nearest
from support.files import replacing
from support.layouts import is_state, unwrap
from support.logger import log
from support.pickles import NUMPY, Refused

# The models published with the paper: name -> (stem of the files, architecture, patch size). Only some have
# linear classifiers; dino_vits16_landmarks is trained on Google Landmarks v2, the others on ImageNet.
PUBLISHED_URL = "https://dl.fbaipublicfiles.com/dino/{stem}_pretrain/{stem}_{kind}.pth"
PUBLISHED = {
    "dino_vits16": ("dino_deitsmall16", "vit_small", 16),
    "dino_vits16_landmarks": ("dino_vitsmall16_googlelandmark", "vit_small", 16),
    "dino_vits8": ("dino_deitsmall8", "vit_small", 8),
    "dino_vitb16": ("dino_vitbase16", "vit_base", 16),
    "dino_vitb8": ("dino_vitbase8", "vit_base", 8),
    "dino_xcit_small_12_p16": ("dino_xcit_small_12_p16", "xcit_small_12_p16", 16),
    "dino_xcit_small_12_p8": ("dino_xcit_small_12_p8", "xcit_small_12_p8", 8),
    "dino_xcit_medium_24_p16": ("dino_xcit_medium_24_p16", "xcit_medium_24_p16", 16),
    "dino_xcit_medium_24_p8": ("dino_xcit_medium_24_p8", "xcit_medium_24_p8", 8),
    "dino_resnet50": ("dino_resnet50", "resnet50", 16),
}


def save_checkpoint(state: dict, path: str | Path, previous: str | Path | None = None) -> None:
    """Write `state` to `path`, which is complete or absent at any moment; see `replacing`.

    Keeps the old file as `previous`. Raises OSError, and UserError for a state that `load_checkpoint` would
    refuse; earlier files are then unchanged.
    """
    path = Path(path)
    with replacing(path) as file:
        torch.save(state, file)
        file.flush()
        with torch.serialization.safe_globals(_data_types()):
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
        if refused:
            what = f"could not be loaded again, as it contains {few(sorted(refused))}"
            fix = "keep numbers, text, tensors and containers of them in flags and states"
            raise UserError(what, str(path), fix)
        if previous and path.exists():
            os.fsync(file.fileno())
            Path(previous).unlink(missing_ok=True)
            try:
                os.link(path, previous)  # so that `path` is never absent
            except OSError:  # a file system without links
                os.replace(path, previous)


def _data_types() -> list:
    """Types and functions that pickled data may use in addition to torch's, some with the name that the data
    gives them; none of them runs code.
    """
    path_types = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
    path_types |= {"PurePosixPath": PurePosixPath, "PureWindowsPath": PureWindowsPath}
    path_modules = ("pathlib", "pathlib._local")  # the second in Python 3.13
    return [
        *(argparse.Namespace, types.SimpleNamespace),  # the published checkpoints carry a Namespace
        *(int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        torch.torch_version.TorchVersion,
        *((kind, ".".join(name)) for name, kind in NUMPY.items()),
        *((kind, f"{module}.{name}") for module in path_modules for name, kind in path_types.items()),
        # torch's loader fills dicts and lists only
        (lambda *args: {}, "collections.defaultdict"),
        (lambda items=(), *args: list(items), "collections.deque"),
    ]


# First bytes, in lower case, of files that are not weights: what such a file is, and what to do.
FOREIGN = {
    b"version https://git-lfs": ("is a Git LFS pointer, not the file", "run git lfs pull"),
    b"<!doctype html": ("is a web page, not the file", "download the file itself"),
    b"<html": ("is a web page, not the file", "download the file itself"),
    b"<?xml": ("is an XML document, often a server's error message", "download the file itself"),
    b"{": ("is a JSON document", "give the file that it describes, *.safetensors or *.bin"),
    b"\x89hdf": ("is an HDF5 file, as TensorFlow writes it", "convert it to a torch state_dict"),
    b"\x93numpy": ("is a NumPy file", "convert it to a torch state_dict"),
    b"\x1f\x8b": ("is compressed", "unpack it"),
}


def find_file(name: str | Path) -> Path:
    """Find the file of this name, with `~` expanded. Raises UserError, also for a URL or a folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(f.name for f in path.iterdir() if f.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        fix = f"give a file in it: {few(files)}" if files else "give a file of weights; it has none"
        raise UserError("this is a folder", str(name), fix)
    if not path.is_file():
        if re.match(r"[A-Za-z][\w+.-]+:(//|\w+/)", str(name)):  # https://..., s3://..., hf-hub:timm/...
            raise UserError("URLs are not downloaded, only published models", str(name), "download the file")
        raise UserError("no such file", str(name), nearest(str(name), list(PUBLISHED)))
    if not os.access(path, os.R_OK):
        raise UserError("no permission to read", str(name), "change its permissions")
    return path


def load_file(name: str | Path):
    """Read a `.safetensors` or torch file to the CPU, without running code from it. Raises UserError."""
    path = find_file(name)
    with open(path, "rb") as file:
        begin = file.read(64)
    # 8 bytes with the length of a JSON header below 4 GiB, then the header; whatever the file's name
    is_safetensors = begin[4:9] == b"\0\0\0\0{"
    for sign, (what, fix) in FOREIGN.items():
        if begin.lstrip().lower().startswith(sign) and not is_safetensors:
            raise UserError(f"file {what}", str(name), fix)
    try:
        if is_safetensors:
            import safetensors.torch  # comes with timm

            with safetensors.safe_open(path, "pt") as file:
                known = (file.metadata() or {}).get("dino")  # records of `export.py`
            state = safetensors.torch.load_file(path)
            return {"state_dict": state, **json.loads(known)} if known else state
        if begin.startswith(b"PK"):  # older formats of torch are no archives and have no sums
            _check_archive(path)
        with torch.serialization.safe_globals(_data_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        if lacks_memory(error) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise  # the file may be sound
        refused = _refused(error)
        if begin.startswith(b"PK") and "Unsupported operand" in str(error):  # its sums are right
            refused = "a pickle that may run code"
        if refused:
            what, fix = f"file contains {refused}, and was not loaded", f"save weights only, with {SAVE}"
            raise UserError(what, str(name), fix) from None
        if "TorchScript" in str(error):
            raise UserError("file is a TorchScript program", str(name), f"save weights with {SAVE}") from None
        what = "file is empty" if not begin else "file is damaged or of another kind"
        raise UserError(what, str(name), "use another file") from None


SAVE = "torch.save(model.state_dict(), path)"


def _refused(error: Exception) -> str:
    """Return what a loader has refused as unsafe; "" if its error is another."""
    text = str(error)
    if isinstance(error, Refused):
        return text
    found = re.search(r"GLOBAL (\S+)", text) or re.search(
        r"(?:but got|function) (?:<(?:class|function) ')?([^\s'>]+)", text
    )
    if found and ("GLOBAL" in text or "Can only" in text or "unrecognized function" in text):
        return f"{found[1]}, which may run code"
    return ""


def _check_archive(path: Path) -> None:
    """Raise ValueError for TorchScript, and if a byte has changed since the file was written.

    torch checks no sums, and its older versions load TorchScript.
    """
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("TorchScript")
        garbled = archive.testzip()
    if garbled:
        raise ValueError(f"{garbled} is garbled")


def load_checkpoint(path: str | Path) -> dict:
    """Read a file's dict; `args` becomes a dict, and names lose wrappers' prefixes (`module.`, ...).

    Raises UserError.
    """
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict):
        what = f"file holds a {type(checkpoint).__name__}, not a checkpoint"
        raise UserError(what, str(path), "use one written by main_dino.py, or a state_dict")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    entries = {name: unwrap(v, str(path)) if is_state(v) else v for name, v in checkpoint.items()}
    return unwrap(entries, str(path))


def download(name: str, kind: str) -> Path:
    """Download a published model's file ("pretrain" or "linearweights") once, to torch.hub's folder.

    Raises UserError.
    """
    url = PUBLISHED_URL.format(stem=PUBLISHED[name][0], kind=kind)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    with main_process_first():  # only one downloads
        if not path.exists():
            log(f"downloading {url}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
                load_file(path)  # torch does not notice a download that was cut off
            except UserError:
                path.unlink()
                raise UserError("download is incomplete or of another kind", url, "try again") from None
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                fix = "check the network or give a file"
                raise UserError(f"cannot download: {error}", url, fix) from None
    return path
