import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.errors import TrainingError, UserError
from support.lock import FolderLock, _started
from tests.conftest import ROOT, run, taken_by, wait_for


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill the process after the block."""
    try:
        yield process
    finally:
        process.kill(), process.wait()


@contextlib.contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the folder until the end of the block."""
    code = "import sys, time, pathlib; from support.lock import FolderLock; "
    code += "FolderLock(pathlib.Path(sys.argv[1])).acquire(); time.sleep(600)"
    with ended(subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT)) as process:
        wait_for(path.exists, "lock")
        yield process


@pytest.mark.slow
def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    path = tmp_path / "lock"
    with holder(path) as process:
        with pytest.raises(UserError, match=rf"another run .* process {process.pid} on .*, since 20"):
            FolderLock(path).acquire()
    lock = FolderLock(path)  # a dead process locks nobody out
    lock.acquire()
    lock.release()
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "told",
    [{"machine": ["elsewhere", "", ""]}, {"folder": [0, 0]}, {"started": ""}],
    ids=["another machine", "mounted twice", "no /proc"],
)
def test_a_lock_whose_process_is_unknown_here_holds_as_long_as_it_changes(told, tmp_path, capsys):
    path, nobody = tmp_path / "lock", 2**22 + 1  # Linux gives no such ID
    mine = FolderLock(path, beat=0.2)
    mine.acquire()
    told = json.loads(path.read_text()) | {"token": "x", "pid": nobody} | told
    mine.release()
    path.write_text(json.dumps(told))
    begun = time.monotonic()
    other = FolderLock(path, beat=0.5)
    other.acquire()  # it does not change: dead
    assert (
        time.monotonic() - begun >= 1
        and f"waiting up to 1 s to see whether process {nobody}" in capsys.readouterr().out
    )
    other.release()

    path.write_text(json.dumps(told))
    code = (
        "import sys, time, pathlib, json, os\np = pathlib.Path(sys.argv[1])\nq = p.with_name('new')\n"
        "for i in range(600):\n"
        "    q.write_text(json.dumps(json.loads(p.read_text()) | {'beats': i}))\n"
        "    os.replace(q, p); time.sleep(0.1)"
    )
    words = f"another run writes to this folder: process {nobody} on"
    with ended(subprocess.Popen([sys.executable, "-c", code, path])), pytest.raises(UserError, match=words):
        FolderLock(path, beat=2).acquire()


def test_an_empty_lock_is_waited_for_until_it_names_its_process(tmp_path):
    path = tmp_path / "new"
    path.touch()  # the first process has just made it
    with holder(tmp_path / "lock") as process:
        threading.Timer(0.1, shutil.copy, [tmp_path / "lock", path]).start()
        with pytest.raises(UserError, match=f"another run writes to this folder: process {process.pid} on"):
            FolderLock(path).acquire()
    path.write_text("")  # and has died at once
    lock = FolderLock(path, beat=0.1)
    lock.acquire()
    lock.release()
    assert not path.exists()


def test_a_copy_of_a_folder_in_use_is_free(tmp_path):
    (tmp_path / "one").mkdir()
    with holder(tmp_path / "one" / "lock"):
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        lock = FolderLock(tmp_path / "two" / "lock", beat=0.1)
        lock.acquire()
        lock.release()


def test_a_lock_that_another_process_took_is_noticed(tmp_path):
    path = tmp_path / "lock"
    lock = FolderLock(path, beat=60)
    lock.acquire()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "another"}))
    with pytest.raises(TrainingError, match="has taken this folder"):
        lock.check()
    lock.release()
    assert path.exists()  # it is not ours


def test_a_lock_that_another_process_took_is_no_longer_written(tmp_path):
    path = tmp_path / "lock"
    lock = FolderLock(path, beat=0.02)
    lock.acquire()
    keeper, other = lock._thread, json.dumps(json.loads(path.read_text()) | {"token": "another"})

    def has_ended() -> bool:
        path.write_text(other)
        return not keeper.is_alive()

    wait_for(has_ended, "end of the thread", seconds=60)
    lock.release()
    assert path.read_text() == other


@pytest.mark.parametrize("spoil", [lambda path: path.write_text(""), lambda path: path.parent.chmod(0)])
def test_an_unreadable_moment_of_a_lock_on_another_machine_does_not_free_the_folder(permissions, spoil):
    path = Path("held", "lock")
    path.parent.mkdir()
    FolderLock(path)._write(0)
    told = json.loads(path.read_text()) | {"machine": ["elsewhere", "", ""], "pid": 1}
    path.write_text(json.dumps(told))

    def go_on() -> None:
        path.parent.chmod(0o700)
        path.write_text(json.dumps(told | {"beats": 7}))

    threading.Timer(0.15, spoil, [path]).start()
    threading.Timer(0.45, go_on).start()
    with pytest.raises(UserError, match="another run writes to this folder: process 1 on"):
        FolderLock(path, beat=1).acquire()


@pytest.mark.skipif(os.getpid() == 1, reason="process 1 is this one")
def test_a_process_of_another_user_holds_the_folder(permissions):
    path = Path("lock")
    FolderLock(path)._write(0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 1, "started": _started(1)}))
    with pytest.raises(UserError, match="another run writes to this folder: process 1 on"):
        FolderLock(path).acquire()


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, capsys):
    lock = FolderLock(tmp_path / "gone" / "lock")
    lock.acquire()
    lock.release()
    said = f"cannot lock {tmp_path}/gone (No such file or directory): do not start a second run in it"
    assert capsys.readouterr().out == f"warning: {said}\n"


ENDS = """
import os, pathlib, sys
from support.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
lock.acquire()
try:
    if (child := os.fork()) == 0:
        sys.exit()
    os.waitpid(child, 0)
    print(lock.path.exists())
    sys.exit("refused")
finally:
    lock.release()
"""


def test_a_process_that_ends_leaves_no_lock_and_one_that_it_forked_does_not_touch_it(tmp_path):
    # Python warns of a fork beside the thread that keeps the lock.
    result = run("-W", "ignore::DeprecationWarning", "-c", ENDS, tmp_path / "lock", check=False)
    assert (result.stdout, result.stderr) == ("True\n", "refused\n") and not list(tmp_path.iterdir())


def test_a_folder_that_became_read_only_does_not_hide_how_the_run_ended(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path / "lock")
    lock.acquire()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(lock.path))

    monkeypatch.setattr(Path, "unlink", refuse)
    lock.release()


def test_a_file_that_is_no_lock_does_not_hold_the_folder(tmp_path):
    path = tmp_path / "lock"
    named = json.dumps(["token", "pid", "host", "since", "machine"])
    for content in ("", "[1]", named, "{}", '{"pid": 1}', "3", "\x00"):
        path.write_text(content)
        lock = FolderLock(path, beat=0.1)
        lock.acquire()
        lock.release()


def test_a_process_id_that_is_used_again_holds_nothing(tmp_path):
    lock = FolderLock(tmp_path / "lock", beat=0.1)
    taken_by(lock, started="1")  # another process had this ID
    lock.acquire()
    lock.release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_killed_process_that_its_parent_does_not_wait_for_holds_nothing(tmp_path):
    """As in a container whose process 1 is `sleep`, or of a notebook."""
    with holder(tmp_path / "lock") as process:
        process.kill()
        wait_for(lambda: " Z " in Path(f"/proc/{process.pid}/stat").read_text(), "zombie")
        lock = FolderLock(tmp_path / "lock")
        lock.acquire()
        lock.release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_process_may_have_any_name():
    code = (  # the kernel cuts the name after 15 bytes, here within a character
        "import ctypes, os; ctypes.CDLL(None).prctl(15, 'entraîné-modèleé'.encode()[:15])\n"
        "from support.lock import _started; print(_started(os.getpid()))"
    )
    assert run("-c", code).stdout.strip().isdigit()


def test_a_living_process_whose_start_is_unknown_holds_while_the_lock_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.lock._started", lambda pid: "")  # as on a Mac
    lock = FolderLock(tmp_path / "lock", beat=0.1)
    taken_by(lock, started="")  # the ID may be used again
    lock.acquire()
    assert "waiting up to 0 s to see whether process" in capsys.readouterr().out
    lock.release()
    taken_by(lock, started="")
    monkeypatch.setattr("support.lock.time.sleep", lambda _: taken_by(lock, started="", beats=1))
    with pytest.raises(UserError, match="another run writes to this folder"):
        lock.acquire()


def test_a_lock_goes_on_changing_after_a_moment_without_its_folder(tmp_path, monkeypatch):
    """Else another machine takes its process for dead; "since" stays, and a lock may be taken again."""
    folder, away = tmp_path / "held", tmp_path / "away"
    folder.mkdir()
    times = itertools.count()
    monkeypatch.setattr("support.lock.time.strftime", lambda _: str(next(times)))
    lock = FolderLock(folder / "lock", beat=0.02)
    for _ in range(2):
        lock.acquire()
        first = json.loads(lock.path.read_text())
        folder.rename(away)  # as a network file system may be gone
        time.sleep(0.2)
        away.rename(folder)
        beats = first["beats"] + 20
        wait_for(lambda beats=beats: json.loads(lock.path.read_text())["beats"] > beats, "beats", seconds=20)
        assert json.loads(lock.path.read_text())["since"] == first["since"]
        lock.release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_process_whose_start_the_system_hides_holds_the_folder(tmp_path, monkeypatch):
    """Of another user, where /proc is mounted with hidepid."""
    lock = FolderLock(tmp_path / "lock")
    taken_by(lock)
    monkeypatch.setattr("support.lock._started", lambda pid: "")
    with pytest.raises(UserError, match="another run writes to this folder"):
        lock.acquire()


@pytest.mark.slow
def test_a_process_outside_of_a_container_is_not_taken_for_dead(tmp_path):
    """Its ID means nothing inside, where the host's name may be the same."""
    contained = ["unshare", "-Urpf", "--mount-proc"]
    if subprocess.run([*contained, "true"], capture_output=True).returncode:
        pytest.skip("not allowed here")
    lock = FolderLock(tmp_path / "lock", beat=0.1)
    lock.acquire()
    code = "import sys, pathlib; from support.lock import FolderLock\n"
    code += "FolderLock(pathlib.Path(sys.argv[1]), 2).acquire()"
    command = [*contained, sys.executable, "-c", code, str(lock.path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stderr
    lock.release()
    assert f"another run writes to this folder: process {os.getpid()} on" in said, said


def test_of_two_that_find_the_holder_dead_the_last_to_write_has_the_folder(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path / "lock", beat=0.1)
    taken_by(lock, pid=os.getpid(), started=_started(os.getpid()))  # an earlier run of this process
    monkeypatch.setattr("support.lock.time.sleep", lambda _: taken_by(FolderLock(lock.path)))
    with pytest.raises(UserError, match="has taken this folder") as error:
        lock.acquire()
    assert error.value.exit_code == 2 and lock._thread is None
