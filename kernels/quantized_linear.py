"""quantized_linear: y = x W^T + b for a few rows of x, from a weight that is not pruned, in 8 or 4 bits.

    y_ti = sum_g absmax_ig / Q sum_(j in g) x_tj q_ij + b_i

The kernels are those of quantized n:m weights (:mod:`.nm_linear`, :mod:`.nm_linear_few_bits`) without metadata.

Bytes per weight of b bits: b / 8 read, once for 32 rows of x on a CPU, and absmax.
"""

from __future__ import annotations

import torch

from . import cpu_packed
from .linear_call import check_linear, of_shape, outputs_of_dense, rows_of
from .nm_linear import nm_linear_launched
from .op import Op, Work, bytes_of
from .packed_dense import PackedDense, dequantize_dense


def quantized_linear(tokens: torch.Tensor, packed: PackedDense, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs [..., out_features] in the dtype of ``tokens``.

    Args:
        tokens: [..., in_features], fp32, fp16 or bf16. Any number of rows works; 1 to 32 are fast.
        packed: the weight.
        bias: [out_features] or None.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_linear(tokens, packed, bias)
    return QUANTIZED_LINEAR.on(tokens, packed.values, packed.absmax, bias)(tokens, packed, bias)


def quantized_linear_reference(
    tokens: torch.Tensor, packed: PackedDense, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The outputs, computed with plain torch from the dense weight in fp32."""
    return outputs_of_dense(tokens, dequantize_dense(packed, torch.float32), bias)


def _by_reference(tokens: torch.Tensor, packed: PackedDense, bias: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    return quantized_linear_reference(tokens, packed, bias)


def _quantized_linear_cpu(tokens: torch.Tensor, packed: PackedDense, bias: torch.Tensor | None) -> torch.Tensor:
    return of_shape(
        cpu_packed.few_bits_linear(rows_of(tokens), packed, None if bias is None else bias.detach()), tokens
    )


def _quantized_linear_triton(tokens: torch.Tensor, packed: PackedDense, bias: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    return of_shape(nm_linear_launched(rows_of(tokens.detach()), packed, bias), tokens)


def _work(tokens: torch.Tensor, packed: PackedDense, bias: torch.Tensor | None) -> Work:
    """Reads the tokens once and the weight once, however many tokens there are."""
    n_tokens = tokens.shape[:-1].numel()
    n_outputs = n_tokens * packed.shape[0]
    products = 2 * n_outputs * packed.shape[1]
    moved = bytes_of(tokens, bias) + packed.packed_bytes + n_outputs * tokens.element_size()
    return Work(moved, products if bias is None else products + n_outputs)


QUANTIZED_LINEAR = Op("quantized_linear", _work, _by_reference, _quantized_linear_cpu, _quantized_linear_triton)
