"""Keeps a second run out of a folder that a run writes to."""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path

from support.errors import TrainingError, UserError, reason_of
from support.files import file_id
from support.logger import log


class FolderLock:
    """A file that names the process which holds a folder, rewritten every `beat` seconds.

    Needs no locks of the file system. A lock that a dead process left is ignored: on the same machine its
    process ID shows that it is dead; elsewhere, the file no longer changes.
    """

    def __init__(self, path: Path, beat: float = 10.0, flag: str = "output_dir"):
        """`flag` is the one that names the folder, for messages."""
        self.path, self.beat, self.where = path, beat, f"--{flag} {path.parent}"
        self.token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0  # of the process that has taken the folder

    def acquire(self) -> None:
        """Take the folder until `release` or the end of the process. Raises UserError if another holds it."""
        moment = min(1.0, self.beat / 10)
        try:
            is_first = self._make()
            holder = None if is_first else self._read(moment)
            if holder and not self._is_dead(holder):
                what = f"another run writes to this folder: {_name(holder)}, since {holder['since']}"
                raise UserError(what, self.where, "wait for it, stop it, or give another folder")
            self._write(0)
        except OSError as error:
            what = f"cannot lock {self.path.parent} ({reason_of(error)})"
            log(f"warning: {what}: do not start a second run in it")
            return
        if not is_first:  # several may have found the holder dead: the last to write has the folder
            time.sleep(moment)
            self.check(UserError)
        self._ended.clear()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        self._pid = os.getpid()

    def release(self) -> None:
        """Release the folder, if this process has taken it."""
        if self._thread and self._pid == os.getpid():  # a forked process also gets here when it ends
            self._ended.set()
            self._thread.join()
            self._thread = None
            if (self._read() or {}).get("token") == self.token:
                with contextlib.suppress(OSError):  # the lock of a dead process does not count
                    self.path.unlink()

    def check(self, error: type[UserError] = TrainingError) -> None:
        """Raise `error` if another process has taken the folder, e.g. while this one was suspended."""
        holder = self._read()
        if holder and holder["token"] != self.token:
            fix = "stop one of the two, then run the same command"
            raise error(f"{_name(holder)} has taken this folder", self.where, fix)

    def _keep(self) -> None:
        beats = 0
        while not self._ended.wait(self.beat):
            beats += 1
            try:
                holder = self._read()
                if holder and holder["token"] != self.token:
                    return
                self._write(beats)
            except OSError:  # disk full or folder gone: saving reports it
                continue

    def _make(self) -> bool:
        """Make an empty file; False if there is one. Of several processes, one makes it. Raises OSError."""
        try:
            self.path.touch(exist_ok=False)
            return True
        except FileExistsError:
            return False

    def _read(self, patience: float = 0) -> dict | None:
        """Read the lock; None if it is missing or incomplete for `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                holder = json.loads(self.path.read_text("utf-8"))
                if {"token", "pid", "host", "since", "machine"} <= holder.keys():
                    return holder
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def _write(self, beats: int) -> None:
        own = {
            "token": self.token,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "machine": _machine(),
            "folder": self._folder(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "beats": beats,
        }
        if beats:
            own["since"] = (self._read() or own)["since"]
        temporary = self.path.with_name(f"{self.path.name}.{self.token}")
        temporary.write_text(json.dumps(own), "utf-8")
        os.replace(temporary, self.path)

    def _folder(self) -> list[int]:
        """Identifies the folder on its machine, so that a copy of it is not taken for it."""
        return list(file_id(self.path.parent))

    def _is_dead(self, holder: dict) -> bool:
        # Where nothing tells when processes started, e.g. on a Mac or without /proc, an ID may be used again
        # or be another machine's. A folder that is mounted twice looks like a copy.
        here = holder["machine"] == _machine() and holder.get("folder", self._folder()) == self._folder()
        if here and holder.get("started"):
            return holder["pid"] == os.getpid() or not _is_alive(holder["pid"], holder["started"])
        log(f"waiting up to {2 * self.beat:.0f} s to see whether {_name(holder)} holds {self.path.parent}")
        deadline = time.monotonic() + 2 * self.beat
        while time.monotonic() < deadline:
            time.sleep(self.beat / 10)
            now = self._read()
            if now is None and self._is_gone():
                return True
            if now and now != holder:
                return False
        return True

    def _is_gone(self) -> bool:
        """Whether there is no file; over a network, it may only be unreadable for a moment."""
        try:
            self.path.stat()
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return False


def _name(holder: dict) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _machine() -> list[str]:
    """Identify where process IDs are valid: the host, its boot, and the container."""
    try:
        return [
            platform.node(),
            Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    except OSError:  # not a Linux
        return [platform.node(), "", ""]


def _started(pid: int) -> str:
    """When a process started, to recognise a process ID that is used again; "" if unknown.

    "ended" for a process that has ended and that its parent does not wait for, e.g. in a container whose
    process 1 is `sleep`: it keeps its ID.
    """
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "ended" if state == b"Z" else numbers[18].decode()
    except (OSError, ValueError, IndexError):
        return ""


def _is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) in ("", started)
