"""select_rows on one core: half of every row and of the layer, against torch's top-k and stable sort."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_rows import select_rows
from benchmarks.published import prune_rows_by_sort, prune_rows_by_topk, wanda_scores

SHAPE = (4096, 11008)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str, scope="module")
def dense(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(SHAPE).to(request.param)


@pytest.fixture(scope="module")
def mean_square() -> torch.Tensor:
    return torch.rand(SHAPE[1]) + 0.1


def time_in_place(benchmark, dense: torch.Tensor, prune, rounds: int) -> None:
    """Time ``prune(weight)`` on a fresh copy each round: what is pruned already is quicker to search."""
    benchmark.pedantic(prune, setup=lambda: ((dense.clone(),), {}), rounds=rounds)
    moved = 2 * dense.nbytes
    benchmark.extra_info |= {"bytes": moved, "GB/s": round(moved / benchmark.stats.stats.median / 1e9, 1)}


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_half(benchmark, dense, mean_square, scope):
    k = SHAPE[1] // 2 * (1 if scope == "row" else SHAPE[0])
    terms = ScoreTerms(scale=mean_square.sqrt())
    time_in_place(benchmark, dense, lambda weight: select_rows(weight, terms, k, scope=scope), rounds=10)


@pytest.mark.parametrize("select", [prune_rows_by_topk, prune_rows_by_sort])
def test_published(benchmark, dense, mean_square, select):
    def prune(weight: torch.Tensor) -> None:
        select(weight, wanda_scores(weight, mean_square), SHAPE[1] // 2)

    time_in_place(benchmark, dense, prune, rounds=3)
