"""Finds a network's weights in a file, and loads them completely or refuses them.

The file is a checkpoint of `main_dino.py` or one published with the paper (full or backbone only), a state
dict of timm, torchvision or a Hugging Face ViT, or a training file of iBOT or DINOv2.
"""

import hashlib
import json
import math
import numbers
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import transforms

from support.backbones import build_backbone, canonical, check_crop_sizes, check_divides, is_known
from support.checkpoints import PUBLISHED, SAVE, download, load_checkpoint
from support.errors import UserError, counted, few, first_line, reason_of
from support.formats import ImageFormat, Range, pairs, range_words
from support.layouts import BESIDE, WITHIN, groups, is_state, select_network, to_timm_names, vit_shapes
from support.logger import log
from support.pixels import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOST_CHANNELS,
    AnyImage,
    Size,
    eval_transform,
    height_and_width,
    require_levels,
    size_words,
)
from vision_transformer import VITS, VisionTransformer

# ---------------------------------------------------------------------------------------------
# State dicts
# ---------------------------------------------------------------------------------------------


def load_strictly(
    module: nn.Module, state: Mapping, source: str, fix: str = "check --arch and the file"
) -> None:
    """Load a state dict. Raises UserError, which names in one line what does not fit."""
    own = module.state_dict()
    both = [k for k in own if k in state]
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [k for k in both if own[k].shape != getattr(state[k], "shape", None)],
        "of another type": [k for k in both if own[k].is_floating_point() != _is_floating_point(state[k])],
    }
    found = [f"{len(keys)} {kind} ({few(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise UserError("weights do not fit: " + ", ".join(found), source, fix)
    versioned = OrderedDict(state)  # torchvision's MNASNet looks for the version of its layers
    versioned._metadata = own._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned)


def _is_floating_point(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is neither sparse nor quantized nor nested."""
    return value.layout == torch.strided and not (value.is_quantized or value.is_nested)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError if a weight is infinite or NaN, since its output could still look like a result.

    Also for tensors without values, and for those that are sparse, quantized or nested.
    """
    empty = [name for name, value in state.items() if value.is_meta]
    if empty:
        raise UserError(f"weights without values: {few(empty)}", source, f"save with {SAVE}")
    odd = [name for name, value in state.items() if not is_plain(value)]
    if odd:
        what = f"weights are sparse, quantized or nested: {few(odd)}"
        raise UserError(what, source, "save dense tensors of floating-point numbers")
    broken = [name for name, value in state.items() if not value.float().isfinite().all()]
    if broken:
        what = f"weights are not finite: {few(broken)}"
        raise UserError(what, source, "use another file")


def digest_weights(module: nn.Module) -> str:
    """12 hexadecimal digits that identify a network's weights."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(name.encode())
        sha.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------
# Weights in files
# ---------------------------------------------------------------------------------------------


Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel


class Weights(NamedTuple):
    """The state dict chosen from a file, and what the file records about it."""

    state: dict[str, Tensor]  # all networks of the entry, with timm's names
    source: str  # for messages
    trained: dict  # the training's arguments, or those known of a published model
    entry: str = ""  # of the file, "" for a file of weights alone
    key: str | None = None  # the part of `state` that the user asks for
    epoch: int | None = None
    normalization: Normalization | None = None
    center: Tensor | None = None  # of the loss, (1, K); belongs to the teacher's head
    value_range: Range | None = None  # of the images' values, which became grey levels
    named: str | None = None  # the architecture that a file of another program names
    fix: str = ""  # advice if the file holds several networks; "" names --checkpoint_key

    @property
    def are_dinos(self) -> bool:
        """Whether the file records DINO's training, or one like it; timm's defaults do not hold for it."""
        return "arch" in self.trained or self.normalization is not None


def read_weights(weights: str, checkpoint_key: str | None = None, fix: str = "") -> Weights:
    """Read weights by file, or by the name of a published model, which is downloaded.

    `checkpoint_key` names an entry of the file or a network in it, or both, as in
    "state_dict.momentum_backbone"; None takes the teacher of a training checkpoint, or the only
    network of other files. Raises UserError; `fix` is its advice for a script without --checkpoint_key.
    """
    checkpoint = load_checkpoint(download(weights, "pretrain") if weights in PUBLISHED else weights)
    entry, key = _choose_entry(checkpoint, checkpoint_key, weights, fix)
    state = checkpoint[entry] if entry else checkpoint
    others = [f"{name} ({type(v).__name__})" for name, v in state.items() if not isinstance(v, Tensor)]
    if others or not state:
        what = f"values that are not tensors: {few(others)}" if others else "nothing"
        raise UserError(f"{entry or 'file'} contains {what}", weights, f"save weights only, with {SAVE}")
    trained = checkpoint.get("args")
    trained = trained if isinstance(trained, dict) else {}
    described = {} if checkpoint.keys() & {"args", "arch", "normalization"} else _description_beside(weights)
    trained |= {name: value for name, value in described.items() if name != "arch"}
    if weights in PUBLISHED:
        trained = dict(zip(("arch", "patch_size"), PUBLISHED[weights][1:], strict=True))
    loss, epoch = checkpoint.get("dino_loss"), checkpoint.get("epoch")
    record = checkpoint.get("normalization")
    if record is None:  # as of a checkpoint that was reduced to weights and flags
        record = _normalization_of_flags(trained)
    normalization, value_range = _recorded_normalization(record, weights)
    named = _recorded(described or checkpoint, "arch")
    return Weights(
        to_timm_names(state),
        weights,
        trained,
        entry,
        key,
        epoch=epoch if isinstance(epoch, int) else None,
        normalization=normalization,
        center=loss.get("center") if is_state(loss) and entry == "teacher" else None,
        value_range=value_range,
        named=named if named and is_known(named) else None,
        fix=fix,
    )


def _choose_entry(checkpoint: dict, key: str | None, source: str, fix: str) -> tuple[str, str | None]:
    """Choose the entry of a file that holds the network, "" for the file itself; also the rest of the key."""
    mappings = [name for name, value in checkpoint.items() if isinstance(value, Mapping)]
    trained = [name for name in ("student", "teacher") if name in mappings]
    wanted, _, rest = (key or "teacher").partition(".")
    if wanted in checkpoint and not isinstance(checkpoint[wanted], Tensor):
        if wanted not in mappings:
            what = f"{wanted!r} is a {type(checkpoint[wanted]).__name__}, not weights"
            raise UserError(what, source, fix or f"choose among {', '.join(mappings) or 'other files'}")
        return wanted, rest or None
    if trained:
        choices = " or ".join(f"--checkpoint_key {name}" for name in trained)
        raise UserError(f"no {wanted!r} in file", source, fix or f"give {choices}")
    # A network has names that end in weight; the centre or the queue of a loss does not.
    networks = [name for name in mappings if any(str(k).endswith("weight") for k in checkpoint[name])]
    if key:
        parts = [name for name in networks if any(str(k).startswith(f"{key}.") for k in checkpoint[name])]
        networks = parts or networks
    if len(networks) > 1:
        choices = " or ".join(f"--checkpoint_key {name}" for name in networks)
        what = f"several state dicts in file: {', '.join(networks)}"
        raise UserError(what, source, fix or f"give {choices}")
    if not networks and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise UserError("no weights in file", source, "use another file")
    return (networks or [""])[0], key


def _description_beside(weights: str) -> dict:
    """What transformers and timm write beside a file of weights; {} if there is nothing. Logs it.

    "arch" (timm), or "num_attention_heads" and "hidden_act" (transformers); "mean" and "std" of the images.
    Raises UserError for means and deviations that are none.
    """
    path = Path(weights).expanduser()
    if path.name not in ("model.safetensors", "pytorch_model.bin"):
        return {}
    config, images = (_read_fields(path.with_name(n)) for n in ("config.json", "preprocessor_config.json"))
    found: dict[str, Any] = {}
    if "architecture" in config:
        found["arch"] = config["architecture"]
        images = config.get("pretrained_cfg", config)  # older files are flat
        names = {"mean": "mean", "std": "std"}
        if config.get("model_args"):
            log(f"warning: {weights}: the model_args in config.json have no effect: {config['model_args']}")
    else:
        found |= {name: config[name] for name in ("num_attention_heads", "hidden_act") if name in config}
        names = {"image_mean": "mean", "image_std": "std"}
    if isinstance(images, dict):
        found |= {ours: images[theirs] for theirs, ours in names.items() if theirs in images}
        if images.get("do_normalize") is False:
            found |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    if "mean" in found or "std" in found:
        _recorded_normalization(found, str(path.parent))
    if found:
        words = ", ".join(f"{name} {value}" for name, value in found.items())
        log(f"note: {weights}: from the .json files beside it: {words}")
    return found


def _read_fields(path: Path) -> dict:
    """The fields of a JSON document; {} if it is not there or holds something else. Raises UserError."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else first_line(error)
        what = f"cannot read the description of the weights: {reason}"
        raise UserError(what, str(path), "repair it, or move it away") from None
    return fields if isinstance(fields, dict) else {}


def _normalization_of_flags(flags: dict) -> dict | None:
    """The record of `main_dino.py`'s flags; None for those of other programs."""
    if not flags.keys() >= {"mean", "std", "value_range"}:
        return None
    given = [flags["mean"], flags["std"], flags["value_range"] or []]
    if not all(isinstance(each, list | tuple) and all(isinstance(x, float) for x in each) for each in given):
        return None
    return {"mean": flags["mean"], "std": flags["std"], "value_range": pairs(flags["value_range"])}


def _recorded_normalization(record, source: str):
    """Mean and deviation in a checkpoint's record, and the range of values; None for what it lacks."""
    if record is None:
        return None, None
    try:
        # A file may repeat one number without end.
        mean, std = (tuple(map(float, record[name][:MOST_CHANNELS])) for name in ("mean", "std"))
        value_range = record.get("value_range")
        if value_range is not None:
            value_range = tuple((float(low), float(high)) for low, high in value_range[:MOST_CHANNELS])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        mean, std, value_range = (), (), None
    if not (0 < len(mean) == len(std) and all(map(math.isfinite, mean + std)) and min(std) > 0):
        what = f"mean and deviation in the file are not valid: {record}"
        raise UserError(what, source, "record both for each channel, the deviation above 0")
    ends = [number for pair in value_range or () for number in pair]
    if value_range is not None and (
        len(value_range) not in (1, len(mean))
        or not all(map(math.isfinite, ends))
        or any(low >= high for low, high in value_range)
    ):
        what = f"value_range in the file is not valid: {record['value_range']}"
        raise UserError(what, source, "record pairs LOW HIGH, for all channels or for each")
    return (mean, std), value_range


# ---------------------------------------------------------------------------------------------
# From a file into a network
# ---------------------------------------------------------------------------------------------


def select_weights(model: nn.Module, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Select a backbone's tensors, a DINO head's ({} for none), and the network's prefix in the file.

    Leaves out classifiers and the heads of other trainings, and logs them. Raises UserError if the file
    holds several networks and none is chosen, or parts of unknown purpose.
    """
    own = model.state_dict()
    prefix = select_network(weights.state, own, weights.key, weights.source, weights.fix)
    parent = prefix.removesuffix("backbone.") if f".{prefix}".endswith(".backbone.") else None
    heads = "" if parent is None else f"{parent}head."
    backbone, head, rest = {}, {}, []
    for name, value in weights.state.items():
        if name.startswith(prefix):
            backbone[name.removeprefix(prefix)] = value
        elif heads and name.startswith(heads):
            head[name.removeprefix(heads)] = value
        else:
            rest.append(name.removeprefix(parent or ""))
    unknown = [name for name in rest if not BESIDE.search(name.partition(".")[0])]
    if unknown and not weights.key and not prefix.startswith("teacher."):
        fix = weights.fix or f"give --checkpoint_key {prefix.removesuffix('.')} to take that part alone"
        raise UserError(f"parts of unknown purpose in file: {groups(unknown)}", weights.source, fix)
    backbone = _as_timm_reads_it(backbone, model)
    # timm's LeViT and others drop a norm beside the classifier, which is in one module with it.
    dropped = getattr(model, "dropped_classifiers", ())
    classifiers = tuple(f"{name.rpartition('.')[0] or name}." for name in dropped)
    extra = [n for n in backbone if n not in own and (n.startswith(classifiers) or WITHIN.match(n))]
    if rest or extra:
        log(f"note: {weights.source}: not used: {groups([*extra, *rest])}")
    return {name: value for name, value in backbone.items() if name not in extra}, head, prefix


def _as_timm_reads_it(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert the layout of a model's own repository (DINOv2, XCiT and others) as timm does."""
    prepare = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if prepare is None or not set(model.state_dict()) - set(state):
        return state
    try:
        prepared = prepare(dict(state), model)
    except Exception:  # a foreign file may raise anything; `load_strictly` says what does not fit
        return state

    def side(shape: torch.Size) -> int:
        return math.isqrt(shape[1]) if len(shape) == 3 else 0

    for name, value in state.items():
        new = prepared.get(name)
        if new is None or new.numel() == value.numel():
            continue
        # Without its CLS token, a grid of positions is the same; timm would also interpolate other grids.
        if name != "pos_embed" or side(new.shape) != side(value.shape):
            return state
    return prepared


def load_pretrained_weights(model: nn.Module, weights: Weights) -> tuple[dict[str, Tensor], str]:
    """Load a backbone: no tensor may be missing or left over, except what `select_weights` names.

    Returns the DINO head's tensors, {} for none, and the network's prefix. Raises UserError.
    """
    state, head, prefix = select_weights(model, weights)
    check_finite(state, weights.source)
    if isinstance(model, VisionTransformer):
        check_is_ours(model, state, prefix, weights)
    load_strictly(model, state, weights.source)
    return head, prefix


NOT_OURS = {"ls1.gamma": "LayerScale", "register_tokens": "register tokens", "reg_token": "register tokens"}


def check_is_ours(model: VisionTransformer, state: dict[str, Tensor], prefix: str, weights: Weights) -> None:
    """Raise UserError for weights of a ViT that differs from ours where names and shapes do not show it.

    `prefix` is the network's in the file. Warns of what may be MoCo v3's.
    """
    if model.embed_dim == 384:
        what = "MoCo v3's vit_small has 12 heads, ours has 6"
        if f".{prefix}".endswith((".base_encoder.", ".momentum_encoder.")):
            raise UserError(what, weights.source, "use another file")
        if "pos_embed" in state and not state["pos_embed"].flatten()[:384].any():
            why = "the CLS token has the position zero"
            log(f"warning: {weights.source} may be MoCo v3's ({why}); then features are wrong: {what}")
    for part, words in NOT_OURS.items():
        if any(part in name for name in state.keys() - model.state_dict().keys()):  # a subclass may have it
            fix = "give timm's name of the architecture, e.g. --arch vit_small_patch14_dinov2"
            raise UserError(f"weights have {words}, which our ViTs lack", weights.source, fix)
    ours: dict[str, list] = {"num_attention_heads": [model.num_heads], "hidden_act": ["gelu", "gelu_python"]}
    for name, values in ours.items():  # transformers' names
        if (theirs := weights.trained.get(name, values[0])) not in values:
            what = f"the network has {name} {theirs}, our ViT of this width has {values[0]}"
            raise UserError(what, weights.source, "use another file")


# ---------------------------------------------------------------------------------------------
# Frozen networks
# ---------------------------------------------------------------------------------------------


class Frozen(NamedTuple):
    """A frozen network and the images that it expects."""

    network: nn.Module  # (B, C, H, W) -> (B, D), in evaluation mode, without gradients
    image_size: Size  # pixels: H = W, or (H, W)
    mean: tuple[float, ...]  # of each channel, in [0, 1]
    std: tuple[float, ...]
    description: str  # one line: the file, and what is known about its network
    arch: str  # the network's name, as `build_backbone` takes it; "" for none
    value_range: Range | None = None  # of the images' values

    @property
    def form(self) -> ImageFormat:
        """The format of its images."""
        return ImageFormat(len(self.mean), self.value_range)

    @property
    def transform(self) -> Callable[[AnyImage], Tensor]:
        """Image to input: resize, crop the centre, normalise; (C, H, W).

        Raises ValueError for values that `value_range` has to map, which `formats.load_pixels` does.
        """
        transform = eval_transform(self.image_size, self.mean, self.std)
        return transform if self.value_range is None else transforms.Compose([require_levels, transform])

    @property
    def value_words(self) -> str:
        """How the values of an image become inputs, for a message."""
        limits = f"values {range_words(self.value_range)}, " if self.value_range else ""
        return f"{limits}mean {self.mean}, deviation {self.std}"

    def zeros(self, count: int) -> Tensor:
        """Inputs of zeros, (count, C, H, W)."""
        return torch.zeros(count, len(self.mean), *height_and_width(self.image_size))

    def require_rgb(self, images: str) -> None:
        """Check that the network takes 8-bit RGB images; `images` names them. Raises UserError."""
        if len(self.mean) != 3:
            what = f"the network takes {counted(len(self.mean), 'channel')}, and {images} have three"
            raise UserError(what, self.description.partition(":")[0], "use a network of three channels")
        if self.value_range is not None:
            log(f"note: {images} have 8 bits: taken as they are, without the training's --value_range")


class Pixels(nn.Flatten):
    """The baseline without a network: an image as a vector, (B, C, H, W) -> (B, C H W)."""


def load_backbone(
    weights: str,
    checkpoint_key: str | None = None,
    arch: str | None = None,
    patch_size: int | None = None,
    image_size: Size | None = None,
    in_chans: int | None = None,
    value_range: Sequence[float] | None = None,
) -> Frozen:
    """Load a frozen backbone from a file, a published model by name, or a baseline: "random" or "pixels".

    "pixels" returns the image as a vector, without a network. An argument that is None is taken from the
    file's record, else from its shapes; by default it is vit_small with patches of 16 for RGB images of 224
    pixels. Raises UserError, also if an argument contradicts the file.
    """
    if not weights:
        fix = "give a file, a published model, or random"
        raise UserError("no weights given", "--pretrained_weights", fix)
    if isinstance(image_size, list):
        image_size = tuple(image_size)
    for name, value in ("patch_size", patch_size), ("image_size", image_size), ("in_chans", in_chans):
        numbered = value if name == "image_size" and isinstance(value, Sequence) else [value]
        if value is not None and not (numbered and all(map(_is_positive, numbered))):
            raise UserError("not a positive whole number", f"{name}={value!r}", "give one, or leave it out")
    unused = {"random": ["checkpoint_key"], "pixels": ["checkpoint_key", "arch", "patch_size"]}
    given = {"checkpoint_key": checkpoint_key, "arch": arch, "patch_size": patch_size}
    for name in filter(given.get, unused.get(weights, [])):
        log(f"note: --{name} has no effect on {weights}")
    if weights == "pixels":
        size = image_size or FALLBACK["image_size"]
        count = in_chans or FALLBACK["in_chans"]
        scale, limits = unknown_normalization(count), pairs(value_range, count)
        return Frozen(Pixels().eval(), size, *scale, "pixels: no network", "", limits)
    known = Weights({}, weights, {}) if weights == "random" else read_weights(weights, checkpoint_key)
    in_chans = settle_channels(known, in_chans)
    limits = settle_range(known, pairs(value_range, in_chans))
    arch, patch_size, trained_size = settle_architecture(known, arch, patch_size, image_size)
    is_ours = canonical(arch) in VITS
    model, embed_dim = build_backbone(arch, patch_size, trained_size, in_chans=in_chans)
    if wants_transform(known, model):
        model.transform_input = True  # type: ignore[assignment]
    words = [canonical(arch), *([f"patch {patch_size}"] if is_ours else [])]
    normalization = unknown_normalization(in_chans)
    if weights != "random":
        prefix = load_pretrained_weights(model, known)[1]
        if part := f"{known.entry}.{prefix}".removesuffix(".").removesuffix(".backbone").strip("."):
            words.insert(0, part)
        words += [] if known.epoch is None else [f"epoch {known.epoch}"]
        words += assumed_heads(model, known)
        normalization = normalization_of(known, model, in_chans)
        if not (stated_normalization(known, model, in_chans) or "arch" in known.trained):
            words.append("ImageNet's mean and deviation assumed")
        if config := timm_config(known, model):
            trained_size = config["input_size"][-1]
    size = image_size or trained_size
    if is_ours:
        check_divides("image_size", size, patch_size)
    check_crop_sizes(model, arch, embed_dim, [size], in_chans)
    description = f"{weights}: {', '.join(words)}"
    model.eval().requires_grad_(False)
    return Frozen(model, size, *normalization, description, canonical(arch), limits)


def assumed_heads(model: nn.Module, weights: Weights) -> list[str]:
    """["N heads assumed"] for a ViT whose file does not record its architecture; else []."""
    is_said = weights.named or _recorded(weights.trained, "arch") or "num_attention_heads" in weights.trained
    if is_said or not isinstance(model, VisionTransformer):
        return []
    return [f"{model.num_heads} heads assumed"]


def wants_transform(weights: Weights, model: nn.Module) -> bool:
    """Whether these are torchvision's own weights of GoogLeNet or Inception v3.

    They were trained with another mean and deviation, and their networks change the input from ImageNet's.
    """
    return bool(weights.state) and not weights.are_dinos and hasattr(model, "transform_input")


def timm_config(weights: Weights, model: nn.Module) -> dict:
    """timm's preprocessing of its own weights; {} for weights that DINO trained."""
    return {} if weights.are_dinos else getattr(model, "default_cfg", {})


def stated_normalization(weights: Weights, model: nn.Module, in_chans: int) -> Normalization | None:
    """Mean and deviation that are recorded in the file or beside it, else timm's for timm's weights.

    One number is for all channels, as in timm's training script.
    """
    if weights.are_dinos:
        return weights.normalization
    found = []
    for name in ("mean", "std"):
        values: Any = weights.trained.get(name)
        if not (isinstance(values, list) and all(isinstance(value, int | float) for value in values)):
            values = timm_config(weights, model).get(name, ())
        found.append(tuple(values) * (in_chans if len(values) == 1 else 1))
    mean, std = found
    return (mean, std) if mean and std else None


def normalization_of(weights: Weights, model: nn.Module, in_chans: int) -> Normalization:
    """Mean and deviation that weights expect. Raises UserError if they are unknown for other than three
    channels.
    """
    known = stated_normalization(weights, model, in_chans)
    if not known and in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    if not known or len(known[0]) != in_chans:
        what = f"weights for {in_chans} channels without their means and deviations"
        raise UserError(what, weights.source, "give a checkpoint of main_dino.py, or a file of export.py")
    return known


def unknown_normalization(in_chans: int) -> Normalization:
    """Mean and deviation where nothing is known: ImageNet's, or those of evenly distributed levels."""
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * in_chans, (0.29,) * in_chans


# ---------------------------------------------------------------------------------------------
# The start of a training
# ---------------------------------------------------------------------------------------------


def init_from(
    own_backbone: nn.Module,
    own_head: nn.Module,
    weights: str,
    arch: str,
    patch_size: int,
    image_size: Size,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    value_range: Range | None = None,
) -> Tensor | None:
    """Load weights by file or name as the start of a run: the backbone's, and the head's if it has one.

    A ViT's position embedding is interpolated to the run's image size. Weights for three channels are
    adapted to the run's number, which is the length of `mean`. Returns the centre (1, K) that belongs to
    the head, if both are there. Raises UserError.
    """
    fix = "give a checkpoint with a teacher, or a file with the weights of one network"
    known = read_weights(weights, None, fix)
    arch, patch_size, size = settle_architecture(known, arch, patch_size, image_size)
    in_chans = settle_channels(known, None)
    if in_chans not in (3, len(mean)):
        what = f"weights of {in_chans} channels cannot start a network of {len(mean)}"
        raise UserError(what, weights, f"give --in_chans {in_chans}, or weights of three channels")
    backbone, _ = build_backbone(arch, patch_size, size, in_chans=in_chans)
    if wants_transform(known, backbone):
        fix = "use another network, or start from random weights"
        what = f"torchvision's weights of {arch} expect another mean and deviation"
        raise UserError(what, weights, fix)
    head, _ = load_pretrained_weights(backbone, known)
    if in_chans == len(mean):
        theirs = normalization_of(known, backbone, in_chans)
        if theirs != (tuple(mean), tuple(std)):
            log(f"warning: {weights} expects mean {theirs[0]}, deviation {theirs[1]}; "
                f"the training uses {tuple(mean)} and {tuple(std)}")  # fmt: skip
    if known.value_range not in (None, value_range):
        log(f"warning: {weights} expects --value_range {range_words(known.value_range)}; "
            f"the training uses {range_words(value_range) or '8-bit values'}")  # fmt: skip
    state = in_more_channels(backbone.state_dict(), own_backbone.state_dict(), weights)
    if isinstance(backbone, VisionTransformer):
        state["pos_embed"] = backbone.interpolate_pos_encoding(None, *height_and_width(image_size))
    load_strictly(own_backbone, state, weights)
    taken = "backbone" if not head else "backbone, head" if known.center is None else "backbone, head, centre"
    log(f"starting from the weights of {weights}: {', '.join([taken, *assumed_heads(backbone, known)])}")
    if not head:
        return None
    check_finite(head | ({} if known.center is None else {"center": known.center}), f"{weights}: head")
    fix = "give the old run's --out_dim, --use_bn_in_head and --head_ flags, or its backbone alone"
    load_strictly(own_head, head, f"{weights}: head", fix)
    return known.center


def in_more_channels(state: dict[str, Tensor], own: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Adapt filters for three channels to the number in `own`, as timm does, and log it.

    They are repeated over the channels, and scaled so that their sum stays about the same; one channel takes
    their sum.
    """
    names = [
        name for name, value in state.items()
        if name in own and value.ndim == 4 and value.shape[1] == 3 and own[name].shape[1] != 3
    ]  # fmt: skip
    if not names:
        return state
    from timm.models import adapt_input_conv

    count = own[names[0]].shape[1]
    log(f"{source}: filters for three channels adapted to {count}: {', '.join(names)}")
    return state | {name: adapt_input_conv(count, state[name]) for name in names}


# ---------------------------------------------------------------------------------------------
# What the network is: flags, records and shapes
# ---------------------------------------------------------------------------------------------

# What a network is if neither the flags nor the file say it.
FALLBACK: dict[str, Any] = {"arch": "vit_small", "patch_size": 16, "image_size": 224, "in_chans": 3}


def settle_architecture(
    weights: Weights, arch: str | None = None, patch_size: int | None = None, image_size: Size | None = None
) -> tuple[str, int, Size]:
    """Determine architecture, patch size and image size of the training that made the weights.

    Each is the argument, else what the training recorded, else the architecture that the file names, as
    timm's do, else what a ViT's shapes say, else the fallback. Raises UserError where an argument contradicts
    the record.
    """
    shapes = vit_shapes(weights.state)
    with torch.device("meta"):
        names = [name for name, make in VITS.items() if make().embed_dim == shapes.get("width")]
    arch = _settle("arch", arch, weights.trained, weights.named or (names[0] if names else None))
    recorded = _recorded(weights.trained, "global_crops_size")
    if canonical(arch) not in VITS:  # the name determines the patches
        if patch_size not in (None, FALLBACK["patch_size"]):
            log(f"note: --patch_size has no effect on {arch}")
        return arch, patch_size or FALLBACK["patch_size"], recorded or image_size or FALLBACK["image_size"]
    patch_size = _settle("patch_size", patch_size, weights.trained | shapes, shapes.get("patch_size"))
    size = _size_of(shapes.get("patches", 0), patch_size, recorded, image_size) or recorded or image_size
    return arch, patch_size, size or FALLBACK["image_size"] // patch_size * patch_size or patch_size


def _size_of(patches: int, patch_size: int, recorded: Size | None, image_size: Size | None) -> Size:
    """The image size that has so many patches: the recorded one, else a square, else the argument."""
    square = math.isqrt(patches) * patch_size
    fits = [
        size for size in (recorded, square, image_size)
        if size and math.prod(side / patch_size for side in height_and_width(size)) == patches
    ]  # fmt: skip
    if fits[:1] == [square] and image_size in fits and len(set(height_and_width(image_size))) > 1:
        words = f"{patches} positions assumed to be those of {square} x {square} pixels"
        log(f"note: {words}, not of --image_size {size_words(image_size)}")
    return fits[0] if fits else square


def settle_channels(weights: Weights, in_chans: int | None) -> int:
    """Determine the number of channels as `settle_architecture` does the others. Raises UserError."""
    shape = vit_shapes(weights.state).get("in_chans")
    recorded = len(weights.normalization[0]) if weights.normalization else None
    return _settle("in_chans", in_chans, {"in_chans": shape or recorded}, None)


def settle_range(weights: Weights, value_range: Range | None) -> Range | None:
    """Determine the range of values: the argument, else the file's. Raises UserError if they differ."""
    known = weights.value_range
    is_baseline = not weights.state
    if value_range is not None and value_range != known and not is_baseline:
        what = f"the weights were trained with {range_words(known) or '8-bit values'}"
        raise UserError(what, f"--value_range {range_words(value_range)}", "leave it out")
    return value_range if is_baseline else known


def _settle(name: str, flag, record: dict, shape):
    """Return the flag, else the record, else the shape, else the fallback. Raises UserError."""
    recorded = _recorded(record, name)
    if flag is not None and recorded is not None and canonical(str(recorded)) != canonical(str(flag)):
        what = f"the weights have {name} {recorded}"
        raise UserError(what, f"--{name} {flag}", f"give --{name} {recorded}")
    return next(value for value in (flag, recorded, shape, FALLBACK[name]) if value is not None)


def _recorded(record: dict, name: str):
    """Read a word, a positive whole number or a pair of them from a file's record; None for anything else."""
    value: Any = record.get(name)
    if name == "arch":
        return value if isinstance(value, str) and value else None
    values = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(map(_is_positive, values)):
        return None
    return tuple(map(int, values)) if values is value else int(value)


def _is_positive(value) -> bool:
    """Whether this is a positive whole number."""
    return isinstance(value, numbers.Integral) and int(value) > 0
