"""Networks for torch.hub: the published ones by name, and any file of weights.

    network = torch.hub.load("path/to/this/folder", "dino_vits16", source="local")
    network = torch.hub.load("path/to/this/folder", "dino", weights="checkpoint.pth", source="local")
    features = network(torch.stack([network.transform(image) for image in images]))  # (B, D)

The caller's project may have a `utils`, a `support` or a `vision_transformer` of its own.
"""

import contextlib
import functools
import importlib.machinery
import os
import sys
import typing

import torch.hub

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]  # and timm, for XCiT

_HERE = os.path.dirname(os.path.realpath(__file__))
_OWN = ("support", "vision_transformer")
_hidden: dict = {}  # our modules, while the caller's of the same name are in their place


@contextlib.contextmanager
def _own_modules():
    """In the block, `support` and `vision_transformer` are ours.

    After it, the caller's are again in their place; ours stay where the caller has none of that name.
    """
    theirs = {name: sys.modules.pop(name) for name in _imported() if not _is_ours(sys.modules[name])}
    sys.modules.update(_hidden)
    sys.path.insert(0, _HERE)
    try:
        yield
    finally:
        sys.path.remove(_HERE)
        for name in _imported():
            top = name.partition(".")[0]
            if top in theirs or _caller_has(top):
                _hidden[name] = sys.modules.pop(name)
        sys.modules.update(theirs)


def _imported() -> list:
    """The names of the imported modules that are called as ours are."""
    return [name for name in sys.modules if name.partition(".")[0] in _OWN]


def _is_ours(module) -> bool:
    file = getattr(module, "__file__", None) or ""
    return os.path.realpath(file).startswith(os.path.join(_HERE, ""))


def _caller_has(name: str) -> bool:
    """Whether the caller could import a module of this name that is not ours."""
    elsewhere = [path for path in sys.path if os.path.realpath(path or os.getcwd()) != _HERE]
    return importlib.machinery.PathFinder.find_spec(name, elsewhere) is not None


def dino(weights, checkpoint_key=None, arch=None, patch_size=None, image_size=None, in_chans=None):
    """Load a network from a file of weights, or a published one by name: (B, C, H, W) -> (B, D).

    The arguments after `weights` are those of the scripts' flags; None takes what the file records. The
    network is in evaluation mode, and its weights can be trained. Its attribute `transform` makes the input
    (C, H, W) from a PIL image or uint8 (C, H, W); its attribute `read` makes the latter from the path of a
    file, with the values of training. Its attribute `description` says what was loaded, and what was assumed
    because the file does not record it. Raises an error, in one line, for weights that do not fit.
    """
    with _own_modules():
        from support.logger import write
        from support.weights import load_backbone

        frozen = load_backbone(os.fspath(weights), checkpoint_key, arch, patch_size, image_size, in_chans)
        network: typing.Any = frozen.network
        fields = frozen._asdict() | {"network": None}
        network.transform, network.read = _portable("transform", fields), _portable("read", fields)
        network.description = frozen.description
        if "assumed" in frozen.description:
            write(f"note: {frozen.description}")
        return network.requires_grad_(True)


class _Portable:
    """A function of a `Frozen`; data-loading workers that are not forked make it again, through this file."""

    def __init__(self, function, name, fields):
        self.function, self.name, self.fields = function, name, fields

    def __call__(self, *args):
        return self.function(*args)

    def __reduce__(self):
        make = functools.partial(torch.hub.load, _HERE, "_portable", source="local")
        return make, (self.name, self.fields)


def _portable(name, fields):
    """The transform, or the reader of files, of the `Frozen` with these fields."""
    with _own_modules():
        from support.formats import load_pixels
        from support.weights import Frozen

        frozen = Frozen(**fields)
        read = functools.partial(load_pixels, form=frozen.form)
        return _Portable({"transform": frozen.transform, "read": read}[name], name, fields)


def _published(name, pretrained):
    """The published network of this name; with `pretrained` false, with random weights."""
    if pretrained:
        return dino(name)
    with _own_modules():
        from support.checkpoints import PUBLISHED
        from vision_transformer import VITS

        _, arch, patch_size = PUBLISHED[name]
    return dino("random", arch=arch, patch_size=patch_size if arch in VITS else None)  # else the name says it


def dino_vits16(pretrained=True):
    """ViT-S/16: 384 features, 21.7 M parameters."""
    return _published("dino_vits16", pretrained)


def dino_vits8(pretrained=True):
    """ViT-S/8: 384 features, 21.7 M parameters."""
    return _published("dino_vits8", pretrained)


def dino_vitb16(pretrained=True):
    """ViT-B/16: 768 features, 85.8 M parameters."""
    return _published("dino_vitb16", pretrained)


def dino_vitb8(pretrained=True):
    """ViT-B/8: 768 features, 85.8 M parameters."""
    return _published("dino_vitb8", pretrained)


def dino_xcit_small_12_p16(pretrained=True):
    """XCiT-S12/16: 384 features, 26 M parameters."""
    return _published("dino_xcit_small_12_p16", pretrained)


def dino_xcit_small_12_p8(pretrained=True):
    """XCiT-S12/8: 384 features, 26 M parameters."""
    return _published("dino_xcit_small_12_p8", pretrained)


def dino_xcit_medium_24_p16(pretrained=True):
    """XCiT-M24/16: 512 features, 84 M parameters."""
    return _published("dino_xcit_medium_24_p16", pretrained)


def dino_xcit_medium_24_p8(pretrained=True):
    """XCiT-M24/8: 512 features, 84 M parameters."""
    return _published("dino_xcit_medium_24_p8", pretrained)


def dino_resnet50(pretrained=True):
    """ResNet-50: 2048 features, 23.5 M parameters."""
    return _published("dino_resnet50", pretrained)
