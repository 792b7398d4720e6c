"""Freed memory is kept where it saves time, and returned where it would add up."""

import sys

import pytest

from tests.conftest import run

PAGES = """
import resource
from support.distributed import choose_device
from support.loading import Loader
from support.signals import begin_worker

def share_cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * 2**26
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages * resource.getpagesize() / 2**26

def share_cleared_again():
    b"1" * 2**26  # with the setting of before, or into what is kept from now on
    return share_cleared()

default = share_cleared_again()
device = choose_device()
kept = share_cleared_again()
iter(Loader([0], [[0]], 0, device))
at_pass = share_cleared()
begin_worker()
print(default, kept, at_pass, share_cleared_again())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can keep it")
def test_a_process_on_a_cpu_keeps_the_memory_it_frees_until_workers_start_and_they_do_not():
    default, kept, at_pass, in_worker = map(float, run("-c", PAGES).stdout.split())
    if default < 0.5:
        pytest.skip("this system's pages are large, or it keeps memory by itself")
    assert kept < 0.01 and at_pass > 0.5 and in_worker > 0.5
