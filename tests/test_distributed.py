"""Which processes belong together; that they meet is tested by all that starts several."""

import os

import pytest
import torch.distributed as dist

from support import distributed

SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, (3, 4, 1)),
        (SLURM | {"SLURM_PROCID": "0"}, (0, 1, 0)),  # in the batch script, outside any srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2", "RANK": "1", "WORLD_SIZE": "16"}, (1, 16, 0)),
    ],
)
def test_launchers(monkeypatch, env, expected):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched_as() == expected


def test_processes_that_do_not_come_are_not_waited_for():
    with pytest.raises(TimeoutError, match="not all of 2 processes have come"):
        distributed._fresh_store(dist.HashStore(), 0, 2, patience=0.1)
