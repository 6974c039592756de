"""LayerTable: one launch for many layers. A table on the device holds each layer's addresses and sizes.

    table[f, k]: field f of layer k, int64.   The first fields are the layers' first programs, one field a launch.

A program finds its layer by its number, and the layer's fields by the layer. The host waits for nothing: the table is
copied from pinned memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from . import memory
from .triton_import import tl, triton

MOST_LAYERS = 64
"""Layers in one launch; each program reads as many numbers to find its layer."""

FEW_LAYERS = 8

NOT_REACHED = 2**62
"""First program of a layer that is not there."""

ALIGNED_NUMBERS = 16
"""A kernel is specialized for addresses, in bytes, and sizes, in elements, that are multiples of this."""

Item = TypeVar("Item")


class LayerTable:
    """Addresses and sizes of layers, for one or more launches over the same layers.

    Args:
        launches: number of launches that read the table.
    """

    def __init__(self, launches: int = 1) -> None:
        self._programs: list[list[int]] = [[0] for _ in range(launches)]
        self._layers: list[list[int]] = []
        self._lines: list[list[int]] = []

    def add(self, programs: Iterable[int], *fields: torch.Tensor | int | None) -> None:
        """Add a layer.

        Args:
            programs: for each launch, the number of programs of this layer.
            fields: tensors, whose addresses are stored, and integers. None is stored as 0.
        """
        for ends, number in zip(self._programs, programs, strict=True):
            ends.append(ends[-1] + number)
        self._layers.append([_as_number(field) for field in fields])

    def add_line(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add a field after those of the layers, with at most :attr:`size` addresses that belong to no layer."""
        assert len(tensors) <= self.size
        self._lines.append([_as_number(tensor) for tensor in tensors])

    @property
    def size(self) -> int:
        """Columns of the table, a compile-time constant of kernels: only two values, so few kernels are compiled."""
        return FEW_LAYERS if len(self._layers) <= FEW_LAYERS else MOST_LAYERS

    def grid(self, launch: int = 0) -> tuple[int]:
        """The grid of a launch."""
        return (self._programs[launch][-1],)

    def on(self, device: torch.device) -> torch.Tensor:
        """The table, int64 [fields, size]."""
        fields = [*map(list, zip(*self._layers, strict=True)), *self._lines]
        lines = [[*ends[:-1], *[NOT_REACHED] * (self.size - len(ends) + 1)] for ends in self._programs]
        lines += [[*field, *[0] * (self.size - len(field))] for field in fields]
        table = torch.tensor(lines, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        return table.to(device, non_blocking=True)


def _as_number(field: torch.Tensor | int | None) -> int:
    if isinstance(field, torch.Tensor):
        return memory.device_address(field)
    return 0 if field is None else field


def bits_of(number: float) -> int:
    """A number as fp32 bits, for a field that a kernel reads with :func:`fp32_field`."""
    return ctypes.c_int32.from_buffer(ctypes.c_float(number)).value


def is_aligned(tensors: Iterable[torch.Tensor], *sizes: int) -> bool:
    """True if kernels may access these tensors by 16 bytes: all addresses and all sizes are multiples of 16."""
    places = map(memory.device_address, tensors)
    return not any(number % ALIGNED_NUMBERS for number in (*places, *sizes))


def slices(sizes: Iterable[int], device: torch.device) -> list[torch.Tensor]:
    """Uninitialized fp32 vectors in one block of memory, all aligned."""
    sizes = list(sizes)
    rounded = [-(-size // ALIGNED_NUMBERS) * ALIGNED_NUMBERS for size in sizes]
    pieces = torch.empty(sum(rounded), dtype=torch.float32, device=device).split(rounded)
    return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]


def batches(items: Iterable[Item], kind: Callable[[Item], Hashable]) -> Iterator[list[Item]]:
    """The items in lists of one kind, which one launch takes: at most MOST_LAYERS."""
    by_kind: dict[Hashable, list[Item]] = {}
    for item in items:
        by_kind.setdefault(kind(item), []).append(item)
    for same in by_kind.values():
        for first in range(0, len(same), MOST_LAYERS):
            yield same[first : first + MOST_LAYERS]


@triton.jit
def layer_of_program(table_ptr, LAUNCH: tl.constexpr, LAYERS: tl.constexpr):
    """The layer of this program, and the program's number within the layer."""
    firsts = table_ptr + LAUNCH * LAYERS
    reached = tl.load(firsts + tl.arange(0, LAYERS)) <= tl.program_id(0)
    layer = tl.sum(reached.to(tl.int32), 0) - 1
    return layer, tl.program_id(0) - tl.load(firsts + layer).to(tl.int32)


@triton.jit
def int_field(table_ptr, layer, FIELD: tl.constexpr, LAYERS: tl.constexpr, ALIGNED: tl.constexpr):
    """A size, int32."""
    number = tl.load(table_ptr + FIELD * LAYERS + layer).to(tl.int32)
    return tl.multiple_of(number, 16) if ALIGNED else number


@triton.jit
def long_field(table_ptr, layer, FIELD: tl.constexpr, LAYERS: tl.constexpr, ALIGNED: tl.constexpr):
    """A number of elements, int64."""
    number = tl.load(table_ptr + FIELD * LAYERS + layer)
    return tl.multiple_of(number, 16) if ALIGNED else number


@triton.jit
def pointer_field(
    table_ptr, layer, DTYPE: tl.constexpr, FIELD: tl.constexpr, LAYERS: tl.constexpr, ALIGNED: tl.constexpr
):
    """A pointer to elements of ``DTYPE``."""
    pointer = tl.load(table_ptr + FIELD * LAYERS + layer).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def fp32_field(table_ptr, layer, FIELD: tl.constexpr, LAYERS: tl.constexpr):
    """A number that :func:`bits_of` stored."""
    return tl.load(table_ptr + FIELD * LAYERS + layer).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def any_flag(table_ptr, FIELD: tl.constexpr, LAYERS: tl.constexpr):
    """1 if any of the flags (int32) on a line is not 0, else 0."""
    places = tl.load(table_ptr + FIELD * LAYERS + tl.arange(0, LAYERS))
    flags = tl.load(places.to(tl.pointer_type(tl.int32)), mask=places != 0, other=0)
    return tl.max((flags != 0).to(tl.int32), 0)


def element_type(dtype: torch.dtype) -> object:
    """Triton's name of a dtype."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
