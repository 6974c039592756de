"""Recognizes out-of-memory errors among other errors of the same class."""

from __future__ import annotations

import torch

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc")
"""Words in out-of-memory messages of torch's allocators, cuBLAS and C++."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if the error says that memory ran out. torch raises some of these errors as plain RuntimeErrors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise the error again if memory ran out, so that it is not taken for a fault of the input."""
    if is_out_of_memory(error):
        raise error
