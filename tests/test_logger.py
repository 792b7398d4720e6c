import errno
import json
import os
import sys

import pytest
import torch

from support import logger
from support.logger import MetricLogger, SmoothedValue, log


def test_a_smoothed_value_has_a_mean_of_the_last_and_of_all():
    series = SmoothedValue(window_size=2)
    for value in (1.0, 2.0, 6.0):
        series.update(value)
    assert series.avg == 4 and series.global_avg == 3


def test_names_neither_break_a_line_nor_control_the_terminal(capsys):
    """A file, a class or a tensor of others may have any name."""
    log("weights: a\nTop1: 99\x1b[2J\x9b\r\u2028")
    assert capsys.readouterr().out == "weights: a\\nTop1: 99\\x1b[2J\\x9b\\r\\u2028\n"


def test_a_line_every_ten_steps(capsys):
    logger = MetricLogger(images_per_step=4)
    for value in logger.log_every(range(25), header="epoch 0", steps_after=5):
        logger.update(loss=value)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == ["epoch 0 [10/25", "epoch 0 [20/25", "epoch 0 [25/25"]
    assert all(word in lines[0] for word in ("loss 4.5", "img/s", "data ", "eta "))
    assert logger.averages()["loss"] == 12


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time in seconds that the log sees."""
    now = [0.0]
    monkeypatch.setattr("support.logger.time.perf_counter", lambda: now[0])
    return now


def test_the_time_left_and_the_wait_for_data(capsys, now):
    def batches():
        for i in range(10):
            now[0] += 25  # of 100 s for a step
            yield i

    for _ in MetricLogger(images_per_step=200).log_every(batches(), 10, length=10, steps_after=1000):
        now[0] += 75
    line = capsys.readouterr().out
    assert "2 img/s" in line and "data 25%" in line and "eta 1 day, 3:46:40" in line


def test_slow_steps_have_a_line_a_minute(capsys, now):
    for step in MetricLogger().log_every(range(40)):
        now[0] += 31 if step < 8 else 1
    lines = capsys.readouterr().out.splitlines()
    # not at 10, so soon after 8
    assert [int(line[2:4]) for line in lines] == [2, 4, 6, 8, 20, 30, 40]


def test_the_speed_of_an_epoch_goes_on_after_a_restart(now):
    state = {}
    assert MetricLogger(images_per_step=10).averages() == {"images_per_second": 0}
    for seconds in (1, 3):
        logger = MetricLogger(images_per_step=10)
        logger.load_state_dict(state)
        for _ in logger.log_every(range(5)):
            now[0] += seconds
        state = logger.state_dict()
    assert logger.averages()["images_per_second"] == pytest.approx(10 / 2)


def test_averages_are_of_the_epoch_and_the_line_of_the_last_steps(capsys, now):
    logger = MetricLogger(images_per_step=10)
    for step in logger.log_every(range(100), 100):
        logger.update(loss=step)
        now[0] += 1 if step < 50 else 3
    assert logger.averages()["images_per_second"] == pytest.approx(10 / 2)
    assert "loss 89.5" in capsys.readouterr().out  # the mean of the last 20


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_under_the_output_does_not_end_a_run(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(logger, "lost", [])
        for _ in range(2):
            log("cannot be written")
        assert [(error.errno, error.__traceback__) for error in logger.lost] == [(errno.ENOSPC, None)]
        monkeypatch.undo()
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), full.fileno())  # Python flushes it when it closes


def test_a_closed_stderr_is_no_terminal(monkeypatch, capsys):
    """As under some schedulers: Python's sys.stderr is then None."""
    monkeypatch.setattr("sys.stderr", None)
    assert list(MetricLogger().log_every(range(3))) == [0, 1, 2]
    assert "[3/3]" in capsys.readouterr().out


def test_a_closed_stdout_takes_no_lines(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    log("for nobody")
    assert not logger.lost


def test_a_line_has_the_speed_only_if_the_number_of_images_is_known(capsys):
    list(MetricLogger(delimiter="; ").log_every([1, 2], 1, "Test:"))
    first, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("Test: [1/2] data ") and "img/s" not in first


def test_tensors_are_summed_as_numbers():
    logger = MetricLogger()
    for _ in range(500):
        logger.update(accuracy=torch.tensor(50.0, dtype=torch.bfloat16, requires_grad=True))
    assert json.dumps(logger.averages()["accuracy"]) == "50.0"


def test_a_part_of_an_epoch_is_numbered_as_in_the_epoch(capsys):
    """Between two saves, and after a restart."""
    list(MetricLogger().log_every("abcdefgh", 4, "epoch 2", length=24, steps_after=-4, numbers=range(14, 22)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == ["epoch 2 [16/24", "epoch 2 [20/24", "epoch 2 [21/24"]
