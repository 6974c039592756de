"""torch's 2:4 matrix product, for many rows on CUDA: CUTLASS on compute capability 8.x, cuSPARSELt elsewhere.

Both read a layout of their own. CUTLASS takes our values as they are and wants only the metadata in another order:
they are made at the first call with many rows and kept as long as the packed weight lives, 1/8 byte a weight more
(1/16 of the dense bytes in bf16). A CUDA graph that records that first call makes them in every replay, so call once
with many rows before the capture. cuSPARSELt has one opaque tensor of values and metadata: it is made anew in each
call, by way of the dense weight, or kept as a second copy (9/16 of the dense bytes) where the caller asks for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.pack_nm import PackedNM, pack_cutlass
from ..kernels.unpack_nm import unpack_nm

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Made:
    """What was made of a packed weight, and the versions of its tensors then."""

    versions: tuple[int, int]
    tensor: torch.Tensor


_made = WeakTensorKeyDictionary()
_algorithms: dict[tuple[object, ...], int] = {}


def backend_of(device: torch.device) -> str | None:
    """ "cutlass", "cusparselt", or None where torch has neither for this device."""
    if device.type != "cuda":
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 8:
        return "cutlass"
    return "cusparselt" if torch.backends.cusparselt.is_available() else None


def refusal(packed: PackedNM) -> str | None:
    """Why torch cannot multiply by this weight, or None where it can."""
    device, dtype = packed.values.device, packed.values.dtype
    backend = backend_of(device)
    if backend is None:
        return f"torch has no 2:4 product for {device}"
    if (packed.n, packed.m) != (2, 4):
        return f"torch multiplies 2:4 alone, the weight is {packed.n}:{packed.m}"
    if dtype not in DTYPES:
        return f"torch's 2:4 product takes float16 and bfloat16 here, the weight is {dtype}"
    rows, cols = (32, 64) if backend == "cutlass" else (16, 16)
    if packed.shape[0] % rows or packed.shape[1] % cols:
        return f"{backend} needs outputs a multiple of {rows} and inputs of {cols}, the weight is {packed.shape}"
    return None


def semi_structured_linear(
    tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None, *, second_copy: bool = False
) -> torch.Tensor:
    """Outputs [n_tokens, out_features] by torch's 2:4 product.

    Args:
        tokens: [n_tokens, in_features], of the weight's dtype and device.
        packed: a weight for which :func:`refusal` is None.
        bias: [out_features] or None.
        second_copy: keep cuSPARSELt's own copy of the weight from the first call on.
    """
    if backend_of(packed.values.device) == "cutlass":
        weight = cutlass_weight(packed)
    else:
        weight = _cusparselt_weight(packed, len(tokens), bias, second_copy)
    return torch.nn.functional.linear(tokens, weight, bias)


def cutlass_weight(packed: PackedNM) -> torch.Tensor:
    """A semi-structured tensor that shares our values and keeps metadata in CUTLASS's order."""
    meta = _remembered(packed, lambda: _cutlass_meta(packed), keep=True)
    return SparseSemiStructuredTensorCUTLASS(torch.Size(packed.shape), packed.values, meta, None, None, None)


def _cutlass_meta(packed: PackedNM) -> torch.Tensor:
    # Zeros among the kept values would move torch's choice of places away from ours; ones do not.
    return pack_cutlass(dataclasses.replace(packed, values=torch.ones_like(packed.values)))[1]


def _cusparselt_weight(packed: PackedNM, rows: int, bias: torch.Tensor | None, keep: bool) -> torch.Tensor:
    compressed = _remembered(packed, lambda: torch._cslt_compress(unpack_nm(packed)), keep)
    algorithm = _algorithm(packed, compressed, rows, bias)
    shape = torch.Size(packed.shape)
    return SparseSemiStructuredTensorCUSPARSELT(
        shape, compressed, None, None, None, None, alg_id_cusparselt=algorithm, requires_grad=False
    )


def _algorithm(packed: PackedNM, compressed: torch.Tensor, rows: int, bias: torch.Tensor | None) -> int:
    """cuSPARSELt's fastest algorithm, searched once for a shape, dtype and power of two of rows."""
    if _capturing(packed.values.device):
        return 0
    width = 1 << max(3, (rows - 1).bit_length())
    key = (*packed.shape, width, packed.values.dtype, packed.values.device.index)
    if key not in _algorithms:
        columns = packed.values.new_zeros(width, packed.shape[1]).t()
        _algorithms[key] = torch._cslt_sparse_mm_search(compressed, columns, bias=bias, transpose_result=True)
    return _algorithms[key]


def _remembered(packed: PackedNM, make: Callable[[], torch.Tensor], keep: bool) -> torch.Tensor:
    """What ``make`` gives for a packed weight, made again where the weight was written since."""
    versions = _version(packed.meta), _version(packed.values)
    made = _made.get(packed.meta)
    if made is not None and made.versions == versions:
        return made.tensor
    tensor = make()
    if keep and not _capturing(packed.values.device):
        _made[packed.meta] = _Made(versions, tensor)
    return tensor


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records this: what is made then holds nothing before a replay, and lies in its memory."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
