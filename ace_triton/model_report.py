"""The report of a pruned model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from .block_fit import BlockFit
from .decoders.account import Account
from .decoders.blocks import Tower, linears_of
from .decoders.plan import Excluded, Skipped
from .recipe import Recipe, Sequential
from .reordering.reorder import PermutationReport
from .reordering.rotate import RotationReport
from .solvers.update import Update
from .sparsity import Axis
from .timing import Seconds


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


TowerRun = Literal["blocks", "forwards", "none", "unreached"]
"""How a tower was run.

"blocks": its blocks were run one at a time. "forwards": the whole model was run for each of them. "none": nothing had
to run, because the method needs no tokens or no layer of the tower was selected. "unreached": no block runs on the
calibration inputs, so its matrices count as outside the blocks.
"""


@dataclass(frozen=True)
class TowerReport:
    """A tower of the model.

    Attributes:
        name: dotted name of the module that contains the tower's blocks.
        blocks: number of its blocks.
        run: how it was run.
    """

    name: str
    blocks: int
    run: TowerRun

    @classmethod
    def of(cls, tower: Tower, run: TowerRun) -> TowerReport:
        """The report of a tower that was run in this way if any input reaches it."""
        return cls(tower.name, len(tower.blocks), run if tower.is_reached else "unreached")


@dataclass(frozen=True)
class ModelReport:
    """The result of :func:`prune_model`.

    Attributes:
        recipe: what was asked for.
        seconds: time by stage.
        peak_bytes: on CUDA, the peak memory that torch allocated on the model's devices since the process started. On
            the CPU, the peak resident memory of the process.
        layers: the pruned layers, in order.
        skipped: weights that were left dense, and why.
        excluded: matrices of the blocks that ``include`` and ``exclude`` ruled out.
        account: number of parameters pruned, skipped and excluded. Their sum is all matrices of the blocks.
        permutation: the result of ``permute=True``, or None.
        towers: the towers of the model, in the order in which they were pruned.
        fits: what training did to each block, if the update has ``block_epochs``.
        rotation: the result of ``rotate=True``, or None.
        cpu_seconds: CPU time of this process in ``seconds.total``, all threads together.
    """

    recipe: Recipe
    seconds: Seconds
    peak_bytes: int
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    excluded: tuple[Excluded, ...]
    account: Account
    permutation: PermutationReport | None = None
    towers: tuple[TowerReport, ...] = ()
    fits: tuple[BlockFit, ...] = ()
    rotation: RotationReport | None = None
    cpu_seconds: float = 0.0

    @property
    def method(self) -> str:
        """The metric's name."""
        return self.recipe.method

    @property
    def sparsity(self) -> str:
        """The pattern, as "2:4" or "0.5"."""
        return str(self.recipe.sparsity)

    @property
    def update(self) -> Update | None:
        """How the kept weights were changed."""
        return self.recipe.update

    @property
    def budgets(self) -> str | None:
        """The rule for each block's share; what each layer kept is in ``layers``."""
        return self.recipe.budgets

    @property
    def sequential(self) -> Sequential | None:
        """What was pruned before the model ran again; None if no tokens were needed."""
        return self.recipe.sequential if self.recipe.needs.tokens else None

    def with_load(self, seconds: float, cpu_seconds: float) -> ModelReport:
        """The report of a run that also loaded the model, in this wall-clock time and CPU time."""
        whole = replace(self.seconds, load=seconds, total=self.seconds.total + seconds)
        return replace(self, seconds=whole, cpu_seconds=self.cpu_seconds + cpu_seconds)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "method": self.method,
            "sparsity": self.sparsity,
            "seconds": self.seconds.to_dict(),
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": self.peak_bytes,
            "layers": [
                {"name": layer.name, "kept": layer.kept, "pattern": layer.pattern, "parameters": layer.parameters}
                for layer in self.layers
            ],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "excluded": [asdict(excluded) for excluded in self.excluded],
            "account": self.account.to_dict(),
            "permutation": None if self.permutation is None else asdict(self.permutation),
            **({} if self.rotation is None else {"rotation": asdict(self.rotation)}),
            "update": None if self.update is None else self.update.to_dict(),
            "budgets": self.budgets,
            "sequential": self.sequential,
            "recipe": self.recipe.to_dict(),
            "towers": [asdict(tower) for tower in self.towers],
            "fits": [asdict(fit) for fit in self.fits],
        }


def linears_outside(model: nn.Module, report: ModelReport) -> tuple[str, ...]:
    """Names of the linear layers that a report does not name: those outside the blocks, which stay dense."""
    named = {entry.name for entries in (report.layers, report.skipped, report.excluded) for entry in entries}
    return tuple(name for name, _ in linears_of(model) if name not in named)
