import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run_with_submitit
from support import cli
from support.checkpoints import load_checkpoint
from support.errors import UserError
from tests.conftest import ROOT, TINY, run, save_images, torchrun, wait_for

PUBLISHED = {"ngpus": 8, "nodes": 2, "timeout": 2800, "use_volta32": False, "comment": ""}


def text_of(*paths: Path) -> str:
    return "".join(path.read_text() for path in paths if path.exists())


def differences(one: Path, other: Path) -> int:
    """How many tensors of two runs' last checkpoints differ in any bit."""
    one, other = (load_checkpoint(folder / "checkpoint.pth") for folder in (one, other))
    assert one["step"] == other["step"]
    return sum(
        not torch.equal(value, other[part][name])
        for part in ("student", "teacher", "dino_loss")
        for name, value in one[part].items()
    )


# ---- flags


def test_published_flags_and_defaults():
    job, args = run_with_submitit.parse_args([])
    assert {name: vars(job)[name] for name in PUBLISHED} == PUBLISHED
    assert args.arch == "vit_small" and not set(vars(args)) & set(vars(job))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ngpus -1", "argument --ngpus: must be at least 0, not -1: see --help"),
        ("--nodes 0", "argument --nodes: must be at least 1, not 0: see --help"),
        ("--mem_gb nan", "argument --mem_gb: must be finite, not nan: see --help"),
        ("--epochs 0", "argument --epochs: must be at least 1, not 0: see --help"),
        ("--local --dry_run", "a local job has no script (--local, --dry_run): leave out one of the two"),
        ("--shared_dir /proc/x", "No such file or directory (--shared_dir /proc/x): choose another"),
        ("--shared_dir ~/x", "No such file or directory (--shared_dir /proc/x): choose another"),
        (  # before anything is submitted
            "--shared_dir /proc/x --warmup_epochs 101",
            "too long for --epochs 100 (--warmup_epochs 101): give at most 100",
        ),
        ("--partition_ low", "unrecognized arguments: --partition_ low: did you mean --partition?"),
    ],
)
def test_bad_usage_is_one_clear_line(flags, message, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(SystemExit) as end:
        cli.run_script(run_with_submitit.main, run_with_submitit.parse_args(["--local", *flags.split()]))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


# ---- on this machine


@pytest.mark.slow
def test_a_local_job_is_interrupted_and_goes_on(images, tmp_path):
    """Two processes, by submitit's own executor; the signal is the one it sends at its time limit."""
    flags = f"--data_path {images} --epochs 10 --batch_size_per_gpu 2".split()
    command = ["run_with_submitit.py", *"--local --ngpus 2".split(), *TINY, *flags]
    command += ["--output_dir", f"{tmp_path}/%j"]
    with open(tmp_path / "said", "w") as said:  # a pipe would be held open by the job
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=said, check=True)
    number = re.search(r"job (\d+), output in", text_of(tmp_path / "said"))[1]
    logs = tmp_path / f"{number}_slurm"
    out = logs / f"{number}_0_log.out"
    wait_for(lambda: "epoch 1 " in text_of(out), "training")
    for task in subprocess.run(["pgrep", "-P", number], capture_output=True, text=True).stdout.split():
        os.kill(int(task), signal.SIGUSR2)
    wait_for(lambda: "Job completed successfully" in text_of(out), "end of the training")
    stopped = int(re.search(r"by SIGUSR2, saved step (\d+) of 50 ", text_of(logs / f"{number}_0_log.err"))[1])
    assert f"2 processes on cpu, torch.float32, from step {stopped} to 50" in text_of(out)
    torchrun(2, "main_dino.py", *TINY, *flags, "--output_dir", tmp_path / "whole")
    assert differences(tmp_path / number, tmp_path / "whole") == 0


# ---- on a real SLURM


@functools.cache
def slurm_is_missing() -> bool:
    if not shutil.which("scontrol"):
        return True
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    return not re.search(r"ClusterName\s*= dinotests", shown)


needs_slurm = pytest.mark.skipif(
    slurm_is_missing(), reason="no SLURM of tests/slurm/cluster here: `sudo tests/slurm/cluster start DIR`"
)

# Two epochs of 48 steps, on two nodes: long enough to be stopped in the middle of one.
SHORT = [*TINY, "--epochs", "2", "--batch_size_per_gpu", "1", "--drop_path_rate", "0.3"]


def slurm(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


class Job:
    """A job on two nodes, by its number; `out` and `err` are the first process's."""

    def __init__(self, number: str, out: Path, err: Path):
        self.number, self.out, self.err = number, out, err

    def show(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S+)", slurm("scontrol", "show", "job", self.number))[1]

    def wait_until(self, state: str) -> None:
        wait_for(
            lambda: self.show("JobState") == state, f"{state}: {self.show('JobState')}\n{text_of(self.err)}"
        )

    def wait_for_line(self, line: str) -> None:
        """A line of the output that is not there yet."""
        before = text_of(self.out).count(line)
        wait_for(lambda: text_of(self.out).count(line) > before, f"{line!r} in {text_of(self.out, self.err)}")

    def freeze(self) -> None:
        """Stop the training's processes where they are, until SLURM signals, and so wakes, them."""
        command = f"^[^ ]*python.* submitit.core._submit {self.out.parent}"
        subprocess.run(["pkill", "-STOP", "-f", command], check=True)

    def start_again(self) -> None:
        """A requeued job waits for two minutes; not here."""
        self.wait_until("PENDING")
        assert self.show("Restarts") == "1"
        time.sleep(2)  # in the second in which it was stopped, SLURM ends it: "already killed, do not launch"
        slurm("scontrol", "update", f"JobId={self.number}", "StartTime=now", "TimeLimit=60")


def submit(*flags: str, output_dir: Path) -> Job:
    """By run_with_submitit.py."""
    resources = "--ngpus 0 --nodes 2 --cpus_per_task 1 --mem_gb 2 --partition low --timeout 60".split()
    command = [sys.executable, "run_with_submitit.py", *resources, *flags, "--output_dir", str(output_dir)]
    number = re.search(r"job (\d+)", slurm(*command))[1]
    logs = Path(f"{output_dir}_slurm".replace("%j", number))
    return Job(number, *(logs / f"{number}_0_log.{end}" for end in ("out", "err")))


def submit_script(folder: Path, command: str) -> Job:
    """By a script of the user's own, as in the README."""
    script = (
        "#!/bin/bash\n"
        "#SBATCH --nodes=2 --ntasks-per-node=1 --partition=low --mem=2G\n"
        "#SBATCH --signal=USR1@120 --requeue --open-mode=append\n"
        f"{command}; code=$?\n"
        "[ $code -eq 75 ] && scontrol requeue $SLURM_JOB_ID\n"
        "exit $code\n"
    )
    (folder / "job.sh").write_text(script)
    out, err = folder / "job.out", folder / "job.err"
    number = slurm(
        "sbatch", "--parsable", f"--output={out}", f"--error={err}", str(folder / "job.sh")
    ).strip()
    return Job(number, out, err)


def preempt(job: Job) -> None:
    """Take both nodes away from the job for a moment."""
    other = slurm(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    wait_for(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", other), "job in partition high")


@pytest.fixture(scope="module")
def many_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    save_images(folder, 96)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(many_images, tmp_path_factory) -> Path:
    """The output of SHORT on two processes, without SLURM."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torchrun(2, "main_dino.py", *SHORT, "--data_path", many_images, "--output_dir", folder)
    return folder


@needs_slurm
def test_dry_run_prints_the_script(tmp_path):
    flags = "--dry_run --nodes 3 --ngpus 4 --account me --qos fast --constraint a|b --use_volta32".split()
    options = "reservation=r gpus-per-node=a100:4 exclude=n1,n2 mail-type=END exclusive time=6"
    flags += ["--slurm_extra", *options.split()]
    setup = ["--slurm_setup", "module load cuda", "ulimit -n 4096"]
    out = run("run_with_submitit.py", *flags, *setup, "--output_dir", tmp_path / "%j").stdout
    for line in (
        "#SBATCH --nodes=3", "#SBATCH --gpus-per-node=a100:4", "#SBATCH --ntasks-per-node=4",
        "#SBATCH --mem=163840MB", "#SBATCH --account=me", "#SBATCH --qos=fast",
        "#SBATCH --constraint='(a|b)&volta32'", "#SBATCH --reservation=r",
        "#SBATCH --exclude=n1,n2", "#SBATCH --mail-type=END", "#SBATCH --exclusive", "#SBATCH --requeue",
        "#SBATCH --time=6",
        "#SBATCH --cpus-per-task=10", "module load cuda", "ulimit -n 4096",
    ):  # fmt: skip
        assert f"\n{line}\n" in out
    assert "--partition" not in out and "--wckey" not in out and not list(tmp_path.iterdir())
    both = run(
        "run_with_submitit.py", *"--mem_gb 1 --slurm_extra mem-per-gpu=4G --dry_run".split(), check=False
    )
    assert both.returncode == 2 and "contradicts --slurm_extra mem-per-gpu (--mem_gb 1)" in both.stderr
    for flags, memory in (
        (["--mem_gb", "0"], "#SBATCH --mem=0MB"),  # all of a node's
        (["--slurm_extra", "mem-per-cpu=4G"], "#SBATCH --mem-per-cpu=4G"),
        (["--ngpus", "0"], ""),
    ):
        out = run("run_with_submitit.py", "--dry_run", *flags).stdout
        assert [line for line in out.splitlines() if "--mem" in line] == [memory] * bool(memory)
    assert (
        "\n#SBATCH --wckey=mine\n"
        in run("run_with_submitit.py", "--dry_run", "--slurm_extra", "wckey=mine").stdout
    )
    # Until submitit has its handlers, no signal of SLURM ends the process.
    command = shlex.split(re.search("^srun .*", out, re.M)[0])
    command = command[command.index("sh") : command.index("-u")]
    code = "import signal; [signal.raise_signal(s) for s in (signal.SIGTERM, signal.SIGUSR2)]"
    subprocess.run([*command, "-c", code], check=True)


@needs_slurm
def test_what_sbatch_refuses_is_one_line(tmp_path):
    flags = "--ngpus", "0", "--partition", "none", "--output_dir", tmp_path / "out"
    result = run("run_with_submitit.py", *flags, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(
        r"^error: sbatch refused: .*partition.*: change the flags of the job\n$", result.stderr, re.M
    )


@pytest.mark.slow  # sbatch tries again
@pytest.mark.skipif(not shutil.which("sbatch"), reason="no sbatch here")
@pytest.mark.parametrize(
    ("conf", "reason"),
    [
        ("", "Unable to process configuration file"),
        ("SlurmctldHost=localhost\nSlurmctldPort=1\n", "Unable to contact slurm controller.*"),
    ],
)
def test_a_machine_outside_the_cluster_is_one_line(conf, reason, images, tmp_path, monkeypatch):
    (tmp_path / "slurm.conf").write_text(
        f"ClusterName=c\nNodeName=n CPUs=99\nPartitionName=p Nodes=n\n{conf}"
    )
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    flags = "--ngpus", "0", "--data_path", images, "--output_dir", tmp_path / "out"
    result = run("run_with_submitit.py", *flags, check=False)
    line = rf"^error: sbatch refused: (.*: )?{reason}: go to a login node, or try --local$"
    assert result.returncode == 2 and re.search(line, result.stderr, re.M), result.stderr


@pytest.mark.slow
@needs_slurm
def test_a_preempted_job_is_saved_requeued_resumed_and_ends_with_the_same_bits(
    many_images, uninterrupted, tmp_path
):
    job = submit(*SHORT, "--data_path", str(many_images), output_dir=tmp_path / "%j")
    job.wait_for_line("epoch 0 [10/48]")
    preempt(job)
    job.start_again()
    job.wait_until("COMPLETED")
    saved = re.search(r"stopped: by .*, saved step (\d+) of 96 ", text_of(job.err))[1]
    assert int(saved) % 48  # in the middle of an epoch
    assert f"2 processes on cpu, torch.float32, from step {saved} to 96" in text_of(job.out)
    assert "global_rank=1(2)" in text_of(job.out.with_name(f"{job.number}_1_log.out"))
    output = tmp_path / job.number
    assert differences(output, uninterrupted) == 0
    assert [json.loads(line)["epoch"] for line in (output / "log.txt").open()] == [0, 1]


@pytest.mark.slow
@needs_slurm
def test_time_limit_requeues_and_scancel_does_not(many_images, tmp_path):
    flags = [*SHORT, "--epochs", "1000", "--data_path", str(many_images)]  # does not end by itself
    job = submit(*flags, output_dir=tmp_path / "run")
    job.wait_for_line("epoch 0 [10/48]")
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")  # two minutes before, SLURM signals
    job.freeze()  # it looks at the time twice a minute; each step until then would be one to compare
    job.start_again()
    job.wait_for_line("from step")
    saved = re.search(r"stopped: by .*, saved step (\d+) of 48000 ", text_of(job.err))[1]
    assert f"from step {saved} to 48000" in text_of(job.out)
    job.wait_for_line("img/s")
    slurm("scancel", job.number)
    job.wait_until("CANCELLED")
    assert job.show("Restarts") == "1"
    step = load_checkpoint(tmp_path / "run" / "checkpoint.pth")["step"]
    assert step > int(saved)
    assert f"stopped: by SIGTERM, saved step {step} of 48000 " in text_of(job.err)
    torchrun(2, "main_dino.py", *flags, "--max_steps", step, "--output_dir", tmp_path / "whole")
    assert differences(tmp_path / "run", tmp_path / "whole") == 0


@pytest.mark.slow
@needs_slurm
def test_bare_srun_resumes_after_preemption(many_images, uninterrupted, tmp_path):
    flags = " ".join([*SHORT, f"--data_path {many_images} --output_dir {tmp_path}"])
    job = submit_script(tmp_path, f"srun {sys.executable} main_dino.py {flags}")
    job.wait_for_line("epoch 0 [10/48]")
    preempt(job)
    job.start_again()
    job.wait_until("COMPLETED")
    saved = re.search(r"stopped: by .*, saved step (\d+) of 96 ", text_of(job.err))[1]
    assert int(saved) % 48  # in the middle of an epoch
    assert f"2 processes on cpu, torch.float32, from step {saved} to 96" in text_of(job.out)
    assert differences(tmp_path, uninterrupted) == 0


@pytest.mark.slow
@needs_slurm
def test_srun_torchrun(many_images, uninterrupted, tmp_path):
    flags = " ".join([*SHORT, f"--data_path {many_images} --output_dir {tmp_path}"])
    rendezvous = "--rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID --rdzv_endpoint=localhost:29517"
    launcher = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc_per_node=1 {rendezvous}"
    job = submit_script(tmp_path, f"srun {launcher} main_dino.py {flags}")
    job.wait_until("COMPLETED")
    assert "2 processes" in text_of(job.out)
    assert differences(tmp_path, uninterrupted) == 0


def test_the_jobs_own_options_are_in_its_script(tmp_path, monkeypatch):
    (tmp_path / "srun").touch(0o755)  # submitit looks whether there is one
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    flags = "--nodes 3 --ngpus 4 --timeout 90 --partition low --comment why --use_volta32 --cpus_per_task 7"
    job, _ = run_with_submitit.parse_args(flags.split())
    executor = run_with_submitit.slurm_executor(job, tmp_path)
    assert executor.max_num_timeout == 30  # requeues
    script = executor._make_submission_file_text("train", "1")
    for line in (
        "--nodes=3", "--gpus-per-node=4", "--ntasks-per-node=4", "--time=90", "--partition=low",
        "--comment=why", "--constraint=volta32", "--cpus-per-task=7", "--signal=USR2@120", "--requeue",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in script, (line, script)
    assert re.search(r"\nsrun .*--cpus-per-task=7 --kill-on-bad-exit=1 ", script), script


@pytest.mark.parametrize(
    ("flags", "lines"),  # those of these kinds
    [
        ("--ngpus 4", "--gpus-per-node=4 --mem=163840MB --ntasks-per-node=4 --requeue"),
        ("--ngpus 0", "--ntasks-per-node=1 --requeue"),
        ("--ngpus 0 --mem_gb 0", "--mem=0MB --ntasks-per-node=1 --requeue"),  # all of a node's
        (
            "--ngpus 1 --slurm_extra mem-per-cpu=4G exclusive wckey=mine",
            "--exclusive --gpus-per-node=1 --mem-per-cpu=4G --ntasks-per-node=1 --requeue --wckey=mine",
        ),
        (
            "--ngpus 0 --account me --qos fast --constraint a|b --use_volta32",
            "--account=me --constraint='(a|b)&volta32' --ntasks-per-node=1 --qos=fast --requeue",
        ),
    ],
)
def test_what_is_not_given_is_left_to_the_cluster(flags, lines, tmp_path, monkeypatch):
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "/packages")
    setup = "--slurm_setup", "module load cuda", "ulimit -n 9"
    job, _ = run_with_submitit.parse_args([*flags.split(), *setup])
    executor = run_with_submitit.slurm_executor(job, tmp_path)
    script = executor._make_submission_file_text("train", "1")
    always = "cpus-per-task|error|job-name|nodes|open-mode|output|signal|time=2800"
    assert sorted(re.findall(rf"^#SBATCH (--(?!{always}).*)$", script, re.M)) == lines.split()
    assert "\nmodule load cuda\nulimit -n 9\n" in script
    assert f" PYTHONPATH={ROOT}:/packages " in run_with_submitit.python_command()
    local = run_with_submitit.local_executor(job, tmp_path)._executor.parameters
    assert (local["tasks_per_node"], local["timeout_min"]) == (max(job.ngpus, 1), 2800)


def test_an_array_is_refused():
    with pytest.raises(
        UserError, match="a run is one job .--slurm_extra array.: submit one job for each run"
    ):
        run_with_submitit.sbatch_options(["array=1-3"])


@pytest.mark.parametrize("flags", [["--comment", "a\nb"], ["--slurm_extra", "exclusive", "nodelist=a\nb"]])
def test_a_line_break_in_an_option_is_refused(flags, tmp_path):
    """It would end the option's line in the job's script."""
    with pytest.raises(
        UserError, match=rf"line break in an option of sbatch \({flags[0]}\): write it in one"
    ):
        run_with_submitit.slurm_executor(run_with_submitit.parse_args(flags)[0], tmp_path)


def test_a_job_is_requeued_while_slurm_does_not_answer(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(run_with_submitit.time, "sleep", lambda seconds: None)
    for script, wanted in (
        ("exit 1", True),
        ("echo JobState=CANCELLED", False),
        ("echo JobState=COMPLETING", False),  # as a cancelled one until its processes have ended
        ("echo JobState=RUNNING", True),
    ):
        scontrol.write_text(f"#!/bin/sh\n{script}\n")
        scontrol.chmod(0o755)
        assert run_with_submitit.still_wanted() == wanted
