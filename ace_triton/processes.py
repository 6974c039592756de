"""The processes of a run: one, or several that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

LONGEST_WAIT = timedelta(hours=12)
"""How long a process waits for another one. torchrun ends all processes as soon as one of them fails."""


@dataclass(frozen=True)
class Processes:
    """This process, and how many share the work.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def now(cls) -> Processes:
        """The processes of torch.distributed's default group; one process if there is no group."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """True for the process that writes and prints."""
        return self.rank == 0

    def send(self, value: Any, to: int) -> None:
        """Send an object with tensors on the CPU to another process."""
        dist.send_object_list([value], dst=to)

    def receive(self, sender: int) -> Any:
        """Receive an object from another process."""
        values = [None]
        dist.recv_object_list(values, src=sender)
        return values[0]

    def broadcast(self, value: Result, sender: int = 0) -> Result:
        """The object of one process, in all of them; others give any value."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=sender)
        return values[0]

    def broadcast_into(self, tensor: torch.Tensor, sender: int) -> None:
        """Overwrite a tensor of any strides and dtype with that of one process."""
        if self.size == 1:
            return
        sent = tensor.detach().contiguous()
        dist.broadcast(sent.view(-1).view(torch.uint8), src=sender)
        if self.rank != sender:
            with torch.no_grad():
                tensor.copy_(sent)

    def first_does(self, task: Callable[[], Result]) -> Result:
        """The result of a task that only the first process does; the others wait for it."""
        result: Any = task() if self.is_first else None
        return self.broadcast(result)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


def started() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def joined() -> Iterator[Processes]:
    """A context in which this process is in one group with the others that torchrun started; alone without torchrun."""
    if started() == 1 or dist.is_initialized():
        yield Processes.now()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    try:
        yield Processes.now()
    finally:
        dist.destroy_process_group()


def shares(costs: Sequence[float], size: int) -> list[int]:
    """For each task, the process that does it: the largest tasks first, each to the process with the least work.

    Args:
        costs: cost of each task.
        size: number of processes.
    """
    work, owners = [0.0] * size, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        owners[task] = min(range(size), key=lambda process: work[process])
        work[owners[task]] += costs[task]
    return owners
