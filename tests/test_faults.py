import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_let_in():
    """A few of the faults; `python -m tests.faults` has all."""
    command = [sys.executable, "-m", "tests.faults", "--short"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all as it should be" in result.stdout and "**no**" not in result.stdout
