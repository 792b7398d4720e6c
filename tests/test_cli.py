import argparse
import errno
import importlib
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_knn
import eval_linear
import eval_segmentation
import eval_video_segmentation
import export
import main_dino
import visualize_attention
from support import cli
from support.cli import bool_flag
from support.errors import (
    ImageError,
    Interrupted,
    UserError,
    WrongFormat,
    first_line,
    lacks_resources,
    reason_of,
)
from tests.conftest import ROOT, call, run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped: at once, by Ctrl-C: run the same command"),
        (MemoryError("Unable to allocate 8 PiB"), 1, "error: out of memory: Unable to allocate 8 PiB: lower"),
        (RuntimeError("MPS backend out of memory (x)"), 1, "error: out of memory: MPS backend"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory: DefaultCPU"),
        (OSError(12, "Cannot allocate memory", "/x"), 1, "error: out of memory: [Errno 12] Cannot allocate"),
        (OSError(28, "No space left on device", "/x"), 1, "error: No space left on device (/x): correct"),
        (RuntimeError("Could not determine home directory."), 2, "error: no home directory for a path that"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), 75, "stopped: a data-loading worker"),
        (RuntimeError("[/a/gloo/b.cc:5] Read error [1]: Reset. This is"), 75, "stopped: lost another proc"),
        (
            torch.distributed.DistBackendError("NCCL error in: /a/b.cpp:94, unhandled system error\n"
                                               "Last error:\nsocket: No route to host"),
            75, "stopped: lost another process: NCCL error in: /a/b.cpp:94, unhandled system error: socket",
        ),
        (
            RuntimeError("NCCL error in: /a/b.cpp:94, invalid usage\nncclInvalidUsage: This usually\n"
                         "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 5000"),
            2, "error: several processes use one GPU: start one process per GPU",
        ),
        (Interrupted("by SIGTERM", "out", "resume"), 75, "stopped: by SIGTERM (out): resume"),
    ],
)  # fmt: skip
def test_an_error_from_outside_the_program_is_one_line(error, code, line, capsys):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run_script(main, argparse.Namespace(batch_size_per_gpu=4))
    said = capsys.readouterr().err
    assert end.value.code == code and said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("resumable", "end"), [(True, ", which resumes if anything is saved"), (False, " to begin again")]
)
def test_only_a_script_that_resumes_promises_to(resumable, end, capsys):
    """With a scheduler's signals, too; but not where submitit has a handler for one."""

    def main(_):
        handled = [signal.getsignal(number) is cli._end_by_signal for number in cli.SCHEDULERS]
        assert handled == [False] + [resumable] * (len(cli.SCHEDULERS) - 1)
        raise KeyboardInterrupt

    handlers = [signal.signal(number, signal.SIG_DFL) for number in cli.SCHEDULERS]
    signal.signal(cli.SCHEDULERS[0], signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            cli.run_script(main, argparse.Namespace(), resumable)
    finally:
        for number, handler in zip(cli.SCHEDULERS, handlers, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err == f"stopped: at once, by Ctrl-C: run the same command{end}\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    def main(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        cli.run_script(main, None)
    in_a_worker = RuntimeError("Caught TypeError in DataLoader worker process 0.\nOriginal Traceback")
    assert cli.as_user_error(in_a_worker) is None


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_what_is_said():
    """torch raises the one error within the writing, which then fails in its turn."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9277696 vs 9277584")
    error.__context__ = RuntimeError("DataLoader worker (pid 25204) is killed by signal: Killed.")
    said = cli.as_user_error(error)
    assert said.exit_code == 75 and "worker (pid 25204)" in str(said)
    later = RuntimeError("MPS backend out of memory (x)")
    later.__context__ = RuntimeError("another one, that was being handled")
    assert "out of memory: MPS backend" in str(cli.as_user_error(later))
    fault = TypeError("a fault of the program")
    fault.__context__ = error.__context__
    assert cli.as_user_error(fault) is None


def test_compile_is_blamed_only_where_it_was_asked_for():
    error = torch._dynamo.exc.TorchDynamoException("no")
    assert "--compile): leave it out" in str(cli.as_user_error(error, argparse.Namespace(compile=True)))
    assert "--compile" not in str(cli.as_user_error(error, argparse.Namespace(to=["torch_export"])))


def test_an_error_of_one_process_is_printed_by_it_and_a_shared_one_by_the_first(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    cli.say(cli.as_user_error(MemoryError("no room"), argparse.Namespace(batch_size_per_gpu=4)))
    cli.say(ImageError("cannot read image"))
    for own in (OSError(28, "No space left on device"), RuntimeError("DataLoader worker (pid 7) is killed")):
        cli.say(cli.as_user_error(own))
    cli.say(WrongFormat("4 channels, not 3"))
    for shared in (UserError("all of them know"), cli.as_user_error(torch.distributed.DistNetworkError("x"))):
        cli.say(shared)
    cli.say_once("warning: of the first process")
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "out of memory", "cannot read image", "No space left on device", "a data-loading worker died",
        "4 channels, not 3",
    ]  # fmt: skip


def test_a_process_with_an_invalid_rank_prints_its_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x"), monkeypatch.setenv("WORLD_SIZE", "2")
    cli.say(UserError("no such folder"))
    assert capsys.readouterr().err == "error: no such folder\n"


def test_an_error_of_a_worker_is_the_last_line_of_its_traceback(capsys):
    text = "Caught ImageError in DataLoader worker process 0.\n  raise\nsupport.errors.ImageError: broken (x)"
    cli.say(ImageError(text))
    assert capsys.readouterr().err == "error: broken (x)\n"
    assert str(ImageError(text)) == "broken (x)"  # a warning may quote it
    cli.say(ImageError("broken\nsupport.UserError: forged", "a\n\x1b[31m.png", "repair it"))
    line = r"error: broken\nsupport.UserError: forged (a\n\x1b[31m.png): repair it"
    assert capsys.readouterr().err == f"{line}\n"


def test_an_error_without_a_text_or_a_number_still_says_something():
    assert first_line(AssertionError()) == "AssertionError" and reason_of(OSError()) == "OSError"
    assert first_line(ValueError("\n a\nb")) == reason_of(OSError("a\nb")) == "a"  # as libraries raise them


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_an_image_is_not_to_blame_for_what_the_machine_lacks(number):
    assert lacks_resources(OSError(number, os.strerror(number)))
    assert not lacks_resources(OSError(errno.EIO, "Input/output error"))


@pytest.mark.parametrize("name", ["a/b/file", "~/a/b/file"])
def test_a_folder_that_cannot_be_made_is_named_with_its_flag(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path), monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.make_folder(os.path.dirname(name)).resolve() == tmp_path / "a" / "b"
    assert cli.data_folder(os.path.dirname(name), "").resolve() == tmp_path / "a" / "b"
    (tmp_path / "a" / "b" / "file").write_text("")
    with pytest.raises(UserError, match=rf"File exists \(--preview {name}\): choose another"):
        cli.make_folder(name, "preview")


def test_a_link_that_is_switched_to_another_run_does_not_move_the_output(tmp_path):
    """It would overwrite the files of that run."""
    link = tmp_path / "current"
    link.symlink_to("run1")
    (tmp_path / "run1").mkdir()
    folders = cli.make_folder(link), cli.data_folder(str(link), "")
    link.unlink(), link.symlink_to("run2")
    assert folders == (tmp_path / "run1", tmp_path / "run1")


def test_a_link_to_a_folder_that_is_not_there_is_refused(tmp_path):
    """Its disk may not be mounted; a run in it would begin again, on another disk."""
    (tmp_path / "runs").symlink_to("disk/runs")
    for name in ("runs", "runs/vits16"):
        with pytest.raises(UserError, match=rf"File exists \(--output_dir {tmp_path}/{name}\)"):
            cli.make_folder(tmp_path / name)
    assert not (tmp_path / "disk").exists()


def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(permissions):
    os.mkdir("closed", 0o500)
    with pytest.raises(UserError, match=r"Permission denied \(--output_dir closed\): choose another"):
        cli.make_folder("closed")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("resumable", "code", "said"),
    [
        (True, 0, "warning: some output was lost: No space left on device\n"),
        (False, 1, "error: No space left on device: correct this, then run the same command\n"),
    ],
)
def test_output_to_a_full_disk_fails_a_script_whose_result_it_is_and_no_training(resumable, code, said):
    text = (
        f"from support import cli, logger; cli.run_script(lambda _: logger.log('a line'), None, {resumable})"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (code, said)


def test_a_signal_that_comes_twice_has_one_line():
    """`timeout` sends SIGTERM to the program, then to its group."""
    code = "import atexit, os, signal; from support import cli\n"
    code += "def stop(*_): os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "atexit.register(stop); cli.run_script(stop, None, resumable=True)"
    ended = run("-c", code, check=False)
    words = "stopped: by SIGTERM, outside of training: run the same command to resume\n"
    assert (ended.returncode, ended.stderr) == (75, words)


def test_a_name_of_any_bytes_is_printed():
    code = "import os; from support import cli, logger\n"
    code += "cli.run_script(lambda _: logger.log(os.fsdecode(b'my \\xff')), None)"
    assert run("-c", code, env={"PYTHONIOENCODING": "utf-8"}).stdout == "my \\udcff\n"


def test_a_script_ends_no_process_of_a_notebook_that_runs_it():
    code = "import multiprocessing, time; from support import cli\n"
    code += "own = multiprocessing.Process(target=time.sleep, args=(300,)); own.start()\n"
    code += "cli.run_script(print, 'done'); print(own.is_alive()); own.kill()"
    assert run("-c", code).stdout == "done\nTrue\n"


def test_no_reader_of_output_and_errors_has_the_exit_code_of_no_reader():
    """As for `main_dino.py 2>&1 | head`."""
    code = "from support import cli; cli.run_script(lambda _: print('a line', flush=True), None)"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    assert ended.returncode == 141


def test_output_that_nobody_reads_ends_the_run_with_a_line():
    code = "from support import cli; cli.run_script(lambda _: print('a line', flush=True), None)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # as `head` does
    said = process.stderr.read()
    assert process.wait() == 141 and said.startswith("stopped: the reader of the output has ended: run the")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (main_dino, ["--preview", "{out}"]),
        (eval_segmentation, ["--demo"]),
        (eval_video_segmentation, ["--output_dir", "{out}"]),
        (export, ["--output_dir", "{out}"]),
        (visualize_attention, ["--image_path", "x", "--output_dir", "{out}"]),
    ],
)
def test_a_second_process_of_a_script_for_one_says_so_and_does_nothing(
    script, flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    call(script, *(flag.format(out=tmp_path / "out.png") for flag in flags))
    said = capsys.readouterr()
    assert said.err.startswith("note: process 1 of 2 has nothing to do: ") and said.err.count("\n") == 1
    assert said.out == "" and not list(tmp_path.iterdir())


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
    error = cli.as_user_error(MemoryError("no room"), script.parse_args([]))
    assert str(error) == f"out of memory: no room: {advice}"


def test_help_shows_defaults_where_there_are_some(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = cli.ArgumentParser()
    parser.add_argument("--text", default="", help="words")
    parser.add_argument("--switch", action="store_true", help="turns")
    parser.add_argument("--number", default=0, help="counts")
    parser.add_argument("--flag", default=False, type=bool_flag, help="decides")
    parser.add_argument("--pair", default=(0.4, 1.0), nargs=2, help="bounds")
    parser.add_argument("--more", default=[], nargs="+", help="adds")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    out = capsys.readouterr().out
    shown = ("counts (default: 0)", "decides (default: False)", "bounds (default: 0.4 1.0)")
    assert all(words in out for words in shown) and out.count("(default:") == len(shown)


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
        (cli.seed, "-1", "must be at least 0, not -1"),
        (cli.seed, str(2**63), f"must be below {2**63}"),
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


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        (eval_knn, "--nb_knn 20 0", "must be at least 1, not 0"),
        (eval_knn, "--temperature 0", "must be above 0, not 0"),
        (eval_knn, "--temperature nan", "must be finite, not nan"),
        (eval_knn, "--batch_size_per_gpu 0", "must be at least 1, not 0"),
        (eval_knn, "--num_workers -1", "must be at least 0, not -1"),
        (eval_knn, "--seed -1", "must be at least 0, not -1"),
        (eval_knn, "--image_size 0", "must be at least 1, not 0"),
        (eval_knn, "--patch_size 0", "must be at least 1, not 0"),
        (eval_linear, "--lr 0", "must be above 0, not 0"),
        (eval_linear, "--lr 0.1 nan", "must be finite, not nan"),
        (eval_linear, "--num_workers -1", "must be at least 0, not -1"),
        (eval_linear, "--seed -1", "must be at least 0, not -1"),
        (eval_linear, "--epochs 0", "must be at least 1, not 0"),
        (eval_linear, "--num_labels 0", "must be at least 1, not 0"),
        (eval_linear, "--few_shot 0%", "must be at least 1, or above 0%"),
        (visualize_attention, "--threshold 60", "must be at most 1, not 60"),
        (visualize_attention, "--threshold 0", "must be above 0, not 0"),
        (visualize_attention, "--image_size 0", "must be at least 1, not 0"),
        (visualize_attention, "--patch_size 0", "must be at least 1, not 0"),
        (visualize_attention, "--seed -1", "must be at least 0, not -1"),
        (visualize_attention, "--layer 0", "must be at least 1, not 0"),
        (visualize_attention, "--query -1 3", "must be at least 0, not -1"),
        (visualize_attention, "--fps 0.0001", "must be at least 0.001, not 0.0001"),
    ],
)
def test_the_scripts_flags_have_their_ranges(script, flag, message, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_args(flag.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: argument {flag.split()[0]}: {message}")


def test_a_number_within_its_range_is_taken():
    parser = cli.ArgumentParser()
    parser.add_argument("--flag", type=cli.number(int, at_least=1))
    assert parser.parse_args(["--flag", "7"]).flag == 7 and parser.parse_args([]).flag is None
    assert cli.seed(str(2**63 - 1)) == 2**63 - 1


def test_a_size_is_one_length_or_two(capsys):
    parser = cli.ArgumentParser()
    cli.add_size_flag(parser, "--size", 224, "help")
    given = {"": 224, "--size 64": 64, "--size 64 64": 64, "--size 64 32": [64, 32]}
    assert {flags: parser.parse_args(flags.split()).size for flags in given} == given
    for flags, message in (
        ("--size 1 2 3", "--size: takes one length, or height and width, not 3"),
        ("--size 64 0", "--size: must be at least 1, not 0"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(flags.split())
        assert message in capsys.readouterr().err


def test_words_for_true_and_false():
    assert [bool_flag(w) for w in ("true", "On", "1", "False", "off", "0")] == [True] * 3 + [False] * 3
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        bool_flag("maybe")


def test_flags_without_effect_are_named(capsys):
    parser = cli.ArgumentParser()
    parser.add_argument("--size", type=int, default=3)
    parser.add_argument("--pair", type=int, nargs="+", default=(1, 2))
    rules = [("size", True, "a reason"), ("pair", False, "does not hold"), ("pair", True, "another")]
    cli.warn_no_effect(parser.parse_args([]), parser, rules)
    cli.warn_no_effect(parser.parse_args(["--pair", "1", "2", "--size", "3"]), parser, rules)
    assert capsys.readouterr().out == ""
    parser.set_defaults(pair=1)  # an image size: one length or two
    cli.warn_no_effect(parser.parse_args(["--pair", "1", "3", "--size", "4"]), parser, rules)
    assert capsys.readouterr().out.splitlines() == [
        "warning: --size has no effect: a reason",
        "warning: --pair has no effect: another",
    ]


# ---- argument files


def test_a_line_is_split_as_in_a_shell():
    lines = {
        "": [],
        "  # a comment, don't mind the quote": [],
        "--epochs 3 --seed 1": ["--epochs", "3", "--seed", "1"],
        "--epochs 3  # three": ["--epochs", "3"],
        "--output_dir runs/a#1 #x": ["--output_dir", "runs/a#1"],
        """--data_path 'my # images' "b c" d\\ e # "f""": ["--data_path", "my # images", "b c", "d e"],
        "--data_path ''\r": ["--data_path", ""],
    }
    assert {line: cli.split_line(line) for line in lines} == lines
    with pytest.raises(ValueError, match="quotation"):
        cli.split_line("--data_path 'my images")


def test_flags_of_a_file_stand_where_its_name_stands(tmp_path, monkeypatch):
    (tmp_path / "one").write_bytes(b"\xef\xbb\xbf# with a mark of the encoding\r\n\r\n--seed\r\n5\r\n")
    file = f"@{tmp_path}/one"
    assert main_dino.parse_args([file]).seed == 5
    assert main_dino.parse_args(["--seed", "3", file]).seed == 5  # the last one counts
    assert main_dino.parse_args([file, "--seed=3"]).seed == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main_dino.parse_args(["@~/one"]).seed == 5  # a shell does not replace this one


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in ROOT.glob("*.py") if "get_args_parser" in path.read_text())
)
def test_every_script_takes_argument_files(name, tmp_path, capsys):
    script = importlib.import_module(name)
    (tmp_path / "one").write_text("\n--unknown\n")
    with pytest.raises(SystemExit) as end:
        script.parse_args([f"@{tmp_path}/one"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"unrecognized arguments: --unknown ({tmp_path}/one, line 2)" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--seed 1\n\n--sed 2\n", "unrecognized arguments: --sed 2 ({file}, line 3): did you mean --seed?"),
        ("--seed 1 8\n", "unrecognized arguments: 8 ({file}, line 1): see --help"),
        ("seed 1\n", "unrecognized arguments: seed 1 ({file}, line 1): see --help"),
        ("--seed 1\n--lr fast", "argument --lr: 'fast' is not a number ({file}, line 2): see --help"),
        ("--lr=fast", "argument --lr: 'fast' is not a number ({file}, line 1): see --help"),
        ("--lr\n--seed 1", "argument --lr: expected one argument ({file}, line 1): see --help"),
        ("--seed 1\n--arch 'vit", "No closing quotation ({file}, line 2): quote as in a shell"),
        (
            "--output_dir=$HOME/a",
            "variables and commands are not replaced in a file: $HOME/a ({file}, line 1): write the value",
        ),
        (
            "--seed 1 # not $x\n--min_lr '$1' --output_dir `hostname`",
            "variables and commands are not replaced in a file: `hostname` ({file}, line 2): write the value",
        ),
        (
            "--output_dir C:\\runs\\new",
            "backslashes count as in a shell: \\runs\\new ({file}, line 1): put the path in single quotes",
        ),
        (
            "--output_dir C:\\.runs",
            "backslashes count as in a shell: \\.runs ({file}, line 1): put the path in single quotes",
        ),
        ("@other", "unrecognized arguments: @other ({file}, line 1): see --help"),
        ("\x89PNG\0", "not a text file (@{file}): name a file of flags"),
    ],
)
def test_an_error_in_a_file_is_one_line_that_names_the_place(text, message, tmp_path, capsys):
    file = tmp_path / "recipe.txt"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        main_dino.parse_args(["--epochs", "2", f"@{file}", "--min_lr", "0"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message.format(file=file)}\n"


@pytest.mark.parametrize("path", ["bob's $x", "$x", 'a "$HOME" `b`', "#$x", "\\$x'", "C:\\runs"])
def test_signs_of_a_shell_in_a_path_are_read_back_from_a_file(path, tmp_path):
    file = tmp_path / "args.txt"
    file.write_text(shlex.join(["--data_path", path]) + "  # not $x\n")
    assert main_dino.parse_args([f"@{file}"]).data_path == path


def test_a_list_given_twice_is_named_since_only_the_last_counts(tmp_path, capsys):
    file = tmp_path / "recipe.txt"
    file.write_text("--data_path a --seed 1")
    sizes = "--seed 2 --seed 3 --local_crops_size 64 --local_crops_size 96".split()  # one value each
    assert main_dino.parse_args([f"@{file}", "--data_path", "b", *sizes]).data_path == "b"
    assert capsys.readouterr().err == ""
    cli.say_once.cache_clear()  # another test may have said it
    assert main_dino.parse_args(["--data_path", "a", "--data_path=b"]).data_path == "b"
    assert capsys.readouterr().err == "warning: --data_path is given 2 times: only the last counts\n"
    cli.say_once.cache_clear()
    file.write_text("--data_path a\n--data_path b")
    assert main_dino.parse_args([f"@{file}"]).data_path == "b"
    assert capsys.readouterr().err == "warning: --data_path is given 2 times: only the last counts\n"


def test_a_file_after_a_flag_of_the_command_line_says_that_it_overrides_it(tmp_path, capsys):
    file = tmp_path / "base.txt"
    file.write_text("--lr 0.01\n--seed 1")
    assert main_dino.parse_args([f"@{file}", "--lr", "0.1", "--epochs", "2"]).lr == 0.1
    assert capsys.readouterr().err == ""
    assert main_dino.parse_args(["--lr=0.1", "--epochs", "2", f"@{file}"]).lr == 0.01
    line = f"warning: --lr of the command line has no effect: {file}, line 1 follows it\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed x", "argument --seed: 'x' is not a whole number: see --help"),
        (
            "--epochs x",
            "argument --epochs: 'x' is not a whole number ({file}, line 1 or the command line): see --help",
        ),
        ("--sed 3", "unrecognized arguments: --sed 3: did you mean --seed?"),
        ("--Save-Every=8", "unrecognized arguments: --Save-Every=8: did you mean --save_every_steps?"),
        ("--l 8", "unrecognized arguments: --l 8: did you mean --lr, --local_rank, --local_crops_size?"),
        ("--=8", "unrecognized arguments: --=8: see --help"),
    ],
)
def test_an_error_of_the_command_line_is_not_blamed_on_the_file(flags, message, tmp_path, capsys):
    file = tmp_path / "recipe.txt"
    file.write_text("--epochs 3")
    with pytest.raises(SystemExit):
        main_dino.parse_args([f"@{file}", *flags.split()])
    assert capsys.readouterr().err == f"error: {message.format(file=file)}\n"


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_a_wrong_command_is_named_on_its_machine(local_rank, lines, monkeypatch, capsys):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main_dino.parse_args(["--epochs", "x"])
    assert capsys.readouterr().err.count("error: argument --epochs") == lines


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--init_from", ""], "--init_from"),
        (["--init_from="], "--init_from"),
        (["--lr=1", ""], "the command line"),
        (["--data_path", "a", ""], "the command line"),
    ],
)
def test_an_empty_value_is_refused_because_it_would_count_as_not_given(words, where, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main_dino.parse_args(["--seed", "1", *words, "--epochs", "1"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: empty value ({where}): set the shell variable")
    (tmp_path / "args.txt").write_text("--init_from old.pth")
    assert main_dino.parse_args([f"@{tmp_path}/args.txt", "--init_from", ""]).init_from == ""  # takes it back


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "cannot read: No such file or directory (@{file}): check the path"),
        ("folder", "not a file (@{file}): name a file of flags"),
        ("pipe", "not a file (@{file}): name a file of flags"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, message, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit) as end:
        eval_knn.parse_args([f"@{tmp_path}/{name}"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message.format(file=tmp_path / name)}\n"


def every_kind_of_flag() -> cli.ArgumentParser:
    parser = cli.ArgumentParser()
    parser.add_argument("--text", default="")
    parser.add_argument("--path", "--file", default=None)
    parser.add_argument("--number", default=3, type=cli.number(int))
    parser.add_argument("--share", default=0.1, type=cli.number(float))
    parser.add_argument("--pair", default=(0.1, 1.0), type=cli.number(float), nargs=2)
    parser.add_argument("--paths", default=[], nargs="+")
    parser.add_argument("--decided", default=True, type=bool_flag)
    parser.add_argument("--switch", action="store_true")
    return parser


TEXT = st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]))


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    text=TEXT, path=st.none() | TEXT, number=st.integers(-(2**31), 2**31 - 1),
    share=NUMBERS, pair=st.tuples(NUMBERS, NUMBERS),
    paths=st.lists(TEXT.filter(lambda text: text[:1] != "-")), decided=st.booleans(), switch=st.booleans(),
)  # fmt: skip
def test_arguments_written_to_a_file_are_read_as_they_were(tmp_path_factory, **values):
    file, parser = tmp_path_factory.getbasetemp() / "args.txt", every_kind_of_flag()
    args = argparse.Namespace(**values | {"pair": list(values["pair"])})
    with open(file, "w", encoding="utf-8", newline="") as out:
        out.write(cli.argument_file(args, parser))
    assert parser.parse_args([f"@{file}"]) == args


def test_paths_of_any_bytes_and_with_spaces_are_written_too(tmp_path):
    parser = every_kind_of_flag()
    path = os.fsdecode(b"my \xff images") + "\f\u2028"  # `splitlines` takes these two for ends of lines
    args = parser.parse_args(["--path", path, "--text=-a", "--paths", "a b", "c#d", "--pair", "0", "1"])
    text = cli.argument_file(args, parser)
    (tmp_path / "args").write_bytes(text.encode(errors="surrogateescape"))
    assert parser.parse_args([f"@{tmp_path}/args"]) == args
    assert "--paths 'a b' 'c#d'" in text and "--decided true" in text and "--switch" not in text
