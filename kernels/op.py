"""Op: what all launchers share. It chooses the body for a call, enters its device and names it to profilers.

Under torch.profiler, a call is an event named ``ace_triton::select_nm bytes=4352 flops=2048``. Profilers that hook into
Triton's launches (Proton) get name, bytes and flops as launch metadata.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .backend import choose_backend
from .written import mark_written

Result = TypeVar("Result")

_profiling = torch.autograd._profiler_enabled


class Work(NamedTuple):
    """The work of a call.

    Attributes:
        bytes: the fewest bytes that any body must read and write.
        flops: additions, multiplications, divisions, roots and powers of the formula; comparisons do not count.
    """

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Op(Generic[Result]):
    """One operation, with a body for each backend. All bodies take the same arguments.

    A launcher checks its arguments, passes the tensors that it was given to :meth:`on`, and calls the body.

    Attributes:
        name: the launcher's name.
        work: the work of a call, computed from the body's arguments only if a profiler records it.
        reference: plain torch; the body of every backend that has none of its own.
        cpu: calls the compiled CPU library.
        triton: launches Triton kernels; the tensors' device is the current one then.
    """

    name: str
    work: Callable[..., Work]
    reference: Callable[..., Result]
    cpu: Callable[..., Result] | None = None
    triton: Callable[..., Result] | None = None

    def on(
        self, tensor: torch.Tensor, *others: torch.Tensor | None, writes: Sequence[torch.Tensor | None] = ()
    ) -> Callable[..., Result]:
        """The body for these tensors (None entries are ignored).

        Args:
            tensor, others: all tensors that the body reads or writes.
            writes: those that the body writes in place, so that autograd notices.

        Raises:
            BackendError: if a forced backend cannot run on these tensors.
            ArgumentError: if the tensors are on different devices, or if a tensor has no memory that a kernel can read.
        """
        backend = choose_backend(tensor, *others)
        body = self.reference
        if backend == "cpu" and self.cpu is not None:
            body = self.cpu
        elif backend == "triton" and self.triton is not None:
            body = functools.partial(self._launch, tensor)
        if writes and body is not self.reference:
            mark_written(*writes)
        return functools.partial(self._record, body) if _profiling() else body

    def _launch(self, tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Result:
        assert self.triton is not None
        outer, _running.call = _running.call, _Call(self, arguments, keywords)
        try:
            with torch.cuda.device_of(tensor):
                return self.triton(*arguments, **keywords)
        finally:
            _running.call = outer

    def _record(self, body: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
        work = self.work(*arguments, **keywords)
        with torch.profiler.record_function(f"ace_triton::{self.name} bytes={work.bytes} flops={work.flops}"):
            return body(*arguments, **keywords)


class _Call:
    """A call whose Triton body runs; ``named`` is True once a launch has carried its work."""

    __slots__ = ("arguments", "keywords", "named", "op")

    def __init__(self, op: Op[Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.op, self.arguments, self.keywords = op, arguments, keywords
        self.named = False


class _Running(threading.local):
    """The call that this thread is in, if any."""

    call: _Call | None = None


_running = _Running()


def launch_metadata(grid: tuple[int, ...], metadata: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Names a launch to profilers that hook into Triton: the argument ``launch_metadata`` of ``triton.jit``.

    The name is that of the operation and of the kernel. The first launch of a call carries the bytes and flops of the
    whole call, so their sums over all launches are right.
    """
    call = _running.call
    if call is None:
        return {"name": metadata.name}
    name = {"name": f"ace_triton::{call.op.name} {metadata.name}"}
    if call.named:
        return name
    call.named = True
    return {**name, **call.op.work(*call.arguments, **call.keywords)._asdict()}


def bytes_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of these tensors; None counts as 0."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
