"""The processes of a run: one, or several that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import ArgumentError, ProcessError

Result = TypeVar("Result")

LONGEST_WAIT = timedelta(hours=12)
"""How long a process waits for another one. torchrun ends all processes as soon as one of them fails."""

LONGEST_WAIT_FOR_TORCHRUN = timedelta(seconds=10)

_APART = ContextVar("_APART", default=False)
"""True while this process works on its own (:func:`apart`)."""


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
        """The processes of torch.distributed's default group; one process without a group, or inside :func:`apart`."""
        if _APART.get() or not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """True for the process that writes and prints."""
        return self.rank == 0

    def send(self, value: Any, to: int) -> None:
        """Send an object with tensors on the CPU to another process."""
        with _connected():
            dist.send_object_list([value], dst=to)

    def receive(self, sender: int) -> Any:
        """Receive an object from another process."""
        values = [None]
        with _connected():
            dist.recv_object_list(values, src=sender)
        return values[0]

    def broadcast(self, value: Result, sender: int = 0) -> Result:
        """The object of one process, in all of them; others give any value."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with _connected():
            dist.broadcast_object_list(values, src=sender)
        return values[0]

    def broadcast_into(self, tensor: torch.Tensor, sender: int) -> None:
        """Overwrite a tensor of any strides and dtype with that of one process."""
        if self.size == 1:
            return
        sent = tensor.detach().contiguous()
        with _connected():
            dist.broadcast(sent.view(-1).view(torch.uint8), src=sender)
        if self.rank != sender:
            with torch.no_grad():
                tensor.copy_(sent)

    def gather(self, value: Result) -> list[Result]:
        """The objects of all processes, in the order of their ranks, in all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _connected():
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: Hashable) -> bool:
        """True if all processes give equal values."""
        return len(set(self.gather(value))) == 1

    def add_up(self, tensor: torch.Tensor) -> None:
        """Overwrite a contiguous fp32 tensor with its sum over all processes; all of them have the same bits then."""
        if self.size > 1:
            with _connected():
                dist.all_reduce(tensor)

    def in_order(self, own: Sequence[Result]) -> list[Result]:
        """The results of a sequence's items in their order, in all processes.

        Args:
            own: this process's results, of the items ``sequence[rank::size]``.
        """
        parts = self.gather(list(own))
        return [parts[index % self.size][index // self.size] for index in range(sum(map(len, parts)))]

    def first_does(self, task: Callable[[], Result]) -> Result:
        """The result of a task that only the first process does, on its own; the others wait for it."""
        result: Any = None
        if self.is_first:
            with apart():
                result = task()
        return self.broadcast(result)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            with _connected():
                dist.barrier()


@contextmanager
def apart() -> Iterator[None]:
    """A context in which this process works on its own: no call inside waits for other processes."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


@contextmanager
def _connected() -> Iterator[None]:
    """Raise ProcessError if the connection to another process is lost inside the block."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "another process of this run has ended or cannot be reached: its own error says why"
        ) from error


def started() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def are_on_one_machine() -> bool:
    """True if torchrun started all processes on this machine, or there is no torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", started())) == started()


def is_first_to_fail() -> bool:
    """True for the first process of a run that calls this, so that only one prints an error; True without torchrun."""
    if started() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=LONGEST_WAIT_FOR_TORCHRUN)
        return store.add(f"ace_triton/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # torchrun has ended.
        return True


def own_device(device: str) -> str:
    """The device of this process: if torchrun started several on this machine, each takes a GPU of its own.

    Args:
        device: a device that is available; "cuda" for any GPU.

    Raises:
        ArgumentError: there are fewer GPUs than processes, or all processes would take the same one.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started() > 1 else 1
    if here == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ArgumentError(
            f"--device {device}: torchrun started {here} processes on this machine, and each needs a GPU of its own: "
            "use --device cuda"
        )
    number, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= available:
        raise ArgumentError(
            f"torchrun started {here} processes on this machine, and each needs a GPU of its own, but it has "
            f"{available}: use --nproc-per-node {available}, or --device cpu"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


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
