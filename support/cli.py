"""What the scripts share: the parser and common flags, the start of processes, errors in one line."""

import argparse
import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import operator
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from support import logger
from support.distributed import (
    agree,
    all_gather_object,
    flush_output,
    in_group,
    init_distributed_mode,
    is_first,
    launched_as,
    leave_group,
)
from support.errors import (
    Interrupted,
    TrainingError,
    UserError,
    few,
    first_line,
    lacks_memory,
    reason_of,
    similar,
)
from support.files import without_links
from support.loading import WORKER_DIED, kill_workers
from support.logger import log
from support.pixels import MOST_CHANNELS
from support.signals import SCHEDULERS, start_helper

T = TypeVar("T")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag's default as it is given to the flag, except for switches and empty defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == 0 or action.default in (None, "", []):
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Full flag names only, defaults in the help, and errors in one line from one process.

    `@FILE` stands for the words of an argument file (`read_words`), as in argparse's `fromfile_prefix_chars`;
    an error in one names the file and the line.
    """

    def __init__(self, description: str | None = None, **kwargs):
        """The first line of the description is shown."""
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("usage", "%(prog)s [@FILE] [--flag value ...]")
        kwargs.setdefault("epilog", "@FILE stands for the flags in a file; flags after it override them")
        title = (description or "").partition("\n")[0]
        super().__init__(description=title, allow_abbrev=False, **kwargs)
        self.places: dict[str, list[str]] = {}  # where each word was read
        # argparse takes other negative numbers for flags (https://github.com/python/cpython/issues/59317)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, with the words of files for each `@FILE`."""
        args = sys.argv[1:] if args is None else args
        check_not_empty(args)
        self.places, words = {}, []
        for given in args:
            for word, place in expand(given):
                words.append(word)
                for name in {word, word.partition("=")[0]}:
                    self.places.setdefault(name, []).append(place)
        for action in self._actions:  # argparse has no public list of them
            places = [place for flag in action.option_strings for place in self.places.get(flag, [])]
            sources = [place.partition(", line ")[0] for place in places]  # the command line, and files
            times = max(map(sources.count, sources), default=0)
            is_list = action.nargs == "+" and not isinstance(action, ImageSize)
            if is_list and times > 1:
                say_once(f"warning: {action.option_strings[0]} is given {times} times: only the last counts")
            if COMMAND_LINE in places and places[-1] != COMMAND_LINE:
                what = f"{action.option_strings[0]} of the command line has no effect"
                say_once(f"warning: {what}: {places[-1]} follows it")
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        named = re.match(r"argument (\S+):", message)
        words = named[1].split("/") if named else message.split()
        words = [word for word in words if word.startswith("-")] or words
        places = list(dict.fromkeys(place for word in words for place in self.places.get(word, [])))
        where = "" if places == [COMMAND_LINE] else " or ".join(places)
        fix = "see --help"
        if message.startswith("unrecognized") and (unknown := re.match(r"--\w[\w-]*", words[0])):
            known = [action.dest for action in self._actions if action.option_strings]
            near = similar(unknown[0][2:].replace("-", "_").lower(), known, cutoff=0.7)
            fix = f"did you mean --{', --'.join(near)}?" if near else fix
        exit_with(UserError(message, where, fix))


def check_not_empty(words: Sequence[str]) -> None:
    """End if a flag of the command line has an empty value, which would count as not given.

    After an `@FILE`, it takes back the file's value.
    """
    for before, word in itertools.pairwise(["", *words]):
        if word.startswith("@"):
            return
        if not word or re.fullmatch(r"--\w+=", word):
            flag = word.rstrip("=") or (before if re.fullmatch(r"--\w+", before) else "")
            fix = "set the shell variable that it comes from, or leave it out"
            exit_with(UserError("empty value", flag or "the command line", fix))


# ---------------------------------------------------------------------------------------------
# Argument files
# ---------------------------------------------------------------------------------------------


COMMAND_LINE = "the command line"


def expand(given: str) -> list[tuple[str, str]]:
    """A word of the command line, or the words of its file for `@FILE`, each with its place."""
    if not given.startswith("@"):
        return [(given, COMMAND_LINE)]
    try:
        return read_words(Path(os.path.expanduser(given[1:])))
    except UserError as error:
        exit_with(error)


# Text that a shell keeps (quotes, escapes, comments); group 1: a variable or a command; group 2: a path of
# Windows, whose backslashes a shell drops.
SHELL = re.compile(
    r"""'[^']*'|"(?:[^"\\$`]|\\.|\$(?![\w{(]))*"|\\[^\w.]|(?<!\S)\#.*|(\$[\w{(]\S*|`\S*)|(\\[\w.]\S*)"""
)


def read_words(path: Path) -> list[tuple[str, str]]:
    """Read an argument file: its words, each with "FILE, line N" for messages.

    A line has any number of words, separated and quoted as in a shell; `#` begins a comment. `@FILE` is not
    expanded in it. Raises UserError, also for what a shell would replace.
    """
    if path.exists() and not path.is_file():  # a pipe could be read only once
        raise UserError("not a file", f"@{path}", "name a file of flags")
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # as Python reads its arguments
    except OSError as error:
        raise UserError(f"cannot read: {reason_of(error)}", f"@{path}", "check the path") from None
    if "\0" in text:
        raise UserError("not a text file", f"@{path}", "name a file of flags")
    words = []
    for number, line in enumerate(text.split("\n"), 1):
        place = f"{path}, line {number}"
        try:
            found = split_line(line)
        except ValueError as error:
            raise UserError(str(error), place, "quote as in a shell") from None
        for expansion, dropped in (match.groups() for match in SHELL.finditer(line)):
            if expansion:
                what = f"variables and commands are not replaced in a file: {expansion}"
                raise UserError(what, place, "write the value")  # else $HOME/runs would be a folder's name
            if dropped:  # else C:\runs would be the folder C:runs
                what = f"backslashes count as in a shell: {dropped}"
                raise UserError(what, place, "put the path in single quotes")
        words += [(word, place) for word in found]
    return words


def split_line(line: str) -> list[str]:
    """Split as a shell does, without the comment. Raises ValueError for quotes that do not close.

    Unlike `shlex.split(comments=True)`, keeps a `#` within a word.
    """
    for sign in re.finditer(r"(?<!\S)#", line):
        with contextlib.suppress(ValueError):  # the sign is between quotes
            return shlex.split(line[: sign.start()])
    return shlex.split(line)


def argument_file(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The text of an argument file from which `parser` makes the same `args`."""
    lines = []
    for action in parser._actions:  # argparse has no public list of them
        value, flag = getattr(args, action.dest, None), action.option_strings[0]
        if action.nargs == 0:  # a switch
            lines += [flag] if value else []
        elif isinstance(value, list | tuple):
            lines += [shlex.join([flag, *map(str, value)])] if value else []
        elif value is not None:
            value = str(value).lower() if isinstance(value, bool) else str(value)
            # By itself, a word that begins with - would be taken for a flag.
            lines.append(shlex.join([f"{flag}={value}"] if value.startswith("-") else [flag, value]))
    return "".join(f"{line}\n" for line in lines)


# ---------------------------------------------------------------------------------------------
# Flags that scripts share
# ---------------------------------------------------------------------------------------------


class OneOrMore(argparse.Action):
    """Store one value as it is, and several as a list; for a flag with nargs="+"."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


class ImageSize(OneOrMore):
    """Store one length as it is, the side of a square, and two different ones as a list: height and width."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"takes one length, or height and width, not {len(values)}")
        super().__call__(parser, namespace, values if len(set(values)) > 1 else values[:1], option_string)


def add_size_flag(group, name: str, default: int | None, help: str) -> None:
    """Add a flag for the size of images in pixels: one length, or height and width."""
    kind = number(int, at_least=1)
    group.add_argument(
        name, default=default, type=kind, nargs="+", action=ImageSize, metavar=("H", "W"), help=help
    )


def add_data_flags(parser: argparse.ArgumentParser, folder: str, demo: str, split: str = "") -> None:
    """Add the flags that select the images; `folder` and `demo` complete their help.

    `split` is the help of `--split`, for a script that reads one part of a dataset.
    """
    # fmt: off
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="", nargs="+", action=OneOrMore,
        help=f"{folder}; several are joined; with --dataset, the folder that holds the dataset")
    group.add_argument("--dataset", default="",
        help="a torchvision dataset by class name, e.g. FashionMNIST or Flowers102")
    if split:
        group.add_argument("--split", default="", help=split)
    group.add_argument("--download", action="store_true",
        help="download what is missing of --dataset; several machines have to share --data_path")
    group.add_argument("--demo", action="store_true", help=demo)
    group.add_argument("--num_workers", default=10, type=number(int, at_least=0),
        help="data-loading workers per process; increase while the log shows more than a few per cent of the "
             "time spent on data; at most one per core")
    # fmt: on


def add_weights_flags(
    parser: argparse.ArgumentParser,
    arch: str = "vit_small",
    patch_size: int = 16,
    rgb_only: bool = False,
    seed_of: str = "the weights of --pretrained_weights random",
) -> None:
    """Add the flags that select a frozen network; a flag that is not given is None; and `--seed`.

    The help names `arch` and `patch_size` as what the script takes if the file does not say it, and
    `seed_of`, what `--seed` decides. A script with `rgb_only` images needs no flags of their format.
    """
    # fmt: off
    group = parser.add_argument_group("weights")
    group.add_argument("--pretrained_weights", default="",
        help="a file of weights; or a published model by name (dino_vits16, ...), which is downloaded; or a "
             "baseline: random (an untrained network) or pixels (no network)")
    group.add_argument("--checkpoint_key", default=None,
        help="teacher or student, or another network in the file by its prefix, e.g. momentum_backbone "
             "(default: the teacher, or the only network)")
    group.add_argument("--arch", default=None,
        help="architecture: one of our ViTs, or a torchvision or timm model by name (default: the file's, "
             f"else {arch})")
    group.add_argument("--patch_size", default=None, type=number(int, at_least=1),
        help=f"pixels per patch side, for our ViTs only (default: the file's, else {patch_size})")
    group.add_argument("--seed", default=0, type=seed, help=f"seed of {seed_of}")
    if rgb_only:
        return
    group.add_argument("--in_chans", default=None, type=number(int, at_least=1, at_most=MOST_CHANNELS),
        help="number of channels of the images (default: the file's, else 3)")
    group.add_argument("--value_range", default=None, type=number(float), nargs="+", metavar=("LOW", "HIGH"),
        help="for random and pixels: values that become the grey levels 0 and 255, as in training (default: "
             "the file's, else 8-bit values as they are)")
    # fmt: on


def add_concat_flag(group, instead_of: str) -> None:
    """Add `--concat_patchtokens`, whose features stand `instead_of` others."""
    # fmt: off
    group.add_argument("--concat_patchtokens", default=False, type=bool_flag,
        help=f"concatenate all patch tokens of the last block, instead of {instead_of}: they keep positions, "
             "which suits small aligned images; for our ViTs and timm's models")
    # fmt: on


def add_launch_flags(group) -> None:
    """Add the flags of the process group."""
    # fmt: off
    group.add_argument("--dist_url", default="env://",
        help="rendezvous of the process group, as in torch.distributed")
    group.add_argument("--local_rank", "--local-rank", default=0, type=int,
        help="accepted and ignored; the launcher's environment decides")
    # fmt: on


# The type that autocast uses for each value of --precision; None: no autocast.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def bool_flag(value: str) -> bool:
    """Parse `true`, `on`, `1` or `false`, `off`, `0`."""
    words = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if value.lower() not in words:
        raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")
    return words[value.lower()]


def number(
    kind: type,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], float]:
    """Build an argparse type for a finite int or float within these bounds; an int is also below 2**31."""
    bounds = {"at least": at_least, "at most": at_most, "above": above, "below": below}
    if kind is int and at_most is None and below is None:
        bounds["below"] = 2**31  # torch takes no larger sizes
    holds = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            words = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        for words, bound in bounds.items():
            if bound is not None and not holds[words](value, bound):
                raise argparse.ArgumentTypeError(f"must be {words} {bound}, not {text}")
        return value

    return parse


def number_or_auto(text: str) -> float | str:
    """Parse a finite number, or the word auto."""
    return text if text == "auto" else number(float)(text)


seed = number(int, at_least=0, below=2**63)  # what torch takes


def make_folder(path: str | Path, flag: str = "output_dir") -> Path:
    """Create the folder for a run's files if it does not exist; returns it without links, which could lead to
    the files of another run later. Raises UserError if it is not writable.
    """
    folder = Path(os.path.expanduser(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)  # fails for a link to a disk that is not mounted
        folder = Path(without_links(folder))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(reason_of(error), f"--{flag} {path}", "choose another") from None
    return folder


def data_folder(data_path: str, fix: str) -> Path:
    """The folder of an evaluation's own layout. Raises UserError, with this advice if none is given."""
    if not data_path:
        raise UserError("no data given", "--data_path", fix)
    folder = Path(without_links(os.path.expanduser(data_path)))
    if not folder.is_dir():
        raise UserError("no such folder", f"--data_path {data_path}", "check the path")
    return folder


# Flags that may differ between processes: places on a machine, whose contents are compared; how one computes;
# what the published `init_distributed_mode` adds.
LOCAL_FLAGS = {
    "data_path", "distractors_path", "whitening_path", "pretrained_weights", "knn_data", "download",
    "num_workers", "cpu_threads", "dist_url", "local_rank", "rank", "world_size", "gpu",
}  # fmt: skip


def join_processes(args: argparse.Namespace) -> torch.device:
    """Join the group if there are several processes, and choose this one's device.

    Raises UserError, also if the processes have different flags, except for LOCAL_FLAGS.
    """
    device = init_distributed_mode(args.dist_url)
    flags = {name: str(value) for name, value in vars(args).items() if name not in LOCAL_FLAGS}
    others = all_gather_object(flags)
    different = [name for name in flags if any(other.get(name) != flags[name] for other in others)]
    agree("flags", few([f"--{name} {flags[name]}" for name in different]))
    return device


def leaves_work_to_first() -> bool:
    """Whether this process is not the first of several, of which one does all the work; says so."""
    rank, world_size, _ = launched_as()
    if rank:
        what = f"process {rank} of {world_size} has nothing to do: the first one does all the work"
        print(
            f"note: {what}; if this is the only one, unset RANK and WORLD_SIZE", file=sys.stderr, flush=True
        )
    return rank > 0


def say(error: UserError) -> None:
    """Print the error in one line, from the first rank or, if only one rank knows of it, from that one.

    Before there is a group, from the first process of each machine.
    """
    if is_first(of_machine=True) or error.alone:  # the command may be wrong on one machine alone
        with contextlib.suppress(OSError):  # its reader has ended, or the disk is full
            print(f"{error.label}: {error}", file=sys.stderr, flush=True)


@functools.cache
def say_once(line: str) -> None:
    """Print a line that is not an error, from the first rank, once: some scripts parse their flags twice."""
    if is_first():
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def exit_with(error: UserError) -> NoReturn:
    """End the process; the first rank says why."""
    say(error)
    sys.exit(error.exit_code)


# How to save memory, by flag; a message names the flags that the script has.
MEMORY_ADVICE = {
    "batch_size_per_gpu": "lower --batch_size_per_gpu",
    "grad_checkpointing": "add --grad_checkpointing",
    "use_cuda": "give --use_cuda false",
    "image_size": "lower --image_size",
}


def as_user_error(error: Exception, args: object = None) -> UserError | None:
    """Turn an error that the machine caused, not the program, into one clear line; None for others.

    `args` are the script's flags, for advice.
    """
    before = error.__context__
    if isinstance(error, RuntimeError) and isinstance(before, RuntimeError):
        error = before if str(before).startswith(WORKER_DIED) else error  # e.g. within torch.save
    message = first_line(error)
    if lacks_memory(error):
        fix = " or ".join(words for name, words in MEMORY_ADVICE.items() if hasattr(args, name))
        fix = fix or "close other programs"
        return TrainingError(f"out of memory: {message}", "", fix, alone=True)
    if message.startswith(WORKER_DIED):
        what = f"a data-loading worker died: {message}"
        return Interrupted(what, "", "run the same command to resume", alone=True)
    if "Duplicate GPU detected" in str(error):  # NCCL's words
        return UserError("several processes use one GPU", "", "start one process per GPU")
    if (dist.is_available() and isinstance(error, dist.DistError)) or "/gloo/" in message:
        message = re.sub(r"^\[\S+\] ", "", message).split(". ")[0]  # without gloo's place in its source
        if cause := re.search(r"Last error:\s*(\S.*)", str(error)):  # NCCL's words
            message += f": {cause[1].strip()}"
        return Interrupted(f"lost another process: {message}", "", "run the same command to resume")
    if message.startswith("Could not determine home directory"):
        return UserError("no home directory for a path that begins with ~", "", "write the path in full")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        asked = getattr(args, "compile", False)  # else torch.export compiles
        where, fix = ("--compile", "leave it out") if asked else ("", "use another network or format")
        return UserError(f"cannot compile the network: {message}", where, fix)
    if isinstance(error, OSError):
        fix = "correct this, then run the same command"
        return TrainingError(error.strerror or message, str(error.filename or ""), fix, alone=True)
    return None


def warn_no_effect(
    args: argparse.Namespace, parser: argparse.ArgumentParser, rules: Iterable[tuple[str, object, str]]
) -> None:
    """Warn of flags that differ from their defaults but have no effect, given the other flags.

    A rule is a flag's name, whether it has no effect, and the reason.
    """
    for name, holds, reason in rules:
        both = getattr(args, name), parser.get_default(name)
        value, default = (list(each) if isinstance(each, tuple) else each for each in both)
        if value != default and holds:
            log(f"warning: --{name} has no effect: {reason}")


def run_script(main: Callable[[T], object], args: T, resumable: bool = False) -> None:
    """Call `main(args)`; print an error that the user can correct in one line, and exit.

    A `resumable` script exits with 75 ("resume me") on a scheduler's signal that `main` does not handle.
    """
    for number in SCHEDULERS if resumable else ():
        if signal.getsignal(number) is signal.SIG_DFL:  # keep a handler of submitit
            signal.signal(number, _end_by_signal)
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    start_helper()
    others = set(multiprocessing.active_children())  # of the notebook or program that runs the script
    goes_on = ", which resumes if anything is saved" if resumable else " to begin again"
    try:
        main(args)
        logger.write()  # what is still to be flushed
        if logger.lost and not resumable:  # it may have been the result
            raise logger.lost[0]
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        stop = Interrupted("at once, by Ctrl-C", "", f"run the same command{goes_on}")
        stop.exit_code = 130  # what a shell reports for SIGINT
        end_at_once(stop)
    except BrokenPipeError:  # the program that reads our output has ended, as `head` does
        stop = Interrupted("the reader of the output has ended", "", f"run the same command{goes_on}")
        stop.exit_code = 141  # what a shell reports for SIGPIPE
        end_at_once(stop)
    except Exception as error:
        outside = as_user_error(error, args)
        if outside is None:
            raise
        end_at_once(outside)
    finally:
        kill_workers(set(multiprocessing.active_children()) - others)
        if logger.lost and resumable:
            say_once(f"warning: some output was lost: {reason_of(logger.lost[0])}")
        flush_output()
        leave_group()


def _end_by_signal(signum: int, _):
    """Handle a signal outside of training: there is nothing to finish and nothing to save."""
    for number in SCHEDULERS:  # `timeout` and `srun` may send it twice
        signal.signal(number, signal.SIG_IGN)
    what = f"by {signal.Signals(signum).name}, outside of training"
    end_at_once(Interrupted(what, "", "run the same command to resume"))


def end_at_once(error: UserError):
    """End the process without leaving the group, which would wait for processes that may be dead."""
    if in_group():
        say(error)
        kill_workers(multiprocessing.active_children())
        os._exit(error.exit_code)
    exit_with(error)
