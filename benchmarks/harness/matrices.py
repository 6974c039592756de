"""The weight that the kernels' benchmarks share, and score terms for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ace_triton.kernels.score_terms import ScoreTerms

from .agreement import Disagreement

SHAPE, TINY_SHAPE = (4096, 11008), (64, 96)
SAMPLED_ROWS = 128

Select = Callable[[torch.Tensor, ScoreTerms], torch.Tensor]


@dataclass(frozen=True)
class Matrix:
    """A weight that is pruned in place and restored.

    Attributes:
        weight: [out_features, in_features].
        dense: a copy of the dense weight.
        row, col, scale: positive vectors, fp32.
    """

    weight: torch.Tensor
    dense: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Matrix:
        """A random matrix, the same for the same arguments."""
        generator = torch.Generator(device).manual_seed(0)
        dense = torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype)
        sizes = (shape[0], shape[1], shape[1])
        vectors = (torch.rand(size, generator=generator, device=device) + 0.1 for size in sizes)
        return cls(dense.clone(), dense, *vectors)

    def restore(self) -> None:
        """Restore the dense weight."""
        self.weight.copy_(self.dense)

    def terms(self, metric: str) -> ScoreTerms:
        """Terms of the form that the metric "magnitude", "wanda", "ria" or "ace" has."""
        if metric == "magnitude":
            return ScoreTerms()
        if metric == "wanda":
            return ScoreTerms(scale=self.scale)
        return ScoreTerms(self.row, self.col, self.scale, power=2 if metric == "ace" else 1)


def check_sample(matrix: Matrix, metric: str, group: int, select: Select, reference: Select) -> None:
    """Check that ``select`` on the whole matrix equals ``reference`` on some of its rows, bit for bit.

    Args:
        matrix: the weight that is timed.
        metric: the metric whose terms are used.
        group: number of rows that belong together if groups run along the outputs.
        select, reference: take a weight and terms, and return a tensor with the weight's rows.

    Raises:
        Disagreement: if they differ.
    """
    matrix.restore()
    terms = matrix.terms(metric)
    result = select(matrix.weight, terms)
    rows = matrix.dense.shape[0]
    n_groups = rows // group
    chosen = torch.linspace(0, n_groups - 1, min(n_groups, max(SAMPLED_ROWS // group, 1)), device=matrix.weight.device)
    index = (chosen.long()[:, None] * group + torch.arange(group, device=chosen.device)).flatten()
    part = ScoreTerms(
        None if terms.row is None else terms.row[index], terms.col, terms.scale, terms.coupling, terms.power
    )
    expected = reference(matrix.dense[index].clone(), part)
    if not torch.equal(result[index], expected):
        wrong = int((result[index] != expected).any(1).sum())
        raise Disagreement(f"{wrong} of {len(index)} sampled rows differ from the plain-torch reference")
