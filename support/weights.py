"""Files of weights: written whole or not at all, loaded right or not at all.

What is read: checkpoints of `main_dino.py`, those published with the paper (full or backbone only),
state dicts of timm and torchvision models, `.safetensors`; nothing in a file is ever executed.
"""

import argparse
import contextlib
import errno
import hashlib
import http.client
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor, nn

from support.backbones import build_backbone, canonical, check_crop_sizes, check_divides
from support.cli import DefaultInt, DefaultStr
from support.distributed import main_process_first
from support.errors import UserError, nearest
from support.logger import log
from vision_transformer import VITS, VisionTransformer

# The models published with the paper: name -> (stem of the files, architecture, patch size).
PUBLISHED_URL = "https://dl.fbaipublicfiles.com/dino/{stem}_pretrain/{stem}_{kind}.pth"
PUBLISHED = {
    "dino_vits16": ("dino_deitsmall16", "vit_small", 16),
    "dino_vits8": ("dino_deitsmall8", "vit_small", 8),
    "dino_vitb16": ("dino_vitbase16", "vit_base", 16),
    "dino_vitb8": ("dino_vitbase8", "vit_base", 8),
    "dino_xcit_small_12_p16": ("dino_xcit_small_12_p16", "xcit_small_12_p16", 16),
    "dino_xcit_small_12_p8": ("dino_xcit_small_12_p8", "xcit_small_12_p8", 8),
    "dino_xcit_medium_24_p16": ("dino_xcit_medium_24_p16", "xcit_medium_24_p16", 16),
    "dino_xcit_medium_24_p8": ("dino_xcit_medium_24_p8", "xcit_medium_24_p8", 8),
    "dino_resnet50": ("dino_resnet50", "resnet50", 16),
}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when its block ends well, whole and on the disk.

    At every moment, also after a power cut, `path` is the old file or the new one. A folder that
    has vanished is made anew. Raises OSError; then the old file is still there.
    """
    if not path.parent.is_dir():
        log(f"warning: {path.parent} has vanished: made anew")
        path.parent.mkdir(parents=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # on a full disk, it would be in the way
        if isinstance(error.__context__, OSError):  # torch hides it behind an error of its own
            raise error.__context__ from None
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk; without that, a rename may be lost."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def save_checkpoint(state: dict, path: str | Path, previous: str | Path | None = None) -> None:
    """Write `state` to `path`, which is at every moment whole or absent; see `replacing`.

    What was at `path` is kept as `previous`. Raises OSError; then what was saved is still there.
    """
    path = Path(path)
    with replacing(path) as file:
        torch.save(state, file)
        if previous and path.exists():
            file.flush()
            os.fsync(file.fileno())
            Path(previous).unlink(missing_ok=True)
            try:
                os.link(path, previous)  # so that `path` is never absent
            except OSError:  # a file system without links
                os.replace(path, previous)


def load_file(path: str | Path):
    """What a `.safetensors` or torch file holds, on the CPU; runs no code from it. Raises UserError."""
    if not Path(path).is_file():
        raise UserError("no such file", str(path), nearest(str(path), PUBLISHED))
    if not os.access(path, os.R_OK):
        raise UserError("no permission to read", str(path), "change its permissions")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors  # comes with timm

            return load_safetensors(path)
        _check_sums(path)
        # The published checkpoints carry their arguments as a pickled Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a garbled file can raise nearly anything
        if any(sign in str(error) for sign in ("GLOBAL", "Can only", "unrecognized function")):
            raise UserError("file wants to run code", str(path), "refused; use another file") from None
        raise UserError("file is damaged or of another kind", str(path), "use another file") from None


def _check_sums(path: str | Path) -> None:
    """Raises ValueError for a byte that has changed since the file was written; torch does not look."""
    if zipfile.is_zipfile(path):  # older formats of torch have no sums
        with zipfile.ZipFile(path) as archive:
            garbled = archive.testzip()
        if garbled:
            raise ValueError(f"{garbled} is garbled")


def load_checkpoint(path: str | Path) -> dict:
    """A file's dict; `args` becomes a plain dict, keys lose the `module.` that DataParallel adds.

    Raises UserError.
    """
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict):
        raise UserError("not a checkpoint", str(path), "use one written by main_dino.py")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])

    def plain(state: Mapping) -> dict:
        return {str(name).removeprefix("module."): value for name, value in state.items()}

    return plain({k: plain(v) if is_state(v) else v for k, v in checkpoint.items()})


def is_state(value) -> bool:
    """Whether it is a state dict: nothing but named tensors."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def load_strictly(
    module: nn.Module, state: dict, source: str, fix: str = "check --arch and the file"
) -> None:
    """`load_state_dict` that names what does not fit in one line. Raises UserError."""
    own = module.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "misshapen": [k for k in own if k in state and own[k].shape != getattr(state[k], "shape", None)],
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if found:
        raise UserError("weights do not fit: " + ", ".join(found), source, fix)
    module.load_state_dict(state)


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """See that no weight is infinite or no number: what they gave would still look like a result.

    Raises UserError.
    """
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        what = f"weights are not finite: {', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}"
        raise UserError(what, source, "use another file")


def digest(module: nn.Module) -> str:
    """A short word that differs where a network's weights do."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(name.encode())
        sha.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


class Weights(NamedTuple):
    """A backbone's weights, a head's ({} where there are none), and what the file says of them."""

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    trained: dict  # arguments of the training, or what is known of a published model
    source: str  # for messages


def read_weights(weights: str, checkpoint_key: str, fix: str = "") -> Weights:
    """Weights by file, or by the name of a published model, which is downloaded.

    From a training checkpoint, those of `checkpoint_key`, "teacher" or "student". Raises UserError,
    with this `fix` where it lacks them.
    """
    checkpoint = load_checkpoint(download(weights, "pretrain") if weights in PUBLISHED else weights)
    states = {name: value for name, value in checkpoint.items() if is_state(value)}
    if checkpoint_key in states:
        state = states[checkpoint_key]
    elif present := [name for name in ("student", "teacher") if name in states]:
        raise UserError(
            f"no {checkpoint_key!r} in file", weights, fix or f"give --checkpoint_key {present[0]}"
        )
    elif not isinstance(checkpoint_key, DefaultStr):
        raise UserError(f"no {checkpoint_key!r} in file", weights, "leave --checkpoint_key out")
    else:  # weights and nothing else, perhaps in a wrapping
        wrapped = [states[name] for name in ("state_dict", "model") if name in states]
        state = wrapped[0] if wrapped else checkpoint
        if not is_state(state):
            raise UserError("no weights in file", weights, "use another file")
    check_finite(state, weights)
    trained = checkpoint.get("args")
    trained = trained if isinstance(trained, dict) else {}
    if weights in PUBLISHED:
        trained = dict(zip(("arch", "patch_size"), PUBLISHED[weights][1:], strict=True))
    backbone, head = (
        {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        for part in ("backbone.", "head.")
    )
    if not backbone:  # the backbone only, or with a classifier, which `load_pretrained_weights` drops
        backbone, head = state, {}
    return Weights(backbone, head, trained, weights)


def download(name: str, kind: str) -> Path:
    """A published model's file ("pretrain" or "linearweights"), kept in torch.hub's folder.

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
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                raise UserError(
                    f"cannot download: {error}", url, "check the network or give a file"
                ) from None
    return path


def load_pretrained_weights(model: nn.Module, weights: Weights) -> None:
    """Load a backbone; nothing may be missing or left over but a classifier, which DINO drops.

    Raises UserError.
    """
    state = weights.backbone
    if "cls_attn_blocks.0.attn.qkv.weight" in state:  # XCiT as in its own repository
        from timm.models.xcit import checkpoint_filter_fn

        state = checkpoint_filter_fn(dict(state), model)
    classifiers = tuple(f"{name}." for name in model.dropped_classifiers)
    state = {name: value for name, value in state.items() if not name.startswith(classifiers)}
    load_strictly(model, state, weights.source)


def load_backbone(
    weights: str,
    checkpoint_key: str = DefaultStr("teacher"),
    arch: str = DefaultStr("vit_small"),
    patch_size: int = DefaultInt(16),
    image_size: int = DefaultInt(224),
) -> tuple[nn.Module, int]:
    """A frozen backbone for images of a size: (B, 3, image_size, image_size) -> (B, D).

    `weights` is a file, the name of a published model, or a baseline: "random" or "pixels", which
    is no network at all. Architecture, patch and image size come from the weights where the flags
    are at their defaults. Returns the backbone and the image size. Raises UserError, also where a
    flag contradicts the weights.
    """
    if not weights:
        raise UserError(
            "no weights given", "--pretrained_weights", "name a file, a published model, or random"
        )
    if weights == "pixels":
        return nn.Flatten(), int(image_size)
    if weights == "random":
        known, size = None, int(image_size)
    else:
        known = read_weights(weights, checkpoint_key)
        arch, patch_size, size = settle_architecture(known, arch, patch_size, image_size)
        if isinstance(image_size, DefaultInt):
            image_size = size
    if canonical(arch) in VITS:
        check_divides("image_size", image_size, patch_size)
    model, embed_dim = build_backbone(arch, patch_size, size)
    if known:
        load_pretrained_weights(model, known)
    check_crop_sizes(model, arch, embed_dim, [image_size])
    return model.eval().requires_grad_(False), int(image_size)


def init_from(
    own_backbone: nn.Module, own_head: nn.Module, weights: str, arch: str, patch_size: int, image_size: int
) -> None:
    """Begin a run with weights by file or name: the backbone's, and the head's where there is one.

    A ViT's position embedding is interpolated to the run's image size. Raises UserError.
    """
    fix = "give a checkpoint with a teacher, or a file of weights alone"
    known = read_weights(weights, DefaultStr("teacher"), fix)
    arch, patch_size, size = settle_architecture(known, arch, patch_size, image_size)
    backbone, _ = build_backbone(arch, patch_size, size)
    load_pretrained_weights(backbone, known)
    state = backbone.state_dict()
    if isinstance(backbone, VisionTransformer):
        state["pos_embed"] = backbone.interpolate_pos_encoding(image_size, image_size)
    load_strictly(own_backbone, state, weights)
    if known.head:
        fix = "give the old run's --out_dim, --use_bn_in_head and --head_ flags, or its backbone alone"
        load_strictly(own_head, known.head, f"{weights}: head", fix)


def settle_architecture(
    weights: Weights, arch: str, patch_size: int, image_size: int
) -> tuple[str, int, int]:
    """Architecture, patch size and image size that the weights were trained with.

    Each is what the file records, else what a ViT's shapes tell, else what the flag says. Raises
    UserError where the user's flag contradicts the file's record.
    """
    shapes = _vit_shapes(weights.backbone)
    arch = _settle("arch", arch, weights.trained, shapes)
    size = weights.trained.get("global_crops_size", image_size)
    if canonical(arch) in VITS:  # elsewhere the name says the one, and shapes do not tell the other
        patch_size = _settle("patch_size", patch_size, weights.trained, shapes)
        size = shapes.get("image_size") or size
    return arch, int(patch_size), int(size)


def _settle(name: str, flag, recorded: dict, shapes: dict):
    is_default = isinstance(flag, DefaultInt | DefaultStr)
    value = recorded.get(name) or (shapes.get(name, flag) if is_default else flag)
    if is_default or canonical(str(value)) == canonical(str(flag)):
        return value
    raise UserError(f"weights were trained with {value}", f"--{name} {flag}", f"give --{name} {value}")


def _vit_shapes(state: dict[str, Tensor]) -> dict:
    """What the shapes of a ViT's weights tell of it; {} for other networks."""
    position, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if position is None or patches is None or position.ndim != 3 or patches.ndim != 4:
        return {}
    width, patch_size = patches.shape[0], patches.shape[-1]
    with torch.device("meta"):
        arch = [name for name, make in VITS.items() if make().embed_dim == width]
    shapes = {"patch_size": patch_size, "image_size": patch_size * math.isqrt(position.shape[1] - 1)}
    return shapes | ({"arch": arch[0]} if arch else {})
