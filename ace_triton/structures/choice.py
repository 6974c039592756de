"""What a run of structured pruning keeps, chosen before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .compensation import Moments
from .coupled import Structures
from .smaller import Changes, Kept

NOTHING = Structures({}, {}, {})
"""The structures of a run that removes whole blocks."""


@dataclass(frozen=True)
class Choice:
    """What is kept, and the configuration of the smaller model.

    Attributes:
        structures: the structures of the dense model.
        kept: indices of the kept structures by name of the consumer, int64, ascending.
        changes: new values of fields of the configuration.
        widths: number of structures before and after, by kind; and of "blocks".
        removed: number of parameters that are removed, less those of new biases.
        blocks: indices of the kept blocks; None for all.
        sizes: for each block, the size of the tuple that it returns, or None for a tensor; empty if all are kept.
        with_bias: names of the layers that read removed structures and have, or get, a bias.
        moments: moments of the inputs of these layers, for update "bias".
        tried: loss on the calibration text, by number of removed groups.
        notes: facts that a user should know.
    """

    structures: Structures
    kept: Mapping[str, torch.Tensor]
    changes: Changes
    widths: Mapping[str, tuple[int, int]]
    removed: int
    blocks: tuple[int, ...] | None = None
    sizes: tuple[int | None, ...] = ()
    with_bias: frozenset[str] = frozenset()
    moments: Mapping[str, Moments] = field(default_factory=dict)
    tried: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def all_kept(self) -> Kept:
        """What is kept, for :func:`~ace_triton.structures.smaller.kept_tensors`."""
        return Kept(self.kept, self.blocks)

    @property
    def kept_experts(self) -> dict[str, torch.Tensor]:
        """What is kept of experts, by name of the consumer."""
        return {name: chosen for name, chosen in self.kept.items() if name not in self.structures.columns}

    @property
    def kept_columns(self) -> dict[str, torch.Tensor]:
        """The kept channels and groups, by name of the layer that reads them."""
        return {name: chosen for name, chosen in self.kept.items() if name in self.structures.columns}

    @property
    def removed_blocks(self) -> tuple[int, ...]:
        """Indices of the removed blocks."""
        return tuple(i for i in range(len(self.sizes)) if self.blocks is not None and i not in self.blocks)
