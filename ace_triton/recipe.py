"""What is asked of a pruning, of a layer or of a model, in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .errors import RecipeError
from .methods.registry import Metric, Needs, metric
from .solvers.update import Update
from .sparsity import Sparsity


@dataclass(frozen=True)
class Request:
    """How to prune a layer.

    Attributes:
        metric: that scores the weights.
        options: of the metric, all of them.
        pattern: to keep.
        update: of the kept weights; None leaves them as they are.
    """

    metric: Metric
    options: Mapping[str, Any]
    pattern: Sparsity
    update: Update | None = None

    @classmethod
    def of(
        cls,
        method: str,
        sparsity: str | float | Sparsity,
        update: str | Mapping[str, Any] | Update | None,
        options: Mapping[str, Any],
    ) -> Request:
        """From a user's arguments; ValueError for an unknown method, option, pattern or update, or a wrong value."""
        chosen = metric(method)
        return cls(chosen, chosen.complete(options), Sparsity.of(sparsity), Update.of(update))

    @cached_property
    def needs(self) -> Needs:
        """Of the metric and the update together."""
        return needs_with(self.metric.needs(self.options), self.update)

    def check_permute(self, permute: bool, sequential: str) -> None:
        """ValueError if channels cannot be reordered for this pattern and metric."""
        if permute and self.pattern.n is None:
            raise RecipeError(
                f"permute orders channels into the groups of n:m; a sparsity of {self.pattern} has none: leave permute "
                "out, or give a pattern such as 2:4"
            )
        if permute and sequential == "layers" and self.needs.consumer:
            raise RecipeError(
                f'permute reorders the rows of gate and up, which {self.metric.name} with sequential="layers" has '
                "pruned in groups by then: leave one of them out"
            )

    @property
    def looks_at_terms(self) -> bool:
        """Whether each layer has terms of its own to look for NaN in: its weight shows in them, or is looked at in the
        same launch."""
        of_layer = self.needs.weight_sums or self.needs.reduce is not None or self.needs.consumer
        return of_layer and self.metric.solve is None


def needs_with(needs: Needs, update: Update | None) -> Needs:
    """What a metric needs, and an update beside it."""
    if update is None:
        return needs
    exact = needs.gram or update.kind == "lstsq"
    return replace(needs, tokens=True, gram=exact, sample=not exact)
