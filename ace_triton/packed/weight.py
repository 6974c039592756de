"""What stands for the weight of a packed layer where code asks for ``layer.weight``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..kernels.packed_nm import PackedNM
from ..kernels.unpack_nm import unpack_nm


class ReadOnly(torch.Tensor):
    """A tensor to look at: an operation that would write to it raises RuntimeError, and so do its views."""

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
        """As of any tensor; writing to it raises."""
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        raise RuntimeError(_refusal("data"))

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """As of any tensor, but not to be written to."""
        array = self.dense.numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """As of any tensor."""
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
            raise RuntimeError(_refusal(function.name()))
        result = function(*_dense(args), **_dense(kwargs or {}))
        if any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns):
            return tree_map(lambda leaf: ReadOnly(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        return result

    def _alias(self) -> ReadOnly:
        return ReadOnly(self.dense)


class PackedWeight(ReadOnly):
    """The weight [out_features, in_features] to look at: its shape, dtype and device cost nothing.

    Every operation on it unpacks the weight first, so that it is right and slow; operations that write to it or to a
    view of it raise RuntimeError, since nothing would come of them.
    """

    packed: PackedNM

    @staticmethod
    def __new__(cls, packed: PackedNM) -> PackedWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls, packed.shape, dtype=packed.values.dtype, device=packed.values.device
        )

    def __init__(self, packed: PackedNM) -> None:
        self.packed = packed

    @property
    def dense(self) -> torch.Tensor:  # type: ignore[override]
        """The weight, unpacked anew."""
        return unpack_nm(self.packed)

    def _alias(self) -> PackedWeight:
        return PackedWeight(self.packed)


def _refusal(operation: str) -> str:
    return (
        f"{operation}: the weight of a packed layer cannot be written to; put nn.Linear(...) with layer.unpack() "
        "in its place first"
    )


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """What a call of ``function`` writes to."""
    for place, argument in enumerate(function._schema.arguments):
        if argument.is_write:
            yield from tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))


def _dense(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.dense if isinstance(leaf, ReadOnly) else leaf, tree)
