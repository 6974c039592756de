"""select_rows compared with torch's top-k, the published stable sort and, for a layer, the published threshold."""

from __future__ import annotations

import torch

from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_rows import select_rows, select_rows_reference
from benchmarks.claims import published
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import Disagreement
from benchmarks.harness.comparison import Comparison, Provider
from benchmarks.harness.matrices import Matrix, check_sample

TESTS = ("tests/kernels/test_select_rows.py", "tests/benchmarks/test_published_baselines.py")


def scores(matrix: Matrix) -> torch.Tensor:
    return published.wanda_scores(matrix.weight, matrix.scale.square())


def test_half_of_every_row(compare: Compare, matrix: Matrix) -> None:
    weight, terms, half = matrix.weight, matrix.terms("wanda"), matrix.weight.shape[1] // 2

    def select(part: torch.Tensor, its_terms: ScoreTerms) -> torch.Tensor:
        return select_rows(part, its_terms, half)

    def reference(part: torch.Tensor, its_terms: ScoreTerms) -> torch.Tensor:
        return select_rows_reference(part, its_terms, half)

    compare(
        Comparison(
            "select_rows 50 %, wanda",
            weight.shape,
            weight.dtype,
            lambda: select(weight, terms),
            (
                Provider("top-k and scatter", lambda: published.prune_rows_by_topk(weight, scores(matrix), half)),
                Provider("published sort", lambda: published.prune_rows_by_sort(weight, scores(matrix), half)),
            ),
            2 * weight.nbytes,
            lambda: check_sample(matrix, "wanda", 1, select, reference),
            matrix.restore,
        )
    )


def test_half_of_the_layer(compare: Compare, matrix: Matrix) -> None:
    weight, terms, half = matrix.weight, matrix.terms("wanda"), matrix.weight.numel() // 2

    def ours() -> torch.Tensor:
        return select_rows(weight, terms, half, scope="layer")

    def theirs() -> None:
        published.prune_layer(weight, scores(matrix), half)

    def check() -> None:
        masks = []
        for call in (ours, theirs):
            matrix.restore()
            call()
            masks.append(weight != 0)
        matrix.restore()
        kept_more = masks[0] & ~masks[1]
        if int(masks[0].sum()) != weight.numel() - half or bool((masks[1] & ~masks[0]).any()):
            raise Disagreement(
                "ours keeps a different number of weights, or prunes some that the published threshold keeps"
            )
        if scores(matrix)[kept_more].unique().numel() > 1:
            raise Disagreement("ours keeps weights below the published threshold that do not tie with it")

    compare(
        Comparison(
            "select_rows 50 % of the layer, wanda",
            weight.shape,
            weight.dtype,
            ours,
            (Provider("published threshold", theirs),),
            2 * weight.nbytes,
            check,
            matrix.restore,
        )
    )
