import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main_dino
from main_dino import FREE_FLAGS
from support import cli
from support.checkpoints import load_checkpoint
from support.errors import TrainingError, UserError
from support.restart import Run, add_records, check_optimizer, read_log
from tests.conftest import ROOT, TINY, taken_by, torchrun, train, wait_for, wait_for_words
from tests.faults import differing_bits, free_port
from utils import LARS


class Ranks:
    """A training of several processes, each in its own folder, with a file for what it says."""

    def __init__(self, count: int, folder: Path, *flags):
        port = str(free_port())
        self.said = [folder / f"said.{rank}" for rank in range(count)]
        self.processes = []
        for rank, said in enumerate(self.said):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in environment.items() if count > 1}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            (folder / str(rank)).mkdir(exist_ok=True)
            with open(said, "w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / "main_dino.py"), *TINY, *map(str, flags)],
                        cwd=folder / str(rank),
                        env=os.environ | environment,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )

    def wait_for(self, words: str) -> None:
        wait_for_words(words, self.said[0], self.processes[0])

    def codes(self) -> list[int]:
        return [process.wait(timeout=300) for process in self.processes]


# ---- the same bits


def test_an_epoch_in_two_parts_has_one_line_with_the_averages_of_the_whole(images, tmp_path):
    flags = ["--data_path", images, "--drop_path_rate", 0.3, "--use_bn_in_head", "true"]
    train(*flags, "--output_dir", tmp_path / "whole")
    for stop in (3, 5, 7, 0):
        train(*flags, "--output_dir", tmp_path / "parts", "--max_steps", stop)
        assert load_checkpoint(tmp_path / "parts" / "checkpoint.pth")["step"] == (stop or 10)
    assert differing_bits(tmp_path / "whole", tmp_path / "parts") == 0  # weights, optimizer, log


def test_saving_every_few_steps_keeps_the_one_before(images, tmp_path):
    flags = ["--data_path", images, "--output_dir", tmp_path, "--save_every_steps", 2, "--max_steps", 9]
    train(*flags)
    steps = [load_checkpoint(tmp_path / f"{name}.pth")["step"] for name in ("checkpoint", "checkpoint_prev")]
    assert steps == [9, 8]


# ---- signals and deaths


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_resume(images, tmp_path, number):
    """To all processes of the job, as from a scheduler or a terminal, data-loading workers too."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("nohup ignores this signal, also for what the tests start")
    flags = ["--data_path", images, "--epochs", 40, "--num_workers", 2, "--output_dir", tmp_path / "out"]
    run = Ranks(1, tmp_path, *flags)
    run.wait_for("epoch 1 ")
    os.killpg(run.processes[0].pid, number)
    assert run.codes() == [75]
    said = run.said[0].read_text()
    step = load_checkpoint(tmp_path / "out" / "checkpoint.pth")["step"]
    saved = f"saved step {step} of 200 ({tmp_path / 'out'})"
    assert said.splitlines()[-1] == f"stopped: by {number.name}, {saved}: run the same command to resume"
    assert "Traceback" not in said and step > 5


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(images, tmp_path):
    flags = ["--data_path", images, "--epochs", 40, "--batch_size_per_gpu", 2]
    run = Ranks(2, tmp_path, *flags, "--output_dir", tmp_path / "parts")
    run.wait_for("epoch 1 ")
    run.processes[1].send_signal(signal.SIGUSR1)
    assert run.codes() == [75, 75]
    step = load_checkpoint(tmp_path / "parts" / "checkpoint.pth")["step"]
    torchrun(2, "main_dino.py", *TINY, *flags, "--output_dir", tmp_path / "whole", "--max_steps", step)
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for part in ("student", "teacher", "dino_loss"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())


@pytest.mark.slow
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(images, labelled, tmp_path):
    """To one process of two and its data-loading workers."""
    for split in ("train", "val"):
        folder = tmp_path / "labelled" / split / "a"
        folder.mkdir(parents=True)
        image = (labelled / split / "a" / "000.png").read_bytes()
        for i in range(4000):  # seconds
            (folder / f"{i}.png").write_bytes(image)
    flags = ["--data_path", images, "--epochs", 40, "--num_workers", 1, "--output_dir", tmp_path / "out"]
    run = Ranks(2, tmp_path, *flags, "--knn_every", 1, "--knn_data", tmp_path / "labelled")
    wait_for((tmp_path / "out" / "checkpoint.pth").exists, "checkpoint")
    time.sleep(1)
    os.killpg(run.processes[1].pid, signal.SIGTERM)
    assert run.codes() == [75, 75]
    records = read_log(tmp_path / "out" / "log.txt")
    assert len(records) == 1 and "knn_teacher" not in records[0]
    step = records[0]["step"] + 1
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pth")["step"] == step
    assert f"saved step {step} of {40 * (step - 1)} (" in run.said[0].read_text().splitlines()[-1]


@pytest.mark.slow
def test_a_signal_outside_of_training_ends_at_once_and_says_resume(tmp_path):
    run = Ranks(1, tmp_path, "--demo", "--max_steps", 1, "--output_dir", tmp_path / "out")
    run.wait_for("k-NN")
    run.processes[0].send_signal(signal.SIGUSR1)
    assert run.codes() == [75]
    said = run.said[0].read_text()
    assert said.splitlines()[-1] == "stopped: by SIGUSR1, outside of training: run the same command to resume"


@pytest.mark.slow
def test_torchrun_restarts_and_resumes_after_a_death(images, tmp_path):
    flags = f"--data_path {images} --batch_size_per_gpu 2 --epochs 8 --save_every_steps 2".split()
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=1".split()
    command = [sys.executable, *launcher, "main_dino.py", *TINY, *flags, "--output_dir"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [*command, tmp_path / "parts"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
        )
        wait_for_words("epoch 1 ", tmp_path / "said", process)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
        assert process.wait(timeout=300) == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text().count("resuming") == 1
    torchrun(2, "main_dino.py", *TINY, *flags, "--output_dir", tmp_path / "whole")
    assert differing_bits(tmp_path / "whole", tmp_path / "parts") == 0


@pytest.mark.slow
def test_processes_that_see_different_checkpoints_end(images, tmp_path):
    """As on two machines whose output folder is not shared."""
    flags = "--data_path", images, "--batch_size_per_gpu", 2, "--output_dir"
    train(*flags, tmp_path / "0" / "out", "--max_steps", 2)
    run = Ranks(2, tmp_path, *flags, "out")
    assert run.codes() == [2, 2]
    assert "error: processes see checkpoints of different steps: [2, 0]" in run.said[0].read_text()


# ---- pieces


def test_a_line_takes_the_place_of_those_from_before_a_restart(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('a note\n{"epoch": 0, "x": 1}\n{"epoch": 1, "x": 2}\n{"epoch": 2}\n')
    add_records([{"epoch": 1, "x": 3}], path)
    assert path.read_text() == 'a note\n{"epoch": 0, "x": 1}\n{"epoch": 1, "x": 3}\n'


@pytest.mark.parametrize("left", ["checkpoint0020.pth", "log.txt"])
def test_what_a_run_without_checkpoint_left_is_not_overwritten(tmp_path, left):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')  # killed while it saved its first epoch
    for name in ("checkpoint0000.pth", "checkpoint_damaged.pth"):
        (tmp_path / name).touch()
    words = rf"an earlier run left {left}, but no checkpoint.pth .*: move them"
    with Run(tmp_path, required=()) as run:
        assert run.resume({}, {"lr": 1}) == {}
        with (tmp_path / left).open("a") as file:
            file.write('{"epoch": 1}\n')
        with pytest.raises(UserError, match=words):
            run.resume({}, {"lr": 1})


def test_a_link_to_a_checkpoint_that_is_away_is_not_a_new_run(tmp_path):
    (tmp_path / "checkpoint.pth").symlink_to("/nowhere/checkpoint.pth")
    with (
        Run(tmp_path, required=()) as run,
        pytest.raises(UserError, match="links to a file that is not there"),
    ):
        run.resume({}, {})


def test_the_log_keeps_lines_of_any_bytes(tmp_path):
    path = tmp_path / "log.txt"
    others = b'Versuch f\xfcr\n{"epoch": "one"}\n{"lr": 1}\n12\n' + b"[" * 100_000 + b"\n"
    path.write_bytes(others)
    add_records([{"epoch": 0}], path)
    assert path.read_bytes() == others + b'{"epoch": 0}\n'


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (None, ""),
        ("", "2 of 2 epochs, e.g. epoch 0"),  # as `| tee log.txt` leaves it
        ("training images: ...", "2 of 2 epochs, e.g. epoch 0"),
        ('{"epoch": 0}\n', "1 of 2 epochs, e.g. epoch 1"),
    ],
)
def test_a_log_that_lacks_epochs_is_said(tmp_path, capsys, text, lost):
    pieces = {"student": torch.nn.Linear(1, 1)}
    with Run(tmp_path, required=("student",)) as run:
        run.resume(pieces, {})
        run.save({"epoch": 2}, [{"epoch": 0}, {"epoch": 1}])
    if text is not None:
        run.log_file.write_text(text)
    with Run(tmp_path, required=("student",)) as run:
        run.resume(pieces, {})
    warnings = re.findall("log.txt lacks (.*): was it changed", capsys.readouterr().out)
    assert warnings == [lost] * bool(lost)


def test_a_log_may_lack_any_number_of_epochs(tmp_path, capsys):
    """A file of others may say so many that a list of them would fill the memory."""
    pieces = {"student": torch.nn.Linear(1, 1)}
    run = Run(tmp_path, required=())
    run.save({"epoch": 10**30, "student": pieces["student"].state_dict()})
    with Run(tmp_path, required=("student",)) as run:
        run.resume(pieces, {})
    assert f"lacks {10**30} of {10**30} epochs, e.g. epoch 0: was" in capsys.readouterr().out


@pytest.mark.parametrize(("logged", "other"), [("stdout", "stderr"), ("stderr", "stdout")])
def test_output_that_goes_to_the_log_is_refused(tmp_path, logged, other):
    code = (
        "import pathlib, sys; from support.restart import Run; from support.errors import UserError\n"
        "try: Run(pathlib.Path(sys.argv[1]), required=()).resume({}, {})\n"
        "except UserError as error: print(error, file=getattr(sys, sys.argv[2]))"
    )
    with (tmp_path / "log.txt").open("w") as output:
        command = [sys.executable, "-c", code, str(tmp_path), other]
        streams = {logged: output, other: subprocess.PIPE}
        said = getattr(subprocess.run(command, cwd=ROOT, text=True, **streams), other)
    assert "the output is redirected to the run's own log" in said and "redirect it to another file" in said


def test_a_damaged_checkpoint_is_put_aside(tmp_path, capsys):
    run = Run(tmp_path, required=())
    assert run.newest_whole() is None and not run.exists()
    for step in (1, 2):
        run.save({"step": step})
    assert run.exists()
    run.checkpoint.write_bytes(b"x")
    path, checkpoint = run.newest_whole()
    assert (path.name, checkpoint["step"]) == ("checkpoint_prev.pth", 1)
    assert (tmp_path / "checkpoint_damaged.pth").read_bytes() == b"x"
    assert re.search(r"warning: .*damaged.*checkpoint.pth", capsys.readouterr().out)
    run.save({"step": 3})  # what is damaged does not come back
    assert [run.newest_whole()[1]["step"], load_checkpoint(path)["step"]] == [3, 1]
    run.checkpoint.write_bytes(b"x"), path.write_bytes(b"y")
    with pytest.raises(UserError, match=r"damaged .*/checkpoint.pth\)"):
        run.newest_whole()
    assert path.read_bytes() == b"y"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, error):
    run = Run(tmp_path, required=())
    for step in (1, 2):
        run.save({"step": step})

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(type(error)):
            run.newest_whole()
    assert run.newest_whole()[1]["step"] == 2 and not run.damaged.exists()


def test_a_checkpoint_without_permission_is_not_damaged(permissions):
    run = Run(Path(), required=())
    for step in (1, 2):
        run.save({"step": step})
    run.checkpoint.chmod(0)
    with pytest.raises(UserError, match=r"no permission to read \(checkpoint.pth\): change its permissions"):
        run.newest_whole()
    run.checkpoint.chmod(0o600)
    assert run.newest_whole()[1]["step"] == 2 and not run.damaged.exists()


def test_a_failure_to_save_is_a_warning_but_for_the_last(tmp_path, capsys):
    (tmp_path / "file").touch()
    Run(tmp_path / "file", required=()).save({"step": 1})
    assert "warning: cannot save: " in capsys.readouterr().out
    with pytest.raises(TrainingError, match="cannot save"):
        Run(tmp_path / "file", required=()).save({"step": 1}, last=True)
    Run(tmp_path / "gone" / "run", required=()).save({"step": 1}, [{"epoch": 0}])
    assert "run was removed: creating it again" in capsys.readouterr().out
    assert json.loads((tmp_path / "gone" / "run" / "log.txt").read_text()) == {"epoch": 0}


def test_what_was_added_to_the_identity_has_a_value_for_older_checkpoints(tmp_path, capsys):
    flags = {"range": (0.4, 1), "output_dir": Path("out")}
    saved = {"student": torch.nn.Linear(1, 1).state_dict(), "epoch": 0, "args": flags}
    torch.save(saved, tmp_path / "checkpoint.pth")
    pieces, added = {"student": torch.nn.Linear(1, 1)}, {"gray": 0.2, "pair": (1, 2)}
    with Run(tmp_path, required=()) as run:
        assert run.resume(pieces, {"range": (0.4, 1), "gray": 0.2, "pair": [1, 2], "new": 3}, added=added)
        assert "does not compare" not in capsys.readouterr().out
        with pytest.raises(UserError, match=r"to resume: range \[0.4, 1\] -> \[0.5, 1\], gray 0.2 -> 0.3 \("):
            run.resume(pieces, {"range": (0.5, 1), "gray": 0.3, "pair": (1, 2)}, added=added)


def test_what_this_version_does_not_compare_is_said(tmp_path, capsys):
    pieces = {"student": torch.nn.Linear(1, 1)}
    with Run(tmp_path, required=()) as run:
        run.resume(pieces, {"lr": 1, "schedule": "wsd"})
        run.save({"epoch": 0})
    with Run(tmp_path, required=()) as run:
        run.resume(pieces, {"lr": 1})
    assert not run.lock.path.exists()
    assert "records schedule wsd, which this version does not compare" in capsys.readouterr().out
    with Run(tmp_path, required=()) as run:
        run.resume(pieces, {"lr": 1}, added={"schedule": "cosine"})  # a flag that may now change
    assert "does not compare" not in capsys.readouterr().out


def test_what_an_older_checkpoint_does_not_record_is_said(tmp_path, capsys):
    pieces = {"student": torch.nn.Linear(1, 1)}
    with Run(tmp_path, required=()) as run:
        run.resume(pieces, {"lr": 1})
        run.save({"epoch": 0})
    with Run(tmp_path, required=()) as run:
        run.resume(pieces, {"lr": 1, "gray": 0.2, "digest of the images": "ab12"}, added={"gray": 0.2})
    assert "checkpoint.pth does not record digest of the images: the run" in capsys.readouterr().out


def test_the_identity_that_was_saved_counts_before_the_flags_and_before_what_was_added(tmp_path):
    pieces = {"student": torch.nn.Linear(1, 1)}
    with Run(tmp_path, required=()) as run:
        run.resume(pieces, {"gray": 0.5})
        run.save({"epoch": 0, "args": {"gray": 0.9}})
    with Run(tmp_path, required=()) as run:
        found = run.resume(pieces, {"gray": 0.5}, added={"gray": 0.2})
    # without the pieces, which would stay in memory
    assert found == {"epoch": 0, "args": {"gray": 0.9}, "identity": {"gray": 0.5}}


def test_a_piece_that_the_checkpoint_lacks_is_said(tmp_path, capsys):
    """As in a checkpoint of the published format."""
    weights = torch.nn.Linear(1, 1)
    torch.save({"student": weights.state_dict(), "epoch": 2}, tmp_path / "checkpoint.pth")
    other = torch.nn.Linear(1, 1)
    pieces = {"student": other, "fp16_scaler": torch.amp.GradScaler("cpu")}
    with Run(tmp_path, required=("student",)) as run:
        run.resume(pieces, {})
    assert "has no fp16_scaler: starting from their initial state" in capsys.readouterr().out
    torch.testing.assert_close(other.state_dict(), weights.state_dict(), rtol=0, atol=0)
    with (
        Run(tmp_path, required=("student", "teacher")) as run,
        pytest.raises(UserError, match="lacks teacher"),
    ):
        run.resume(pieces, {})
    for state, epoch, words in ((weights.state_dict(), -1, "checkpoint lacks epoch"), ({}, 2, "2 missing")):
        torch.save({"student": state, "epoch": epoch}, tmp_path / "checkpoint.pth")
        with Run(tmp_path, required=()) as run, pytest.raises(UserError, match=words):
            run.resume(pieces, {})


def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(tmp_path):
    """Their loss would never be finite again."""
    network = torch.nn.Linear(1, 1)
    with Run(tmp_path, required=("student",), advice="try a lower --lr") as run:
        assert run.resume({"student": network}, {}) == {}
        run.save({"step": 1, "epoch": 0})
        for ruined, words in ((2e19, "as large as 2.0e[+]19"), (torch.nan, "that are not finite")):
            with torch.no_grad():
                network.bias.fill_(ruined)
            with pytest.raises(
                TrainingError, match=f"student has weights {words}: not saved.*try a lower --lr"
            ):
                run.save({"step": 2, "epoch": 0})
        assert load_checkpoint(run.checkpoint)["step"] == 1
        run.advice = None  # as of a search over learning rates
        run.save({"step": 2, "epoch": 0})
        run.advice = "try a lower --lr"
        with pytest.raises(UserError, match="not finite .*remove it to resume from checkpoint_prev.pth"):
            run.resume({"student": torch.nn.Linear(1, 1)}, {})


def test_a_float16_run_whose_steps_are_all_skipped_is_not_saved(tmp_path):
    """Its loss stays finite, but the scaler skips each step and halves its scale, to 0 in the end."""
    network, scaler = torch.nn.Linear(1, 1), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    run = Run(tmp_path, required=("student",), advice="try a lower --lr")
    assert run.resume({"student": network, "fp16_scaler": scaler}, {}) == {}

    def step(gradient: float) -> None:
        scaler.scale(network.weight.sum() * gradient).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for _ in range(16):  # 65,536 becomes 1
        step(torch.inf)
    step(1.0)
    run.save({"step": 17, "epoch": 0})
    for _ in range(10):
        step(torch.nan)
    words = r"gradients were not finite at any scale \(fp16_scaler: 9.8e-04\): not saved.*try a lower --lr"
    with pytest.raises(TrainingError, match=words):
        run.save({"step": 27, "epoch": 0})
    assert load_checkpoint(run.checkpoint)["step"] == 17
    run.lock.release()


def test_flags_that_change_the_maths_are_not_free():
    flags = {action.dest for action in main_dino.get_args_parser()._actions}
    maths = (
        "arch patch_size out_dim norm_last_layer momentum_teacher use_bn_in_head head_hidden_dim "
        "head_bottleneck_dim teacher_update centering warmup_teacher_temp teacher_temp "
        "warmup_teacher_temp_epochs adapt_teacher_temp weight_decay weight_decay_end clip_grad "
        "batch_size_per_gpu accum_steps epochs freeze_last_layer lr warmup_epochs min_lr optimizer "
        "drop_path_rate global_crops_scale local_crops_number local_crops_scale global_crops_size "
        "local_crops_size jitter jitter_p gray_p blur_p blur_sigma solarize_p hflip_p vflip_p quarter_turns "
        "crop_aspect in_chans value_range mean std dataset seed"
    )
    assert flags - FREE_FLAGS == set(maths.split()) and flags >= FREE_FLAGS - cli.LOCAL_FLAGS


def test_a_run_keeps_others_out_and_does_not_save_into_a_folder_that_another_took(tmp_path):
    run, other = Run(tmp_path, required=()), Run(tmp_path, required=())
    taken_by(other.lock)
    with pytest.raises(UserError, match="another run writes to this folder"):
        run.resume({}, {})
    run.lock.path.unlink()
    with run:
        run.resume({}, {})
        run.save({"step": 1})
        taken_by(other.lock)
        with pytest.raises(TrainingError, match="has taken this folder"):
            run.save({"step": 2}, [{"epoch": 0}])
    assert load_checkpoint(run.checkpoint)["step"] == 1 and not run.log_file.exists()


def test_an_epochs_line_and_its_copy_are_written_before_the_checkpoint(tmp_path, monkeypatch):
    """Else a run killed in between would resume behind them, and they would be lost."""
    written, write = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (written.append(Path(new).name), write(old, new)))
    for _ in range(2):  # the second time as after a kill, over what there is
        Run(tmp_path, required=()).save({"step": 1}, [{"epoch": 0}], "checkpoint0000.pth")
    assert written == ["log.txt", "checkpoint0000.pth", "checkpoint.pth"] * 2


def test_what_the_log_could_not_take_is_written_with_the_next_epoch(tmp_path, capsys):
    """Also lines that are written twice, as for the k-NN accuracy, and two lines of one epoch."""
    run, obstacle = Run(tmp_path, required=()), tmp_path / ".log.txt.tmp"
    run.save({"step": 1}, [{"epoch": 0}])
    obstacle.mkdir()
    for epoch in (1, 2):
        run.save({"step": 1}, [{"epoch": epoch, "lr": lr} for lr in (1, 2)])
        run.write_records([{"epoch": epoch, "lr": lr, "knn": 50} for lr in (1, 2)])
    obstacle.rmdir()
    run.save({"step": 4}, [{"epoch": 3}])
    run.save({"step": 5}, [{"epoch": 4}])
    assert capsys.readouterr().out.count("cannot save") == 4
    whole = [{"epoch": epoch, "lr": lr, "knn": 50} for epoch in (1, 2) for lr in (1, 2)]
    assert read_log(run.log_file) == [{"epoch": 0}, *whole, {"epoch": 3}, {"epoch": 4}]


@pytest.mark.parametrize("name", ["log.txt", "checkpoint0000.pth"])
def test_whatever_the_last_save_cannot_write_is_an_error(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(TrainingError, match=f"cannot save: .*{name}"):
        Run(tmp_path, required=()).save({"step": 1}, [{"epoch": 0}], "checkpoint0000.pth", last=True)


@pytest.mark.parametrize("ruined", [-2e19, -torch.inf])
def test_large_negative_weights_are_not_saved(tmp_path, ruined):
    network = torch.nn.Linear(1, 1)
    network.register_buffer("without_elements", torch.zeros(0))
    run = Run(tmp_path, required=())
    run.pieces = {"student": network}
    torch.nn.init.constant_(network.bias, ruined)
    with pytest.raises(TrainingError, match="student has weights .*: not saved"):
        run.save({"step": 1, "epoch": 0})


def test_a_run_of_which_only_the_checkpoint_before_is_left_exists_and_keeps_its_flags(tmp_path):
    run = Run(tmp_path, required=())
    for step in (1, 2):
        run.save({"step": step, "args": {"mean": [step]}})
    assert run.recorded_args() == {"mean": [2]}
    run.checkpoint.write_bytes(b"x")
    assert run.recorded_args() == {"mean": [1]}
    run.checkpoint.unlink()
    assert run.exists()
    run.save({"step": 3, "args": [1]})  # another program's
    assert run.recorded_args() == {}


@pytest.mark.parametrize("own", [torch.optim.AdamW, torch.optim.SGD, LARS])
def test_the_state_of_another_optimizer_is_refused(own):
    makers = (torch.optim.AdamW, torch.optim.SGD, LARS)
    states = {maker: maker([torch.zeros(1)], lr=0.1).state_dict() for maker in makers}
    optimizer = own([torch.zeros(1)], lr=0.1)
    check_optimizer(optimizer, states.pop(own))
    for state in states.values():
        with pytest.raises(ValueError, match="another optimizer saved it"):
            check_optimizer(optimizer, state)


@pytest.mark.parametrize(("enabled", "scale"), [(False, 65_536), (True, 8)])  # full precision or float16
def test_a_run_goes_on_with_the_scale_of_its_loss_or_begins_with_one(tmp_path, enabled, scale):
    run, scaler = Run(tmp_path, required=()), torch.amp.GradScaler("cpu")
    saved = torch.amp.GradScaler("cpu", init_scale=8, enabled=enabled)
    torch.save({"epoch": 0, "fp16_scaler": saved.state_dict()}, run.checkpoint)
    with run:
        run.resume({"fp16_scaler": scaler}, {})
    assert scaler.get_scale() == scale
