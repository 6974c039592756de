"""Finds weights that share memory with other parameters of a model."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


class Owners:
    """Which parameters and buffers of a model share memory.

    Two tensors are tied if they have at least one element at the same address. Examples: an output head that uses the
    parameter of the embedding, or a parameter that is a slice of another. Tensors without memory (meta device) are tied
    only if they are the same object.

    Args:
        model: any module. Creating this object takes one pass over its parameters and buffers.

    Attributes:
        tensors: the parameters and buffers by name. A tensor shared by several modules has several names.
    """

    def __init__(self, model: nn.Module) -> None:
        named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self.tensors: dict[str, torch.Tensor] = dict(chain(*named))
        self._by_memory: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            self._by_memory.setdefault(memory_of(tensor), []).append(name)

    def others(self, tensor: torch.Tensor, name: str | None) -> list[str]:
        """Names of all parameters and buffers that share memory with a tensor, except ``name``."""
        sharing = (other for other in self._by_memory.get(memory_of(tensor), ()) if other != name)
        return [other for other in sharing if self.tensors[other] is tensor or overlap(self.tensors[other], tensor)]


def tied_parameters(model: nn.Module) -> set[int]:
    """Ids (``id()``) of the parameters that share memory, in whole or in part, with a parameter of another module."""
    spans = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # A tensor without memory gets one byte at the address of its Python object, in no other tensor's memory.
            address = 0 if parameter.is_meta else parameter.data_ptr()
            last = sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
            size = (last + 1) * parameter.element_size() if address else 1
            if parameter.numel():
                spans.append((address or id(parameter), (address or id(parameter)) + size, id(parameter)))
    tied: set[int] = set()
    furthest, holder = 0, 0
    for start, end, identity in sorted(spans):
        if start < furthest:
            tied |= {identity, holder}
        if end > furthest:
            furthest, holder = end, identity
    return tied


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors of the same storage have at least one element at the same address."""
    if one.is_meta or one.numel() == 0 or other.numel() == 0:
        return False
    first, second = _span(one), _span(other)
    if max(first[0], second[0]) >= min(first[1], second[1]):
        return False
    if (one.is_contiguous() and other.is_contiguous()) or one.element_size() != other.element_size():
        return True
    # Byte ranges can overlap without a shared element, as for two column ranges of one matrix. So mark the elements of
    # one tensor and look up those of the other.
    begin = min(one.storage_offset(), other.storage_offset())
    marks = torch.zeros(max(first[1], second[1]) // one.element_size() - begin, dtype=torch.bool, device="cpu")
    marks.as_strided(one.shape, one.stride(), one.storage_offset() - begin).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset() - begin).any())


def memory_of(tensor: torch.Tensor) -> object:
    """A key that is equal for tensors that may overlap, because they have the same storage."""
    try:
        start = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor or a wrapper around others
        start = 0
    return (tensor.device, start) if start else id(tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Offset of a tensor's first byte in its storage, and of the first byte after the tensor."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(reach + 1) * tensor.element_size()
