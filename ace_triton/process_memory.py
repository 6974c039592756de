"""Return memory to the system that a mapped file or the allocator would keep."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import nn

_MADV_PAGEOUT = 21


def own_memory(model: nn.Module) -> None:
    """Copy each parameter on the CPU to its own memory, so that it can be freed separately.

    The tensors of a loaded checkpoint are views of one mapped file. Pages that were written stay in memory until the
    last tensor is freed. Parameters that share memory still share it after the copy.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or not parameter.numel():
            continue
        mapped = parameter.data
        identity = (mapped.data_ptr(), mapped.shape, mapped.stride(), mapped.dtype)
        if identity not in copies:
            copies[identity] = mapped.clone()
            _page_out(mapped)
        parameter.data = copies[identity]


def give_back_free_memory() -> None:
    """Return freed memory that the allocator keeps, if it is glibc's allocator."""
    _call("malloc_trim", 0)


def _page_out(tensor: torch.Tensor) -> None:
    """Tell Linux that a tensor's pages may leave memory. Their contents are not lost."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _call("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def _call(function: str, *arguments: object) -> None:
    with suppress(AttributeError, OSError, TypeError):  # Other systems may not have the function.
        getattr(ctypes.CDLL(None), function)(*arguments)
