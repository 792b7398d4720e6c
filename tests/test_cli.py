import argparse

import pytest

import eval_knn
import eval_linear
import main_dino
import visualize_attention
from support import cli
from support.cli import bool_flag
from support.errors import ImageError, Interrupted, UserError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped: at once, by Ctrl-C: run the same command"),
        (MemoryError("Unable to allocate 8 PiB"), 1, "error: out of memory: Unable to allocate 8 PiB: lower"),
        (RuntimeError("MPS backend out of memory (x)"), 1, "error: out of memory: MPS backend"),
        (OSError(28, "No space left on device", "/x"), 1, "error: No space left on device (/x): correct"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), 75, "stopped: a data-loading worker"),
        (RuntimeError("[/a/gloo/b.cc:5] Read error [1]: Reset. This is"), 75, "stopped: lost another proc"),
        (Interrupted("by SIGTERM", "out", "resume"), 75, "stopped: by SIGTERM (out): resume"),
    ],
)  # fmt: skip
def test_what_comes_from_outside_is_one_line(error, code, line, capsys):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run_script(main, argparse.Namespace(batch_size_per_gpu=4))
    said = capsys.readouterr().err
    assert end.value.code == code and said.startswith(line) and said.count("\n") == 1


def test_what_is_a_fault_of_the_program_keeps_its_traceback():
    def main(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        cli.run_script(main, None)
    in_a_worker = RuntimeError("Caught TypeError in DataLoader worker process 0.\nOriginal Traceback")
    assert cli.from_outside(in_a_worker) is None


def test_the_one_that_knows_says_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    cli.say(cli.from_outside(MemoryError("no room"), argparse.Namespace(batch_size_per_gpu=4)))
    cli.say(ImageError("cannot read image"))
    cli.say(UserError("all of them know"))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: out of memory: no room: lower") and second == "error: cannot read image"


@pytest.mark.parametrize(
    ("script", "advice"),
    [
        (main_dino, "lower --batch_size_per_gpu or add --grad_checkpointing"),
        (eval_knn, "lower --batch_size_per_gpu or give --use_cuda false or lower --image_size"),
        (eval_linear, "lower --batch_size_per_gpu or lower --image_size"),
        (visualize_attention, "lower --image_size"),
    ],
)
def test_each_script_advises_the_flags_that_it_has(script, advice):
    error = cli.from_outside(MemoryError("no room"), script.parse_args([]))
    assert str(error) == f"out of memory: no room: {advice}"


def test_help_shows_defaults_where_there_are_some(capsys):
    parser = cli.ArgumentParser()
    parser.add_argument("--text", default="", help="words")
    parser.add_argument("--switch", action="store_true", help="turns")
    parser.add_argument("--number", default=0, help="counts")
    parser.add_argument("--flag", default=False, type=bool_flag, help="decides")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    out = capsys.readouterr().out
    assert "counts (default: 0)" in out and "decides (default: False)" in out and out.count("(default:") == 2


@pytest.mark.parametrize(
    ("number", "text", "words"),
    [
        (cli.number(int, at_least=1), "0", "must be at least 1, not 0"),
        (cli.number(int, at_least=1), "2147483648", "must be below 2147483648"),
        (cli.number(int, at_least=0), "1.5", "'1.5' is not a whole number"),
        (cli.number(float, above=0, at_most=1), "0", "must be above 0, not 0"),
        (cli.number(float, above=0, at_most=1), "1.01", "must be at most 1, not 1.01"),
        (cli.number(float), "nan", "must be finite, not nan"),
        (cli.number(float), "inf", "must be finite, not inf"),
    ],
)
def test_a_number_out_of_its_range_is_refused_where_the_flag_is_declared(number, text, words, capsys):
    parser = cli.ArgumentParser()
    parser.add_argument("--flag", type=number, default=3)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--flag", text])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: argument --flag: {words}") and said.count("\n") == 1


def test_a_number_within_its_range_is_taken():
    parser = cli.ArgumentParser()
    parser.add_argument("--flag", type=cli.number(int, at_least=1))
    assert parser.parse_args(["--flag", "7"]).flag == 7 and parser.parse_args([]).flag is None


def test_bool_flag():
    assert [bool_flag(w) for w in ("true", "On", "1", "False", "off", "0")] == [True] * 3 + [False] * 3
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        bool_flag("maybe")


def test_flags_without_effect_are_named(capsys):
    parser = cli.ArgumentParser()
    parser.add_argument("--size", type=int, default=3)
    parser.add_argument("--pair", type=int, nargs=2, default=(1, 2))
    rules = [("size", lambda a: True, "a reason"), ("pair", lambda a: a.size == 4, "another")]
    cli.warn_no_effect(parser.parse_args([]), parser, rules)
    cli.warn_no_effect(parser.parse_args(["--pair", "1", "2", "--size", "3"]), parser, rules)
    assert capsys.readouterr().out == ""
    cli.warn_no_effect(parser.parse_args(["--pair", "1", "3", "--size", "4"]), parser, rules)
    assert capsys.readouterr().out.splitlines() == [
        "warning: --size has no effect: a reason",
        "warning: --pair has no effect: another",
    ]
