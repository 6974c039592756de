"""What a structured pruning run removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .estimate import Estimate
from .settings import ShrinkSettings


@dataclass(frozen=True)
class ShrinkReport:
    """What a structured pruning run removed, and what it cost.

    Attributes:
        settings: the settings of the run.
        blocks_before, blocks_after: number of parameters of the blocks.
        model_before, model_after: number of parameters of the model.
        widths: number of structures in each block before and after, by kind ("channels", "groups", "experts", or
            "expert_channels" of each expert); and of "blocks".
        config: the fields of the configuration that changed, with their new values.
        removed_blocks: indices of the removed blocks.
        kept: indices of the kept structures by name of the layer that reads them; of experts, by name of the mixture.
        refused: kinds of structures that this model cannot have fewer of, with reasons.
        tried: loss on the calibration text, in nats per token, by number of removed groups; empty if one number was
            possible.
        output_error: error of the layers that read removed structures before and after the update, as a mean share of
            their outputs' energy; None without an update.
        notes: other facts that a user should know.
        seconds: by stage.
        bytes_before, bytes_after: size of the checkpoint, the names in its files included.
        estimate: what the run would take; None if it was no dry run.
    """

    settings: ShrinkSettings
    blocks_before: int
    blocks_after: int
    model_before: int
    model_after: int
    widths: Mapping[str, tuple[int, int]]
    config: Mapping[str, Any]
    removed_blocks: tuple[int, ...] = ()
    kept: Mapping[str, list[int]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    tried: Mapping[int, float] = field(default_factory=dict)
    output_error: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    estimate: Estimate | None = None

    @property
    def removed(self) -> float:
        """Share of the blocks' parameters that was removed."""
        return 1 - self.blocks_after / self.blocks_before

    def step(self, perplexity: Sequence[float] | None = None) -> dict[str, Any]:
        """What the run did, cost and brought, for the history of a result.

        Args:
            perplexity: before and after; None if it was not measured.
        """
        settings = self.settings
        return {
            "did": ", ".join([settings.method, *([settings.chosen_update] * (settings.chosen_update != "none"))]),
            "seconds": sum(self.seconds.values()),
            "parameters": [self.model_before, self.model_after],
            "bytes": [self.bytes_before, self.bytes_after],
            "perplexity": None if perplexity is None else list(perplexity),
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without the indices of the kept structures."""
        content = {**asdict(self), "settings": self.settings.to_dict(), "removed": self.removed}
        content["widths"] = {kind: list(counts) for kind, counts in self.widths.items()}
        content["tried"] = {str(groups): loss for groups, loss in self.tried.items()}
        content["estimate"] = None if self.estimate is None else self.estimate.to_dict()
        del content["kept"]
        return content
