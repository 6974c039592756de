"""What the products y = x W^T + b by a packed weight share: their checks, shapes, launches and bound calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from . import bound_launch, few_bits, launch, launch_packed
from .bound_launch import BoundCall, new, recorded
from .errors import ArgumentError
from .op import launch_metadata
from .packed_dense import PackedDense
from .packed_nm import PackedNM
from .packed_rows import PackedRows
from .triton_import import tl, triton

MOST_BOUND_TOKENS = 64
"""Rows of a call that :func:`bound` takes; one launch has room for them."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_linear(tokens: torch.Tensor, packed: PackedNM | PackedRows | PackedDense, bias: torch.Tensor | None) -> None:
    """Raise ArgumentError if the product with a packed weight does not support the shapes or dtypes."""
    out_features, in_features = packed.shape
    if tokens.dim() < 1 or tokens.shape[-1] != in_features:
        raise ArgumentError(
            f"tokens must be [..., {in_features}] for a weight {packed.shape}, got shape {tuple(tokens.shape)}"
        )
    if tokens.dtype not in DTYPES or packed.dtype not in DTYPES:
        raise ArgumentError(
            "tokens and weight must be float32, float16 or bfloat16, "
            f"got {tokens.dtype} and {packed.dtype}: convert them"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ArgumentError(f"bias must be [{out_features}] for a weight {packed.shape}, got {tuple(bias.shape)}")


def rows_of(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [..., in_features] as [n_tokens, in_features], without a graph."""
    return tokens if tokens.dim() == 2 else tokens.detach().reshape(-1, tokens.shape[-1])


def of_shape(outputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Outputs [n_tokens, out_features] in the dtype of ``tokens`` [..., in_features], and in their shape."""
    outputs = outputs.to(tokens.dtype)
    return outputs if tokens.dim() == 2 else outputs.reshape(*tokens.shape[:-1], outputs.shape[1])


def outputs_of_dense(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The references' product: outputs [..., out_features] in the dtype of ``tokens``, computed in fp32 from a dense
    weight [out_features, in_features]."""
    outputs = tokens.float() @ weight.float().t()
    return (outputs if bias is None else outputs + bias.float()).to(tokens.dtype)


def bound(
    product: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    operands: Iterable[torch.Tensor],
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, BoundCall | None]:
    """The outputs of a product on a GPU, and the same call to be repeated with other tensors; None if it cannot be.

    Repetitions take the tokens, the operands and, if it is there, the bias.

    Args:
        product: computes the outputs of tokens by :func:`launched`, from these operands and this bias.
        tokens: [n_tokens, in_features], contiguous, up to MOST_BOUND_TOKENS rows.
        operands: all other tensors that the product reads, but for the bias.
        bias: [out_features] or None.
    """
    tokens = tokens.detach()
    with torch.cuda.device_of(tokens):
        return recorded(lambda: product(tokens), tokens, *operands, *(() if bias is None else (bias,)))


def launched(
    kernel: Any,
    tokens: torch.Tensor,
    operands: tuple[torch.Tensor | None, ...],
    bias: torch.Tensor | None,
    rows: int,
    *more: object,
    block_rows: int,
    block_tokens: int,
    constants: Mapping[str, object],
    splits: int = 1,
    **options: int,
) -> torch.Tensor:
    """Outputs [n_tokens, rows] in the dtype of ``tokens``, by a kernel whose programs compute a tile of them each.

    Args:
        kernel: takes tokens, operands, bias, outputs, numbers of tokens, outputs and inputs, the stride of the tokens,
            ``more``, and its constants. With several splits, it stores fp32 sums [splits, n_tokens, rows] without the
            bias, and a second kernel adds them.
        tokens: [n_tokens, in_features] with contiguous rows, at least one.
        operands: what the kernel reads of the weight.
        bias: [rows] or None.
        rows: number of outputs, at least one.
        more: further arguments.
        block_rows: outputs of a program.
        block_tokens: tokens of a program.
        constants: compile-time constants of the kernel.
        splits: number of programs among which the inputs are split; more than one only if one launch takes all tokens.
        options: of the launch, such as ``num_warps``.
    """
    n_tokens, cols = tokens.shape
    outputs = new(n_tokens, rows, dtype=tokens.dtype, device=tokens.device)
    pieces = launch_packed.within_grid(tokens, outputs, block_tokens)
    if splits > 1:
        sums = new(splits, n_tokens, rows, dtype=torch.float32, device=tokens.device)
        pieces = ((tokens, sums),)
    for some_tokens, target in pieces:
        grid = (triton.cdiv(rows, block_rows), triton.cdiv(len(some_tokens), block_tokens), splits)
        sizes = len(some_tokens), rows, cols, tokens.stride(0)
        arguments = (some_tokens, *operands, bias if splits == 1 else None, target, *sizes, *more)
        bound_launch.launch(kernel, grid, arguments, constants, **options)
    if splits > 1:
        _add(sums, bias, outputs)
    return outputs


def few_bits_constants(packed: PackedNM | PackedDense) -> dict[str, object]:
    """The constants of kernels that read a quantized weight."""
    assert packed.bits is not None
    return {"GROUP": packed.group, "BITS": packed.bits, "LARGEST": few_bits.LARGEST[packed.bits]}


def _add(sums: torch.Tensor, bias: torch.Tensor | None, outputs: torch.Tensor) -> None:
    """Store the outputs [n_tokens, rows] of fp32 ``sums`` [splits, n_tokens, rows] over all splits of the inputs."""
    splits, n_tokens, rows = sums.shape
    block = launch.WARPS * launch.lanes(sums.device) * 4
    grid = (triton.cdiv(rows, block), n_tokens)
    arguments = (sums, bias, outputs, n_tokens, rows, splits)
    bound_launch.launch(_add_splits, grid, arguments, {"BLOCK": block}, num_warps=launch.WARPS)


@triton.jit(launch_metadata=launch_metadata)
def _add_splits(sums_ptr, bias_ptr, outputs_ptr, n_tokens, rows, splits, BLOCK: tl.constexpr):
    """Add the sums of all splits for one token, from the first split to the last, and the bias."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(splits):
        total += tl.load(sums_ptr + (split * n_tokens + token) * rows + i, mask=i < rows, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + i, mask=i < rows, other=0.0).to(tl.float32)
    tl.store(outputs_ptr + token * rows + i, total.to(outputs_ptr.dtype.element_ty), mask=i < rows)
