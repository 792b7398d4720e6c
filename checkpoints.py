"""Files of weights: written whole or not at all, loaded right or not at all."""

import argparse
import os
from pathlib import Path

import torch
from torch import nn

from utils import DefaultInt, DefaultStr, UserError, build_backbone
from vision_transformer import VITS


def save_checkpoint(state: dict, path: str | Path) -> None:
    """Write by way of a temporary file, so that `path` is at every moment whole or absent."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_file(path: str | Path):
    """`torch.load` to the CPU that runs no code from the file. Raises UserError."""
    if not Path(path).is_file():
        raise UserError("no such file", str(path), "check the path")
    try:
        # The published checkpoints carry their arguments as a pickled Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a garbled pickle can raise nearly anything
        if "unsupported" in str(error).lower():
            raise UserError("file wants to run code", str(path), "refused; use another file") from None
        raise UserError("file is damaged or of another kind", str(path), "use another file") from None


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of ours or of the published code; `args` becomes a plain dict.

    Keys lose the `module.` that DataParallel adds. Raises UserError.
    """
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict):
        raise UserError("not a checkpoint", str(path), "use one written by main_dino.py")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    for key, value in checkpoint.items():
        if isinstance(value, dict) and any(str(name).startswith("module.") for name in value):
            checkpoint[key] = {name.removeprefix("module."): v for name, v in value.items()}
    return checkpoint


def load_strictly(module: nn.Module, state: dict, source: str) -> None:
    """`load_state_dict` that names what does not fit in one line. Raises UserError."""
    own = module.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "misshapen": [k for k in own if k in state and own[k].shape != state[k].shape],
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if found:
        raise UserError("weights do not fit: " + ", ".join(found), source, "check --arch and the file")
    module.load_state_dict(state)


def load_pretrained_weights(model: nn.Module, checkpoint: dict, checkpoint_key: str, source: str) -> None:
    """Load the backbone of `checkpoint[checkpoint_key]`; nothing may be missing or left over.

    `source` names the checkpoint in messages. Raises UserError.
    """
    state = checkpoint.get(checkpoint_key)
    if not isinstance(state, dict):
        keys = ", ".join(str(k) for k, v in checkpoint.items() if isinstance(v, dict))
        raise UserError(f"no {checkpoint_key!r} in checkpoint", source, f"--checkpoint_key: {keys}")
    prefix = "backbone."
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    load_strictly(model, state, source)


def load_backbone(
    weights: str, checkpoint_key: str, arch: str, patch_size: int
) -> tuple[nn.Module, int, dict]:
    """A frozen backbone with the weights of a checkpoint, or random ones for the name "random".

    Architecture and patch size come from the checkpoint where the flags are at their defaults.
    Returns the backbone, its width D and the checkpoint's training arguments ({} for random).
    Raises UserError, also where a flag contradicts the checkpoint.
    """
    if not weights:
        raise UserError("no weights given", "--pretrained_weights", "name a checkpoint, or random")
    checkpoint = {} if weights == "random" else load_checkpoint(weights)
    trained = checkpoint.get("args") or {}
    arch = _settle("arch", arch, trained)
    patch_size = _settle("patch_size", patch_size, trained)
    model, embed_dim = build_backbone(arch, patch_size, trained.get("global_crops_size", 224))
    if checkpoint:
        load_pretrained_weights(model, checkpoint, checkpoint_key, weights)
    return model.eval().requires_grad_(False), embed_dim, trained


def _settle(name: str, flag, trained: dict):
    """A flag's value, or the checkpoint's where the user did not set it. Raises UserError."""
    value = trained.get(name, flag)
    if isinstance(flag, DefaultInt | DefaultStr) or VITS.get(value, value) == VITS.get(flag, flag):
        return value
    raise UserError(f"checkpoint was trained with {value}", f"--{name} {flag}", "leave the flag out")
