"""Give memory back to the system that a mapped file or the allocator would hold."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import nn

_MADV_PAGEOUT = 21


def own_memory(model: nn.Module) -> None:
    """Give each parameter on a CPU memory of its own, so that it can be freed alone.

    A checkpoint's tensors lie in one mapped file, and what is written to them is held until the last of them is freed.
    Parameters that share memory share it afterwards too.
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
    """Return what the allocator keeps of freed memory, if it is glibc's."""
    _call("malloc_trim", 0)


def _page_out(tensor: torch.Tensor) -> None:
    """Tell Linux that a tensor's pages are not needed in memory. Nothing of them is lost."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _call("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def _call(function: str, *arguments: object) -> None:
    with suppress(AttributeError, OSError, TypeError):  # Another system may not have it.
        getattr(ctypes.CDLL(None), function)(*arguments)
