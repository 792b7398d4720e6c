"""Handles names of tensors in files: wrappers, other projects' layouts, several networks in one file.

Everything here works on names and shapes; it neither reads files nor builds networks.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from support.errors import UserError

# What DataParallel, torch.compile, FSDP and activation checkpointing add to names, anywhere and repeatedly.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Hugging Face's names of a ViT's and of DINOv2's tensors, after any prefix -> timm's: the names in files of
# transformers, and those in memory since its version 5.
LAYER = r"(?:encoder\.)?layers?\.(\d+)\."
HUGGING_FACE = [
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (LAYER + r"attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (LAYER + r"attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.", r"blocks.\1.attn.\2."),
    (LAYER + r"intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (LAYER + r"output\.dense\.", r"blocks.\1.mlp.fc2."),
    (LAYER + r"layernorm_before\.", r"blocks.\1.norm1."),
    (LAYER + r"layernorm_after\.", r"blocks.\1.norm2."),
    (LAYER + r"layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (LAYER + r"(norm1|norm2|mlp)\.", r"blocks.\1.\2."),
    (r"layernorm\.(weight|bias)$", r"norm.\1"),
]
QKV = [("query", "key", "value"), ("q_proj", "k_proj", "v_proj")]
HUGGING_FACE_MARK = "embeddings.patch_embeddings.projection.weight"
PATCHES = "patch_embed.proj.weight"

# Parts that a training adds beside a backbone, and inside it, and that its features do not need.
BESIDE = re.compile(
    r"head|proj|predictor|classifier|prototype|queue|pooler|decoder|linear|fc|center|n_averaged|mask_token"
)
WITHIN = re.compile(
    r"(mask_token|masked_embed|n_averaged)$|(decoder|pooler|classifier|projector|predictor|aux\d|Aux)"
)


def is_state(value) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether a value is a state dict: a mapping that contains tensors only."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def unwrap(state: Mapping, source: str) -> dict:
    """Remove the wrappers from the names of entries. Raises UserError if two names become equal."""
    plain = {}
    for name, value in state.items():
        short = WRAPPERS.sub("", str(name))
        if short in plain:
            raise UserError(f"two entries named {short}, once as {name}", source, "save one of the two")
        plain[short] = value
    return plain


def to_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors in Hugging Face's layout, or in DINOv2's chunks of blocks, to timm's names."""
    for mark in [name for name in state if is_last_part(HUGGING_FACE_MARK, name)]:
        state = _from_hugging_face(state, mark.removesuffix(HUGGING_FACE_MARK))
    for mark in [name for name in state if is_last_part(PATCHES, name)]:
        prefix = re.escape(mark.removesuffix(PATCHES))
        if any(re.match(prefix + r"blocks\.0\.0\.norm1\.", name) for name in state):
            # DINOv2 trains `blocks.<chunk>.<block>`; the block's number counts through all chunks.
            state = {re.sub(rf"^({prefix}blocks)\.\d+\.(\d+)\.", r"\1.\2.", n): v for n, v in state.items()}
    return state


def is_last_part(part: str, name: str) -> bool:
    """Whether `name` is `part`, or ends with it after a dot."""
    return name == part or name.endswith(f".{part}")


def _from_hugging_face(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, ours in HUGGING_FACE:
                name, found = re.subn("^" + pattern, ours, name)
                if found:
                    break
            name = prefix + name
        renamed[name] = value
    for first, *others in QKV:
        for name in [name for name in renamed if f".attn.{first}." in name and name.startswith(prefix)]:
            parts = [name, *(name.replace(f".{first}.", f".{part}.") for part in others)]
            if all(part in renamed for part in parts):
                qkv = torch.cat([renamed.pop(part) for part in parts])
                renamed[name.replace(f".{first}.", ".qkv.")] = qkv
    return renamed


def find_networks(state: Iterable[str], own: Iterable[str]) -> list[str]:
    """Find the prefixes, "" included, under which `state` has at least half of a network's `own` names."""
    state, own = set(state), list(own)
    samples = {own[0], own[len(own) // 2], own[-1]}  # several, because another layout may rename some
    prefixes = {name.removesuffix(own) for own in samples for name in state if is_last_part(own, name)}
    return sorted(p for p in prefixes if 2 * sum(p + name in state for name in own) >= len(own))


def select_network(
    state: Iterable[str], own: Iterable[str], key: str | None, source: str, fix: str = ""
) -> str:
    """Return the prefix of the only network in `state`, or of the one that `key` names.

    Of a teacher and a student in one state dict, takes the teacher. Raises UserError if several networks
    fit, with `fix` instead of advice to give --checkpoint_key, or if none has that key.
    """
    prefixes = find_networks(state, own)
    named = [prefix.removesuffix(".") for prefix in prefixes if prefix]
    if key:
        found = [p for p in prefixes if p.startswith(f"{key}.")]
        if not found:
            choices = " or ".join(f"--checkpoint_key {name}" for name in named)
            fix = f"give {choices}" if len(prefixes) > 1 else "leave --checkpoint_key out"
            raise UserError(f"no {key!r} in file", source, fix)
    else:
        found = [p for p in prefixes if p.startswith("teacher.")] or prefixes
    if len(found) > 1:
        choices = " or ".join(f"--checkpoint_key {p.removesuffix('.')}" for p in found if p)
        listed = ", ".join(f"{p}*" for p in found)
        raise UserError(f"{len(found)} networks in file: {listed}", source, fix or f"give {choices}")
    if found:
        return found[0]
    return "backbone." if any(name.startswith("backbone.") for name in state) else ""


def groups(names: Iterable[str]) -> str:
    """Group names by their first part and count them: "projector (4 tensors), queue"."""
    counts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count} tensors)" for name, count in counts.items())


def vit_shapes(state: dict[str, Tensor]) -> dict[str, int]:
    """A ViT's width, patch size and numbers of patches and channels, from a state dict's shapes.

    {} for other networks, also for timm's hybrids, whose patches are those of a convnet's output.
    """
    if any("patch_embed.backbone." in name for name in state):
        return {}
    for name in state:
        if is_last_part(PATCHES, name):
            patches, position = state[name], state.get(name.removesuffix(PATCHES) + "pos_embed")
            if position is not None and position.ndim == 3 and patches.ndim == 4:
                width, in_chans, _, patch_size = patches.shape
                count = max(0, position.shape[1] - 1)
                return {"width": width, "patch_size": patch_size, "patches": count, "in_chans": in_chans}
    return {}
