"""Recipes by name: a method and what is added to it."""

from __future__ import annotations

from dataclasses import dataclass

from .model_report import Sequential
from .solvers.update import Update


@dataclass(frozen=True)
class Preset:
    """Arguments of :func:`~ace_triton.prune_blocks.prune_model` that go together.

    Attributes:
        method: a metric's name.
        permute: whether channels are reordered first; for n:m only.
        update: how kept weights are moved.
        sequential: what is pruned between two looks at the model.
    """

    method: str
    permute: bool = False
    update: Update | None = None
    sequential: Sequential = "blocks"

    @property
    def words(self) -> str:
        """As in "wanda, permuted, lstsq"."""
        said = [self.method] + ["permuted"] * self.permute
        return ", ".join(said if self.update is None else [*said, self.update.kind])


FAST = Preset("ace")
"""The best metric alone."""

BALANCED = Preset("wanda", permute=True, update=Update("lstsq"))
"""What gains the most for the time that it takes (docs/curve)."""

BEST = Preset("wanda", permute=True, update=Update("lstsq", mask_rounds=8), sequential="layers")
"""The same with more mask rounds, and another look at the model after each group of layers."""

PRESETS = {"fast": FAST, "balanced": BALANCED, "best": BEST}

DEFAULT_PRESET = "balanced"
