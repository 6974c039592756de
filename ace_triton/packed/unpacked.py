"""The product that unpacks the weight for each call and multiplies dense."""

from __future__ import annotations

import torch

from ..kernels.pack_rows import unpack_rows
from ..kernels.packed_dense import PackedDense, dequantize_dense
from ..kernels.packed_nm import PackedNM
from ..kernels.packed_rows import PackedRows
from ..kernels.unpack_nm import unpack_nm
from .products import Packed, Product, RowLimits

BLOCK_BYTES = 4 * 2**20
"""Bytes of the dense weight that a CPU unpacks at a time. Blocks of 1 MiB make the dense product slower."""


class Unpacked(Product):
    """:func:`unpacked_linear`, for every call that no other product takes."""

    name, label = "dense", "unpacked"
    forms = (PackedNM, PackedRows, PackedDense)

    def refusal(self, packed: Packed, rows: int) -> str | None:
        return None

    def multiply(
        self, tokens: torch.Tensor, packed: Packed, bias: torch.Tensor | None, limits: RowLimits
    ) -> torch.Tensor:
        return unpacked_linear(tokens, packed, bias)


def unpacked_weight(packed: Packed, into: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight [out, in]; ``into`` as for :func:`~ace_triton.kernels.unpack_nm.unpack_nm`."""
    if isinstance(packed, PackedDense):
        weight = dequantize_dense(packed)
        return weight if into is None else into.copy_(weight)
    return unpack_rows(packed, into) if isinstance(packed, PackedRows) else unpack_nm(packed, into)


def unpacked_linear(tokens: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute outputs [n_tokens, out_features] from the unpacked weight.

    A CPU unpacks BLOCK_BYTES of the weight at a time, so that each block is still in the cache when it is multiplied.
    """
    out_features, in_features = packed.shape
    at_once = max(1, BLOCK_BYTES // max(1, in_features * packed.dtype.itemsize))
    if tokens.device.type != "cpu" or at_once >= out_features:
        return torch.nn.functional.linear(tokens, unpacked_weight(packed), bias)
    outputs = tokens.new_empty(len(tokens), out_features)
    weights = packed.values.new_empty(at_once, in_features, dtype=packed.dtype)
    for first in range(0, out_features, at_once):
        block = packed.outputs(first, first + at_once)
        part = slice(first, first + block.shape[0])
        weight = unpacked_weight(block, weights[: block.shape[0]])
        outputs[:, part] = torch.nn.functional.linear(tokens, weight, None if bias is None else bias[part])
    return outputs
