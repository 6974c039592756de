"""weighted_squares: the column vectors of exact second-order CosP, for several layers that share an input.

    v_kj = sum_t d_kt x_tj^2      (d_kt = 1 / s_t of layer k, 0 for an excluded token)

The tokens are read once for up to 8 layers. For example, q, k and v share one input but have their own output norms.
"""

from __future__ import annotations

import torch

from . import cpu, launch_sums
from .errors import ArgumentError
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton

MOST_LAYERS = 8


def weighted_squares(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of squares [n_layers, in_features] in fp32.

    Args:
        tokens: [n_tokens, in_features], fp32, fp16 or bf16.
        weights: fp32 [n_layers, n_tokens], 1 to 8 layers. Tokens with weight 0 are ignored, even if they contain NaN.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_weights(tokens, weights)
    return WEIGHTED_SQUARES.on(tokens, weights)(tokens, weights)


def weighted_squares_reference(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sums, computed with plain torch in fp64."""
    squares = tokens.detach().double().square()
    weighted = [torch.where(w[:, None] != 0, w[:, None] * squares, 0.0).sum(0) for w in weights.double()]
    return torch.stack(weighted).float()


def check_weights(tokens: torch.Tensor, weights: torch.Tensor) -> None:
    """Raise ArgumentError if the shape or dtype of ``weights`` does not fit ``tokens``."""
    if tokens.dim() != 2:
        raise ArgumentError(f"tokens must be [n_tokens, in_features], got shape {tuple(tokens.shape)}")
    if weights.dim() != 2 or weights.shape[1] != tokens.shape[0] or not 1 <= weights.shape[0] <= MOST_LAYERS:
        raise ArgumentError(
            f"weights must be [1..{MOST_LAYERS}, {tokens.shape[0]}] for tokens of shape {tuple(tokens.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if weights.dtype != torch.float32:
        raise ArgumentError(f"weights must be float32, got {weights.dtype}")


def _weighted_squares_triton(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tokens, weights = tokens.detach(), weights.contiguous()
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    n_tokens, cols = tokens.shape
    layers = weights.shape[0]
    tile = launch_sums.down_rows(n_tokens, tokens)
    across, down = triton.cdiv(cols, tile.block_cols), triton.cdiv(n_tokens, tile.block_rows * tile.trips)
    parts = torch.empty(down, layers, cols, dtype=torch.float32, device=tokens.device)
    if tokens.numel():
        _sum_weighted_squares[(across * down,)](
            *(tokens, weights, parts, n_tokens, cols, tokens.stride(0), tile.trips),
            LAYERS=layers,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            num_warps=1,
        )
    return parts.sum(0)


def _work(tokens: torch.Tensor, weights: torch.Tensor) -> Work:
    n_layers, cols = len(weights), tokens.shape[1]
    return Work(bytes_of(tokens, weights) + 4 * n_layers * cols, (1 + 2 * n_layers) * tokens.numel())


WEIGHTED_SQUARES = Op(
    "weighted_squares", _work, weighted_squares_reference, cpu.weighted_squares, _weighted_squares_triton
)


# Batches of other lengths, such as those of experts, must not cause recompilation.
@triton.jit(do_not_specialize=["trips"], launch_metadata=launch_metadata)
def _sum_weighted_squares(
    tokens_ptr,
    weights_ptr,
    parts_ptr,
    n_tokens,
    cols,
    stride,
    trips,
    LAYERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Partial sums over ``trips`` * BLOCK_ROWS tokens and BLOCK_COLS columns per program, for every layer."""
    across = tl.cdiv(cols, BLOCK_COLS)
    part = tl.program_id(0) // across
    j = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    t = part * (trips * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    sums = ()
    for _ in tl.static_range(LAYERS):
        sums = sums + (tl.zeros([1, BLOCK_COLS], tl.float32),)
    for _ in tl.range(trips):
        x = tl.load(tokens_ptr + t.to(tl.int64) * stride + j, mask=(t < n_tokens) & (j < cols), other=0.0).to(
            tl.float32
        )
        added = ()
        for k in tl.static_range(LAYERS):
            d = tl.load(weights_ptr + k * n_tokens + t, mask=t < n_tokens, other=0.0)
            added = added + (sums[k] + tl.sum(tl.where(d != 0, x * x, 0.0) * d, 0, keep_dims=True),)
        sums = added
        t += BLOCK_ROWS
    for k in tl.static_range(LAYERS):
        tl.store(parts_ptr + (part.to(tl.int64) * LAYERS + k) * cols + j, sums[k], mask=j < cols)
