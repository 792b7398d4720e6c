import math
import signal

import pytest
import torch
import torch.nn.functional as F

from support import monitor
from support.errors import TrainingError, UserError
from support.monitor import StopSignals
from utils import DINOLoss

NONE_UNREADABLE = torch.full((8,), -1)


def guard_after(teacher: torch.Tensor, student: torch.Tensor, steps: int, patience: int = 5):
    """A guard that has watched `steps` steps of the real loss on these outputs."""
    guard = monitor.RunGuard(teacher.shape[1], unreadable_limit=10, patience=patience)
    loss_fn = DINOLoss(teacher.shape[1], 2, 0.04, 0.04, 0, 1)
    for step in range(steps):
        loss_fn(student, teacher, 0)
        guard.check(step, loss_fn.stats, NONE_UNREADABLE)
    return guard


def test_uniform_collapse_is_named_once_with_flags_to_try(capsys):
    guard_after(torch.zeros(16, 64), torch.zeros(16, 64), 20)
    out = capsys.readouterr().out
    assert out.count("uniform collapse") == 1 and "--use_bn_in_head" in out and "4.1589" in out


def test_constant_collapse_is_named(capsys):
    loss_fn = monitor.RunGuard(64, 10, patience=5)
    peaked = F.one_hot(torch.zeros(16, dtype=torch.long), 64).float() * 10
    loss = DINOLoss(64, 2, 0.04, 0.04, 0, 1)
    for step in range(6):
        loss.center.zero_()  # a centre that does not follow
        loss(peaked, peaked, 0)
        loss_fn.check(step, loss.stats, NONE_UNREADABLE)
    out = capsys.readouterr().out
    assert out.count("constant collapse") == 1 and "uniform" not in out


def test_outputs_that_differ_between_images_are_no_collapse(capsys):
    torch.manual_seed(0)
    guard_after(torch.randn(16, 64), torch.randn(16, 64), 20)
    assert capsys.readouterr().out == ""


def test_a_collapse_that_does_not_last_is_not_named(capsys):
    guard, flat = monitor.RunGuard(64, 10, patience=5), math.log(64)
    for step in range(9):
        entropy = 1.0 if step == 4 else flat  # four flat steps, a sound one, four flat ones
        guard.check(step, torch.tensor([flat, entropy, flat, 0]), NONE_UNREADABLE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value):
    guard = monitor.RunGuard(64, 10)
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) \(step 7\): try --use_fp16 false"):
        guard.check(7, torch.tensor([value, 0, 0, 0]), NONE_UNREADABLE)
    assert TrainingError.exit_code == 1 and UserError.exit_code == 2


def test_unreadable_images_are_named_once_and_counted(capsys):
    guard = monitor.RunGuard(64, unreadable_limit=3, name_of="image {}".format)
    good = torch.tensor([1.0, 0, 0, 0])
    guard.check(0, good, torch.tensor([-1, 5, -1, 6]))
    guard.check(1, good, torch.tensor([5, -1, -1, -1]))
    assert guard.unreadable == 3
    out = capsys.readouterr().out
    assert out.count("image 5") == 1 and out.count("image 6") == 1
    with pytest.raises(UserError, match="4 images"):
        guard.check(2, good, torch.tensor([7]))
    guard.start_epoch()
    guard.check(3, good, torch.tensor([7]))


def test_a_signal_is_noted_and_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert not signals.asked()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            assert signals.asked() and signals.received == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
