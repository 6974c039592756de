"""all_finite: is every element a finite number, in one read and no write; of two tensors in one launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from . import cpu, launch
from .backend import choose_backend
from .triton_import import tl, triton

LAST_MARK = 2**31 - 1


def all_finite(*tensors: torch.Tensor) -> bool:
    """True where tensors (any shapes; fp32, fp16 or bf16; on one device) hold neither NaN nor infinity.

    The answer is read on the host, which waits for a GPU and cannot be recorded in a CUDA graph.
    """
    backend = choose_backend(*tensors)
    if backend == "cpu":
        return all(cpu.all_finite(tensor) for tensor in tensors)
    if backend == "triton":
        with torch.cuda.device_of(tensors[0]):
            return _all_finite_triton([tensor.detach().contiguous() for tensor in tensors])
    return all_finite_reference(*tensors)


def all_finite_reference(*tensors: torch.Tensor) -> bool:
    """The same in plain torch."""
    return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in tensors)


def not_finite_reference(*vectors: torch.Tensor) -> torch.Tensor:
    """Int32 [1]: 1 where one of the vectors holds NaN or infinity, else 0."""
    return torch.cat(vectors).isfinite().all().logical_not().int().reshape(1)


def _all_finite_triton(tensors: Sequence[torch.Tensor]) -> bool:
    found, mark = _flags.next(tensors[0].device)
    there = [tensor for tensor in tensors if tensor.numel()]
    for first, *second in (there[k : k + 2] for k in range(0, len(there), 2)):
        block = launch.all_finite(first)
        other = second[0] if second else None
        blocks = triton.cdiv(first.numel(), block)
        further = 0 if other is None else triton.cdiv(other.numel(), block)
        _find_non_finite[(blocks + further,)](
            *(first, other, found, first.numel(), 0 if other is None else other.numel(), blocks, mark),
            BLOCK=block,
            num_warps=launch.WARPS,
        )
    return found.item() != mark


class _Flags(threading.local):
    """An int32 [1] on each device, this thread's own, and a mark that no earlier call wrote there.

    So no call begins by clearing it, and what another thread finds, or a call that was interrupted, is not seen.
    """

    def __init__(self) -> None:
        self._found: dict[torch.device, torch.Tensor] = {}
        self._calls = 0

    def next(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """Where to write, and what."""
        if device not in self._found:
            with torch.inference_mode(False):
                self._found[device] = torch.zeros(1, dtype=torch.int32, device=device)
        self._calls = self._calls % LAST_MARK + 1
        return self._found[device], self._calls


_flags = _Flags()


@triton.jit(do_not_specialize=["mark"])
def _find_non_finite(tensor_ptr, other_ptr, found_ptr, size, other_size, blocks, mark, BLOCK: tl.constexpr):
    """The tensor in the first ``blocks`` programs, the other one in those that follow."""
    block = tl.program_id(0)
    if other_ptr is None:  # noqa: SIM114 (decided when Triton compiles)
        _look_at(tensor_ptr, found_ptr, mark, block, size, BLOCK)
    elif block < blocks:
        _look_at(tensor_ptr, found_ptr, mark, block, size, BLOCK)
    else:
        _look_at(other_ptr, found_ptr, mark, block - blocks, other_size, BLOCK)


@triton.jit
def _look_at(tensor_ptr, found_ptr, mark, block, size, BLOCK: tl.constexpr):
    offset = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(tensor_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    note_not_finite(value, found_ptr, mark)


@triton.jit
def note_not_finite(vector, found_ptr, mark):
    """Every program that finds NaN or infinity in its fp32 vector writes the same ``mark``."""
    tl.store(found_ptr, mark, mask=not_finite(vector) == 1)


@triton.jit
def not_finite(vector):
    """1 where a fp32 vector holds NaN or infinity, else 0."""
    return 1 - tl.min((tl.abs(vector) < float("inf")).to(tl.int32), 0)
