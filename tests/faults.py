"""Break training for real, and see that nothing is lost and nothing bad is let in.

    python -m tests.faults            # 125 kills and all bad inputs
    python -m tests.faults --short    # a few of each, for the tests

Prints two tables in Markdown. Exit code 1 if anything in them is not as it should be.

Each training is a process of its own, killed by SIGKILL. Most are forked from this one, which has
imported torch already: the same program, seconds sooner. Every tenth is started by its command.
"""

import argparse
import contextlib
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
import main_dino
from support import cli
from support.errors import UserError
from support.restart import Run
from support.weights import load_checkpoint
from tests.conftest import ROOT, TINY, save_images

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
            cli.run_script(program.main, program.parse_args(argv))
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    before = {path for path in temporary if path.exists()}
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

    def run(self, argv: list, program=main_dino, as_nobody=False, meanwhile=None) -> tuple[int | None, str]:
        """Exit code (None: it hangs) and output of a process; `meanwhile` happens while it runs."""
        said = self.work / "said"
        said.unlink(missing_ok=True)
        child = fork(program, [str(a) for a in argv], said, as_nobody=as_nobody)
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
        came = said_it[0] if said_it else " ".join(said.splitlines()[-2:])
        self.row(what, f"exit {ended_with}: `{came[:180]}`", ok)
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
        self.expect("`--data_path` does not exist", [*argv, "/nowhere"], 2, "error: no such folder")
        self.expect("`--data_path` is a file", [*argv, __file__], 2, "error: no such folder")
        self.expect("`--data_path` without images", [*argv, self.new("empty")], 2, "error: no images found")
        dataset = self.new("dataset")
        for split in ("train", "val"):
            save_images(dataset / split, 1)
        self.expect(
            "`--data_path` with train/ and val/", [*argv, dataset], 2, "error: folder has train/ and val/"
        )
        loop = self.work / "loop"
        loop.symlink_to(loop)
        self.expect("`--data_path` is a link to itself", [*argv, loop], 2, "error: no such folder")
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
            ("`--data_path` that cannot be entered", [*argv, closed / "inner"], "error: no such folder"),
            ("`--output_dir` that cannot be written", [*self.flags, "--output_dir", closed],
             "error: Permission denied"),
        ):  # fmt: skip
            self.expect(what, flags, 2, words, as_nobody=True)
            closed.chmod(0)

    # ---- flags

    def parse_and_check(self, argv: list[str]) -> bool:
        """True if accepted; asserts that a refusal is one line and exit code 2."""
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
        text = said.getvalue()
        assert code in (0, 2) and (code == 0 or text.startswith("error: ") and len(text.splitlines()) == 1), (
            argv
        )
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

        structures = {
            "is a list": [1, 2],
            "lacks the student": {"teacher": {}},
            "has a number for the student": load_checkpoint(whole / "checkpoint.pth") | {"student": 5},
            "has numbers for weights": load_checkpoint(whole / "checkpoint.pth") | {"student": {"a": 5}},
            "has another optimizer": load_checkpoint(whole / "checkpoint.pth") | {"optimizer": {}},
            "has a word for the epoch": load_checkpoint(whole / "checkpoint.pth") | {"epoch": "two"},
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
        return (self.work / "whole" / "checkpoint.pth").read_bytes()

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


def bad_input_table(work: Path, examples: int, runs: int, rng: random.Random) -> bool:
    """Try all bad inputs and print what came back; True if all is well."""
    print("| bad input | what came back | as it should be |\n|---|---|---|")
    inputs = BadInputs(work, rng)
    inputs.images()
    inputs.folders()
    inputs.fuzzed_flags(examples, runs)
    inputs.checkpoints(examples)
    inputs.disks()
    return inputs.ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--only", choices=["kills", "inputs"], help="one of the two tables")
    parser.add_argument("--seed", default=0, type=int, help="decides instants and bytes")
    args = parser.parse_args()
    torch.set_num_threads(1)  # also for what is forked
    os.environ["OMP_NUM_THREADS"] = "1"
    kills, epochs, examples, runs = (4, 2, 20, 5) if args.short else (125, 4, 1000, 60)
    # With three processes, the order of a sum matters.
    pairs = [(1, 2), (3, 0)] if args.short else [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0)]
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        work.chmod(0o777)
        began = time.monotonic()
        if args.only != "inputs":
            ok &= kill_table(work, kills, epochs, pairs, random.Random(args.seed))
        if args.only != "kills":
            ok &= bad_input_table(work, examples, runs, random.Random(args.seed))
        print(
            f"\n{(time.monotonic() - began) / 60:.1f} minutes, {'all as it should be' if ok else 'NOT WELL'}"
        )
    sys.exit(not ok)


if __name__ == "__main__":
    main()
