"""The process group: how processes find each other, and collectives that do nothing without a group."""

from __future__ import annotations  # dist.Store does not exist in a torch without torch.distributed

import argparse
import atexit
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import Interrupted, TrainingError, UserError
from support.memory import keep_freed_memory

# ---------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment, SLURM's, or for one process.

    SLURM's variables count only inside a step started by `srun`, because the batch script itself is a
    single process. If the launcher gives no local rank, the rank is used. Raises UserError.
    """
    env = os.environ
    for rank, world_size, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if env.get(rank) and env.get(world_size):
            local = local_rank if env.get(local_rank) else rank
            return env_number(rank), env_number(world_size), env_number(local)
    return 0, 1, 0


def env_number(name: str) -> int:
    """A number in the environment, 0 if it is not set. Raises UserError."""
    try:
        return int(os.environ.get(name) or 0)
    except ValueError:
        what = f"{name} is {os.environ[name]!r}, not a number"
        raise UserError(what, "", "unset it, or start with torchrun or srun", alone=True) from None


def check_launch() -> None:
    """Raise UserError if the environment describes several processes, but incompletely or wrongly."""
    env = os.environ
    rank, world_size, _ = launched_as()
    if rank >= world_size:
        raise UserError(f"rank {rank} of {world_size} processes", "", "count the ranks from 0", alone=True)
    if world_size > 1 and not dist.is_available():
        raise UserError("this torch has no torch.distributed", "", "start one process only")
    if world_size > 1 or (env.get("RANK") and env.get("WORLD_SIZE")):
        return
    for name, least, missing in (
        ("RANK", 1, "WORLD_SIZE"),
        ("WORLD_SIZE", 2, "RANK"),
        ("SLURM_PROCID", 1, "SLURM_STEP_NUM_TASKS"),
    ):
        if env_number(name) >= least and not env.get(missing):
            what = f"{name} is {env[name]}, but {missing} is not set"
            raise UserError(what, "", "set both, or neither to train with one process")


def choose_device() -> torch.device:
    """Choose this process's GPU; without CUDA, MPS for a single process, else the CPU. Raises UserError.

    An empty CUDA_VISIBLE_DEVICES hides all GPUs, a Mac's too. On a CPU, the process keeps freed memory.
    """
    _, world_size, local_rank = launched_as()
    if torch.cuda.is_available():
        processes, gpus = env_number("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
        if 1 < gpus < processes:  # 1: each process may see a different one
            what, alone = f"{processes} processes for {gpus} GPUs", local_rank == 0  # one for each machine
            raise UserError(what, "torchrun", "start one process per GPU", alone)
        # SLURM may show each task only its own GPU, as number 0.
        device = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(device)
        return device
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if world_size == 1 and torch.backends.mps.is_available() and not hidden:
        return torch.device("mps")
    keep_freed_memory()
    return torch.device("cpu")


# ---------------------------------------------------------------------------------------------
# Rendezvous
# ---------------------------------------------------------------------------------------------


def _set_slurm_address() -> None:
    """Set MASTER_ADDR to the step's first node and MASTER_PORT to a port of this attempt, if not set."""

    def scontrol(*arguments: str) -> str:
        command = ["scontrol", "show", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    env = os.environ
    try:
        if not env.get("MASTER_ADDR"):  # a container may lack scontrol
            first = scontrol("hostnames", env["SLURM_STEP_NODELIST"]).split()[0]
            # A node's name need not resolve; its address does.
            address = re.search(r"NodeAddr=(\S+)", scontrol("node", first))
            env["MASTER_ADDR"] = address[1] if address else first
        if not env.get("MASTER_PORT"):
            attempt = env_number("SLURM_STEP_ID") + 10 * env_number("SLURM_RESTART_COUNT")
            # Jobs on one machine, and attempts at one job, need different ports, below those that Linux
            # gives to programs which ask for any (from 32768 on).
            env["MASTER_PORT"] = str(20000 + (97 * int(env["SLURM_JOB_ID"]) + attempt) % 12000)
    except KeyError as error:
        reason = f"{error.args[0]} is not set"
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(error)
    else:
        return
    raise UserError(f"cannot find rank 0: {reason}", "SLURM", "set MASTER_ADDR and MASTER_PORT")


def _address(dist_url: str) -> tuple[str, int] | None:
    """Host and port of rank 0's store; None for a store in a file. Raises UserError."""
    if dist_url == "env://":
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"{name} is not set", "", "set it, or start the processes with torchrun")
        host = os.environ["MASTER_ADDR"]
        host = f"[{host}]" if ":" in host and host[0] != "[" else host  # IPv6
        dist_url = f"tcp://{host}:{os.environ['MASTER_PORT']}"
    url = urllib.parse.urlparse(dist_url)
    if url.scheme == "file":
        return None
    with contextlib.suppress(ValueError):  # a port that is not a number
        if url.scheme == "tcp" and url.hostname and url.port:
            return url.hostname, url.port
    fix = "write tcp://HOST:PORT, env:// or file:///PATH"
    raise UserError("not an address", f"--dist_url {dist_url}", fix)


def _wait_until(
    condition: Callable[[], object], whom: Callable[[], str], patience: float = 600, silent: float = 10
) -> None:
    """Wait until `condition()` is true; after `silent` seconds, print once whom it waits for.

    It polls, because a signal would not end a wait inside torch. Raises TimeoutError after `patience`
    seconds.
    """
    start = time.monotonic()
    while not condition():
        waited = time.monotonic() - start
        if waited > patience:
            raise TimeoutError(f"waited {patience:g} s for {whom()}")
        if waited > silent:
            by_hand = "RANK" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
            advice = "start them, or unset RANK and WORLD_SIZE" if by_hand else "have they all been started?"
            print(f"waiting for {whom()}: {advice}", file=sys.stderr, flush=True)
            silent = float("inf")
        time.sleep(0.05)


def _listens(address: tuple[str, int]) -> bool:
    """Whether a process accepts connections at this host and port."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5):
        return True
    return False


def _name(address: tuple[str, int]) -> str:
    """The address in words, with the reason if its host is unknown."""
    place = ":".join(map(str, address))
    try:
        socket.getaddrinfo(*address)
    except OSError as error:
        return f"{place}: {error.strerror}"
    return place


ANSWER = timedelta(seconds=20)  # for rank 0 to answer; torchrun kills 30 s after SIGTERM


def meet(dist_url: str, rank: int, world_size: int) -> dist.Store:
    """Connect to the store that all processes at this address share.

    Raises UserError, or TimeoutError if some processes do not connect.
    """
    if "RANK" not in os.environ and dist_url == "env://":
        _set_slurm_address()
    address = _address(dist_url)
    place = ":".join(map(str, address)) if address else dist_url
    if rank and address:
        _wait_until(lambda: _listens(address), lambda: f"rank 0 of {world_size} processes ({_name(address)})")
    # No signal ends a wait inside torch, and rank 0, which listened just now, may have ended.
    patience = {"timeout": ANSWER} if rank and address else {}
    try:
        # World size 1, because torch would wait here for the others without a message.
        store, *_ = next(dist.rendezvous(dist_url, rank, 1 if address else world_size, **patience))
        store.set_timeout(timedelta(minutes=30))  # torch's default
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        fix = "set another MASTER_PORT" if dist_url == "env://" else "set another port in --dist_url"
        raise UserError("the port is in use", place, fix) from None
    return _fresh_store(store, rank, world_size, place)


def _fresh_store(store: dist.Store, rank: int, world_size: int, place: str, **waiting: float) -> dist.Store:
    """Return the store under a prefix that no earlier attempt has used.

    torchrun's store survives a restart of the processes, which would then read the addresses of processes
    that have ended. torchrun's count of restarts may differ between machines
    (https://github.com/pytorch/pytorch/issues/135712). So each rank draws a random key, and rank 0 draws
    the prefix and writes it under each of these keys.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question of {rank}", question)
        _wait_until(
            lambda: store.check([question]), lambda: f"rank 0 of {world_size} processes ({place})", **waiting
        )
        name = store.get(question).decode()
        store.add(f"{name} heard", 1)
        return dist.PrefixStore(name, store)

    name = uuid.uuid4().hex

    def heard() -> int:
        return store.add(f"{name} heard", 0)

    def all_have_heard() -> bool:  # a question may be left from an earlier attempt
        for other in range(1, world_size):
            if store.check([f"question of {other}"]):
                store.set(store.get(f"question of {other}").decode(), name)
        return heard() == world_size - 1

    def missing() -> str:
        return f"{world_size - 1 - heard()} of {world_size} processes ({place})"

    _wait_until(all_have_heard, missing, **waiting)
    return dist.PrefixStore(name, store)


# ---------------------------------------------------------------------------------------------
# The group
# ---------------------------------------------------------------------------------------------

# The store of the group that `init_distributed_mode` made, and the number of `main_process_first` blocks
# that this process has reached.
_store: dist.Store | None = None
_first_blocks = 0
_FIRST = "blocks of the main process that have ended"


def init_distributed_mode(dist_url: str | argparse.Namespace = "env://") -> torch.device:
    """Choose this process's device, and join the group if there are several processes. Raises UserError.

    `dist_url` may be a Namespace that holds it; as in the published code, it then gets `rank`, `world_size`
    and `gpu`.
    """
    global _store, _first_blocks
    url = dist_url if isinstance(dist_url, str) else dist_url.dist_url
    check_launch()
    device = choose_device()
    rank, world_size, _ = launched_as()
    if not isinstance(dist_url, str):
        dist_url.rank, dist_url.world_size, dist_url.gpu = rank, world_size, device.index or 0
    if world_size > 1 and not dist.is_initialized():
        try:
            _store, _first_blocks = meet(url, rank, world_size), 0
        except TimeoutError as error:
            raise Interrupted(str(error), "", "start all processes together") from error
        check_same_device(_store, rank, device.type)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store,
            rank=rank,
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
            timeout=timedelta(minutes=15),  # longer than a loader waits for images: NCCL would take 10
        )
    return device


def check_same_device(store: dist.Store, rank: int, kind: str) -> None:
    """Raise UserError unless this process's kind of device is rank 0's; they could not form a group."""
    if rank == 0:
        store.set("device of rank 0", kind)
    elif (first := store.get("device of rank 0").decode()) != kind:
        what = f"rank {rank} on {socket.gethostname()} would compute on {kind}, rank 0 on {first}"
        raise UserError(what, "", "check the GPUs and the torch of each machine", alone=True)


def in_group() -> bool:
    """Whether this process has joined a group."""
    return dist.is_available() and dist.is_initialized()


def leave_group() -> None:
    """Leave the group at the end of a process.

    After a group of gloo, or if leaving takes a minute, the end of Python runs the exit handlers and then
    ends the process without freeing objects, with the exit code of the error that is pending now.
    """
    if not in_group():
        return
    # Threads of gloo may still hold tensors of the last collective. While Python frees its objects, freeing
    # these aborts the process (https://github.com/pytorch/pytorch/pull/179291), and destroying the group can
    # wait forever in torch 2.7 (https://github.com/pytorch/pytorch/pull/154976).
    if dist.get_backend() != "gloo":
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(60)
        if not thread.is_alive():
            return
        print("note: the process group did not end within 60 s", file=sys.stderr)
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else error
    atexit.register(_end_process, code if isinstance(code, int) else int(code is not None))


def _end_process(code: int) -> None:
    """An exit handler that runs the others, then ends the process."""
    atexit.unregister(_end_process)
    atexit._run_exitfuncs()
    flush_output()
    os._exit(code or int(hasattr(sys, "last_value")))  # an error that came later, e.g. in submitit


def flush_output() -> None:
    """Flush what was printed. Drop what cannot be written: Python would try again, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream and not stream.closed:  # None if the shell has closed it
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def get_rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if in_group() else 0


def get_world_size() -> int:
    """How many processes train together, 1 without a group."""
    return dist.get_world_size() if in_group() else 1


def is_main_process() -> bool:
    """Whether this process saves."""
    return get_rank() == 0


def is_first(of_machine: bool = False) -> bool:
    """Whether this process prints: rank 0 of the group; before there is one, the launcher's first, or the
    first `of_machine`.

    Also a process that does not know which it is.
    """
    if in_group():
        return get_rank() == 0
    try:
        rank, _, local_rank = launched_as()
        return (local_rank if of_machine else rank) == 0
    except UserError:
        return True


def barrier() -> None:
    """Wait until all ranks have reached this call."""
    if get_world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """Run the block in the main process first, then in the others.

    The others poll the store, so that no collective has to match and no timeout ends a long download. In a
    group that `init_distributed_mode` did not make, all processes run the block at once.
    """
    global _first_blocks
    if _store is None:
        yield
        return
    _first_blocks += 1
    while not is_main_process() and _store.add(_FIRST, 0) < _first_blocks:
        time.sleep(0.1)
    try:
        yield
    finally:
        if is_main_process():
            _store.add(_FIRST, 1)


@contextlib.contextmanager
def same_error_on_all_ranks():
    """Raise an error that one rank meets in the block on all ranks, with that rank's number in the message.

    For work that each process does by itself, e.g. reading files. The block must not contain collectives;
    `main_process_first` is allowed. An error that all ranks share is raised unchanged. An error that is not
    a UserError is raised unchanged on its own rank, and as a TrainingError on the others.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if error and is_main_process() and _store:
        _store.add(_FIRST, 2**30)  # the others need not wait any longer
    is_ours = isinstance(error, UserError)
    mine = (type(error), str(error)) if is_ours else (TrainingError, f"{type(error).__name__}: {error}")
    errors = all_gather_object(mine if error else None)
    rank = next((rank for rank, other in enumerate(errors) if other), None)
    if rank is None:
        return
    if not error or (is_ours and len(set(errors)) > 1):
        kind, text = errors[rank]
        error = kind(f"rank {rank}: {text}")
    if isinstance(error, UserError):
        error.alone = False  # all ranks raise it: the first one prints it
    raise error


def agree(what: str, value: str) -> None:
    """Raise UserError on all ranks unless `value`, a short description of `what`, is the same on all."""
    values = all_gather_object(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            where = f"rank 0: {values[0]}; rank {rank}: {other}"
            raise UserError(f"ranks have different {what}", where, "give every process the same")


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks, in place; the tensor itself without a group."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give all ranks the first rank's buffers, e.g. the running means of batch norms."""
    if get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors of the same shape from all ranks, concatenated along the first dimension."""
    if get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_object(value) -> list:
    """Gather small picklable values from all ranks, in the order of the ranks."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


_in_use = threading.Lock()  # the random state of this process


@contextlib.contextmanager
def only_one_in_process() -> Iterator[None]:
    """Raise UserError if another thread is in this block: the two would draw from one random state."""
    if not _in_use.acquire(blocking=False):
        fix = "start each in a process of its own"
        raise UserError("this process already trains, in another thread", "", fix)
    try:
        yield
    finally:
        _in_use.release()


def fix_random_seeds(seed: int = 31, *more: int) -> None:
    """Seed Python, NumPy and torch on every device from a few numbers, e.g. (seed, rank, step)."""
    torch.manual_seed(fix_cpu_seeds(seed, *more))


def fix_cpu_seeds(*numbers: int) -> int:
    """Seed Python, NumPy and torch on the CPU from a few numbers, and return what they are seeded with.

    Takes a tenth of the time that torch takes to seed every device.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed
