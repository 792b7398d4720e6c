"""Break training for real, and see that nothing is lost and nothing bad is let in.

    python -m tests.faults                  # 125 kills, all bad inputs, all silent faults
    python -m tests.faults --short          # a few of each, for the tests
    python -m tests.faults --only silent    # one section

Prints tables in Markdown, for docs/faults.md. Exit code 1 if anything in them is not as it should be.

Each training is a process of its own, killed by SIGKILL. Most are forked from this one, which has
imported torch already: the same program, seconds sooner. Every tenth is started by its command.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import eval_knn
import eval_linear
import main_dino
import visualize_attention
from support import cli
from support.backbones import build_backbone
from support.checkpoints import load_checkpoint
from support.errors import UserError
from support.restart import Run
from tests.conftest import ROOT, TINY, free_port, save_images
from tests.test_weights import hugging_face, prefixed

NOBODY = 65534  # root may do everything, so that permissions are tested as somebody else


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def fork(program, argv: list[str], said: Path, environment: dict | None = None, as_nobody=False) -> int:
    """A process that runs `program` with these flags; its output goes to a file. Returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.environ |= environment or {}
        if as_nobody:
            os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
        try:
            cli.run_script(program.main, program.parse_args(argv), resumable=program is main_dino)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a child, negative for a signal; None if it goes on for longer than that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def launch(argv: list[str], ranks: int, said: Path, by_command: bool = False) -> list[int]:
    """The processes of one training."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    children = []
    for rank in range(ranks):
        environment = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        own = said.with_suffix(f".{rank}")
        if by_command:
            with open(own, "w") as output:
                child = subprocess.Popen(
                    [sys.executable, "main_dino.py", *argv],
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            children.append(child.pid)
            child.returncode = 0  # waited for by its id, like the others
        else:
            children.append(fork(main_dino, argv, own, environment))
    return children


# ---------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------


def differing_bits(one: Path, other: Path) -> int:
    """Tensors, and lines of the log but for the speed, that differ between two finished runs."""

    def flatten(state, name=""):
        if isinstance(state, dict):
            for key, value in state.items():
                yield from flatten(value, f"{name}/{key}")
        elif isinstance(state, torch.Tensor):
            yield name, state

    def log(folder: Path) -> list[dict]:
        records = [json.loads(line) for line in (folder / "log.txt").open()]
        return [{k: v for k, v in record.items() if "per_second" not in k} for record in records]

    parts = "student", "teacher", "optimizer", "dino_loss"
    tensors = []
    for folder in (one, other):
        checkpoint = load_checkpoint(folder / "checkpoint.pth")
        tensors.append(dict(flatten({part: checkpoint[part] for part in parts})))
    differ = sum(not torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    return differ + (log(one) != log(other)) + (tensors[0].keys() != tensors[1].keys())


def unreadable(folder: Path) -> int:
    """Checkpoints in the folder that do not load."""
    count = 0
    for path in folder.glob("*.pth"):
        try:
            load_checkpoint(path)
        except UserError:
            count += 1
    return count


def comes_to_say(words: str, child: int, said: Path) -> bool:
    """Wait for the words in a child's output; False if it ends without them."""
    while words not in (said.read_text() if said.exists() else ""):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.005)
    return True


def strike(children: list[int], folder: Path, aim: str, rng: random.Random) -> bool:
    """Kill one of the processes: at "any" instant, or in a "write". True if it hit a write."""
    temporary = [folder / f".{name}.tmp" for name in ("checkpoint.pth", "log.txt")]
    deadline = time.monotonic() + (30 if aim == "write" else rng.uniform(0.05, 2.5))
    writing = {path: path.stat().st_mtime_ns for path in temporary if path.exists()}  # of an earlier strike
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False  # it has finished
        if aim == "write" and any(
            path.exists() and writing.get(path) != path.stat().st_mtime_ns for path in temporary
        ):
            time.sleep(rng.uniform(0, 0.03))
            break
        time.sleep(0.0002)
    victim = children[0] if aim == "write" else rng.choice(children)
    before = {path for path in temporary if path.exists() and writing.get(path) != path.stat().st_mtime_ns}
    kill(victim)
    return victim == children[0] and bool(before & {path for path in temporary if path.exists()})


def kill_runs(work: Path, ranks: int, workers: int, kills: int, epochs: int, rng: random.Random) -> dict:
    """Kill a small training again and again; the row of the table."""
    data = work / "data"
    if not data.exists():
        save_images(data, 48)
    flags = [
        *TINY, "--data_path", str(data), "--num_workers", str(workers), "--epochs", str(epochs),
        "--saveckp_freq", "2", "--drop_path_rate", "0.3", "--save_every_steps", "2",
        "--batch_size_per_gpu", str(4 // ranks),
    ]  # fmt: skip
    whole = work / f"whole_{ranks}_{workers}"
    codes = [ended(c, 300) for c in launch([*flags, "--output_dir", str(whole)], ranks, work / "said")]
    assert codes == [0] * ranks, (work / "said.0").read_text()

    row = {"processes": ranks, "workers": workers, "kills": 0, "in a write": 0, "runs": 0,
           "unreadable": 0, "differ": 0, "seconds": 0.0, "bad": 0}  # fmt: skip
    lives = 0
    while row["kills"] < kills or row["runs"] == 0:
        folder = work / f"run_{ranks}_{workers}_{row['runs']}"
        while True:
            lives += 1
            argv = [*flags, "--output_dir", str(folder)]
            for old in work.glob("said.[0-9]"):
                old.unlink()
            children = launch(argv, ranks, work / "said", by_command=lives % 10 == 0)
            if row["kills"] < kills:
                folder.mkdir(exist_ok=True)
                if len(children) > 1 or lives % 10 == 0:
                    # The processes are a group by then: before that, only a launcher knows of a death.
                    comes_to_say("from step", children[0], work / "said.0")
                hit = strike(children, folder, "write" if lives % 2 else "any", rng)
            began = time.monotonic()
            codes = [ended(child, 120) for child in children]
            killed = -signal.SIGKILL in codes
            row["kills"] += killed
            row["in a write"] += killed and hit
            if killed and ranks > 1:
                row["seconds"] = max(row["seconds"], time.monotonic() - began)
            row["unreadable"] += unreadable(folder)
            # Not of a killed one, whose data-loading workers may complain.
            texts = [
                (work / f"said.{rank}").read_text()
                for rank, code in enumerate(codes)
                if code != -signal.SIGKILL
            ]
            # A process whose partner was killed says so and ends with 75: resume me.
            if None in codes or set(codes) - {0, -signal.SIGKILL, 75} or "Traceback" in "".join(texts):
                row["bad"] += 1
                print(f"codes {codes}\n" + "\n".join(texts), file=sys.stderr)
                for child in children:
                    kill(child)
                if row["bad"] > 3:
                    return row
            if set(codes) == {0}:
                break
        row["runs"] += 1
        row["differ"] += differing_bits(whole, folder)
        shutil.rmtree(folder)
    return row


def kill_table(work: Path, kills: int, epochs: int, pairs: list[tuple[int, int]], rng: random.Random) -> bool:
    """Run each pair of processes and workers and print the table; True if all is well."""
    print("| processes | workers | kills | of them in a write | files ever unreadable | runs finished "
          "| bits different | survivors ended after |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    rows = []
    for ranks, workers in pairs:
        row = kill_runs(work, ranks, workers, -(-kills // len(pairs)), epochs, rng)
        rows.append(row)
        after = f"at most {row['seconds']:.1f} s" if ranks > 1 else ""
        print(f"| {ranks} | {workers} | {row['kills']} | {row['in a write']} | {row['unreadable']} "
              f"| {row['runs']} | {row['differ']} | {after} |", flush=True)  # fmt: skip
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    print(f"| **all** | | **{total['kills']}** | **{total['in a write']}** | **{total['unreadable']}** "
          f"| **{total['runs']}** | **{total['differ']}** | |\n")  # fmt: skip
    return total["kills"] >= kills and not (total["unreadable"] or total["differ"] or total["bad"])


# ---------------------------------------------------------------------------------------------
# Bad inputs
# ---------------------------------------------------------------------------------------------


def pixels(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def truncated(path: Path) -> None:
    Image.fromarray(pixels(200, 150)).save(path)
    path.write_bytes(path.read_bytes()[:4000])


def exif_rotated(path: Path) -> None:
    image = Image.fromarray(pixels(60, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def animated(path: Path) -> None:
    frames = [Image.fromarray(pixels(40, 40)) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def palette_with_alpha(path: Path) -> None:
    Image.fromarray(pixels(40, 40)).quantize(16).save(path, transparency=bytes(range(0, 256, 16)))


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)  # 50 kB that want 1.2 GB


def loop_of_links(path: Path) -> None:
    path.with_suffix("").symlink_to(path.parent.parent, target_is_directory=True)


def forbidden(path: Path) -> None:
    Image.fromarray(pixels(40, 40)).save(path)
    path.chmod(0)


IMAGES: dict[str, tuple[str, Callable[[Path], None], int]] = {
    # what it is: (name, how it is made, whether it counts as unreadable)
    "truncated JPEG": ("bad.jpg", truncated, 1),
    "zero bytes": ("bad.png", lambda path: path.write_bytes(b""), 1),
    "text named .jpg": ("bad.jpg", lambda path: path.write_text("no image\n" * 50), 1),
    "random bytes after a PNG signature": ("bad.png", lambda path: path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(500)), 1),
    "CMYK JPEG": ("odd.jpg", lambda path: Image.fromarray(pixels(40, 40)).convert("CMYK").save(path), 0),
    "16-bit grey PNG": ("odd.png", lambda path: Image.fromarray(
        np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40).save(path), 0),
    "32-bit float TIFF": ("odd.tiff", lambda path: Image.fromarray(
        np.zeros((40, 40), np.float32)).save(path), 1),
    "palette with alpha": ("odd.png", palette_with_alpha, 0),
    "grey with alpha": ("odd.png", lambda path: Image.fromarray(pixels(40, 40, 2)).save(path), 0),
    "EXIF-rotated": ("odd.jpg", exif_rotated, 0),
    "animated WebP": ("odd.webp", animated, 0),
    "1 x 1": ("odd.png", lambda path: Image.fromarray(pixels(1, 1)).save(path), 0),
    "20,000 x 10": ("odd.png", lambda path: Image.fromarray(pixels(20_000, 10)).save(path), 0),
    "decompression bomb": ("bad.png", bomb, 1),
    "dangling link": ("bad.png", lambda path: path.symlink_to("/nowhere.png"), 1),
    "link to the folder above": ("odd.png", loop_of_links, 0),
    "named pipe": ("bad.png", os.mkfifo, 1),
    "name that is no text": ("bad\udcff.png", lambda path: path.write_bytes(b"x"), 1),
    "no permission": ("bad.png", forbidden, 1),
}  # fmt: skip


class Payload:
    """Unpickled, it would leave a folder behind."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def cut(text: str, length: int = 200) -> str:
    """The text, or its first words."""
    return text if len(text) <= length else f"{text[: length - 4].rpartition(' ')[0]} ..."


class BadInputs:
    """Gives bad inputs to real processes and notes what comes back."""

    def __init__(self, work: Path, rng: random.Random):
        self.work, self.rng, self.ok = work, rng, True
        self.is_root = os.geteuid() == 0
        self.data = work / "good"
        save_images(self.data, 24)
        self.flags = [*TINY, "--data_path", str(self.data)]

    def row(self, what: str, came: str, ok: bool) -> None:
        self.ok &= ok
        came = came.replace(str(self.work), "...").replace("|", "/")
        print(f"| {what} | {came} | {'yes' if ok else '**no**'} |", flush=True)

    def run(
        self, argv: list, program=main_dino, as_nobody=False, meanwhile=None, environment: dict | None = None
    ) -> tuple[int | None, str]:
        """Exit code (None: it hangs) and output of a process; `meanwhile` happens while it runs."""
        said = self.work / "said"
        said.unlink(missing_ok=True)
        child = fork(program, [str(a) for a in argv], said, environment, as_nobody)
        if meanwhile:
            meanwhile(child, said)
        code = ended(child, 120)
        if code is None:
            kill(child)
        return code, said.read_text(errors="replace")

    def expect(self, what: str, argv: list, code: int, words: str, **how) -> str:
        """A row for a process that should end with this code and say these words."""
        ended_with, said = self.run(argv, **how)
        said_it = [line for line in said.splitlines() if words in line]
        ok = ended_with == code and bool(said_it) and "Traceback" not in said
        came = said_it[0].strip() if said_it else " ".join(said.splitlines()[-2:])
        self.row(what, f"exit {ended_with}: `{cut(came)}`", ok)
        return said

    def new(self, name: str) -> Path:
        """An empty folder, for everybody."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        folder.chmod(0o777)
        return folder

    # ---- images

    def images(self) -> None:
        # An epoch may have nine that are replaced, and root has all permissions: hence three runs.
        groups: dict[tuple[int, bool], list[str]] = {}
        for what, (_, _, bad) in IMAGES.items():
            groups.setdefault((bad, what == "no permission"), []).append(what)
        for (bad, forbidden), members in groups.items():
            folder = self.new("images")
            save_images(folder / "many", 20)
            for number, what in enumerate(members):
                name, make, _ = IMAGES[what]
                (folder / str(number)).mkdir()
                make(folder / str(number) / name)
            argv = [*TINY, "--data_path", folder, "--output_dir", self.new("out"), "--epochs", "1"]
            code, said = self.run(argv, as_nobody=forbidden and self.is_root)
            log = self.work / "out" / "log.txt"
            count = json.loads(log.read_text())["unreadable"] if log.exists() else -1
            named = [
                what
                for number, what in enumerate(members)
                if f"warning: cannot read {folder / str(number)}/" in said
            ]
            came = f"exit {code}: {len(named)} replaced by another image, named and counted, the rest read"
            found = 20 + len(members) - ("link to the folder above" in members)
            ok = code == 0 and named == members * bad and count == len(named) and f"{found} images" in said
            ok &= "Traceback" not in said and "Warning" not in said
            self.row(f"images: {', '.join(members)}", came, ok)
        folder = self.new("images")
        for split in ("train", "val"):
            save_images(folder / split / "a", 3)
        truncated(folder / "val" / "a" / "bad.jpg")
        argv = [
            "--data_path",
            folder,
            "--pretrained_weights",
            "random",
            "--arch",
            "vit_nano",
            "--num_workers",
            0,
        ]
        self.expect("image to evaluate on: truncated", argv, 2, "error: cannot read image", program=eval_knn)

    # ---- folders

    def folders(self) -> None:
        out = ["--output_dir", self.new("out")]
        argv = [*TINY, *out, "--data_path"]
        self.expect("`--data_path` does not exist", [*argv, "/nowhere"], 2, "error: no such file or folder")
        self.expect("`--data_path` is a file", [*argv, __file__], 2, 'error: no such file: """')
        self.expect("`--data_path` without images", [*argv, self.new("empty")], 2, "error: no images found")
        dataset = self.new("dataset")
        for split in ("train", "val"):
            save_images(dataset / split, 1)
        self.expect(
            "`--data_path` with train/ and val/", [*argv, dataset], 2, "error: folder has train/ and val/"
        )
        loop = self.work / "loop"
        loop.symlink_to(loop)
        self.expect("`--data_path` is a link to itself", [*argv, loop], 2, "error: no such file or folder")
        self.expect(
            "`--output_dir` is a file", [*self.flags, "--output_dir", __file__], 2, "error: File exists"
        )
        self.expect(
            "`--output_dir` below a file", [*self.flags, "--output_dir", f"{__file__}/x"], 2, "error: Not a"
        )
        if not self.is_root:
            return self.row(
                "folders without permission, full disks", "not tried: only root can make them", True
            )
        closed = self.new("closed")
        save_images(closed / "inner", 3)
        (closed / "inner").chmod(0)
        for what, flags, words in (
            ("a folder of images that cannot be listed", [*argv, closed], "error: Permission denied"),
            ("`--data_path` that cannot be entered", [*argv, closed / "inner"], "error: no such file or"),
            ("`--output_dir` that cannot be written", [*self.flags, "--output_dir", closed],
             "error: Permission denied"),
        ):  # fmt: skip
            self.expect(what, flags, 2, words, as_nobody=True)
            closed.chmod(0)

    # ---- flags

    def parse_and_check(self, argv: list[str]) -> bool:
        """True if accepted; asserts that a refusal is one error in one line, and exit code 2."""
        said, code = io.StringIO(), 0
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                main_dino.check_args(main_dino.parse_args(argv))
            except UserError as error:
                code, message = 2, f"error: {error}\n"
                said.write(message)
            except SystemExit as end:
                code = end.code
        if "--help" in argv and code == 0:
            return False
        # A flag that is given twice is named before the error, once in a process.
        lines = [line for line in said.getvalue().splitlines() if not line.startswith("warning: --")]
        refused = len(lines) == 1 and lines[0].startswith("error: ")
        assert code == 0 or (code == 2 and refused), argv
        return code == 0

    def fuzzed_flags(self, examples: int, runs: int) -> None:
        flags = [action.option_strings[0] for action in main_dino.get_args_parser()._actions]
        numbers = st.one_of(st.integers(), st.integers(-3, 70), st.floats(), st.floats(0, 2))
        words = st.one_of(
            numbers.map(str), st.text(max_size=8), st.sampled_from(["true", "0", "vit_nano", "adamw"])
        )
        argv = st.lists(st.tuples(st.sampled_from(flags), words), max_size=4).map(
            lambda pairs: [token for pair in pairs for token in pair]
        )
        accepted = []

        how = {"deadline": None, "database": None, "derandomize": True}

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck), **how)
        @given(argv)
        def fuzz(argv):
            accepted.append(self.parse_and_check(argv))

        try:
            fuzz()
            came, ok = (
                f"{len(accepted) - sum(accepted)} refused in one line, exit 2; {sum(accepted)} accepted",
                True,
            )
        except Exception as error:
            came, ok = f"`{error!r}`", False
        self.row(f"{len(accepted)} random command lines", came, ok)

        values = ["-1", "0", "1", "2", "3", "0.5", "nan", "inf", "1e30", "999999999"]
        codes = []
        skip = {
            "--download",
            "--demo",
            "--data_path",
            "--output_dir",
            "--dataset",
            "--dist_url",
            "--num_workers",
        }
        for _ in range(runs):
            given_flags = self.rng.sample([f for f in flags if f not in skip], 2)
            pairs = [token for flag in given_flags for token in (flag, self.rng.choice(values))]
            argv = [*self.flags, "--output_dir", self.new("out"), "--max_steps", "2", *pairs]
            code, said = self.run(argv)
            codes.append(code)
            if code not in (0, 1, 2) or "Traceback" in said or (code and "error: " not in said):
                self.row(f"`{' '.join(pairs)}`", f"exit {code}: `{said[-300:]}`", False)
        came = ", ".join(f"{codes.count(code)} with exit {code}" for code in sorted(set(codes), key=str))
        self.row(f"{runs} real runs with random values of real flags", came, set(codes) <= {0, 1, 2})

    # ---- checkpoints

    def checkpoints(self, examples: int) -> None:
        run, whole = self.new("run"), self.new("whole")
        argv = [*self.flags, "--output_dir"]
        assert self.run([*argv, whole])[0] == 0
        assert self.run([*argv, run, "--max_steps", "8"])[0] == 0
        names = "checkpoint.pth", "checkpoint_prev.pth", "log.txt"
        saved = {name: (run / name).read_bytes() for name in names}

        def reset(**changed: bytes | None) -> None:
            for path in run.iterdir():
                path.unlink()
            for name, content in (saved | {f"{k}.pth": v for k, v in changed.items()}).items():
                if content is not None:
                    (run / name).write_bytes(content)

        half = saved["checkpoint.pth"][: len(saved["checkpoint.pth"]) // 2]
        flipped = bytearray(saved["checkpoint.pth"])
        flipped[len(flipped) // 2] ^= 1
        for what, content in (
            ("truncated", half), ("of zero bytes", b""), ("of random bytes", self.rng.randbytes(5000)),
            ("with one bit flipped in a weight", bytes(flipped)), ("that is missing", None),
        ):  # fmt: skip
            reset(checkpoint=content)
            code, said = self.run([*argv, run])
            same = code == 0 and differing_bits(whole, run) == 0
            kept = content is None or (run / "checkpoint_damaged.pth").read_bytes() == content
            from_previous = f"resuming {run / 'checkpoint_prev.pth'} at step 6" in said
            came = f"exit {code}: goes on from `checkpoint_prev.pth`, {'same' if same else 'OTHER'} bits"
            ok = same and kept and from_previous and "Traceback" not in said
            self.row(f"`checkpoint.pth` {what}", came, ok)
        reset(checkpoint=half, checkpoint_prev=half[:-9])
        self.expect("both checkpoints truncated", [*argv, run], 2, "error: file is damaged")
        untouched = (run / "checkpoint.pth").read_bytes() == half
        self.row("... and afterwards", "both files as they were", untouched)

        for position, what in (
            ("checkpoint", "in `--output_dir`"),
            ("weights", "`--init_from`"),
            ("weights", "to evaluate"),
        ):
            marker = self.work / "owned"
            reset(checkpoint_prev=None)
            evil = run / f"{position}.pth"
            torch.save({"student": {"w": Payload(marker)}, "teacher": Payload(marker)}, evil)
            flags = (
                [*argv, run] if position == "checkpoint" else [*argv, self.new("out"), "--init_from", evil]
            )
            program = main_dino
            if what == "to evaluate":
                program, flags = eval_knn, ["--pretrained_weights", evil, "--demo", "--num_workers", 0]
            self.expect(f"a pickle with code, {what}", flags, 2, "error: file contains", program=program)
            self.row("... and afterwards", "the code has not run", not marker.exists())

        right = load_checkpoint(whole / "checkpoint.pth")
        structures = {
            "is a list": [1, 2],
            "lacks the student": {name: value for name, value in right.items() if name != "student"},
            "has a number for the student": right | {"student": 5},
            "has numbers for weights": right | {"student": {"a": 5}},
            "has another optimizer": right | {"optimizer": {}},
            "has a word for the epoch": right | {"epoch": "two"},
        }
        for what, structure in structures.items():
            reset(checkpoint_prev=None)
            torch.save(structure, run / "checkpoint.pth")
            self.expect(f"a checkpoint that {what}", [*argv, run], 2, "error: ")

        same, fell_back, wrong = 0, 0, 0
        good = torch.load(io.BytesIO(saved["checkpoint.pth"]), weights_only=True)["teacher"]
        for _ in range(examples):
            content = bytearray(saved["checkpoint.pth"])
            for _ in range(self.rng.choice([1, 1, 3, 30])):
                place = self.rng.randrange(len(content))
                if self.rng.random() < 0.1:
                    del content[place : place + self.rng.randrange(1, 2000)]
                elif self.rng.random() < 0.1:
                    content[place:place] = self.rng.randbytes(self.rng.randrange(1, 2000))
                else:
                    content[place] = self.rng.randrange(256)
            reset(checkpoint=bytes(content))
            with contextlib.redirect_stdout(io.StringIO()):
                path, found = Run(run, required=()).newest_whole()
            if path.name == "checkpoint_prev.pth":
                fell_back += 1
            elif all(torch.equal(value, found["teacher"][name]) for name, value in good.items()):
                same += 1
            else:
                wrong += 1
        self.row(f"{examples} checkpoints with random bytes changed, cut out, put in",
                 f"{fell_back} named, and the one before used; {same} loaded with all weights as they were "
                 f"(unused bytes); {wrong} loaded with others", wrong == 0)  # fmt: skip

    # ---- disks

    def disks(self) -> None:
        out = self.new("out")

        def once_training(act: Callable[[], None], when: str = "epoch 0"):
            def meanwhile(child: int, said: Path) -> None:
                if comes_to_say(when, child, said):
                    act()

            return meanwhile

        argv = [*self.flags, "--output_dir", out, "--epochs", "4"]
        self.expect("`--output_dir` vanishes during training", argv, 0, "was removed",
                    meanwhile=once_training(lambda: out.rename(self.work / "moved")))  # fmt: skip
        self.row(
            "... and afterwards",
            "the checkpoint is there",
            load_checkpoint(out / "checkpoint.pth")["step"] == 24,
        )
        if not self.is_root:
            return
        out = self.new("out")
        argv = [*self.flags, "--output_dir", out, "--epochs", "4"]
        self.expect("`--output_dir` becomes read-only", argv, 1, "warning: cannot save: Permission",
                    as_nobody=True, meanwhile=once_training(lambda: out.chmod(0o555), "epoch 1"))  # fmt: skip
        self.row("... and afterwards", "an earlier checkpoint is whole; exit 1 because the last is not there",
                 unreadable(out) == 0 and (out / "checkpoint.pth").exists())  # fmt: skip
        disk = self.new("disk")
        megabytes = 3.4 * len(self.one_checkpoint()) / 2**20  # for old, new and the one before
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes:.0f}m", "none", disk])
        if mounted.returncode:
            return self.row("full disk", "not tried: nothing can be mounted here", True)
        try:
            argv = [*self.flags, "--output_dir", disk, "--epochs", "4", "--saveckp_freq", "0"]
            full = "warning: cannot save: No space left"
            filled = once_training(lambda: fill(disk), "epoch 1")
            self.expect("disk full from the second epoch on", argv, 1, full, meanwhile=filled)
            self.row("... and afterwards", "an earlier checkpoint is whole, no half-written file is left",
                     unreadable(disk) == 0 and (disk / "checkpoint.pth").exists()
                     and not (disk / ".checkpoint.pth.tmp").exists())  # fmt: skip
            (disk / "filler").unlink()
            self.expect("the same command once there is room", argv, 0, "resuming")
            for path in disk.iterdir():
                path.unlink()
            filled = once_training(lambda: self.full_for_a_while(disk), "epoch 1")
            self.expect("disk full for a while", argv, 0, full, meanwhile=filled)
        finally:
            subprocess.run(["umount", disk], check=True)

    def one_checkpoint(self) -> bytes:
        path = self.work / "whole" / "checkpoint.pth"
        if not path.exists():  # else of `checkpoints`
            assert self.run([*self.flags, "--output_dir", path.parent])[0] == 0
        return path.read_bytes()

    def full_for_a_while(self, disk: Path) -> None:
        fill(disk)
        while "cannot save" not in (self.work / "said").read_text():
            time.sleep(0.01)
        (disk / "filler").unlink()


def fill(disk: Path) -> None:
    """Leave no room."""
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# ---------------------------------------------------------------------------------------------
# Silent faults
# ---------------------------------------------------------------------------------------------

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}


def save_colours(folder: Path, count: int, names=tuple(COLOURS), mode: str = "RGB") -> None:
    """Class folders of images that are told apart by their colour."""
    rng = np.random.default_rng(count)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-30, 30, (5, 5, 3)) + COLOURS[name]
            image = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((40, 40))
            image = image.quantize(16) if mode == "P" else image.convert(mode)
            image.save(folder / name / f"{i}.png")


def link_to_each_other(folder: Path) -> None:
    for name in "ab":
        save_images(folder / name, 10, seed=ord(name))
    (folder / "a" / "to_b").symlink_to("../b", target_is_directory=True)
    (folder / "b" / "to_a").symlink_to("../a", target_is_directory=True)


def with_hidden_names(folder: Path) -> None:
    save_images(folder, 20)
    save_images(folder / ".ipynb_checkpoints", 3)
    for path in folder.glob("*.png"):
        (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7 the Finder's notes")


def with_jfif(folder: Path) -> None:
    save_images(folder, 20)
    for path in sorted(folder.iterdir())[:14]:
        Image.open(path).save(path.with_suffix(".jfif"), "JPEG")
        path.unlink()
    (folder / "notes.txt").write_text("fourteen were renamed by a browser")


def arrays(make: Callable[[np.random.Generator], Image.Image], extension: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(24):
            make(rng).save(folder / f"{i}.{extension}")

    return save


def nearly_identical(folder: Path) -> None:
    save_images(folder, 1)
    for i in range(1, 24):
        shutil.copy(folder / "000.png", folder / f"{i:03}.png")


def train_and_test(folder: Path) -> None:
    for split in ("train", "test"):
        save_images(folder / split, 24)


# What a folder of training images is, how it is made, the exit code, and what is said.
TRAINING_FOLDERS: list[tuple[str, Callable[[Path], None], int, str]] = [
    ("hidden files of a Mac and of Jupyter", with_hidden_names, 0, "20 images (.png 20); left out 21 hidden"),
    ("folders that link to each other", link_to_each_other, 0, "20 images (.png 20)"),
    ("14 of 20 images are `.jfif`", with_jfif, 0, "(.jfif 14, .png 6); left out 1 file (.txt 1)"),
    ("16-bit images that use 12 bits", arrays(lambda rng: Image.fromarray(
        rng.integers(0, 4096, (40, 40), dtype=np.uint16)), "png"), 0, "have 16 bits but use 12 of them"),
    ("four-band images", arrays(lambda rng: Image.fromarray(
        rng.integers(0, 256, (40, 40, 4), dtype=np.uint8), "RGBX"), "tif"), 0, "lose 1 of 4 bands"),
    ("transparent images", arrays(lambda rng: Image.fromarray(
        rng.integers(0, 256, (40, 40, 4), dtype=np.uint8)), "png"), 0, "lose transparency"),
    ("black images", arrays(lambda rng: Image.new("L", (40, 40), 3), "png"), 0, "are nearly constant"),
    ("nearly identical images", nearly_identical, 0, "are nearly identical to another one"),
    ("`train/` beside `test/`", train_and_test, 2, "error: folder has train/ and test/"),
]  # fmt: skip

# Training flags, the exit code, and what is said.
TRAINING_FLAGS = [
    ("a freeze beyond the training", "--freeze_last_layer 5", 2, "too long for --epochs 2"),
    ("a freeze of all of a trial", "--max_steps 4", 0, "keeps the prototypes frozen"),
    ("a warm-up of the temperature in 0 epochs", "--warmup_teacher_temp 0.02", 0, "has no effect"),
    ("`--knn_data` without `--knn_every`", "--knn_data x", 0, "--knn_data has no effect"),
    ("batch norm that gets one value per channel",
     "--arch resnet18 --batch_size_per_gpu 1 --local_crops_number 1 --max_steps 2", 2, "error: batch norm"),
    ("an architecture that begins with `vit_large`", "--arch vit_large", 2, "did you mean vit_large_patch"),
]  # fmt: skip


def weight_files() -> list[tuple[str, object, list[str], int, str]]:
    """What a file of weights is, its content, flags, the exit code, and what is said."""
    torch.manual_seed(0)
    one, two = (build_backbone("vit_nano", 8, 32)[0].state_dict() for _ in range(2))
    both = {"state_dict": prefixed(one, "backbone.") | prefixed(two, "momentum_backbone.")}
    recorded = {"arch": "vit_nano", "patch_size": np.int64(8), "lr": np.float64(0.1), "from": Path("a/b")}
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5\nsize 86728949\n"
    key = ["--checkpoint_key", "momentum_backbone"]
    chosen = "state_dict.momentum_backbone, vit_nano, patch 8"
    read = "vit_nano, patch 8"
    return [
        ("two networks in a file", both, [], 2, "error: 2 networks in file: backbone.*, momentum_backbone.*"),
        ("the same, with the choice", both, key, 0, chosen),
        ("a word among the teacher's tensors", {"teacher": one | {"note": "x"}, "student": two}, [], 2,
         "contains values that are not tensors: note (str)"),
        ("unknown leftovers", prefixed(one, "backbone.") | {"adapter.weight": torch.ones(2)}, [], 2,
         "error: parts of unknown purpose in file: adapter"),
        ("a projector left over", one | {"projector.weight": torch.ones(2)}, [], 0, "projector"),
        ("NumPy values and a path in a checkpoint", {"teacher": one, "args": recorded}, [], 0, read),
        ("weights of `torch.compile` in DDP", prefixed(one, "module._orig_mod."), [], 0, read),
        ("Hugging Face's layout", hugging_face(one), [], 0, read),
        ("a Git LFS pointer", pointer, [], 2, "error: file is a Git LFS pointer"),
        ("a web page", b"<!DOCTYPE html><html>Sign in</html>", [], 2, "error: file is a web page"),
    ]  # fmt: skip


def odd_features() -> list[tuple[str, dict[str, torch.Tensor], int, str]]:
    """What saved features are, tensors in place of good ones, the exit code, and what is said."""
    features, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    return [
        ("negative labels", {"trainlabels": labels - 1}, 2, "error: labels are not whole numbers from 0"),
        ("labels with fractions", {"testlabels": labels + 0.5}, 2, "error: labels are not whole numbers"),
        ("rows of any length", {"trainfeat": features * torch.arange(1, 9)[:, None]}, 0, "normalised to 1"),
        ("NaN", {"testfeat": features * torch.nan}, 2, "error: features are not finite"),
        ("a row of zeros", {"trainfeat": features * (torch.arange(8)[:, None] > 0)}, 2, "of length 0"),
        ("other weights beside them", {}, 0, "--pretrained_weights has no effect"),
    ]


class SilentFaults(BadInputs):
    """Faults that other projects, and earlier versions of this one, pass over: exit 0 and a wrong result, a
    hang, or a traceback. Each is to be named, refused, or handled right. A `short` run has some of them.
    """

    def __init__(self, work: Path, rng: random.Random, short: bool):
        super().__init__(work, rng)
        self.most = 2 if short else None
        self.classes = work / "classes"
        save_colours(self.classes / "train", 5)
        save_colours(self.classes / "val", 3)
        self.labelled = ["--num_workers", 0, "--data_path", self.classes]
        self.pixels = ["--pretrained_weights", "pixels", "--image_size", 8]

    def command(self, argv: list, program=main_dino) -> str:
        """The command, as the table shows it: without small sizes, and folders by their last names."""
        words = f" {' '.join(map(str, argv))} ".replace(f"{self.work}/", "")
        for flag, value in [("--num_workers", "0"), *zip(TINY[::2], TINY[1::2], strict=True)]:
            words = words.replace(f" {flag} {value} ", " ", 1)
        return f"`{program.__name__}.py ... {words.strip()}`"

    def expect(self, what: str, argv: list, code: int, words: str, program=main_dino, **how) -> str:
        what = f"{what}: {self.command(argv, program)}"
        return super().expect(what, argv, code, words, program=program, **how)

    def all(self) -> None:
        """All kinds, each in a method; in a short run, those that take seconds."""
        short = [self.training_folders, self.weights, self.saved_features, self.ranks]
        rest = [self.training_flags, self.other_images, self.classes_by_name, self.preprocessing]
        rest += [self.attention, self.ruined_weights, self.two_runs, self.shells, self.waiting]
        for kind in short if self.most else [*short, *rest]:
            kind()

    # ---- training

    def training_folders(self) -> None:
        for what, make, code, words in TRAINING_FOLDERS[: self.most]:
            folder = self.work / "images"
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            argv = [*TINY, "--data_path", folder, "--output_dir", self.new("out"), "--epochs", 1]
            self.expect(what, argv, code, words)

    def training_flags(self) -> None:
        for what, flags, code, words in TRAINING_FLAGS:
            argv = [*self.flags, "--output_dir", self.new("out"), *flags.split()]
            self.expect(what, argv, code, words)
        out = self.new("out")
        place = self.flags.index("--warmup_epochs")
        flags = self.flags[:place] + self.flags[place + 2 :]  # the default, as most users have it
        argv = [*flags, "--output_dir", out, "--epochs", 1]
        self.expect("one epoch", argv, 0, "--warmup_epochs shortened from 10 to 0.1")
        prototypes = [load_checkpoint(out / "checkpoint.pth")["student"]["head.last_layer.weight_v"]]
        self.run([*argv, "--output_dir", self.new("out"), "--max_steps", 1])
        prototypes.append(load_checkpoint(out / "checkpoint.pth")["student"]["head.last_layer.weight_v"])
        moved = (prototypes[0] - prototypes[1]).abs().max().item()
        self.row("... and afterwards", f"the prototypes have moved by {moved:.1e}", moved > 0)

    def other_images(self) -> None:
        """Another folder with as many images, and with the same classes, into an existing folder."""
        other, out, moved = self.new("other"), self.new("out"), self.work / "moved"
        save_images(other, 24, seed=1)
        assert self.run([*self.flags, "--output_dir", out])[0] == 0
        argv = [*TINY, "--data_path", other, "--output_dir", out]
        self.expect("training goes on with as many other images", argv, 2, "digest of the images")
        shutil.copytree(self.data, moved)
        argv = [*TINY, "--data_path", moved, "--output_dir", out]
        self.expect("training goes on with the same images, which were moved", argv, 0, "resuming")
        other, probe = self.new("other"), self.new("probe")
        save_colours(other / "train", 5, names=sorted(COLOURS, reverse=True))
        save_colours(other / "val", 4)
        argv = [*self.pixels, "--output_dir", probe, "--epochs", 2, "--num_workers", 0, "--data_path"]
        assert self.run([*argv, self.classes], eval_linear)[0] == 0
        self.expect("a linear probe goes on with other images of the same classes", [*argv, other], 2,
                    "training images", program=eval_linear)  # fmt: skip

    def ruined_weights(self) -> None:
        """The last step ruins the weights, by a learning rate that is far too high."""
        out = self.new("out")
        argv = [*self.flags, "--output_dir", out, "--lr", 1e30, "--clip_grad", 0, "--max_steps"]
        assert self.run([*argv, 1])[0] == 0  # during the first step, the rate is 0
        self.expect("weights ruined by the last step", [*argv, 2], 1, "student has weights as large as")
        kept = load_checkpoint(out / "checkpoint.pth")
        self.row("... and afterwards", f"the checkpoint of step {kept['step']} is there", kept["step"] == 1)
        argv[argv.index(1e30)] = 1e20  # too high as well, which the weights do not show
        self.new("out")
        assert self.run([*argv, 1])[0] == self.run([*argv, 2])[0] == 0
        words = "checkpoint.pth to resume from checkpoint_prev.pth"
        self.expect("the loss is not finite at once after a restart", [*argv, 3], 1, words)

    # ---- evaluation

    def classes_by_name(self) -> None:
        out, part, more = self.new("probe"), self.new("part"), self.new("more")
        for folder, names in ((part, ("green", "red")), (more, COLOURS)):
            shutil.copytree(self.classes / "train", folder / "train")
            save_colours(folder / "val", 3, names)
        (more / "val" / "red").rename(more / "val" / "rouge")
        train = [*self.pixels, "--lr", 1, "--epochs", 20, "--num_workers", 0, "--output_dir", out]
        assert self.run([*train, "--data_path", self.classes], eval_linear)[0] == 0
        knn = [*self.pixels, "--nb_knn", 3, "--num_workers", 0]
        evaluate = [*self.pixels, "--num_workers", 0, "--output_dir", out, "--evaluate"]
        train[-1] = self.new("other")
        for what, program, argv, folder, code, words in [
            ("lacks a class", eval_linear, evaluate, part, 0, "top-1 100.00 %"),
            ("has an unknown class", eval_linear, evaluate, more, 2, "classifier does not know 1 class"),
            ("lacks a class", eval_knn, knn, part, 0, "Top1: 100.0"),
            ("lacks a class", eval_linear, train, part, 0, "Best accuracy: top-1 100.00 %"),
            ("has an unknown class", eval_knn, knn, more, 2, "val has classes that train lacks: rouge"),
        ]:  # fmt: skip
            self.expect(f"`val/` {what}", [*argv, "--data_path", folder], code, words, program=program)

    def weights(self) -> None:
        argv = ["--nb_knn", 3, *self.labelled, "--pretrained_weights"]
        for number, (what, content, flags, code, words) in enumerate(weight_files()[: self.most]):
            path = self.work / f"weights{number}.pth"
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
            self.expect(what, [*argv, path, *flags], code, words, program=eval_knn)
        url = "https://example.com/weights.pth"
        self.expect("a URL", [*argv, url], 2, "error: URLs are not downloaded", program=eval_knn)
        trained = self.work / "out" / "checkpoint.pth"
        assert self.run([*self.flags, "--output_dir", self.new("out"), "--max_steps", 3])[0] == 0
        argv = [*self.flags, "--output_dir", self.new("started"), "--max_steps", 1, "--init_from", trained]
        self.expect("the centre belongs to the head", argv, 0, "backbone, head, centre")

    def preprocessing(self) -> None:
        import timm

        path, folder = self.work / "timm.pth", self.new("palettes")
        arch = "vit_tiny_patch16_224"  # which timm trained with another mean and deviation than ImageNet's
        torch.save(timm.create_model(arch).state_dict(), path)
        argv = ["--nb_knn", 3, *self.labelled, "--pretrained_weights", path, "--arch", arch]
        words = "224 pixels, mean (0.5, 0.5, 0.5), deviation (0.5, 0.5, 0.5)"
        self.expect("weights that want other pixels", argv, 0, words, program=eval_knn)
        shutil.copytree(self.classes / "train", folder / "train")
        save_colours(folder / "val", 3, mode="P")
        argv = [*self.pixels, "--nb_knn", 3, "--num_workers", 0, "--data_path", folder]
        self.expect("images with a palette", argv, 0, "Top1: 100.0", program=eval_knn)
        shutil.rmtree(folder / "val")
        save_colours(folder / "val", 3, mode="RGBA")
        self.expect("images with alpha", argv, 0, "Top1: 100.0", program=eval_knn)
        argv = ["--n_last_blocks", 2, "--epochs", 1, "--image_size", 32, *self.labelled]
        argv += ["--output_dir", self.new("probe"), "--pretrained_weights", "random", "--arch", "resnet18"]
        words = "--n_last_blocks has no effect"
        self.expect("blocks of a convnet", argv, 0, words, program=eval_linear)

    def saved_features(self) -> None:
        features, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
        good = {"trainfeat": features, "trainlabels": labels, "testfeat": features, "testlabels": labels}
        for what, changed, code, words in odd_features()[: self.most]:
            folder = self.new("features")
            for name, tensor in (good | changed).items():
                torch.save(tensor, folder / f"{name}.pth")
            argv = ["--nb_knn", 2, "--load_features", folder]
            argv += [] if changed else ["--pretrained_weights", "random"]
            self.expect(f"features: {what}", argv, code, words, program=eval_knn)

    # ---- attention

    def attention(self) -> None:
        flags = "--pretrained_weights random --arch vit_nano --patch_size 8 --image_size 64 --image_path"
        mine, photos = self.new("mine"), self.new("photos")
        how = {"program": visualize_attention}
        for name in ("img.png", "sheet.png"):
            Image.fromarray(pixels(60, 40)).save(mine / name)
            before = (mine / name).read_bytes()
            argv = [*flags.split(), mine / name, "--output_dir", mine]
            self.expect(f"the user's own {name}", argv, 2, "would overwrite a file", **how)
            kept = (mine / name).read_bytes() == before
            self.row("... and afterwards", "the file is as it was" if kept else "the file has changed", kept)
        exif_rotated(photos / "portrait.jpg")
        save_images(photos / "more", 1)
        truncated(photos / "broken.jpg")
        argv = [*flags.split(), photos, "--output_dir", photos / "attention"]
        self.expect("a broken photo among others", argv, 1, "warning: cannot read image", **how)
        shown = Image.open(photos / "attention" / "portrait" / "img.png").size
        self.row("... and a photo that EXIF turns", f"is shown upright, {shown[0]} x {shown[1]} pixels",
                 shown[0] < shown[1])  # fmt: skip
        (photos / "broken.jpg").unlink()
        words = "left out 23 pictures of an earlier run"
        self.expect("its own pictures from the first time", argv, 0, words, **how)
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        self.expect("as one of two processes, the other not started", argv, 0, "side by side",
                    environment=environment, **how)  # fmt: skip
        network, tokens = build_backbone("vit_nano", 8, 32)[0].eval(), []
        network.blocks[-1].register_forward_hook(lambda _, inputs, output: tokens.append(output.shape[1]))
        network(torch.zeros(1, 3, 32, 32))
        self.row(
            "a forward hook on the last block, for 16 patches", f"gets {tokens[0]} tokens", tokens == [17]
        )

    # ---- several processes

    def two_runs(self) -> None:
        out = self.new("out")
        argv = [*self.flags, "--output_dir", out, "--epochs", 500, "--saveckp_freq", 0]
        first = fork(main_dino, [str(a) for a in argv], self.work / "first")
        try:
            comes_to_say("epoch 0", first, self.work / "first")
            words = f"another run writes to this folder: process {first} on {socket.gethostname()}, since"
            self.expect("a second run in the folder", argv, 2, words)
        finally:
            kill(first)
            ended(first, 30)
        self.row("... the first is killed", "its lock is left", (out / ".checkpoint.pth.lock").exists())
        argv += ["--max_steps", 30]
        self.expect("the lock of a dead process", argv, 0, "to 30")
        lock = {
            "token": "x",
            "pid": 1,
            "host": "node7",
            "since": "yesterday",
            "machine": ["node7", "", ""],
        }
        (out / ".checkpoint.pth.lock").write_text(json.dumps(lock))
        self.expect("the lock of a dead process on another machine", argv, 0, "waiting up to 20 s to see")

    def expect_ranks(
        self, what: str, argv: list, code: int, words: str, environment: dict | None = None
    ) -> None:
        """A row for two processes; in each flag, {rank} stands for the process's number."""
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        children = []
        for rank in range(2):
            own = environment or {"RANK": "{rank}", "LOCAL_RANK": "{rank}", "WORLD_SIZE": "2"}
            own = launched | {name: value.format(rank=rank) for name, value in own.items()}
            flags = [str(a).format(rank=rank) for a in argv]
            children.append(fork(main_dino, flags, self.work / f"said.{rank}", own))
        codes = [ended(child, 60) for child in children]
        for child in children:
            kill(child)
        said = "".join((self.work / f"said.{rank}").read_text() for rank in range(2))
        found = [line for line in said.splitlines() if words in line]
        came = found[0] if found else " ".join(said.splitlines()[-2:])
        ok = codes == [code, code] and len(found) == 1 and "Traceback" not in said
        self.row(f"{what}: {self.command(argv)}", f"exit {codes[0]} and {codes[1]}: `{cut(came)}`", ok)

    def ranks(self) -> None:
        folder = self.new("rank")
        save_images(folder / "0", 24)
        argv = [*TINY, "--batch_size_per_gpu", 2, "--output_dir", self.new("out")]
        argv += ["--data_path", folder / "{rank}"]
        slurm = {"SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"}
        differ = "error: ranks have different images"
        for what, images, seed, code, words, environment in (
            ("one of two processes has no images", 0, 0, 2, "error: rank 1: no such file or folder", None),
            ("one of two processes has fewer images", 20, 0, 2, differ, None),
            ("one of two processes has other images", 24, 1, 2, differ, None),
            ("SLURM in a container, without scontrol and SLURM_LOCALID", 24, 0, 0, "2 processes", slurm),
        )[: self.most]:
            shutil.rmtree(folder / "1", ignore_errors=True)
            if images:
                save_images(folder / "1", images, seed=seed)
            self.expect_ranks(what, argv, code, words, environment)
        argv = [*argv[:-1], folder / "0", "--lr", "0.0{rank}1"]
        differ = "error: ranks have different flags"
        self.expect_ranks("one of two processes has another flag", argv, 2, differ)

    def shells(self) -> None:
        """What a shell does to a run, which is started by its command here."""
        for what, before, flags, after, code, words in (
            ("a closed pipe", "", "", " | head -n 1", 141, "stopped: the reader of the output has ended"),
            ("few open files", "ulimit -n 20; ", "--num_workers 2", "", 75, "raise the limit of open files"),
        ):  # fmt: skip
            argv = [*self.flags, "--output_dir", self.new("out"), "--epochs", 50, *flags.split()]
            command = f"{sys.executable} main_dino.py {' '.join(map(str, argv))} 2>&3"
            command = f"exec 3>&1; {before}{command}{after}; exit ${{PIPESTATUS[0]}}"
            how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
            done = subprocess.run(["bash", "-c", command], **how)
            text = done.stdout + done.stderr
            said = [line for line in text.splitlines() if words in line]
            ok = done.returncode == code and bool(said) and "Traceback" not in text
            shown = f"`{before}{self.command(argv)[1:-1]}{after}`"
            came = said[0] if said else text[-180:]
            self.row(f"{what}: {shown}", f"exit {done.returncode}: `{cut(came)}`", ok)

    def waiting(self) -> None:
        """Waits that nothing ends: for a process that nobody starts, and for a file system that stalls."""
        argv = [*self.flags, "--output_dir", self.new("out")]

        def stop(child: int, said: Path) -> None:
            comes_to_say("waiting for 1 of 2 processes", child, said)
            os.kill(child, signal.SIGTERM)

        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
        self.expect("a process that nobody starts, then SIGTERM", argv, 75, "start them, or unset RANK",
                    environment=environment, meanwhile=stop)  # fmt: skip

        slow = self.new("slow") / "images"
        save_images(slow, 24)

        def stop_in_a_stall(child: int, said: Path) -> None:
            comes_to_say("epoch 0", child, said)
            with stalled(slow):
                time.sleep(2)
                os.kill(child, signal.SIGTERM)
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

        if not (self.is_root and os.access("/dev/fuse", os.W_OK)):
            return self.row("images on a file system that stalls", "not tried: none can be mounted", True)
        argv = [*TINY, "--data_path", slow.parent, "--output_dir", self.new("out"), "--num_workers", 1]
        argv += ["--epochs", 500]
        self.expect("images on a file system that stalls, then SIGTERM", argv, 75,
                    "stopped: by SIGTERM, saved step", meanwhile=stop_in_a_stall)  # fmt: skip


@contextlib.contextmanager
def stalled(folder: Path):
    """A file system that never answers is mounted here (Linux, as root)."""
    libc = ctypes.CDLL(None, use_errno=True)
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
    mounted = libc.mount(b"none", os.fsencode(folder), b"fuse", 0, options.encode()) == 0
    try:
        assert mounted, os.strerror(ctypes.get_errno())
        yield
    finally:
        os.close(server)
        if mounted:
            libc.umount2(os.fsencode(folder), 2)


# ---------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------

INPUTS = "images", "folders", "flags", "checkpoints", "disks"


def bad_input_table(work: Path, examples: int, runs: int, rng: random.Random, sections: list[str]) -> bool:
    """Try bad inputs and print what came back; True if all is well."""
    print("| bad input | what came back | as it should be |\n|---|---|---|")
    inputs = BadInputs(work, rng)
    for section in sections:
        {
            "images": inputs.images,
            "folders": inputs.folders,
            "flags": lambda: inputs.fuzzed_flags(examples, runs),
            "checkpoints": lambda: inputs.checkpoints(examples),
            "disks": inputs.disks,
        }[section]()
    print()
    return inputs.ok


def silent_fault_table(work: Path, rng: random.Random, short: bool) -> bool:
    """Try what once went wrong without a word and print what came back; True if all is well."""
    print("| fault | what came back | as it should be |\n|---|---|---|")
    faults = SilentFaults(work, rng, short)
    faults.all()
    return faults.ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument(
        "--only", nargs="+", choices=["kills", *INPUTS, "silent"], help="some of the sections"
    )
    parser.add_argument("--seed", default=0, type=int, help="decides instants and bytes")
    args = parser.parse_args()
    torch.set_num_threads(1)  # also for what is forked
    os.environ["OMP_NUM_THREADS"] = "1"
    kills, epochs, examples, runs = (4, 2, 20, 5) if args.short else (125, 4, 1000, 60)
    # With three processes, the order of a sum matters.
    pairs = [(1, 2), (3, 0)] if args.short else [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0)]
    sections = args.only or ["kills", *INPUTS, "silent"]
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        work.chmod(0o777)
        began = time.monotonic()
        if "kills" in sections:
            ok &= kill_table(work, kills, epochs, pairs, random.Random(args.seed))
        if inputs := [name for name in INPUTS if name in sections]:
            ok &= bad_input_table(work, examples, runs, random.Random(args.seed), inputs)
        if "silent" in sections:
            (work / "silent").mkdir()
            ok &= silent_fault_table(work / "silent", random.Random(args.seed), args.short)
        print(
            f"\n{(time.monotonic() - began) / 60:.1f} minutes, {'all as it should be' if ok else 'NOT WELL'}"
        )
    sys.exit(not ok)


if __name__ == "__main__":
    main()
