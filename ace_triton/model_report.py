"""What became of a pruned model."""

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
"""What is pruned between two looks at the model: all of it, a block, or the layers of a block that share an input.

A block's attention before the rest of it, in hardly more time than the whole block, was tried and left out: over five
seeds it gained nothing."""


@dataclass(frozen=True)
class LayerReport:
    """A pruned layer.

    Attributes:
        name: its dotted name in the model.
        kept: share of its weights kept.
        pattern: "2:4", or the pruned fraction.
        axis: what groups or rows run along.
        parameters: its weights, kept or not.
    """

    name: str
    kept: float
    pattern: str
    axis: Axis
    parameters: int


@dataclass(frozen=True)
class ModelReport:
    """What :func:`prune_model` did.

    Attributes:
        method: the metric's name.
        sparsity: the pattern.
        seconds: time by stage.
        peak_bytes: on CUDA, the most memory that torch had allocated since the process started, over the
            model's devices; on the CPU, the most that the process had resident.
        layers: the pruned layers, in order.
        skipped: what was left dense, and why.
        excluded: matrices of the blocks that ``include`` and ``exclude`` ruled out.
        account: how many parameters were pruned, skipped and excluded: together all matrices of the blocks.
        permutation: what ``permute=True`` did.
        update: how the kept weights were moved.
        budgets: by what the blocks' shares were set; what each layer kept is in ``layers``.
        sequential: what was pruned between two looks at the model; None where tokens were not needed.
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
        """As JSON types."""
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
