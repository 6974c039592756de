"""all_finite: is every element a finite number, and every score term 0 or more, in one read and no write.

Two tensors share a launch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from . import cpu, launch
from .backend import choose_backend
from .triton_import import tl, triton

LAST_MARK = 2**31 - 1


def all_finite(*tensors: torch.Tensor, terms: Sequence[torch.Tensor] = ()) -> bool:
    """True if tensors hold neither NaN nor infinity, and score terms neither these nor numbers below 0.

    The answer is read on the host, which waits for a GPU and cannot be recorded in a CUDA graph.

    Args:
        tensors: of any shapes; fp32, fp16 or bf16; on one device.
        terms: fp32, on that device.
    """
    backend = choose_backend(*tensors, *terms)
    if backend == "cpu":
        return all(map(cpu.all_finite, tensors)) and all(cpu.all_finite(term, not_below_zero=True) for term in terms)
    if backend == "triton":
        given = [tensor.detach().contiguous() for tensor in (*tensors, *terms)]
        with torch.cuda.device_of(given[0]):
            return _all_finite_triton(given, len(tensors))
    return all_finite_reference(*tensors, terms=terms)


def all_finite_reference(*tensors: torch.Tensor, terms: Sequence[torch.Tensor] = ()) -> bool:
    """The same in plain torch."""
    finite = all(bool(tensor.detach().isfinite().all()) for tensor in (*tensors, *terms))
    return finite and all(bool((term.detach() >= 0).all()) for term in terms)


def not_finite_reference(*vectors: torch.Tensor) -> torch.Tensor:
    """Int32 [1]: 1 if one of the vectors holds NaN, infinity or a number below 0, else 0."""
    whole = torch.cat(vectors)
    return (whole.isfinite() & (whole >= 0)).all().logical_not().int().reshape(1)


def _all_finite_triton(tensors: Sequence[torch.Tensor], n_signed: int) -> bool:
    """Of contiguous tensors; those from ``n_signed`` on are score terms."""
    found, mark = _flags.next(tensors[0].device)
    there = [(tensor, place < n_signed) for place, tensor in enumerate(tensors) if tensor.numel()]
    for (first, signed), *second in (there[k : k + 2] for k in range(0, len(there), 2)):
        block = launch.all_finite(first)
        other, other_signed = second[0] if second else (None, True)
        blocks = triton.cdiv(first.numel(), block)
        further = 0 if other is None else triton.cdiv(other.numel(), block)
        _find_non_finite[(blocks + further,)](
            *(first, other, found, first.numel(), 0 if other is None else other.numel(), blocks, mark),
            SIGNED=signed,
            OTHER_SIGNED=other_signed,
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
def _find_non_finite(
    tensor_ptr,
    other_ptr,
    found_ptr,
    size,
    other_size,
    blocks,
    mark,
    SIGNED: tl.constexpr,
    OTHER_SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tensor in the first ``blocks`` programs, the other one in those that follow."""
    block = tl.program_id(0)
    if other_ptr is None:  # noqa: SIM114 (decided when Triton compiles)
        _look_at(tensor_ptr, found_ptr, mark, block, size, SIGNED, BLOCK)
    elif block < blocks:
        _look_at(tensor_ptr, found_ptr, mark, block, size, SIGNED, BLOCK)
    else:
        _look_at(other_ptr, found_ptr, mark, block - blocks, other_size, OTHER_SIGNED, BLOCK)


@triton.jit
def _look_at(tensor_ptr, found_ptr, mark, block, size, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    offset = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(tensor_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    note_not_finite(value, found_ptr, mark, SIGNED)


@triton.jit
def note_not_finite(vector, found_ptr, mark, SIGNED: tl.constexpr):
    """Every program that finds NaN, infinity or a forbidden sign in its fp32 vector writes the same ``mark``."""
    tl.store(found_ptr, mark, mask=not_finite(vector, SIGNED) == 1)


@triton.jit
def not_finite(vector, SIGNED: tl.constexpr):
    """1 if a fp32 vector holds NaN or infinity or, unless it is ``SIGNED``, a number below 0; else 0."""
    if SIGNED:
        good = tl.abs(vector) < float("inf")
    else:
        good = (vector >= 0) & (vector < float("inf"))
    return 1 - tl.min(good.to(tl.int32), 0)
