"""token_norms: s_t = sum_i a_ti^2 for every token, in one read, summed in fp32."""

from __future__ import annotations

import torch

from . import cpu, launch_sums
from .errors import ArgumentError
from .op import Op, Work, launch_metadata
from .triton_import import tl, triton


def token_norms(outputs: torch.Tensor) -> torch.Tensor:
    """Squared L2 norms [n_tokens] in fp32 of outputs [n_tokens, out_features] (fp32, fp16 or bf16).

    The result is fp32 because s_t exceeds fp16's range for tokens with massive activations.

    Raises:
        ArgumentError: if ``outputs`` is not a matrix.
    """
    if outputs.dim() != 2:
        raise ArgumentError(f"outputs must be [n_tokens, out_features], got shape {tuple(outputs.shape)}")
    return TOKEN_NORMS.on(outputs)(outputs)


def token_norms_reference(outputs: torch.Tensor) -> torch.Tensor:
    """The squared norms, computed with plain torch in fp64."""
    return outputs.detach().double().square().sum(-1).float()


def _token_norms_triton(outputs: torch.Tensor) -> torch.Tensor:
    outputs = outputs.detach()
    if outputs.stride(1) != 1:
        outputs = outputs.contiguous()
    n_tokens, cols = outputs.shape
    norms = torch.empty(n_tokens, dtype=torch.float32, device=outputs.device)
    if n_tokens:
        tile = launch_sums.along_rows(outputs)
        _sum_squares[(triton.cdiv(n_tokens, tile.block_rows),)](
            *(outputs, norms, n_tokens, cols, outputs.stride(0)),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            num_warps=1,
        )
    return norms


def _work(outputs: torch.Tensor) -> Work:
    return Work(outputs.nbytes + 4 * len(outputs), 2 * outputs.numel())


TOKEN_NORMS = Op("token_norms", _work, token_norms_reference, cpu.token_norms, _token_norms_triton)


@triton.jit(launch_metadata=launch_metadata)
def _sum_squares(outputs_ptr, norms_ptr, n_tokens, cols, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Each lane sums its own columns; one reduction at the end combines the lanes."""
    t = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    line = outputs_ptr + t.to(tl.int64) * stride
    squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in tl.range(0, cols, BLOCK_COLS):
        i = first + tl.arange(0, BLOCK_COLS)[None, :]
        a = tl.load(line + i, mask=(t < n_tokens) & (i < cols), other=0.0).to(tl.float32)
        squares += a * a
    tl.store(norms_ptr + t, tl.sum(squares, 1, keep_dims=True), mask=t < n_tokens)
