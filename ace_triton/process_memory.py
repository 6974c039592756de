"""Mapped files, and memory that goes back to the system although a mapped file or the allocator would keep it."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_PAGEOUT = 21

SECONDS_BETWEEN_PAGE_OUTS = 0.02


def own_memory(model: nn.Module) -> None:
    """Copy each parameter on the CPU to its own memory, so that it can be freed separately.

    The tensors of a loaded checkpoint are parts of one mapped file. Pages that were written stay in memory until the
    last tensor is freed. Parameters that share memory still share it after the copy. A parameter that has its own
    memory, because its dtype was converted, is not copied.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    files = _maps_of(None)
    for parameter in model.parameters():
        in_a_file = files is None or any(start <= parameter.data_ptr() < end for start, end in files)
        alone = not in_a_file and parameter.untyped_storage().nbytes() == parameter.nbytes
        if parameter.device.type != "cpu" or not parameter.numel() or alone:
            continue
        mapped = parameter.data
        identity = (mapped.data_ptr(), mapped.shape, mapped.stride(), mapped.dtype)
        if identity not in copies:
            copies[identity] = mapped.clone()
            page_out(mapped)
        parameter.data = copies[identity]
    give_back_free_memory()


def map_file(path: str | Path, size: int) -> torch.UntypedStorage:
    """A storage that is a shared mapping of a file: what is written to it goes to the file."""
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
    return storage


def reserve_space(descriptor: int, size: int) -> None:
    """Give a file its size and its blocks on the disk: a write to a mapped page without one would kill the process.

    Raises:
        OSError: if the disk has too little space.
    """
    os.posix_fallocate(descriptor, 0, size)


def drop_pages(tensor: torch.Tensor) -> None:
    """Remove the pages of a tensor that is a shared mapping of a file from this process's memory.

    Values that were written are not lost: the system keeps them until they are in the file.
    """
    _advise(tensor, _MADV_DONTNEED)


def prefetch_pages(tensor: torch.Tensor) -> None:
    """Tell the system that a mapped tensor will be read soon, so that it starts to read the file."""
    _advise(tensor, _MADV_WILLNEED)


def resident_bytes() -> int:
    """Bytes of this process that are in memory; its peak if the system does not tell the present number."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def give_back_free_memory() -> None:
    """Return freed memory that the allocator keeps, if it is glibc's allocator."""
    _call("malloc_trim", 0)


def page_out(tensor: torch.Tensor) -> None:
    """Tell Linux that a tensor's pages may leave memory. Their contents are not lost."""
    _advise(tensor, _MADV_PAGEOUT)


@contextmanager
def few_pages_of(paths: Iterable[Path]) -> Iterator[None]:
    """A context in which pages of mapped files leave this process's memory soon after they were read.

    For files that another library maps and reads as a whole. On systems other than Linux it does nothing.
    """
    names, ended = {str(path.resolve()) for path in paths}, threading.Event()

    def page_out_at_intervals() -> None:
        while not ended.wait(SECONDS_BETWEEN_PAGE_OUTS):
            for start, end in _maps_of(names) or ():
                _call("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)

    if not names:
        yield
        return
    thread = threading.Thread(target=page_out_at_intervals, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _maps_of(names: set[str] | None) -> list[tuple[int, int]] | None:
    """The addresses at which this process maps files of these names, or any files; None if the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and (fields[5] in names if names is not None else fields[5].startswith("/")):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found.append((start, end))
    return found


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Give the system advice about the pages that belong to a contiguous tensor alone."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _call("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _call(function: str, *arguments: object) -> None:
    with suppress(AttributeError, OSError, TypeError):  # Other systems may not have the function.
        getattr(ctypes.CDLL(None), function)(*arguments)
