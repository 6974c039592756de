"""Counts bytes and launches of a call: Triton kernels in the interpreter, torch operations at dispatch.

Within a launch, a byte counts once, as if the cache served repeats. Between launches nothing is cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@dataclass
class Traffic:
    """Traffic of one call.

    Attributes:
        read, written: bytes, each counted once per launch.
        issued: bytes of all loads and stores, including repeats; torch operations count once.
        launches: number of Triton kernels and of torch operations that touch data.
        kernels: number of Triton kernels.
        waits: number of times that the host reads from the device, or needs a number from it to size a result.
    """

    read: int = 0
    written: int = 0
    issued: int = 0
    launches: int = 0
    kernels: int = 0
    waits: int = 0


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
"""Operations for which a GPU's host waits. An index by a bool tensor waits too."""


@dataclass
class Counter(TorchDispatchMode):
    """Counts inside its ``with`` block."""

    traffic: Traffic = field(default_factory=Traffic)
    _inside_kernel: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if not self._inside_kernel and not _is_view(operation):
            self._count_operation(operation, (*args, *(kwargs or {}).values()), result)
        return result

    def _count_operation(self, operation: Any, arguments: tuple[Any, ...], result: Any) -> None:
        inputs = {id(t): t for t in _tensors(arguments)}
        outputs = {id(t): t for t in _tensors(result)}
        name = operation.overloadpacket.__name__
        self.traffic.waits += name in WAITING or (name == "index" and _has_bool_index(arguments))
        if name.startswith(("empty", "new_empty")) or (not outputs and name == "_local_scalar_dense"):
            return
        if name in ("scatter_", "index_put_"):
            read, written = _scattered(arguments)
        else:
            read = 0 if name in ("zero_", "fill_") else sum(_bytes(t) for t in inputs.values())
            written = sum(_bytes(t) for t in outputs.values())
        self.traffic.read += read
        self.traffic.written += written
        self.traffic.issued += read + written
        self.traffic.launches += 1

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        """Count torch operations and Triton kernels."""
        loads: list[tuple[np.ndarray, int]] = []
        stores: list[tuple[np.ndarray, int]] = []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        run, as_list = GridExecutor.__call__, torch.Tensor.tolist

        def counted_list(tensor: torch.Tensor) -> Any:
            self.traffic.waits += not self._inside_kernel
            return as_list(tensor)

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            loads.append(_addresses(pointers, mask))
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            stores.append(_addresses(pointers, mask))
            return store(builder, pointers, value, mask, *rest)

        def counted_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self._inside_kernel = True
            try:
                result = run(executor, *args, **kwargs)
            finally:
                self._inside_kernel = False
            self.traffic.launches += 1
            self.traffic.kernels += 1
            for kept, name in ((loads, "read"), (stores, "written")):
                self.traffic.issued += sum(places.size * size for places, size in kept)
                setattr(self.traffic, name, getattr(self.traffic, name) + _distinct(kept))
                kept.clear()
            return result

        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
            mock.patch.object(GridExecutor, "__call__", counted_run),
            mock.patch.object(torch.Tensor, "tolist", counted_list),
            self,
        ):
            yield self.traffic


def _addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """Addresses of the elements that a load or store touches, and their size in bytes."""
    inside = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
    return pointers.data[inside].astype(np.uint64).ravel(), max(pointers.get_element_ty().primitive_bitwidth // 8, 1)


def _distinct(accesses: list[tuple[np.ndarray, int]]) -> int:
    """Distinct bytes of many accesses; elements of one size are aligned to it."""
    sizes = {size for _, size in accesses}
    return sum(size * np.unique(np.concatenate([p for p, s in accesses if s == size])).size for size in sizes)


def _scattered(arguments: tuple[Any, ...]) -> tuple[int, int]:
    """Bytes read and written by an operation that writes to some places of its first argument."""
    target, *places = _tensors(arguments)
    touched = int(places[0].sum()) if places[0].dtype == torch.bool else places[0].numel()
    return sum(_bytes(t) for t in places), touched * target.element_size()


def _has_bool_index(arguments: tuple[Any, ...]) -> bool:
    return any(tensor.dtype == torch.bool for tensor in _tensors(arguments[1:]))


def _is_view(operation: Any) -> bool:
    aliases = [r.alias_info for r in operation._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: torch.Tensor) -> int:
    """Distinct bytes of a tensor; an expanded axis counts once."""
    return tensor.element_size() * int(
        np.prod([n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s != 0], dtype=np.int64)
    )
