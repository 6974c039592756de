"""select_rows: score and keep exactly k weights of every row, or of the whole layer.

    threshold = the k-th highest score; kept above it, and at it from the higher index down until k

Among equal scores the lower index is pruned first, as a stable ascending sort does. Bytes per weight
of e bytes: e read and e written where a row fits on chip.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import cpu
from .backend import choose_backend
from .score_terms import ScoreTerms, scores_reference
from .select_nm import Output, check_selection, deliver

Scope = Literal["row", "layer"]


def select_rows(
    weight: torch.Tensor,
    terms: ScoreTerms,
    k: int,
    *,
    scope: Scope = "row",
    output: Output = "weight",
) -> torch.Tensor:
    """Keep exactly the k weights with the highest score in every row, or in the whole layer.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        terms: the score's factors.
        k: how many are kept, of each row (0 to in_features) or of the layer (0 to its size).
        scope: "row", or "layer" for one threshold over the whole weight; index order is row-major.
        output: as in :func:`~ace_triton.kernels.select_nm.select_nm`.

    Raises:
        ValueError: a count, shape or dtype that cannot be served, with what would be.
    """
    check_selection(weight, terms, output)
    if scope not in ("row", "layer"):
        raise ValueError(f"scope must be 'row' or 'layer', got {scope!r}")
    most = weight.shape[1] if scope == "row" else weight.numel()
    if not 0 <= k <= most:
        raise ValueError(f"k must lie between 0 and {most} for a {scope} of shape {tuple(weight.shape)}, got {k}")
    backend = choose_backend(weight, *terms.tensors().values())
    if backend == "cpu":
        return cpu.select_rows(weight, terms, k, scope, output)
    return select_rows_reference(weight, terms, k, scope=scope, output=output)


def select_rows_reference(
    weight: torch.Tensor,
    terms: ScoreTerms,
    k: int,
    *,
    scope: Scope = "row",
    output: Output = "weight",
) -> torch.Tensor:
    """The same in plain torch, by a stable sort."""
    scores = scores_reference(weight, terms)
    rows = scores if scope == "row" else scores.reshape(1, -1)
    pruned_first = rows.argsort(dim=-1, stable=True)
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep.scatter_(-1, pruned_first[:, : rows.shape[1] - k], False)
    return deliver(weight, keep.reshape(weight.shape), output)
