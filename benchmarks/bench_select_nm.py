"""select_nm on one core: 2:4 in place by each family of terms, other patterns and outputs, the published loop."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from benchmarks.published import prune_groups, wanda_scores

SHAPE = (4096, 11008)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str, scope="module")
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(SHAPE).to(request.param)


def positive(size: int) -> torch.Tensor:
    return torch.rand(size) + 0.1


def terms_of(metric: str) -> ScoreTerms:
    rows, cols = SHAPE
    if metric == "ria":
        return ScoreTerms(row=positive(rows), col=positive(cols), scale=positive(cols))
    return ScoreTerms(scale=positive(cols), power=2 if metric == "ace" else 1)


def report(benchmark, weight: torch.Tensor, written: float) -> None:
    """Bytes moved at least, and the rate that makes of the median time; ``written`` in bytes an element."""
    moved = int(weight.nbytes + weight.numel() * written)
    benchmark.extra_info |= {"bytes": moved, "GB/s": round(moved / benchmark.stats.stats.median / 1e9, 1)}


def test_pass_over_the_weight(benchmark, weight):
    benchmark(weight.mul_, 1)
    report(benchmark, weight, weight.element_size())


@pytest.mark.parametrize("metric", ["wanda", "ria", "ace"])
def test_two_of_four(benchmark, weight, metric):
    benchmark(select_nm, weight, terms_of(metric), 2, 4)
    report(benchmark, weight, weight.element_size())


@pytest.mark.parametrize(("n", "m"), [(1, 2), (4, 8), (8, 16), (16, 32)])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_other_patterns(benchmark, weight, n, m, axis):
    benchmark(select_nm, weight, terms_of("wanda"), n, m, axis=axis)
    report(benchmark, weight, weight.element_size())


@pytest.mark.parametrize(("output", "written"), [("mask", 1), ("bits", 1 / 8)])
def test_masks(benchmark, weight, output, written):
    benchmark(select_nm, weight, terms_of("wanda"), 2, 4, output=output)
    report(benchmark, weight, written)


def test_published_loop(benchmark, weight):
    mean_square = positive(SHAPE[1])
    loop = benchmark.pedantic
    loop(lambda: prune_groups(weight, wanda_scores(weight, mean_square), 2, 4), rounds=3, warmup_rounds=0)
    report(benchmark, weight, weight.element_size())
