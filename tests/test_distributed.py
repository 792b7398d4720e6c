"""Which processes belong together, how they meet, share errors and part."""

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from support import cli, distributed
from support.distributed import (
    all_gather,
    all_reduce_mean,
    fix_random_seeds,
    get_rank,
    get_world_size,
    is_main_process,
)
from support.errors import UserError
from support.logger import log
from tests.conftest import ROOT, TINY, free_port, run, save_images, wait_for_words

SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "7",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launch(monkeypatch):
    """Set the launcher's variables to these, and no others."""
    for name in [*LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that it is removed afterwards, also if the code sets it
        monkeypatch.delenv(name)
    return lambda env: [monkeypatch.setenv(name, value) for name, value in env.items()]


# ---- launch


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, (5, 8, 5)),  # each device is then rank % GPUs, as published
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3"}, (0, 1, 0)),  # alone, in one of several tasks
        (SLURM | STEP, (3, 4, 1)),
        ({"SLURM_PROCID": "3"} | STEP, (3, 4, 3)),
        (SLURM | {"SLURM_PROCID": "0"}, (0, 1, 0)),  # in the batch script, outside any srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2", "RANK": "1", "WORLD_SIZE": "16"}, (1, 16, 1)),
        ({"WORLD_SIZE": "4"} | SLURM | STEP, (3, 4, 1)),  # exported in the job's script, for others
    ],
)
def test_launchers(launch, env, expected):
    launch(env)
    assert distributed.launched_as() == expected
    distributed.check_launch()


def test_whatever_slurm_leaves_out_no_task_becomes_a_run_by_itself(launch, monkeypatch):
    """A container may pass only some variables on. Rank 3 is rank 3, or refused."""
    everything = SLURM | STEP
    for count in range(len(everything) + 1):
        for names in itertools.combinations(everything, count):
            with monkeypatch.context() as patch:
                for name in names:
                    patch.setenv(name, everything[name])
                try:
                    distributed.check_launch()
                except UserError as error:
                    assert "SLURM_PROCID is 3, but SLURM_STEP_NUM_TASKS is not set" in str(error)
                else:
                    assert distributed.launched_as()[0] == 3 or "SLURM_PROCID" not in names


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set: set both, or neither to train with one"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set: set both, or neither to train with one"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', not a number: unset it, or start with torchrun or"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes: count the ranks from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set: set it, or start the processes with"),
        (SLURM | STEP, "cannot find rank 0: .*scontrol.* .SLURM.: set MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "cannot find rank 0: SLURM_STEP_NODELIST is"),
    ],
)
def test_half_a_launch_is_one_line(launch, monkeypatch, env, message):
    launch(env)
    monkeypatch.setenv("PATH", "/nowhere")  # there is no scontrol
    with pytest.raises(UserError, match=message):
        distributed.init_distributed_mode()


def test_processes_on_different_kinds_of_devices_form_no_group():
    store = torch.distributed.HashStore()
    for rank in (0, 1):
        distributed.check_same_device(store, rank, "cuda")
    with pytest.raises(UserError, match="rank 1 on .* would compute on cpu, rank 0 on cuda: check the GPUs"):
        distributed.check_same_device(store, 1, "cpu")


def test_before_there_is_a_group_the_first_process_alone_speaks(launch, capsys):
    for rank, said in (("1", ""), ("0", "words\n")):
        launch({"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0"})  # each the first of its machine
        log("words")
        assert capsys.readouterr().out == said and is_main_process()


def test_an_address_may_be_ipv6s(launch):
    launch({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1234"})
    assert distributed._address("env://") == distributed._address("tcp://[::1]:1234") == ("::1", 1234)
    launch({"MASTER_ADDR": "[::1]"})
    assert distributed._address("env://") == ("::1", 1234)


def test_an_unknown_host_is_named_while_waiting():
    assert distributed._name(("127.0.0.1", 1)) == "127.0.0.1:1"
    assert re.fullmatch(r"no-such-node.invalid:1: \S.*", distributed._name(("no-such-node.invalid", 1)))


@pytest.mark.parametrize("dist_url", ["tcp//host:1", "tcp://host", "tcp://host:port", "http://host:1"])
def test_an_address_that_is_none_is_named(launch, dist_url):
    launch({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match=f"not an address .--dist_url {dist_url}.: write tcp://HOST:PORT"):
        distributed.init_distributed_mode(dist_url)


def test_an_address_that_the_user_sets_is_kept_without_asking_slurm(launch, monkeypatch):
    launch(SLURM | STEP | {"MASTER_ADDR": "10.0.0.1"})
    monkeypatch.setenv("PATH", "/nowhere")  # there is no scontrol
    distributed._set_slurm_address()
    assert os.environ["MASTER_ADDR"] == "10.0.0.1" and 20000 <= int(os.environ["MASTER_PORT"]) < 40000
    monkeypatch.setenv("MASTER_PORT", "29500")
    distributed._set_slurm_address()
    assert os.environ["MASTER_PORT"] == "29500"


def test_jobs_steps_and_attempts_take_different_ports(launch):
    ports = set()
    base = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    for changes in ({}, {"SLURM_JOB_ID": "200"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        launch(base | changes)
        distributed._set_slurm_address()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 4 and all(20000 <= int(port) < 32768 for port in ports)  # Linux gives others away


def test_the_first_node_of_a_step_is_found_by_its_address(launch, tmp_path, monkeypatch):
    """Its name need not resolve."""
    scontrol = tmp_path / "scontrol"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for known, expected in (("NodeAddr=10.0.0.7", "10.0.0.7"), ("", "node1")):
        launch(SLURM | STEP | {"MASTER_ADDR": "", "MASTER_PORT": ""})
        answer = (
            f'[ "$3" = node1 ] && echo "NodeName=node1 {known} NodeHostName=x" || printf "node1\\nnode2\\n"'
        )
        scontrol.write_text(f"#!/bin/sh\n{answer}\n")
        scontrol.chmod(0o755)
        distributed._set_slurm_address()
        assert os.environ["MASTER_ADDR"] == expected


@pytest.mark.parametrize(
    ("env", "gpus", "expected"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 4, "cuda:1"),
        ({"RANK": "5", "WORLD_SIZE": "8"}, 4, "cuda:1"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 1, "cuda:0"),
        ({}, 2, "cuda:0"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            2,
            r"4 processes for 2 GPUs .torchrun.: start one process per GPU",
        ),
    ],
)
def test_each_process_takes_its_own_gpu(launch, monkeypatch, env, gpus, expected):
    """Where each sees one only, that one."""
    launch(env)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if "processes" in expected:
        with pytest.raises(UserError, match=expected) as error:
            distributed.choose_device()
        assert not error.value.alone  # the first process of each machine says it
    else:
        assert distributed.choose_device() == torch.device(expected)
        assert chosen == [torch.device(expected)]


def test_the_published_call_is_accepted(launch):
    launch({})
    args = argparse.Namespace(dist_url="env://")
    assert distributed.init_distributed_mode(args) == distributed.choose_device()
    assert (args.rank, args.world_size, args.gpu) == (0, 1, 0)


# A torch that was built with USE_DISTRIBUTED=0 lacks these functions, and torch.distributed then has little
# more than `is_available`. Python runs a file of this name when it starts.
WITHOUT_DISTRIBUTED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            for init in "_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init":
                delattr(sys.modules["torch._C"], init)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_a_torch_without_distributed_trains(images, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DISTRIBUTED)
    env = {"PYTHONPATH": str(tmp_path)}
    code = (
        "import os, torch, main_dino, eval_knn, eval_linear, visualize_attention, run_with_submitit\n"
        "assert not torch.distributed.is_available() and not hasattr(torch.distributed, 'Store')\n"
        "os.environ |= {'RANK': '0', 'WORLD_SIZE': '2'}\n"
        "main_dino.cli.run_script(main_dino.utils.init_distributed_mode, 'env://')\n"
    )
    result = run("-c", code, env=env, check=False)
    error = "error: this torch has no torch.distributed: start one process only\n"
    assert (result.returncode, result.stderr) == (2, error)
    flags = [*TINY, "--max_steps", "2", "--data_path", images, "--output_dir", tmp_path / "run"]
    assert "1 process on" in run("main_dino.py", *flags, env=env).stdout


# ---- rendezvous


@pytest.mark.parametrize(
    ("env", "advice"),
    [
        ({}, "have they all been started?"),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "have they all been started?"),  # torchrun's
        ({"RANK": "0"}, "start them, or unset RANK and WORLD_SIZE"),
    ],
)
def test_processes_that_do_not_come_are_not_waited_for(launch, capsys, env, advice):
    launch(env)
    with pytest.raises(TimeoutError, match="waited 0.1 s for 1 of 2 processes .here."):
        distributed._fresh_store(dist.HashStore(), 0, 2, "here", patience=0.1, silent=0)
    assert capsys.readouterr().err == f"waiting for 1 of 2 processes (here): {advice}\n"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_processes_is_said_and_a_signal_ends_it(rank, images, tmp_path):
    port = free_port()
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["main_dino.py", *TINY, "--data_path", str(images), "--output_dir", str(tmp_path / "run")]
    said = tmp_path / "said"
    with said.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | env, stderr=file)
    whom = "rank 0 of" if rank else "1 of"
    words = f"waiting for {whom} 2 processes (127.0.0.1:{port}): start them, or unset RANK and WORLD_SIZE\n"
    wait_for_words(words, said, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_a_file_is_a_place_to_meet(launch, tmp_path):
    launch({})
    store = distributed.meet(f"file://{tmp_path}/store", 0, 1)
    store.set("key", "value")
    assert store.get("key") == b"value" and (tmp_path / "store").exists()


def test_rank_0_may_end_before_it_answers(launch, monkeypatch):
    launch({})
    monkeypatch.setattr(distributed, "ANSWER", timedelta(seconds=1))
    with distributed.socket.create_server(("127.0.0.1", 0)) as rank_0:
        threading.Thread(target=lambda: (rank_0.accept(), rank_0.close())).start()
        with pytest.raises(dist.DistError) as error:
            distributed.meet(f"tcp://127.0.0.1:{rank_0.getsockname()[1]}", 1, 2)
    assert "lost another process" in str(cli.as_user_error(error.value))


def test_a_port_that_is_in_use_is_named(launch):
    with distributed.socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        for url, fix in (("env://", "MASTER_PORT"), (f"tcp://127.0.0.1:{port}", "port in --dist_url")):
            match = f"the port is in use .127.0.0.1:{port}.: set another {fix}"
            with pytest.raises(UserError, match=match):
                distributed.meet(url, 0, 2)


# ---- two processes


def start_two_processes(tmp_path: Path, body: str) -> list[subprocess.Popen]:
    """Two ranks that run `body` in a group, as a script's `main` would."""
    script = tmp_path / "script.py"
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    script.write_text(
        "import glob, sys, time, torch\n"
        "import torch.distributed as dist\n"
        "from support import cli\n"
        "from support.distributed import *\n"
        "from support.errors import *\n"
        f"def main(_):\n    init_distributed_mode()\n    rank = get_rank()\n{lines}"
        "cli.run_script(main, None)\n"
    )
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | address | {"RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def two_processes(tmp_path: Path, body: str) -> list[tuple[int, str]]:
    """Their exit codes and what they wrote to stderr."""
    processes = start_two_processes(tmp_path, body)
    said = [process.communicate(timeout=120)[1] for process in processes]
    return list(zip([process.returncode for process in processes], said, strict=True))


OPEN = """
with same_error_on_all_ranks():
    images = glob.glob({folder!r} + str(rank) + "/*.png")
    if not images:
        raise UserError("no images", {folder!r} + str(rank), "check the path")
agree("images", f"{{len(images)}} images")
print("trains", file=sys.stderr)
"""


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_with_its_number(tmp_path):
    save_images(tmp_path / "on0", 2)
    results = two_processes(tmp_path, OPEN.format(folder=str(tmp_path / "on")))
    line = f"error: rank 1: no images ({tmp_path}/on1): check the path\n"
    assert results == [(2, line), (2, "")]


@pytest.mark.slow
def test_different_images_are_refused_on_all_ranks(tmp_path):
    save_images(tmp_path / "on0", 3)
    save_images(tmp_path / "on1", 2)
    results = two_processes(tmp_path, OPEN.format(folder=str(tmp_path / "on")))
    what = "ranks have different images (rank 0: 3 images; rank 1: 2 images)"
    line = f"error: {what}: give every process the same\n"
    assert results == [(2, line), (2, "")]


@pytest.mark.slow
def test_different_flags_are_refused_on_all_ranks(tmp_path):
    body = """
from argparse import Namespace
local = dict(data_path=f"/scratch/{rank}", num_workers=rank, local_rank=rank, dist_url="env://")
args = Namespace(lr=0.1, callers=torch.ones(2), **local)
init_distributed_mode(args)  # adds rank, world_size and gpu
cli.join_processes(args)
cli.join_processes(Namespace(lr=0.1, seed=rank, output_dir=f"runs/{rank}", **local))
"""
    zero, one = (f"rank {rank}: --seed {rank}, --output_dir runs/{rank}" for rank in range(2))
    line = f"error: ranks have different flags ({zero}; {one}): give every process the same\n"
    assert two_processes(tmp_path, body) == [(2, line), (2, "")]


@pytest.mark.slow
def test_different_weights_are_refused_on_all_ranks(tmp_path):
    body = """
from support.features import confirm_network
from support.weights import load_backbone
for seed in (0, rank):
    fix_random_seeds(seed)
    confirm_network(load_backbone("random", None, "vit_nano"))
"""
    (code, said), other = two_processes(tmp_path, body)
    assert (code, other) == (2, (2, ""))
    assert re.fullmatch(r"error: ranks have different weights \(rank 0: \w{12}; rank 1: \w{12}\): .*\n", said)


# (what each rank does, what both then raise); a rank that raises nothing waits for the main process first
CASES = [
    ("pass", None),
    ("raise ImageError('none', 'a.jpg')", ("ImageError", "none (a.jpg)", False)),
    ("if rank: raise ImageError('none', 'a.jpg')", ("ImageError", "rank 1: none (a.jpg)", False)),
    ("if rank: raise Interrupted('stopped')", ("Interrupted", "rank 1: stopped", False)),
    ("if rank: raise UserError('no folder')", ("UserError", "rank 1: no folder", False)),
    ("if not rank: raise UserError('no folder')", ("UserError", "rank 0: no folder", False)),
]
EACH = """
for code, expected in {cases!r}:
    try:
        with same_error_on_all_ranks():
            exec(code)
            with main_process_first(): pass
        agree("images", "3 images")
        met = None
    except UserError as error:
        met = type(error).__name__, str(error), error.alone
    assert met == expected, (rank, code, met)
"""


@pytest.mark.slow
def test_errors_are_shared_whichever_rank_meets_them_first(tmp_path):
    """Among them: a rank fails before it comes to the block that the main process runs first."""
    assert two_processes(tmp_path, EACH.format(cases=CASES)) == [(0, ""), (0, "")]


@pytest.mark.slow
def test_a_folder_that_one_rank_cannot_write_is_named(tmp_path):
    """As where one machine does not see the file system of the others."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "1" / "out").write_text("")
    body = f"import main_dino, os\nos.chdir({str(tmp_path)!r} + f'/{{rank}}')\n"
    body += f"main_dino.train_dino(main_dino.parse_args({[*TINY, '--demo', '--output_dir', 'out']!r}))"
    line = "error: rank 1: File exists (--output_dir out): choose another\n"
    assert [(code, said.splitlines(True)[-1:]) for code, said in two_processes(tmp_path, body)] == [
        (2, [line]),
        (2, []),
    ]


@pytest.mark.slow
def test_a_fault_of_one_rank_keeps_its_traceback_and_ends_the_other(tmp_path):
    body = "with same_error_on_all_ranks():\n    if rank: {}['key']"
    (code0, said0), (code1, said1) = two_processes(tmp_path, body)
    assert (code0, said0) == (1, "error: rank 1: KeyError: 'key'\n")
    assert code1 == 1 and "Traceback" in said1


@pytest.mark.slow
def test_the_first_ranks_buffers_are_given_to_all(tmp_path):
    body = """
norm = torch.nn.BatchNorm1d(3)
norm.running_mean += rank + 1
broadcast_buffers(norm)
assert norm.running_mean.tolist() == [1, 1, 1], norm.running_mean
"""
    assert two_processes(tmp_path, body) == [(0, ""), (0, "")]


@pytest.mark.slow
def test_means_of_a_published_loop_are_those_of_all_ranks(tmp_path):
    body = """
from utils import MetricLogger
logger = MetricLogger(delimiter="  ")
logger.update(loss=1.0, acc=rank)
for _ in range(rank):
    logger.meters["loss"].update(4.0, n=2)
logger.synchronize_between_processes()
means = {name: meter.global_avg for name, meter in logger.meters.items()}
assert means == {"loss": 2.5, "acc": 0.5} and logger.acc.value == rank, means
"""
    assert two_processes(tmp_path, body) == [(0, ""), (0, "")]


@pytest.mark.slow
def test_the_numbers_of_a_step_are_those_of_all_ranks(tmp_path):
    body = """
from support.monitor import Monitor
seen = []
class Watch:
    def __call__(self, numbers): seen.append(numbers)
monitor = Monitor(10, watch=Watch())
monitor.check(0, {"loss": torch.tensor(1.0 + rank)}, torch.tensor([3 if rank else -1]))
assert seen == [{"loss": 1.5}] and monitor.unreadable == 1, (seen, monitor.unreadable)
"""
    assert two_processes(tmp_path, body) == [(0, ""), (0, "")]


@pytest.mark.slow
def test_ranks_train_with_drop_path_of_their_own(tmp_path):
    body = f"""
import main_dino
from support.logger import MetricLogger
from support.monitor import Monitor
args = main_dino.parse_args({[*TINY, "--drop_path_rate", "0.5", "--data_path", "x"]!r})
training = main_dino.build_training(args, torch.device("cpu"), main_dino.count_steps(args, 20), resumes=False)
drawn = []
draw = lambda module, *_: drawn.append(module.training and torch.rand(()).item())
training.student_without_ddp.backbone.blocks[-1].drop_path.register_forward_hook(draw)
views = [torch.zeros(4, 2, 3, size, size, dtype=torch.uint8) for size in (32, 16)]
batch = views, (), torch.full((4,), -1)
main_dino.train_one_epoch(training, iter([batch]), range(1), Monitor(9), MetricLogger())
first, second = all_gather_object(drawn)
assert len(first) == 4 and all(first) and all(second) and not set(first) & set(second), (first, second)
"""
    found = two_processes(tmp_path, body)
    assert [code for code, _ in found] == [0, 0], found


@pytest.mark.slow
def test_the_main_process_is_first(tmp_path):
    file = str(tmp_path / "file")
    body = (
        "for turn in range(3):\n"
        "    with main_process_first():\n"
        f"        if rank == 0: time.sleep(0.3); open({file!r}, 'a').write('x')\n"
        f"        assert len(open({file!r}).read()) > turn\n"
        "dist.barrier()  # rank 0 has the store, which the other asks"
    )
    assert two_processes(tmp_path, body) == [(0, ""), (0, "")]


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise UserError('wrong')", 2)])
def test_a_group_with_unfinished_work_does_not_keep_a_process(ending, code, tmp_path):
    """Rank 1 does not answer. torch's own end of the group waits for it."""
    body = f"if rank: time.sleep(1000)\ndist.all_reduce(torch.ones(1), async_op=True)\n{ending}"
    first, second = start_two_processes(tmp_path, body)
    try:
        assert first.wait(120) == code
    finally:
        first.kill(), second.kill()
        first.communicate(), second.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise UserError('wrong')", 2), ("sys.exit(75)", 75)])
def test_a_process_of_a_group_ends_before_python_frees_its_objects(ending, code, tmp_path):
    """A thread of the group that frees a tensor at that time would abort the process."""
    body = f"""
import atexit
class Object:
    def __del__(self):
        print("freed", file=sys.__stderr__, flush=True)
globals()["an_object"] = Object()
atexit.register(print, f"exit handler of {{rank}}", file=sys.stderr)
barrier()
{ending}
"""
    for rank, (found, said) in enumerate(two_processes(tmp_path, body)):
        assert found == code and f"exit handler of {rank}" in said and "freed" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, r"error: rank 1: .* \(.*on1\): .*\n"),
        (8, r"error: ranks have different images \(rank 0: .*16.*; rank 1: .*8.*\): give every .*\n"),
    ],
)
def test_machines_with_different_data_do_not_train(count, message, tmp_path):
    save_images(tmp_path / "on0", 16)
    if count:
        save_images(tmp_path / "on1", count)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):
        flags = [*TINY, "--data_path", f"{tmp_path}/on{rank}", "--output_dir", str(tmp_path / "run")]
        env = os.environ | address | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "main_dino.py", *flags]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert re.fullmatch(message, said[0]) and said[1] == ""


# ---- collectives


def test_reductions_do_nothing_outside_a_group():
    x = torch.arange(3.0)
    assert all_reduce_mean(x) is x and all_gather(x) is x
    assert (get_rank(), get_world_size(), is_main_process()) == (0, 1, True)


def test_seeds_decide_every_generator():
    def draw(*entropy):
        fix_random_seeds(*entropy)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    for numbers in zip(draw(0, 1, 2), draw(0, 2, 1), draw(0, 1, 1), draw(1, 1, 2), strict=True):
        assert len(set(numbers)) == 4  # of each generator
