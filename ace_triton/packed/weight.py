"""A read-only tensor that stands for the dense weight of a packed layer, as ``layer.weight``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import PackedWeightError
from .products import Packed
from .unpacked import unpacked_weight


class ReadOnly(torch.Tensor):
    """A read-only tensor. An operation that writes to it or to a view of it raises PackedWeightError."""

    dense: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, dense: torch.Tensor) -> ReadOnly:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            dense.shape,
            strides=dense.stride(),
            storage_offset=dense.storage_offset(),
            dtype=dense.dtype,
            device=dense.device,
        )

    def __init__(self, dense: torch.Tensor) -> None:
        self.dense = dense

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        """As in any tensor, but read-only."""
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        raise PackedWeightError(_refusal("data"))

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """As in any tensor, but the array is read-only."""
        array = self.dense.numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """As in any tensor."""
        return self.dense.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.dense)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]._alias()
        if any(isinstance(leaf, ReadOnly) for leaf in _written(function, args, kwargs or {})):
            raise PackedWeightError(_refusal(function.name()))
        result = function(*_dense(args), **_dense(kwargs or {}))
        if any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns):
            return tree_map(lambda leaf: ReadOnly(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        return result

    def _alias(self) -> ReadOnly:
        return ReadOnly(self.dense)


class PackedWeight(ReadOnly):
    """The read-only weight [out_features, in_features] of a packed layer. Its shape, dtype and device cost nothing.

    Every operation on it first unpacks the weight, so the result is correct but slow. Writing to it, or to a view of
    it, raises PackedWeightError, because the packed weight would not change.
    """

    packed: Packed

    _is_hf_initialized = True
    """transformers does not initialize a weight with this mark when it loads a model."""

    @staticmethod
    def __new__(cls, packed: Packed) -> PackedWeight:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=packed.dtype, device=packed.values.device)

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    @property
    def dense(self) -> torch.Tensor:  # type: ignore[override]
        """The unpacked weight; it is unpacked each time."""
        return unpacked_weight(self.packed)

    def _alias(self) -> PackedWeight:
        return PackedWeight(self.packed)


def _refusal(operation: str) -> str:
    return (
        f"{operation}: the weight of a packed layer cannot be written to; replace the layer by an nn.Linear with "
        "layer.unpack() as its weight first"
    )


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that a call of ``function`` writes to."""
    for place, argument in enumerate(function._schema.arguments):
        if argument.is_write:
            yield from tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))


def _dense(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.dense if isinstance(leaf, ReadOnly) else leaf, tree)
