"""The operations that read tokens, on one core, beside a plain read of the same tokens."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.moments import moments
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.weighted_squares import weighted_squares

SHAPES = [(512, 16, 4096), (64, 128, 4096), (4, 2048, 4096), (2, 2048, 11008)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[(dtype, shape) for dtype in DTYPES for shape in SHAPES], ids=str, scope="module")
def tokens(request: pytest.FixtureRequest) -> torch.Tensor:
    dtype, shape = request.param
    return torch.randn(shape).to(dtype)


def report(benchmark, tokens: torch.Tensor) -> None:
    """The bytes read, and the rate that makes of the median time."""
    benchmark.extra_info |= {
        "bytes": tokens.nbytes,
        "GB/s": round(tokens.nbytes / benchmark.stats.stats.median / 1e9, 1),
    }


@pytest.mark.parametrize("read", [all_finite, torch.sum])
def test_plain_read(benchmark, tokens, read):
    benchmark(read, tokens)
    report(benchmark, tokens)


def test_moments(benchmark, tokens):
    benchmark(moments, tokens)
    report(benchmark, tokens)


def test_token_norms(benchmark, tokens):
    benchmark(token_norms, tokens.flatten(0, 1))
    report(benchmark, tokens)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_weighted_squares(benchmark, tokens, n_layers):
    flat = tokens.flatten(0, 1)
    benchmark(weighted_squares, flat, torch.rand(n_layers, flat.shape[0]) + 0.1)
    report(benchmark, tokens)
