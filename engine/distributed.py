"""One process or many: the device, the process group of torchrun, and the few collectives used.

Everything here works without a process group, as a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.config import local_ranks
from utils.environment import keep_freed_memory, use_threads
from utils.errors import FeatherDetError, UserError

T = TypeVar("T")

# how gloo and NCCL word it when a rank is gone
LOST_RANK = ("gloo", "nccl", "connection", "timed out", "pair closure", "connectfullmesh")


@dataclass(frozen=True)
class Distributed:
    """The device and rank of this process among the processes of a run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints, draws and writes checkpoints."""
        return self.rank == 0


def select_device(text: str = "", *, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """'' -> CUDA if present else CPU; 'cpu', 'mps'; '0', 'cuda:0' -> that GPU; else UserError.

    Under torchrun every process takes the GPU of its local rank ('' or 'cuda'), or of its place in
    a list such as '2,3'.
    """
    name = text.strip().lower()
    if name in {"cpu", "mps"} or (name == "" and not torch.cuda.is_available()):
        if name == "mps" and (world_size > 1 or not torch.backends.mps.is_available()):
            raise UserError(
                "--device mps: torch finds no Apple GPU here, or several ranks would share it; try"
                " --device cpu"
            )
        return torch.device(name or "cpu")
    index = name.removeprefix("cuda").removeprefix(":")
    listed = [item.strip() for item in index.split(",") if item.strip()]
    if "," in index and world_size == 1:
        raise UserError(
            f"--device {text}: one process drives one GPU; for {len(listed)} of them start"
            f" torchrun --nproc_per_node {len(listed)} train.py --device {text} ..."
        )
    if "," in index:
        ranks = local_ranks()
        if len(set(listed)) != len(listed) or len(listed) != ranks:
            raise UserError(
                f"--device {text}: torchrun started {ranks} processes on this machine, each needs"
                " a GPU of its own; name as many, or leave the flag out"
            )
        index, world_size = listed[local_rank], 1
    if index and not index.isdigit():
        raise UserError(f"--device {text}: expected '', 'cpu', 'mps' or a GPU number such as 0")
    if index and world_size > 1:
        raise UserError(
            f"--device {text}: every rank of torchrun would use this one GPU; leave the flag out"
            f" (CUDA_VISIBLE_DEVICES={index} chooses which are used)"
        )
    if not torch.cuda.is_available():
        raise UserError(f"--device {text}: no CUDA device is usable here; try --device cpu")
    chosen, present = int(index or local_rank), torch.cuda.device_count()
    if chosen >= present:
        raise UserError(
            f"--device {text}: GPU {chosen} does not exist, there are {present} (counted from 0)"
        )
    return torch.device("cuda", chosen)


def start(device: str = "", *, timeout: float = 1800.0, threads: int = 0) -> Distributed:
    """Choose the device and join torchrun's process group, if its environment is there.

    Freed memory stays with the process (`keep_freed_memory`), `threads` is for `use_threads`.
    `timeout` in seconds bounds every collective: a rank that stays away longer ends the run.
    """
    world_size = _environment("WORLD_SIZE", 1, minimum=1)
    rank = _environment("RANK", 0, maximum=world_size - 1)
    local_rank = _environment("LOCAL_RANK", 0, maximum=world_size - 1)
    chosen = select_device(device, local_rank=local_rank, world_size=world_size)
    keep_freed_memory()
    use_threads(threads)
    cuda = chosen.type == "cuda"
    if cuda:
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        limit = timedelta(seconds=timeout)
        try:
            # NCCL needs the device: otherwise it guesses one at the first barrier
            dist.init_process_group(backend, timeout=limit, device_id=chosen if cuda else None)
        except (dist.DistError, RuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise FeatherDetError(
                f"rank {rank} of {world_size}: no process group ({backend}) within"
                f" {timeout:g} s: {cause}; is the port free and every rank started?"
            ) from error
    return Distributed(chosen, rank, world_size)


def _environment(name: str, default: int, *, minimum: int = 0, maximum: int = 2**31) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and minimum <= int(text) <= maximum):
        raise UserError(
            f"environment: {name} is {text!r}, expected {minimum} to {maximum}; torchrun sets RANK,"
            " LOCAL_RANK and WORLD_SIZE together"
        )
    return int(text)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether `error` of a collective means that another rank ended or does not answer."""
    text = str(error).lower()
    return is_active() and (
        isinstance(error, dist.DistError) or any(word in text for word in LOST_RANK)
    )


def is_active() -> bool:
    """Whether this process belongs to a group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main() -> bool:
    """Whether this process is rank 0 (a single process always is)."""
    return not is_active() or dist.get_rank() == 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over ranks, as a new tensor without gradient."""
    total = value.detach().clone()
    if is_active():
        dist.all_reduce(total)
    return total


def barrier() -> None:
    """Wait for all ranks."""
    if is_active():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 carries out the block first; the others find the files that it leaves."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on every rank (pickled between the run's own processes)."""
    if not is_active():
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrite `tensors` in place by rank 0's."""
    if is_active():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def cleanup() -> None:
    """Leave the process group."""
    if is_active():
        dist.destroy_process_group()
