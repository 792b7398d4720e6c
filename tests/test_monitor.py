import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from support.errors import Interrupted, TrainingError, UserError
from support.monitor import Monitor
from tests.conftest import ROOT, run
from utils import CollapseWatch, DINOLoss

NONE_UNREADABLE = torch.full((8,), -1)


def watching(out_dim: int = 64) -> Monitor:
    return Monitor(10, watch=CollapseWatch(out_dim, patience=5))


def monitor_after(teacher: torch.Tensor, student: torch.Tensor, steps: int) -> None:
    """`steps` steps of the real loss on these outputs."""
    monitor = watching(teacher.shape[1])
    loss_fn = DINOLoss(teacher.shape[1], 2, 0.04, 0.04, 0, 1)
    for step in range(steps):
        loss_fn(student, teacher, 0)
        monitor.check(step, loss_fn.stats, NONE_UNREADABLE)


def numbers(loss: float, entropy: float = 0.0, spread: float = 1.0) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "entropy": torch.tensor(entropy), "spread": torch.tensor(spread)}


def test_uniform_collapse_is_named_once_with_flags_to_try(capsys):
    monitor_after(torch.zeros(16, 64), torch.zeros(16, 64), 20)
    out = capsys.readouterr().out
    assert out.count("uniform collapse") == 1 and "--adapt_teacher_temp" in out and "4.1589" in out


def test_constant_collapse_is_named(capsys):
    monitor = watching()
    peaked = F.one_hot(torch.zeros(16, dtype=torch.long), 64).float() * 10
    loss = DINOLoss(64, 2, 0.04, 0.04, 0, 1)
    for step in range(6):
        loss.center.zero_()  # a centre that does not follow
        loss(peaked, peaked, 0)
        monitor.check(step, loss.stats, NONE_UNREADABLE)
    out = capsys.readouterr().out
    assert out.count("constant collapse") == 1 and "uniform" not in out


def test_outputs_that_only_a_tiny_temperature_tells_apart_have_collapsed(capsys):
    torch.manual_seed(0)
    outputs = torch.full((16, 64), 0.1) + 1e-6 * torch.randn(16, 64)
    for centering in ("sinkhorn", "ema"):
        monitor, loss = (
            watching(),
            DINOLoss(64, 2, 0.04, 0.04, 0, 1, centering=centering, adapt_teacher_temp=2),
        )
        for step in range(6):
            loss(outputs, outputs, 0)
            monitor.check(step, loss.stats, NONE_UNREADABLE)
        assert "collapse" in capsys.readouterr().out
    monitor = watching()
    for step in range(6):
        monitor.check(step, numbers(4, 2) | {"temp": torch.tensor(9e-4)}, NONE_UNREADABLE)
    assert capsys.readouterr().out.count("constant collapse") == 1


def test_outputs_that_differ_between_images_are_no_collapse(capsys):
    torch.manual_seed(0)
    monitor_after(torch.randn(16, 64), torch.randn(16, 64), 20)
    monitor_after(torch.zeros(16, 64), torch.randn(16, 64), 20)  # flat outputs that the student does not give
    assert capsys.readouterr().out == ""


def test_a_collapse_that_does_not_last_is_not_named(capsys):
    monitor, flat = watching(), math.log(64)
    for step in range(9):
        entropy = 1.0 if step == 4 else flat  # four flat steps, a sound one, four flat ones
        monitor.check(step, numbers(flat, entropy, flat - entropy), NONE_UNREADABLE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("collapsed", "sound"),  # shares of ln K: loss, entropy and spread; and the temperature
    [
        ((1.0, 0.996, 1.0, 1), (1.0, 0.994, 1.0, 1)),
        ((1.004, 1.0, 1.0, 1), (1.006, 1.0, 1.0, 1)),
        ((0.5, 0.5, 0.004, 1), (0.5, 0.5, 0.006, 1)),
        ((0.5, 0.5, 0.5, 9e-4), (0.5, 0.5, 0.5, 1.1e-3)),
    ],
)
def test_how_near_to_a_collapse_is_one(collapsed, sound, capsys):
    for (*shares, temp), named in ((collapsed, 1), (sound, 0)):
        values = [share * math.log(64) for share in shares]
        watch = CollapseWatch(64, patience=1)
        watch(dict(zip(("loss", "entropy", "spread"), values, strict=True), temp=temp))
        assert capsys.readouterr().out.count("collapse: for") == named
    assert CollapseWatch(64).patience == 200


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value):
    monitor = Monitor(10, advice="try --lr 1")
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) \(step 7\): try --lr 1"):
        monitor.check(7, numbers(value), NONE_UNREADABLE)
    with pytest.raises(TrainingError, match=r"koleo is (nan|inf) \(step 7\)"):  # another term of a loss
        monitor.check(7, numbers(1.0) | {"koleo": torch.tensor(value)}, NONE_UNREADABLE)
    assert TrainingError.exit_code == 1 and UserError.exit_code == 2


def test_a_loss_that_is_not_finite_at_once_may_need_other_advice():
    monitor = Monitor(10, advice="try --lr 1")
    monitor.advice_at_first = "remove checkpoint.pth"
    with pytest.raises(TrainingError, match="remove checkpoint.pth"):
        monitor.check(7, numbers(math.nan), NONE_UNREADABLE)
    monitor.check(7, numbers(1.0), NONE_UNREADABLE)
    with pytest.raises(TrainingError, match="try --lr 1"):
        monitor.check(8, numbers(math.nan), NONE_UNREADABLE)


def test_unreadable_images_are_named_once_and_counted(capsys):
    guard = Monitor(unreadable_limit=3, name_of="image {}".format)
    good = numbers(1.0)
    guard.check(0, good, torch.tensor([-1, 5, -1, 6]))
    guard.check(1, good, torch.tensor([5, -1, -1, -1]))
    assert guard.unreadable == 3
    out = capsys.readouterr().out
    assert out.count("image 5") == 1 and out.count("image 6") == 1
    words = r"4 images of this epoch cannot be read \(--data_path\): repair or remove these images"
    with pytest.raises(UserError, match=words):
        guard.check(2, good, torch.tensor([7]))
    guard.start_epoch()
    guard.check(3, good, torch.tensor([7]))


def test_a_signal_is_noted_and_a_second_ctrl_c_stops_at_once(tmp_path, capfd, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with Monitor(10) as monitor:
        assert not monitor.stop_asked()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            for _ in range(1 if number == signal.SIGINT else 2):  # schedulers repeat theirs; it is said once
                signal.raise_signal(number)
            assert monitor.stop_asked() and monitor.received == number and not monitor.stopping
        said = capfd.readouterr().err.splitlines()
        assert said[0] == "SIGTERM: stopping after this step" and len(said) == 5
        assert said[-1] == "SIGINT: stopping after this step; a second Ctrl-C stops at once, without saving"
        monitor.check(0, numbers(1.0), NONE_UNREADABLE)
        assert monitor.stopping
        monitor.raise_if_stopped(3, 3, tmp_path)
        with pytest.raises(Interrupted, match="by SIGINT, saved step 2 of 3"):
            monitor.raise_if_stopped(2, 3, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    capfd.readouterr()
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    signal.signal(signal.SIGTERM, theirs := lambda *_: None)  # as submitit's
    with Monitor(10) as monitor:
        signal.raise_signal(signal.SIGTERM)
        assert monitor.stop_asked() and capfd.readouterr().err == ""  # the first process says it
    assert signal.signal(signal.SIGTERM, before) == theirs


def test_a_run_that_a_signal_to_another_process_stopped_says_so(tmp_path):
    with pytest.raises(Interrupted, match="by a signal to another process, saved step 2 of 3"):
        Monitor(10).raise_if_stopped(2, 3, tmp_path)


def test_a_training_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> bool:
        with Monitor(10) as monitor:
            return monitor.stop_asked()

    with ThreadPoolExecutor(1) as threads:
        assert not threads.submit(enter).result()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_under_nohup_outlives_its_terminal():
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from support.monitor import Monitor\n"
    )
    code += "with Monitor(1) as m: signal.raise_signal(signal.SIGHUP); print(m.received)"
    assert run("-c", code).stdout == "None\n"


def test_a_signal_writes_into_no_file_where_stderr_is_closed(tmp_path):
    code = "import signal, sys; from support.monitor import Monitor\n"
    code += "file = open(sys.argv[1], 'wb'); assert file.fileno() == 2\n"
    code += "with Monitor(1) as m: signal.raise_signal(signal.SIGTERM); assert m.stop_asked()"
    command = f'{sys.executable} -c "$0" "$1" 2>&-'
    subprocess.run(["sh", "-c", command, code, str(tmp_path / "x")], cwd=ROOT, check=True)
    assert (tmp_path / "x").read_bytes() == b""


def test_a_restart_keeps_the_counts():
    first, second = watching(), watching()
    for step in range(3):
        first.check(step, numbers(math.log(64), math.log(64), 0.0), torch.tensor([step]))
    second.load_state_dict(first.state_dict())
    assert second.unreadable == 3 and second.watch.lasted == {"uniform collapse": 3, "constant collapse": 0}
