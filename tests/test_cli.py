import pytest

import cli
import utils


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped: at once, by Ctrl-C: the same command goes on"),
        (MemoryError("Unable to allocate 8 PiB"), 1, "error: out of memory: Unable to allocate 8 PiB: lower"),
        (OSError(28, "No space left on device", "/x"), 1, "error: No space left on device (/x): mend it"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), 75, "stopped: a data-loading worker"),
        (RuntimeError("[/a/gloo/b.cc:5] Read error [1]: Reset. This is"), 75, "stopped: lost another proc"),
        (utils.Interrupted("by SIGTERM", "out", "resume"), 75, "stopped: by SIGTERM (out): resume"),
    ],
)  # fmt: skip
def test_what_comes_from_outside_is_one_line(error, code, line, capsys):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run_script(main, None)
    said = capsys.readouterr().err
    assert end.value.code == code and said.startswith(line) and said.count("\n") == 1


def test_what_is_a_fault_of_the_program_keeps_its_traceback():
    def main(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        cli.run_script(main, None)
