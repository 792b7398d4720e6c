"""Train in a SLURM job that saves and requeues itself when it is preempted or runs out of time.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --arch vit_small \\
        --data_path /data/imagenet/train --output_dir "runs/%j"

All flags of main_dino.py, and those of the job. `%j` in a path becomes the job's number.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

import main_dino
from support import cli, distributed
from support.distributed import barrier, is_main_process
from support.errors import Interrupted, UserError


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the job."""
    parser = cli.ArgumentParser("DINO in a SLURM job", add_help=False)
    # fmt: off
    group = parser.add_argument_group("job")
    group.add_argument("--ngpus", default=8, type=int,
        help="GPUs per node, one process each; 0: a CPU job with one process per node")
    group.add_argument("--nodes", default=2, type=int, help="nodes")
    group.add_argument("--timeout", default=2800, type=int,
        help="minutes until the job saves, requeues itself and goes on")
    group.add_argument("--partition", default="", help="partition; the cluster's default if empty")
    group.add_argument("--use_volta32", action="store_true",
        help="ask for the feature volta32, where a cluster calls its 32 GB GPUs so")
    group.add_argument("--comment", default="", help="for the scheduler, where it asks for one")
    group.add_argument("--account", default="", help="whom to charge, where the cluster asks")
    group.add_argument("--qos", default="", help="quality of service, where the cluster has several")
    group.add_argument("--constraint", default="", help="features that nodes must have, e.g. a100")
    group.add_argument("--cpus_per_task", default=10, type=int,
        help="cores per process; --num_workers and one more is best: 11 with its default of 10")
    group.add_argument("--mem_gb", default=None, type=float,
        help="memory per node; without it, 40 per GPU, or what the cluster gives a CPU job")
    group.add_argument("--slurm_setup", default=[], nargs="+", metavar="COMMAND",
        help="shell commands that come first in the job, e.g. 'module load cuda'")
    group.add_argument("--shared_dir", default="",
        help="folder for the job's script and logs, which all nodes see; OUTPUT_DIR_slurm if empty")
    group.add_argument("--dry_run", action="store_true", help="print the job's script, submit nothing")
    group.add_argument("--local", action="store_true",
        help="run on this machine, without SLURM: a trial of everything but the queue")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The command line: flags of the job, and of the training."""
    parents = [get_args_parser(), main_dino.get_args_parser()]
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0], parents=parents)
    args = main_dino.parse_args(argv, parser)
    names = [action.dest for action in parents[0]._actions]
    return argparse.Namespace(**{name: vars(args).pop(name) for name in names}), args


class Trainer:
    """What runs in each process of the job. submitit pickles it, and calls it again after a requeue."""

    def __init__(self, args: argparse.Namespace, attempt: int = 0):
        self.args, self.attempt = args, attempt

    def __call__(self) -> None:
        job = submitit.JobEnvironment()
        if job.cluster == "local":  # as a launcher would; under SLURM, `rendezvous` asks SLURM
            port = distributed.port_of(int(job.job_id), self.attempt)
            os.environ |= {
                "RANK": str(job.global_rank), "WORLD_SIZE": str(job.num_tasks),
                "LOCAL_RANK": str(job.local_rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        args = vars(self.args) | {"output_dir": self.args.output_dir.replace("%j", job.job_id)}
        cli.run_script(self.train, argparse.Namespace(**args))

    def train(self, args: argparse.Namespace) -> None:
        """Train; if that was stopped, and not by `scancel`, have the job requeued."""
        try:
            main_dino.main(args)
        except Interrupted as stop:
            try:
                if is_main_process() and still_wanted():
                    cli.say(stop)
                    # What was a signal to save is now, with all saved, submitit's signal to requeue.
                    signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
            finally:
                barrier()  # a process that ends makes SLURM end the others
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit runs after the requeue: the same training, which finds what it saved."""
        return submitit.helpers.DelayedSubmission(Trainer(self.args, self.attempt + 1))

    __submitit_checkpoint__ = checkpoint  # its newer name


def still_wanted() -> bool:
    """Whether the job is to go on: SLURM no longer calls a cancelled job running, but a preempted one.

    Both may get the same signals, so that those do not tell.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return True
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    return "JobState=RUNNING" in shown


def make_executor(job: argparse.Namespace, folder: Path) -> submitit.AutoExecutor:
    """submitit's executor for the flags; its script and logs go to `folder`. Raises UserError."""
    # The job starts in the folder of the submission, the program's files may be elsewhere.
    search_path = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    python = shlex.join(["env", f"PYTHONPATH={':'.join(search_path)}", sys.executable])
    processes = max(job.ngpus, 1)
    if job.local:
        executor = submitit.AutoExecutor(folder, cluster="local", local_python=python)
        executor.update_parameters(
            timeout_min=job.timeout, tasks_per_node=processes, gpus_per_node=job.ngpus, nodes=1
        )
        return executor
    # While Python loads, before submitit has its handlers, a signal would end the job for good. Ignored,
    # it leaves a preempted job to SLURM, which requeues what still runs when the grace period is over.
    deaf = f"""sh -c 'trap "" TERM {submitit.JobEnvironment.USR_SIG}; exec "$@"' sh"""
    try:
        executor = submitit.AutoExecutor(
            folder, cluster="slurm", slurm_python=f"{deaf} {python}", slurm_max_num_timeout=30
        )
    except RuntimeError:
        raise UserError("no srun on this machine", "", "go to a login node, or try --local") from None
    features = [feature for feature in (job.constraint, "volta32" * job.use_volta32) if feature]
    mem_gb = 40 * job.ngpus if job.mem_gb is None else job.mem_gb
    executor.update_parameters(
        name="dino",
        timeout_min=job.timeout,
        nodes=job.nodes,
        tasks_per_node=processes,
        gpus_per_node=job.ngpus or None,
        cpus_per_task=job.cpus_per_task,
        mem_gb=mem_gb or None,
        slurm_partition=job.partition or None,
        slurm_comment=job.comment or None,
        slurm_account=job.account or None,
        slurm_qos=job.qos or None,
        slurm_constraint="&".join(features) or None,
        slurm_setup=job.slurm_setup or None,
        slurm_signal_delay_s=120,
        # srun no longer takes the cores from the job; and one dead process has to end the others.
        slurm_srun_args=[f"--cpus-per-task={job.cpus_per_task}", "--kill-on-bad-exit=1"],
        slurm_additional_parameters={"requeue": True},
    )
    return executor


def check_job(job: argparse.Namespace) -> None:
    """Raises UserError for flags that no job can have."""
    for name, least in (("ngpus", 0), ("nodes", 1), ("timeout", 1), ("cpus_per_task", 1), ("mem_gb", 0)):
        value = getattr(job, name)
        if value is not None and not value >= least:
            raise UserError(f"must be at least {least}", f"--{name} {value}", "raise it")
    if job.local and job.dry_run:
        raise UserError("a local job has no script", "--dry_run", "leave out one of --local, --dry_run")


def submit(job: argparse.Namespace, args: argparse.Namespace) -> None:
    """Submit a job that trains, or print its script under `--dry_run`. Raises UserError."""
    check_job(job)
    main_dino.check_args(argparse.Namespace(**vars(args)))  # better now than after days in the queue
    args.output_dir = str(Path(args.output_dir).expanduser().absolute())
    folder = Path(job.shared_dir or f"{args.output_dir}_slurm").expanduser().absolute()
    try:
        executor = make_executor(job, folder)
        submitted = None if job.dry_run else executor.submit(Trainer(args))
    except (FailedJobError, FailedSubmissionError) as error:
        reasons = re.findall(r"sbatch: error: (.*)", str(error)) or str(error).splitlines()
        raise UserError(f"sbatch refused: {reasons[-1]}", "", "mend the flags of the job") from None
    except OSError as error:
        raise UserError(error.strerror, f"--shared_dir {folder}", "choose another") from None
    if job.dry_run:
        slurm = executor._executor
        print(slurm._make_submission_file_text(slurm._submitit_command_str, "dry_run"))
        return
    print(f"job {submitted.job_id}, output in {args.output_dir.replace('%j', submitted.job_id)}")
    print(f"watch it: tail -F {submitted.paths.stdout}")


def main(flags: tuple[argparse.Namespace, argparse.Namespace]) -> None:
    """Flags of the job, and of the training."""
    submit(*flags)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
