"""What a run leaves in its folder, and how it goes on from there with the same bits.

`checkpoint.pth` is the newest state, `checkpoint_prev.pth` the one before, `log.txt` a line of JSON
per epoch, `curves.png` its picture. The pieces of a run are objects with `state_dict` and `load_state_dict`.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from support.distributed import (
    all_gather_object,
    get_rank,
    get_world_size,
    is_main_process,
    main_process_first,
)
from support.errors import TrainingError, UserError
from support.logger import log
from support.weights import load_checkpoint, load_strictly, replacing, save_checkpoint

CHECKPOINT, PREVIOUS, DAMAGED = "checkpoint.pth", "checkpoint_prev.pth", "checkpoint_damaged.pth"

# Flags that may differ between a run and its restart: they leave the maths as it is.
FREE_FLAGS = {
    "data_path", "download", "num_workers", "output_dir", "saveckp_freq", "save_every_steps", "max_steps",
    "allow_changed_args", "cpu_threads", "dist_url", "local_rank", "demo", "use_fp16", "precision",
    "init_from", "augment_on", "compile", "grad_checkpointing", "knn_every", "knn_data", "knn_share",
    "tensorboard",
}  # fmt: skip


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a run to continue."""
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS))


class RandomStates:
    """The global random generators of this process; their states are saved for all ranks."""

    def state_dict(self) -> list[dict]:
        """A state per rank. All ranks have to call this together."""
        own = {"python": random.getstate(), "torch": torch.get_rng_state()}
        kind, words, *rest = np.random.get_state()
        own["numpy"] = (kind, words.tolist(), *rest)
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        return all_gather_object(own)

    def load_state_dict(self, states: list[dict]) -> None:
        """Take this rank's state; a rank that did not exist when it was saved keeps its own."""
        if get_rank() >= len(states):
            return
        own = states[get_rank()]
        version, words, gauss = own["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(own["numpy"]))
        torch.set_rng_state(own["torch"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])


def identity(args: dict, num_images: int, dtype: torch.dtype | None, schedules: dict) -> dict:
    """All that decides the maths of a run, by name; the schedules as digests."""
    own = {name: value for name, value in args.items() if name not in FREE_FLAGS}
    own |= {"world_size": get_world_size(), "images": num_images, "dtype": str(dtype or torch.float32)}
    for name, values in schedules.items():
        own[f"{name} schedule"] = hashlib.sha256(np.ascontiguousarray(values)).hexdigest()[:12]
    return json.loads(json.dumps(own))  # lists for tuples, plain numbers: as they compare


def changed(old: dict, new: dict) -> dict[str, tuple]:
    """What differs, {name: (old, new)}, among the names that both know."""
    differ = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    # The schedules follow from the flags, so they speak only where no flag does.
    flags = {name: pair for name, pair in differ.items() if not name.endswith(" schedule")}
    return flags or differ


def newest_whole(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read, None if there is none at all.

    A damaged one is named and put aside. Raises UserError where all are damaged.
    """
    damaged: UserError | None = None
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if not path.exists():
            continue
        if not os.access(path, os.R_OK):  # nothing to fall back from
            raise UserError("no permission to read", str(path), "change its permissions")
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            log(f"warning: {error}")
            damaged = damaged or error
            continue
        if damaged:
            log(f"warning: going on from {path}; the damaged file is now {DAMAGED}")
            if is_main_process():  # else the next save would put it in the place of this one
                os.replace(folder / CHECKPOINT, folder / DAMAGED)
        return path, checkpoint
    if damaged:
        raise damaged
    return None


def resume(
    folder: Path, pieces: dict, run_identity: dict, allow_changed_args: bool = False
) -> tuple[int, int]:
    """Load the newest whole checkpoint of `folder`, if there is one, into the pieces.

    Returns where the run stands: the epoch, and how many images of it all ranks have seen.
    `run_identity` is what `identity` gives; a checkpoint with another one is a UserError
    unless `allow_changed_args`. Raises UserError also for states that do not fit.
    """
    with main_process_first():
        found = newest_whole(folder)
    path, checkpoint = found or (folder / CHECKPOINT, {"epoch": 0, "step": 0})
    steps = all_gather_object(checkpoint.get("step"))
    if any(step != steps[0] for step in steps):
        raise UserError(
            f"processes see checkpoints of different steps: {steps}",
            f"--output_dir {folder}",
            "put it on a file system that all machines share",
        )
    if found is None:
        return 0, 0

    known = checkpoint.get("identity") or checkpoint.get("args")
    differences = changed(known, run_identity) if isinstance(known, dict) else {}
    listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in differences.items())
    if differences and not allow_changed_args:
        fix = "give the old values, another --output_dir, or --allow_changed_args"
        raise UserError(f"flags differ from those of the checkpoint: {listed}", str(path), fix)
    if differences:
        log(f"warning: going on with {listed}: from here on {consequences(differences)} differ")

    epoch, seen = checkpoint.get("epoch"), (checkpoint.get("sampler") or {}).get("seen", 0)
    missing = [name for name in ("student", "teacher", "optimizer") if name not in checkpoint]
    if missing or not isinstance(epoch, int) or epoch < 0:
        lacks = ", ".join(missing or ["epoch"])
        raise UserError(f"checkpoint lacks {lacks}", str(path), "give another --output_dir")
    for name, piece in pieces.items():
        if checkpoint.get(name) is None:  # the published format knows fewer
            continue
        if isinstance(piece, torch.amp.GradScaler) and not checkpoint[name]:  # until now, in full precision
            continue
        try:
            if isinstance(piece, nn.Module):
                load_strictly(piece, checkpoint[name], f"{path}: {name}")
            else:
                piece.load_state_dict(checkpoint[name])
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{name} does not fit: {reason}", str(path), "give another --output_dir"
            ) from None
    log(f"resuming {path} at step {checkpoint.get('step', '?')}, epoch {epoch}")
    return epoch, seen


def consequences(names: Iterable[str]) -> str:
    """In words, what a change of these flags makes different."""
    groups = {
        "the schedules": {
            "epochs", "batch_size_per_gpu", "accum_steps", "world_size", "images", "lr", "min_lr",
            "warmup_epochs", "weight_decay", "weight_decay_end", "momentum_teacher",
            "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "freeze_last_layer"},
        "the order and the views of the images": {
            "batch_size_per_gpu", "accum_steps", "world_size", "images", "dataset", "seed",
            "global_crops_scale", "local_crops_scale", "local_crops_number", "global_crops_size",
            "local_crops_size"},
    }  # fmt: skip
    found = [what for what, flags in groups.items() if flags & set(names)]
    if set(names) - set().union(*groups.values()):
        found.append("the networks' updates")
    return ", ".join(found)


def save_run(
    folder: Path, state: dict, record: dict | None = None, keep_as: str = "", last: bool = False
) -> None:
    """Write a run's checkpoint, before it the epoch's line of log.txt and a numbered copy, if any.

    In this order, a run that is killed in between makes up for what is missing.
    """
    if record:
        save_record(folder, record, last)
    if keep_as:
        try_to_write(folder / keep_as, lambda path: save_checkpoint(state, path), last)
    try_to_write(folder / CHECKPOINT, lambda path: save_checkpoint(state, path, folder / PREVIOUS), last)


def save_record(folder: Path, record: dict, last: bool = False) -> None:
    """Write an epoch's line of log.txt."""
    try_to_write(folder / "log.txt", lambda path: add_record(record, path), last)


def try_to_write(path: Path, write: Callable[[Path], None], last: bool = False) -> None:
    """Call `write(path)`; a failure of the disk is a warning, as it may pass before the next save; at
    the `last` one, a TrainingError.
    """
    try:
        write(path)
    except OSError as error:
        what = f"cannot save: {error.strerror or error}"
        if last:
            raise TrainingError(
                what, str(path), "mend it and start again; the earlier checkpoint is whole"
            ) from None
        log(f"warning: {what} ({path}): training goes on, and tries again at the next save")


def read_log(path: Path) -> list[dict]:
    """The epochs' records in log.txt, without lines that are not of ours."""
    return [record for _, record in _lines(path) if record]


def add_record(record: dict, path: Path) -> None:
    """Append a line of JSON, in place of lines of its epoch or later ones from before a restart."""
    kept = [line for line, old in _lines(path) if not old or old["epoch"] < record["epoch"]]
    with replacing(path) as file:
        for line in [*kept, json.dumps(record)]:
            file.write(f"{line}\n".encode())


def _lines(path: Path) -> Iterator[tuple[str, dict | None]]:
    """The lines of log.txt and what they say, None for one that is not of ours."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            yield line, record if isinstance(record["epoch"], int) else None
        except (ValueError, KeyError, TypeError):
            yield line, None
