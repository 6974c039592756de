"""Tells errors of a full memory from others of the same class."""

from __future__ import annotations

import torch

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc")
"""In the messages of torch's allocators, cuBLAS and C++."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory ran out; torch raises some of these as plain RuntimeErrors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise the error again if memory ran out: it says nothing about what was tried."""
    if is_out_of_memory(error):
        raise error
