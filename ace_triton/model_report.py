"""The report of a pruned model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .decoders.account import Account
from .decoders.plan import Excluded, Skipped
from .reordering.reorder import PermutationReport
from .solvers.update import Update
from .sparsity import Axis
from .timing import Seconds

Sequential = Literal["none", "blocks", "layers"]
"""What is pruned before statistics are collected again: "none": the whole model; "blocks": one block; "layers": the
layers of a block that share an input."""


@dataclass(frozen=True)
class LayerReport:
    """A pruned layer.

    Attributes:
        name: the layer's dotted name in the model.
        kept: share of the layer's weights that were kept.
        pattern: "2:4", or the pruned fraction.
        axis: the direction of groups or rows.
        parameters: number of the layer's weights, kept and pruned.
    """

    name: str
    kept: float
    pattern: str
    axis: Axis
    parameters: int


@dataclass(frozen=True)
class ModelReport:
    """The result of :func:`prune_model`.

    Attributes:
        method: the metric's name.
        sparsity: the pattern.
        seconds: time by stage.
        peak_bytes: on CUDA, the peak memory that torch allocated on the model's devices since the process started. On
            the CPU, the peak resident memory of the process.
        layers: the pruned layers, in order.
        skipped: weights that were left dense, and why.
        excluded: matrices of the blocks that ``include`` and ``exclude`` ruled out.
        account: number of parameters pruned, skipped and excluded. Their sum is all matrices of the blocks.
        permutation: the result of ``permute=True``, or None.
        update: the update of the kept weights, or None.
        budgets: the rule that set the share of each block, or None; ``layers`` has the share that each layer kept.
        sequential: what was pruned before statistics were collected again; None if the method needs no tokens.
    """

    method: str
    sparsity: str
    seconds: Seconds
    peak_bytes: int
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    excluded: tuple[Excluded, ...]
    account: Account
    permutation: PermutationReport | None = None
    update: Update | None = None
    budgets: str | None = None
    sequential: Sequential | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "method": self.method,
            "sparsity": self.sparsity,
            "seconds": asdict(self.seconds),
            "peak_bytes": self.peak_bytes,
            "layers": [
                {"name": layer.name, "kept": layer.kept, "pattern": layer.pattern, "parameters": layer.parameters}
                for layer in self.layers
            ],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "excluded": [asdict(excluded) for excluded in self.excluded],
            "account": self.account.to_dict(),
            "permutation": None if self.permutation is None else asdict(self.permutation),
            "update": None if self.update is None else self.update.to_dict(),
            "budgets": self.budgets,
            "sequential": self.sequential,
        }
