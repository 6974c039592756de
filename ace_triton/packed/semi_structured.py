"""torch's 2:4 matrix product, for many rows on CUDA: CUTLASS on compute capability 8.x, cuSPARSELt on others.

Each library has its own layout. CUTLASS uses our values and needs only its own order of the metadata. These metadata
are made at the first call with many rows and kept as long as the packed weight exists; they take 1/8 byte per weight
(1/16 of the dense bytes in bf16). A CUDA graph that captures this first call makes them in every replay, so make one
call with many rows before the capture. cuSPARSELt needs one opaque tensor of values and metadata. It is made from the
unpacked weight in each call, or kept as a second copy (9/16 of the dense bytes in bf16) if the caller asks for it.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from ..kernels.pack_nm import PackedNM, pack_cutlass
from ..kernels.unpack_nm import unpack_nm
from . import conversions
from .products import Packed, Product, RowLimits

DTYPES = (torch.float16, torch.bfloat16)


_conversions = conversions.Conversions()
_algorithms: dict[tuple[object, ...], int] = {}


class SemiStructured(Product):
    """:func:`semi_structured_linear`."""

    name, label, converts = "semi_structured", "torch 2:4", True

    def takes(self, rows: int, limits: RowLimits) -> bool:
        return limits.semi_structured is not None and rows >= limits.semi_structured

    def refusal(self, packed: PackedNM, rows: int) -> str | None:
        return refusal(packed)

    def multiply(
        self, tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None, limits: RowLimits
    ) -> torch.Tensor:
        return semi_structured_linear(tokens, packed, bias, second_copy=limits.second_copy)


def backend_of(device: torch.device) -> str | None:
    """The library that torch uses on a device: "cutlass", "cusparselt", or None if it has neither."""
    if device.type != "cuda":
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 8:
        return "cutlass"
    return "cusparselt" if torch.backends.cusparselt.is_available() else None


def refusal(packed: PackedNM) -> str | None:
    """Why torch cannot multiply by this weight; None if it can."""
    device, dtype = packed.values.device, packed.values.dtype
    backend = backend_of(device)
    if backend is None:
        return f"torch has no 2:4 product for {device}"
    if (packed.n, packed.m) != (2, 4):
        return f"torch supports only 2:4, the weight is {packed.n}:{packed.m}"
    if packed.absmax is not None:
        return f"torch's 2:4 product does not support weights of {packed.bits} bits"
    if dtype not in DTYPES:
        return f"torch's 2:4 product is used for float16 and bfloat16 only, the weight is {dtype}"
    rows, cols = (32, 64) if backend == "cutlass" else (16, 16)
    if packed.shape[0] % rows or packed.shape[1] % cols:
        return f"{backend} needs multiples of {rows} outputs and {cols} inputs, the weight is {packed.shape}"
    return None


def warn_of_no_second_copy(packed: Packed) -> None:
    """Warn if the caller's limits ask for a second copy of a weight that torch cannot multiply by."""
    why_not = refusal(packed) if isinstance(packed, PackedNM) else "its zeros follow no pattern n:m"
    if why_not is not None:
        warnings.warn(f"second_copy=True has no effect, the weight is unpacked in each call: {why_not}", stacklevel=3)


def semi_structured_linear(
    tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None, *, second_copy: bool = False
) -> torch.Tensor:
    """Compute outputs [n_tokens, out_features] with torch's 2:4 product.

    Args:
        tokens: [n_tokens, in_features], with the weight's dtype and device.
        packed: a weight for which :func:`refusal` returns None.
        bias: [out_features] or None.
        second_copy: keep cuSPARSELt's copy of the weight after the first call.
    """
    if backend_of(packed.values.device) == "cutlass":
        weight = cutlass_weight(packed)
    else:
        weight = _cusparselt_weight(packed, len(tokens), bias, second_copy)
    return torch.nn.functional.linear(tokens, weight, bias)


def cutlass_weight(packed: PackedNM) -> torch.Tensor:
    """A semi-structured tensor that shares our values and has metadata in CUTLASS's order."""
    meta = _conversions.of(packed, lambda: _cutlass_meta(packed))
    return SparseSemiStructuredTensorCUTLASS(torch.Size(packed.shape), packed.values, meta, None, None, None)


def _cutlass_meta(packed: PackedNM) -> torch.Tensor:
    # torch would choose other places for kept values that are zero, so all kept values are replaced by ones here.
    return pack_cutlass(dataclasses.replace(packed, values=torch.ones_like(packed.values)))[1]


def _cusparselt_weight(packed: PackedNM, rows: int, bias: torch.Tensor | None, keep: bool) -> torch.Tensor:
    compressed = _conversions.of(packed, lambda: torch._cslt_compress(unpack_nm(packed)), keep)
    algorithm = _algorithm(packed, compressed, rows, bias)
    shape = torch.Size(packed.shape)
    return SparseSemiStructuredTensorCUSPARSELT(
        shape, compressed, None, None, None, None, alg_id_cusparselt=algorithm, requires_grad=False
    )


def _algorithm(packed: PackedNM, compressed: torch.Tensor, rows: int, bias: torch.Tensor | None) -> int:
    """The fastest cuSPARSELt algorithm; searched once per shape, dtype, device and power of two of the rows."""
    if conversions.capturing(packed.values.device):
        return 0
    width = 1 << max(3, (rows - 1).bit_length())
    key = (*packed.shape, width, packed.values.dtype, packed.values.device.index)
    if key not in _algorithms:
        columns = packed.values.new_zeros(width, packed.shape[1]).t()
        _algorithms[key] = torch._cslt_sparse_mm_search(compressed, columns, bias=bias, transpose_result=True)
    return _algorithms[key]
