"""Saves a run to its folder, and resumes it from there with the same bits.

`checkpoint.pth` is the newest state, `checkpoint_prev.pth` the one before, `log.txt` has a line of JSON
per epoch. The pieces of a run are objects with `state_dict` and `load_state_dict`.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from support.checkpoints import load_checkpoint, save_checkpoint
from support.distributed import (
    all_gather_object,
    is_main_process,
    main_process_first,
    same_error_on_all_ranks,
)
from support.errors import TrainingError, UserError, few, first_line, reason_of
from support.files import replacing
from support.lock import FolderLock
from support.logger import log
from support.weights import load_strictly


class Run(contextlib.AbstractContextManager):
    """A run's folder: resumes from it and saves to it.

    `required` names the pieces that a checkpoint has to hold; a warning names others that it lacks. `advice`
    is what to try when the weights are not finite; with None, weights are saved without that check.
    """

    def __init__(
        self,
        folder: Path,
        required: Sequence[str],
        suffix: str = ".pth",
        log_name: str = "log.txt",
        advice: str | None = "lower the learning rate",
    ):
        self.folder, self.required, self.suffix, self.advice = folder, required, suffix, advice
        self.checkpoint = folder / f"checkpoint{suffix}"
        self.previous = folder / f"checkpoint_prev{suffix}"
        self.damaged = folder / f"checkpoint_damaged{suffix}"
        self.log_file = folder / log_name
        self.lock = FolderLock(folder / f".checkpoint{suffix}.lock")
        self.pieces: dict = {}
        self.identity: dict = {}
        self.unwritten: list[dict] = []  # records that a disk error keeps out of the log
        self.changed = ""  # how the identity differs from that of the run it resumes

    def exists(self) -> bool:
        """Whether there is a run to resume."""
        return self.checkpoint.exists() or self.previous.exists()

    def recorded_args(self) -> dict:
        """The flags in the newest checkpoint that can be read; {} for a new run."""
        for path in (self.checkpoint, self.previous):
            with contextlib.suppress(UserError):  # `resume` says what is wrong with it
                recorded = load_checkpoint(path).get("args")
                return recorded if isinstance(recorded, dict) else {}  # else another program's
        return {}

    def __exit__(self, *_):
        self.lock.release()

    # ---- resume

    def resume(
        self, pieces: dict, identity: dict, allow_changed: bool | None = None, added: dict | None = None
    ) -> dict:
        """Load the newest whole checkpoint, if there is one, into the pieces; all ranks call this together.

        From here to the end of the run's `with` block no other run can use the folder. `identity` holds
        everything that determines the run's maths, by name. Returns what the checkpoint holds besides the
        pieces, {} for a new run. Raises UserError for states that do not fit, and for a checkpoint with
        another identity unless `allow_changed`, which is None for a script without such a flag. `added`
        gives the values for older checkpoints that lack a part of the identity.
        """
        self.pieces, self.identity = pieces, comparable(identity)
        with same_error_on_all_ranks(), main_process_first():
            if is_main_process():
                self._check_output()
                self.lock.acquire()
            found = self.newest_whole()
            if found is None:
                self._check_unused()
        path, checkpoint = found or (self.checkpoint, {"step": 0})
        steps = all_gather_object(checkpoint.get("step", checkpoint.get("epoch")))
        if any(step != steps[0] for step in steps):
            what = f"processes see checkpoints of different steps: {steps}"
            fix = "put it on a file system that all machines share"
            raise UserError(what, f"--output_dir {self.folder}", fix)
        if found is None:
            return {}
        self._check_identity(checkpoint, added or {}, path, allow_changed)
        self._load(checkpoint, path)
        if self.advice and (ruined := self._ruined()):
            raise UserError(ruined, str(path), f"remove it to resume from {self.previous.name}")
        step = f"step {checkpoint['step']}, " if "step" in checkpoint else ""
        log(f"resuming {path} at {step}epoch {checkpoint['epoch']}")
        if is_main_process():
            logged = {record["epoch"] for record in read_log(self.log_file)}
            ended = checkpoint["epoch"]  # any number, if the file is not ours
            if lost := ended - sum(0 <= epoch < ended for epoch in logged):
                first = next(epoch for epoch in itertools.count() if epoch not in logged)
                count = f"{lost} of {ended} epochs, e.g. epoch {first}"
                log(f"warning: {self.log_file} lacks {count}: was it changed?")
        return {name: value for name, value in checkpoint.items() if name not in pieces}

    def newest_whole(self) -> tuple[Path, dict] | None:
        """Read the newest checkpoint that is not damaged; None if there is no checkpoint.

        Logs and renames a damaged one. Raises UserError if all are damaged.
        """
        damaged: UserError | None = None
        for path in (self.checkpoint, self.previous):
            if not path.exists():
                if path.is_symlink():
                    fix = "restore that file, or remove the link"
                    raise UserError("links to a file that is not there", str(path), fix)
                continue
            if not os.access(path, os.R_OK):  # not damaged, so do not fall back to the one before
                raise UserError("no permission to read", str(path), "change its permissions")
            try:
                checkpoint = load_checkpoint(path)
            except UserError as error:
                log(f"warning: {error}")
                damaged = damaged or error
                continue
            if damaged:
                log(f"warning: resuming from {path}; the damaged file is now {self.damaged.name}")
                if is_main_process():  # else the next save would replace the sound one by it
                    os.replace(self.checkpoint, self.damaged)
            return path, checkpoint
        if damaged:
            raise damaged
        return None

    def _check_output(self) -> None:
        """Raise UserError if a shell writes what we print to our log, whose replacement it would not see."""
        for stream in (1, 2):
            with contextlib.suppress(OSError):  # no log yet, or no output
                if os.path.samestat(os.fstat(stream), os.stat(self.log_file)):
                    what, fix = "the output is redirected to the run's own log", "redirect it to another file"
                    raise UserError(what, str(self.log_file), fix)

    def _check_unused(self) -> None:
        """Raise UserError if a new run would overwrite what an earlier one left, other than its first epoch.

        A run that is killed while it saves its first epoch leaves that, and goes on here.
        """
        numbered = sorted(self.folder.glob(f"checkpoint[0-9]*{self.suffix}"))
        kept = [path for path in numbered if path.name != f"checkpoint0000{self.suffix}"]
        if any(record["epoch"] > 0 for record in read_log(self.log_file)):
            kept.insert(0, self.log_file)
        if kept:
            what = f"an earlier run left {few([path.name for path in kept])}, but no {self.checkpoint.name}"
            fix = "move them away, or give another folder"
            raise UserError(what, f"--output_dir {self.folder}", fix)

    def _check_identity(self, checkpoint: dict, added: dict, path: Path, allow_changed: bool | None) -> None:
        recorded = recorded_identity(checkpoint)
        known = comparable(added | recorded)
        changed = [name for name in self.identity if name in known and known[name] != self.identity[name]]
        listed = ", ".join(f"{name} {known[name]} -> {self.identity[name]}" for name in changed)
        if changed and not allow_changed:
            fix = "give the old values or another --output_dir"
            fix += "" if allow_changed is None else ", or --allow_changed_args"
            raise UserError(f"this differs from the run to resume: {listed}", str(path), fix)
        if changed:
            self.changed = listed
            log(f"warning: resuming with {listed}: a new run would give another result")
        lacking = [name for name in self.identity if name not in known]  # of an earlier version
        if lacking:
            what = ", ".join(lacking) if recorded else "settings"
            log(f"warning: {path} does not record {what}: the run may have begun with other values")
        for name, value in recorded.items() if checkpoint.get("identity") else ():
            if name not in self.identity | added:
                log(f"warning: {path} records {name} {value}, which this version does not compare")

    def _load(self, checkpoint: dict, path: Path) -> None:
        fix = "give another --output_dir"
        missing = [name for name in self.required if checkpoint.get(name) is None]
        epoch = checkpoint.get("epoch")
        if missing or not isinstance(epoch, int) or epoch < 0:
            raise UserError(f"checkpoint lacks {', '.join(missing or ['epoch'])}", str(path), fix)
        absent = [name for name in self.pieces if checkpoint.get(name) is None]
        if absent:  # the published format has fewer
            log(f"warning: {path} has no {', '.join(absent)}: starting from their initial state")
        for name, piece in self.pieces.items():
            if name in absent:
                continue
            if isinstance(piece, torch.amp.GradScaler) and not checkpoint[name]:
                continue  # saved without loss scaling, in full precision
            try:
                if isinstance(piece, nn.Module):
                    load_strictly(piece, checkpoint[name], f"{path}: {name}", fix)
                else:
                    if isinstance(piece, torch.optim.Optimizer):
                        check_optimizer(piece, checkpoint[name])
                    piece.load_state_dict(checkpoint[name])
            except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
                raise UserError(f"{name} does not fit: {first_line(error)}", str(path), fix) from None

    # ---- save

    def save(self, values: dict, records: Sequence[dict] = (), keep_as: str = "", last: bool = False) -> None:
        """Write the checkpoint: the pieces' states, the identity, and `values`. Rank 0 writes.

        First writes the epoch's `records` to the log and a numbered copy `keep_as`, if given. In this order,
        a run killed in between rewrites what is missing when it resumes. A disk error is a warning; at the
        `last` save it is a TrainingError, on all ranks, which call this together.
        """
        if self.advice and (ruined := self._ruined()):  # on all ranks, whose weights are the same
            raise TrainingError(f"{ruined}: not saved", str(self.folder), self.advice)
        with same_error_on_all_ranks():
            if is_main_process():
                self._write(values, records, keep_as, last)

    def _write(self, values: dict, records: Sequence[dict], keep_as: str, last: bool) -> None:
        self.lock.check()
        self.write_records(records, last)
        state = {name: piece.state_dict() for name, piece in self.pieces.items()}
        state |= values | {"identity": self.identity}
        if keep_as:
            with try_to_write(self.folder / keep_as, last):
                save_checkpoint(state, self.folder / keep_as)
        with try_to_write(self.checkpoint, last):
            save_checkpoint(state, self.checkpoint, self.previous)

    def _ruined(self) -> str | None:
        """Describe weights that are not finite, or whose squares are not; None if there are none.

        A step can ruin the weights after a finite loss. In float16, a scaler skips such steps and lowers
        its scale: if it vanishes, no step is left.
        """
        for name, piece in self.pieces.items():
            if isinstance(piece, torch.amp.GradScaler) and piece.get_scale() < 1e-3:  # 1 if off
                return f"gradients were not finite at any scale ({name}: {piece.get_scale():.1e})"
            tensors = list(piece.state_dict().values()) if isinstance(piece, nn.Module) else []
            largest = [tensor.float().abs().max() for tensor in tensors if tensor.numel()]
            size = torch.stack(largest).max().item() if largest else 0.0  # NaN if one is
            if not size**2 < torch.finfo(torch.float32).max:
                too_large = f"as large as {size:.1e}" if math.isfinite(size) else "that are not finite"
                return f"{name} has weights {too_large}"
        return None

    def write_records(self, records: Sequence[dict], last: bool = False) -> None:
        """Write an epoch's records to the log, after those that it lacks. Rank 0 writes."""
        if records and is_main_process():
            earlier = [record for record in self.unwritten if record["epoch"] < records[0]["epoch"]]
            self.unwritten = [*earlier, *records]
            with try_to_write(self.log_file, last):
                add_records(self.unwritten, self.log_file)
                self.unwritten = []


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Raise ValueError if another kind of optimizer saved the state; torch would take over its settings."""
    own, saved = (set(groups[0]) for groups in (optimizer.param_groups, state["param_groups"]))
    if {"betas", "dampening", "eta"} & own - saved:  # of Adam, SGD and LARS
        raise ValueError("another optimizer saved it")


def recorded_identity(checkpoint: dict) -> dict:
    """What a checkpoint records of its run: its identity; from the published code, its flags. Else {}."""
    recorded = checkpoint.get("identity") or checkpoint.get("args")
    return recorded if isinstance(recorded, dict) else {}  # else another program's


def comparable(identity: dict) -> dict:
    """The identity as JSON keeps it, with lists for tuples."""
    return json.loads(json.dumps(identity, default=str))


@contextlib.contextmanager
def try_to_write(path: Path, last: bool = False) -> Iterator[None]:
    """Make a disk error of the block, which writes `path`, a warning, since the next save may succeed.

    On the `last` save it is a TrainingError.
    """
    try:
        yield
    except OSError as error:
        what = f"cannot save: {reason_of(error)}"
        if last:
            fix = "free some disk space, then run the same command; the earlier checkpoint is whole"
            raise TrainingError(what, str(path), fix) from None
        log(f"warning: {what} ({path}): training goes on and tries again at the next save")


# ---------------------------------------------------------------------------------------------
# log.txt
# ---------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict]:
    """Read the epochs' records in the log; skips lines that we did not write."""
    return [record for _, record in _lines(path) if record]


def add_records(records: Sequence[dict], path: Path) -> None:
    """Append lines of JSON; drop earlier lines of their epoch and of later ones, from before a restart."""
    kept = [line for line, old in _lines(path) if not old or old["epoch"] < records[0]["epoch"]]
    with replacing(path) as file:
        for line in [*kept, *map(json.dumps, records)]:
            file.write(f"{line}\n".encode(errors="surrogateescape"))


def _lines(path: Path) -> Iterator[tuple[str, dict | None]]:
    """Yield the lines of the log and their records, None for a line that we did not write."""
    for line in path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            yield line, record if isinstance(record["epoch"], int) else None
        except (ValueError, KeyError, TypeError, RecursionError):
            yield line, None
