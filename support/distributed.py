"""How processes that are started together find each other."""

import contextlib
import os
import random
import re
import subprocess
import time
import uuid

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import Interrupted, UserError


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment, SLURM's, or for one process.

    SLURM counts only inside a step started by `srun`: in the batch script itself, the other tasks
    do not exist.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def port_of(job: int, attempt: int) -> int:
    """A port that jobs on one machine, and attempts at one job, do not share."""
    return 20000 + (97 * job + attempt) % 20000


def _set_slurm_address() -> None:
    """Set MASTER_ADDR and MASTER_PORT as torchrun would: the step's first node, a port per step."""

    def scontrol(*arguments: str) -> str:
        command = ["scontrol", "show", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    env = os.environ
    first = scontrol("hostnames", env["SLURM_STEP_NODELIST"]).split()[0]
    # A node's name need not resolve; its address does.
    address = re.search(r"NodeAddr=(\S+)", scontrol("node", first))[1]
    env.setdefault("MASTER_ADDR", address)
    attempt = int(env["SLURM_STEP_ID"]) + 10 * int(env.get("SLURM_RESTART_COUNT", 0))
    env.setdefault("MASTER_PORT", str(port_of(int(env["SLURM_JOB_ID"]), attempt)))


def meet(dist_url: str, rank: int, world_size: int) -> dist.Store:
    """What the processes at this address share. Raises TimeoutError when some do not come."""
    if "RANK" not in os.environ and dist_url == "env://":
        _set_slurm_address()
    store, rank, world_size = next(dist.rendezvous(dist_url, rank, world_size))
    return _fresh_store(store, rank, world_size)


def _fresh_store(store: dist.Store, rank: int, world_size: int, patience: float = 600) -> dist.Store:
    """The store under a prefix that no earlier attempt has used.

    torchrun's store outlives a restart of its processes, which would read their dead
    predecessors' addresses; the count of restarts that it gives may differ between machines. So
    rank 0 draws a name, and tells it to each rank under a key that this rank has just drawn.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question of {rank}", question)
        name = store.get(question).decode()  # waits for the key
        store.add(f"{name} heard", 1)
        return dist.PrefixStore(name, store)
    name, deadline = uuid.uuid4().hex, time.monotonic() + patience
    while store.add(f"{name} heard", 0) < world_size - 1:  # until then, a question may be an old one
        for other in range(1, world_size):
            if store.check([f"question of {other}"]):
                store.set(store.get(f"question of {other}").decode(), name)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {world_size} processes have come")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def init_distributed_mode(dist_url: str = "env://") -> torch.device:
    """Choose this process's device, and join the group if there are several. Raises UserError."""
    rank, world_size, local_rank = launched_as()
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if 1 < gpus < processes:  # 1: perhaps each process is shown another one
            raise UserError(f"{processes} processes for {gpus} GPUs", "torchrun", "start one process per GPU")
        # SLURM may show each task one GPU of its own, which is then number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif world_size == 1 and torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            store = meet(dist_url, rank, world_size)
        except TimeoutError as error:
            raise Interrupted(str(error), "", "start them together") from error
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )
    return device


def get_rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """How many processes train together, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process logs and saves."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    if get_world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """The main process runs the block, then the others do."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:
        if is_main_process():
            barrier()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks, in place; the tensor itself without a group."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors of the same shape from all ranks, concatenated along the first dimension."""
    if get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_object(value) -> list:
    """Small picklable values of all ranks, in their order."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def fix_random_seeds(*entropy: int) -> None:
    """Seed Python, NumPy and torch on every device from a few numbers, e.g. (seed, rank, step)."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
