"""Train in a SLURM job that saves and requeues itself when it is preempted or runs out of time.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --arch vit_small \\
        --data_path /data/imagenet/train --output_dir "runs/%j"

All flags of main_dino.py, and those of the job. `%j` in a path becomes the job's number.
"""

import argparse
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

import main_dino
from support import cli
from support.distributed import barrier, is_main_process
from support.errors import Interrupted, UserError, reason_of


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the job."""
    parser = cli.ArgumentParser(add_help=False)
    # fmt: off
    group = parser.add_argument_group("job")
    group.add_argument("--ngpus", default=8, type=cli.number(int, at_least=0),
        help="GPUs per node, one process each; 0: a CPU job with one process per node")
    group.add_argument("--nodes", default=2, type=cli.number(int, at_least=1), help="number of nodes")
    group.add_argument("--timeout", default=2800, type=cli.number(int, at_least=1),
        help="minutes until the job saves, requeues itself and resumes")
    group.add_argument("--partition", default="", help="partition (default: the cluster's)")
    group.add_argument("--use_volta32", action="store_true",
        help="require the node feature volta32 (32 GB V100 GPUs on some clusters)")
    group.add_argument("--comment", default="", help="comment for the scheduler, if the cluster requires one")
    group.add_argument("--account", default="", help="account to charge, if the cluster requires one")
    group.add_argument("--qos", default="", help="quality of service, if the cluster has several")
    group.add_argument("--constraint", default="", help="features that nodes must have, e.g. 'a100|h100'")
    group.add_argument("--cpus_per_task", default=10, type=cli.number(int, at_least=1),
        help="cores per process; best is --num_workers plus one: 11 for 10 workers, its default")
    group.add_argument("--mem_gb", default=None, type=cli.number(float, at_least=0),
        help="memory per node in GB, 0 for all of it (default: 40 per GPU, and for a CPU job the cluster's "
             "default)")
    group.add_argument("--slurm_extra", default=[], nargs="+", metavar="OPTION",
        help="further options of sbatch without the leading dashes, e.g. reservation=dino "
             "gpus-per-node=a100:8 exclude=node7 exclusive; they override the job's own")
    group.add_argument("--slurm_setup", default=[], nargs="+", metavar="COMMAND",
        help="shell commands that the job runs first, e.g. 'module load cuda'")
    group.add_argument("--shared_dir", default="",
        help="folder for the job's script and logs, which all nodes can read (default: OUTPUT_DIR_slurm)")
    group.add_argument("--dry_run", action="store_true", help="print the job's script, submit nothing")
    group.add_argument("--local", action="store_true",
        help="run on this machine without SLURM, to try everything except the queue")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The command line: flags of the job, and of the training."""
    parents = [get_args_parser(), main_dino.get_args_parser()]
    parser = cli.ArgumentParser(__doc__, parents=parents)
    args = main_dino.parse_args(argv, parser)
    names = vars(parents[0].parse_args([]))
    return argparse.Namespace(**{name: vars(args).pop(name) for name in names}), args


class Trainer:
    """Runs in each process of the job. submitit pickles it, and calls it again after a requeue."""

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def __call__(self) -> None:
        job = submitit.JobEnvironment()
        if job.cluster == "local":  # under SLURM, `support.distributed` reads SLURM's variables
            launch = submitit.helpers.TorchDistributedEnvironment()
            launch.master_addr = "127.0.0.1"  # this machine's name need not resolve
            launch.export(set_cuda_visible_devices=False, overwrite=True)
        args = vars(self.args) | {"output_dir": self.args.output_dir.replace("%j", job.job_id)}
        cli.run_script(self.train, argparse.Namespace(**args), resumable=True)

    def train(self, args: argparse.Namespace) -> None:
        """Train; if the training is stopped, but not by `scancel`, have the job requeued."""
        try:
            main_dino.main(args)
        except Interrupted as stop:
            try:
                if is_main_process() and still_wanted():
                    cli.say(stop)
                    # Everything is saved: send this process submitit's signal to requeue.
                    signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
            finally:
                if not stop.alone:  # the others would not come
                    barrier()  # a process that ends makes SLURM end the others
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit runs after the requeue: the same training, which resumes from its checkpoint."""
        return submitit.helpers.DelayedSubmission(Trainer(self.args))

    __submitit_checkpoint__ = checkpoint  # its name in newer versions of submitit


def still_wanted() -> bool:
    """Whether the job should continue, i.e. was not cancelled, as far as SLURM can tell.

    A preempted and a cancelled job may get the same signals, but SLURM shows only the first as running.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return True
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]]
    for _ in range(5):
        shown = subprocess.run(command, capture_output=True, text=True)
        if not shown.returncode:
            return "JobState=RUNNING" in shown.stdout
        time.sleep(2)  # SLURM's controller may be restarting
    return True


def python_command() -> str:
    """The shell command of this Python, which also finds this program's modules from another folder."""
    # The job starts in the folder of the submission; this program may be in another one.
    search_path = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return shlex.join(["env", f"PYTHONPATH={':'.join(search_path)}", sys.executable])


def local_executor(job: argparse.Namespace, folder: Path) -> submitit.AutoExecutor:
    """submitit's executor on this machine; it writes its logs to `folder`."""
    executor = submitit.AutoExecutor(folder, cluster="local", local_python=python_command())
    executor.update_parameters(
        timeout_min=job.timeout, tasks_per_node=max(job.ngpus, 1), gpus_per_node=job.ngpus, nodes=1
    )
    return executor


def slurm_executor(job: argparse.Namespace, folder: Path) -> submitit.SlurmExecutor:
    """submitit's executor for SLURM; it writes the job's script and logs to `folder`. Raises UserError."""
    for name in ("partition", "comment", "account", "qos", "constraint", "slurm_extra"):
        if "\n" in "".join(getattr(job, name)):  # it would end the option in the job's script
            raise UserError("line break in an option of sbatch", f"--{name}", "write it in one line")
    # A signal while Python starts, before submitit sets its handlers, would end the job without a requeue. If
    # it is ignored, SLURM requeues a preempted job that still runs after the grace period.
    ignoring = f"""sh -c 'trap "" TERM {submitit.JobEnvironment.USR_SIG}; exec "$@"' sh"""
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=30, python=f"{ignoring} {python_command()}")
    except RuntimeError:
        raise UserError("no srun on this machine", "", "go to a login node, or try --local") from None
    constraint = job.constraint
    if job.use_volta32:
        constraint = f"({constraint})&volta32" if constraint else "volta32"
    mem_gb = job.mem_gb if job.mem_gb is not None else 40 * job.ngpus or None
    further = sbatch_options(job.slurm_extra)
    if per_part := [name for name in further if name.startswith("mem_per_")]:  # sbatch refuses both
        if job.mem_gb is not None:
            what = f"contradicts --slurm_extra {per_part[0].replace('_', '-')}"
            raise UserError(what, f"--mem_gb {job.mem_gb:g}", "leave out one of the two")
        mem_gb = None
    executor.update_parameters(
        job_name="dino",
        time=job.timeout,
        nodes=job.nodes,
        ntasks_per_node=max(job.ngpus, 1),
        gpus_per_node=job.ngpus or None,
        cpus_per_task=job.cpus_per_task,
        mem=f"{math.ceil(mem_gb * 1024)}MB" if mem_gb is not None else None,
        partition=job.partition or None,
        comment=job.comment or None,
        account=job.account or None,
        qos=job.qos or None,
        constraint=constraint or None,
        wckey=None,  # submitit's default, "submitit", is refused where the cluster has no such key
        setup=job.slurm_setup or None,
        signal_delay_s=120,
        # srun does not inherit the job's cores; if one process ends, the others have to end too.
        srun_args=[f"--cpus-per-task={job.cpus_per_task}", "--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True} | further,
    )
    return executor


def sbatch_options(words: list[str]) -> dict[str, str | bool]:
    """Parse `--slurm_extra`: `key=value`, or `key` for a switch; returns them as submitit's parameters.

    Raises UserError.
    """
    pairs = [word.partition("=") for word in words]
    if any(key == "array" for key, _, _ in pairs):
        raise UserError("a run is one job", "--slurm_extra array", "submit one job for each run")
    return {key.replace("-", "_"): value if equals else True for key, equals, value in pairs}


def main(flags: tuple[argparse.Namespace, argparse.Namespace]) -> None:
    """Submit a job that trains, or print its script under `--dry_run`. Raises UserError.

    `flags` are those of the job and those of the training.
    """
    job, args = flags
    if job.local and job.dry_run:
        raise UserError("a local job has no script", "--local, --dry_run", "leave out one of the two")
    main_dino.check_args(argparse.Namespace(**vars(args)))  # checked now, not after days in the queue
    args.output_dir = str(Path(args.output_dir).expanduser().absolute())
    folder = Path(job.shared_dir or f"{args.output_dir}_slurm").expanduser().absolute()
    if job.dry_run:
        slurm = slurm_executor(job, folder)
        # submitit has no public way to make the script without submitting it.
        print(slurm._make_submission_file_text(slurm._submitit_command_str, "dry_run"))
        return
    try:
        executor = local_executor(job, folder) if job.local else slurm_executor(job, folder)
        submitted = executor.submit(Trainer(args))
    except (FailedJobError, FailedSubmissionError) as error:
        reasons = re.findall(r"sbatch: (?:error|fatal): (.*)", str(error)) or str(error).splitlines()
        reasons = reasons or ["it gives no reason"]
        unreachable = re.search("configuration (file|source)|Unable to contact", " ".join(reasons))
        fix = "go to a login node, or try --local" if unreachable else "change the flags of the job"
        raise UserError(f"sbatch refused: {reasons[-1]}", "", fix) from None
    except OSError as error:
        raise UserError(reason_of(error), f"--shared_dir {folder}", "choose another") from None
    print(f"job {submitted.job_id}, output in {args.output_dir.replace('%j', submitted.job_id)}")
    print(f"watch it: tail -F {submitted.paths.stdout}")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
