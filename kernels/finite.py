"""all_finite: is every element a finite number, in one read and no write."""

from __future__ import annotations

import functools

import torch

from . import cpu, launch
from .backend import choose_backend
from .triton_import import tl, triton


def all_finite(tensor: torch.Tensor) -> bool:
    """True where ``tensor`` (any shape; fp32, fp16 or bf16) holds neither NaN nor infinity."""
    backend = choose_backend(tensor)
    if backend == "cpu":
        return cpu.all_finite(tensor)
    if backend == "triton":
        with torch.cuda.device_of(tensor):
            return _all_finite_triton(tensor.detach().contiguous())
    return all_finite_reference(tensor)


def all_finite_reference(tensor: torch.Tensor) -> bool:
    """The same in plain torch."""
    return bool(torch.isfinite(tensor.detach()).all())


def not_finite_reference(*vectors: torch.Tensor) -> torch.Tensor:
    """Int32 [1]: 1 where one of the vectors holds NaN or infinity, else 0."""
    return torch.cat(vectors).isfinite().all().logical_not().int().reshape(1)


def _all_finite_triton(tensor: torch.Tensor) -> bool:
    found = _clean_flag(tensor.device, launch.stream_of(tensor))
    if tensor.numel():
        block = launch.all_finite(tensor)
        _find_non_finite[(triton.cdiv(tensor.numel(), block),)](
            tensor, found, tensor.numel(), BLOCK=block, num_warps=launch.WARPS
        )
    if not found.item():
        return True
    found.zero_()
    return False


@functools.cache
def _clean_flag(device: torch.device, stream: int) -> torch.Tensor:
    """A 0, int32 [1], one for each stream: whoever finds a 1 there puts it back, so that no call begins by clearing."""
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32, device=device)


@triton.jit
def _find_non_finite(tensor_ptr, found_ptr, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(tensor_ptr + offset, mask=offset < size, other=0.0).to(tl.float32)
    note_not_finite(value, found_ptr)


@triton.jit
def note_not_finite(vector, found_ptr):
    """Every program that finds NaN or infinity in its fp32 vector writes the same 1."""
    tl.store(found_ptr, 1, mask=not_finite(vector) == 1)


@triton.jit
def not_finite(vector):
    """1 where a fp32 vector holds NaN or infinity, else 0."""
    return 1 - tl.min((tl.abs(vector) < float("inf")).to(tl.int32), 0)
