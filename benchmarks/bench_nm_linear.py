"""nm_linear on one core: packed, the same loop over the dense weight, and torch, by rows of tokens."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels import cpu
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import PackedNM, pack_nm, pack_scored, unpack_nm
from ace_triton.kernels.score_terms import ScoreTerms

SHAPE = (4096, 11008)
ROWS = (1, 2, 4, 8, 16)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str, scope="module")
def packed(request: pytest.FixtureRequest) -> PackedNM:
    return pack_scored(torch.randn(SHAPE).to(request.param), ScoreTerms(), 2, 4)


@pytest.fixture(scope="module")
def weight(packed: PackedNM) -> torch.Tensor:
    return unpack_nm(packed)


def tokens_of(rows: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(rows, SHAPE[1]).to(like.dtype)


def report(benchmark, weight_bytes: int) -> None:
    """Bytes of the weight, and the rate at which they were read."""
    rate = round(weight_bytes / benchmark.stats.stats.median / 1e9, 1)
    benchmark.extra_info |= {"bytes": weight_bytes, "GB/s": rate}


@pytest.mark.parametrize("rows", ROWS)
def test_packed(benchmark, packed, rows):
    benchmark(nm_linear, tokens_of(rows, packed.values), packed)
    report(benchmark, packed.packed_bytes)


@pytest.mark.parametrize("rows", ROWS)
def test_dense_loop(benchmark, weight, rows):
    benchmark(cpu.dense_linear, tokens_of(rows, weight), weight)
    report(benchmark, weight.nbytes)


@pytest.mark.parametrize("rows", ROWS)
def test_torch(benchmark, weight, rows):
    benchmark(torch.nn.functional.linear, tokens_of(rows, weight), weight)
    report(benchmark, weight.nbytes)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8), (16, 32)])
def test_other_patterns(benchmark, weight, n, m):
    packed = pack_scored(weight, ScoreTerms(), n, m)
    benchmark(nm_linear, tokens_of(1, weight), packed)
    report(benchmark, packed.packed_bytes)


def test_pack(benchmark, weight):
    benchmark(pack_nm, weight, 2, 4)
    report(benchmark, weight.nbytes)
