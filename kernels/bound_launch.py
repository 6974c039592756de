"""Launches that are recorded once and repeated with other tensors, for calls whose time on the host counts.

A launch through Triton's JIT binds the arguments, looks at each for what the kernel is specialized for, and finds the
compiled kernel. A layer that decodes makes the same call thousands of times. :func:`recorded` notes the compiled
kernels and grids of one call, and :class:`BoundCall` repeats them with new tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .launch import has_memory, is_aligned


@dataclass
class BoundCall:
    """The launches of one call of an operation that reads ``sources`` and allocates what it writes.

    A repetition allocates the same tensors again, so it may be captured in a CUDA graph, and it waits for nothing. No
    memory is kept.

    Attributes:
        sources: the inputs; later tensors of their forms without memory.
        device: the device of all tensors.
        allocated: shape and dtype of the tensors that the call allocated, in order.
        result: index of the result in ``allocated``.
        launches: a compiled kernel with its grid, its arguments, and those that are replaced: their places, and their
            indices in the inputs and what is allocated.
        repeatable: False if a launch cannot be repeated.
    """

    sources: tuple[torch.Tensor, ...]
    device: torch.device
    allocated: list[torch.Tensor] = field(default_factory=list)
    result: int = 0
    launches: list[tuple[Any, list[Any], list[tuple[int, int]]]] = field(default_factory=list)
    repeatable: bool = True

    def takes(self, *sources: torch.Tensor) -> bool:
        """True if the kernels are right for these inputs: they fit, have memory, and are aligned."""
        return self.fits(*sources) and all(has_memory(source) and is_aligned(source) for source in sources)

    def fits(self, *sources: torch.Tensor) -> bool:
        """True if there are as many inputs as in the call, in the same forms and on its device."""
        return len(sources) == len(self.sources) and all(
            source.shape == own.shape
            and source.dtype == own.dtype
            and source.device == self.device
            and source.stride() == own.stride()
            for source, own in zip(sources, self.sources, strict=True)
        )

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        """The result for other inputs."""
        tensors = list(sources)
        for like in self.allocated:
            tensors.append(torch.empty(like.shape, dtype=like.dtype, device=self.device))
        for run, arguments, places in self.launches:
            own = arguments.copy()
            for place, index in places:
                own[place] = tensors[index]
            run(*own)
        return tensors[len(sources) + self.result]


class _Recording(threading.local):
    """The call that this thread records, if any."""

    call: BoundCall | None = None


_recording = _Recording()


def recorded(call: Callable[[], torch.Tensor], *sources: torch.Tensor) -> tuple[torch.Tensor, BoundCall | None]:
    """The result of ``call``, and its launches; None if they cannot be repeated.

    Args:
        call: an operation that allocates with :func:`new` and launches with :func:`launch` only.
        sources: all tensors that the call reads, which later calls replace.
    """
    outer, bound = _recording.call, BoundCall(sources, sources[0].device)
    _recording.call = bound
    try:
        result = call()
    finally:
        _recording.call = outer
    places = [place for place, tensor in enumerate(bound.allocated) if tensor is result]
    aligned = all(is_aligned(source) for source in sources)
    if not (bound.repeatable and bound.launches and places and aligned):
        return result, None
    bound.result = places[0]
    # Only the form of these tensors is used, so their memory is given back.
    bound.allocated = [torch.empty_like(tensor, device="meta") for tensor in bound.allocated]
    bound.sources = tuple(
        torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta") for source in sources
    )
    return result, bound


def new(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor without content, which a repetition allocates again."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _recording.call is not None:
        _recording.call.allocated.append(tensor)
    return tensor


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Mapping[str, Any], **options: Any
) -> None:
    """``kernel[grid](*arguments, **constants, **options)``, noted if the call is recorded."""
    compiled = kernel[grid](*arguments, **constants, **options)
    call = _recording.call
    if call is None:
        return
    if compiled is None:  # Triton's interpreter compiles nothing.
        call.repeatable = False
        return
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | dict(constants)
    values = [named[name] for name in kernel.arg_names]
    replaced = [*call.sources, *call.allocated]
    places = [
        (place, index) for place, value in enumerate(values) for index, tensor in enumerate(replaced) if value is tensor
    ]
    for place, _ in places:
        values[place] = None
    if any(isinstance(value, torch.Tensor) for value in values):  # A view of an input, which no repetition replaces.
        call.repeatable = False
    call.launches.append((compiled[(*grid, 1, 1)[:3]], values, places))
