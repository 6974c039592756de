"""expanded_linear: y = x W^T + b for more rows than :mod:`.nm_linear` is made for, from a packed weight, in bf16.

    y_ti = sum_j x_tj W_ij + b_i,   over all (i, j), summed in fp32 and rounded once

Bytes per weight: those of the packed weight, read once per 512 tokens. On a CPU with AVX512-BF16 and VBMI2, the
compiled library expands blocks of the weight into the cache and multiplies each block by all tokens: by tiles on
processors with AMX, else by vectors. At 2:4 and by vectors a bf16 weight is not expanded: each group of four inputs
gives six pairs of inputs, and the two kept weights are multiplied by one of them. All other devices run the reference.

A quantized weight is rounded to bf16, W_ij = bf16(absmax_ig q_ij / Q), exactly as if it were unpacked first.

Outputs do not depend on the number of threads or on the other tokens of the call. Tiles and vectors add in different
orders, so their outputs differ in the last bits, as those of ``F.linear`` do between instruction sets. Both take
subnormal numbers (below 1.2e-38) as 0, as the processor's bf16 instructions do. If the input of a pruned weight is NaN
or infinite, the output may or may not be NaN.
"""

from __future__ import annotations

import torch

from . import cpu_packed
from .errors import ArgumentError
from .linear_call import check_linear, of_shape, outputs_of_dense, rows_of
from .nm_linear import nm_linear_reference
from .op import Op, Work, bytes_of
from .packed_dense import PackedDense, dequantize_dense
from .packed_nm import PackedNM
from .packed_rows import PackedRows
from .quantize_nm import dequantize_nm
from .rows_linear import rows_linear_reference

ExpandedWeight = PackedNM | PackedRows | PackedDense
"""The forms of packed weights that are multiplied so."""


def expanded_linear(tokens: torch.Tensor, packed: ExpandedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs [..., out_features], bf16.

    Args:
        tokens: [..., in_features], bf16. Any number of rows works; it is made for 8 and more.
        packed: the weight, bf16: n:m or with row starts, or quantized with ``absmax`` in bf16.
        bias: [out_features] or None.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_linear(tokens, packed, bias)
    if tokens.dtype != torch.bfloat16 or packed.dtype != torch.bfloat16:
        raise ArgumentError(
            f"tokens and weight must be bfloat16, got {tokens.dtype} and {packed.dtype}: use nm_linear, rows_linear or "
            "quantized_linear"
        )
    return EXPANDED_LINEAR.on(tokens, *packed.tensors.values(), bias)(tokens, packed, bias)


def has_expanded_product() -> bool:
    """True if the compiled library has this product for the processor and the instruction set in use."""
    return cpu_packed.has_expanded_product()


def expanded_linear_reference(
    tokens: torch.Tensor, packed: ExpandedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The outputs, computed with plain torch from the dense weight, which is rounded to bf16 and widened to fp32."""
    packed.check_tensors()
    if isinstance(packed, PackedRows):
        return rows_linear_reference(tokens, packed, bias)
    if isinstance(packed, PackedNM):
        return nm_linear_reference(tokens, packed if packed.absmax is None else dequantize_nm(packed), bias)
    return outputs_of_dense(tokens, dequantize_dense(packed), bias)


def _expanded_linear_cpu(tokens: torch.Tensor, packed: ExpandedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if not packed.shape[1] or not has_expanded_product():
        return expanded_linear_reference(tokens, packed, bias)
    return of_shape(
        cpu_packed.expanded_linear(rows_of(tokens), packed, None if bias is None else bias.detach()), tokens
    )


def _work(tokens: torch.Tensor, packed: ExpandedWeight, bias: torch.Tensor | None) -> Work:
    """Reads the tokens once and the packed weight once, however many tokens there are."""
    n_tokens = tokens.shape[:-1].numel()
    n_outputs = n_tokens * packed.shape[0]
    kept = packed.values.numel() if isinstance(packed, PackedRows) else packed.shape[0] * packed.kept_of_a_row
    moved = bytes_of(tokens, bias) + packed.packed_bytes + n_outputs * tokens.element_size()
    products = 2 * n_tokens * kept
    return Work(moved, products if bias is None else products + n_outputs)


EXPANDED_LINEAR = Op("expanded_linear", _work, expanded_linear_reference, _expanded_linear_cpu)
