"""What stands for the weight of a packed layer where code asks for ``layer.weight``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .kernels.pack_nm import PackedNM, unpack_nm


class PackedWeight(torch.Tensor):
    """The weight [out_features, in_features] to look at: its shape, dtype and device cost nothing.

    Every operation on it unpacks the weight first, so that it is right and slow; operations that write to it
    raise RuntimeError, since nothing would come of them.
    """

    packed: PackedNM

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: PackedNM) -> PackedWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls, packed.shape, dtype=packed.values.dtype, device=packed.values.device
        )

    def __init__(self, packed: PackedNM) -> None:
        self.packed = packed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        for given, argument in zip(args, function._schema.arguments, strict=False):
            if isinstance(given, cls) and argument.is_write:
                raise RuntimeError(
                    f"{function.name()}: the weight of a packed layer cannot be written to; put "
                    "nn.Linear(...) with layer.unpack() in its place first"
                )
        return function(*_dense(args), **_dense(kwargs or {}))


def _dense(tree: Any) -> Any:
    def unpacked(leaf: Any) -> Any:
        return unpack_nm(leaf.packed) if isinstance(leaf, PackedWeight) else leaf

    return tree_map(unpacked, tree)
