"""What a run of structured pruning would take: the memory from the sizes of its tensors, the time from a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Block, linears_of
from ..linears import linear_weight
from .compensation import CACHED_BYTES
from .coupled import Structures
from .gradients import SUMS
from .settings import ShrinkSettings

FP32 = 4


@dataclass(frozen=True)
class Estimate:
    """Estimates of a dry run.

    Attributes:
        phases: bytes of tensors in memory at the same time, by phase; the process itself is not counted.
        seconds: time of the run, without loading and saving.
        weight_bytes: bytes of the dense model, which are part of every phase.
    """

    phases: Mapping[str, int]
    seconds: float
    weight_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes of all phases."""
        return max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def memory_phases(
    model: nn.Module,
    structures: Structures,
    batches: Sequence[Batch],
    tensors: Mapping[str, torch.Tensor],
    settings: ShrinkSettings,
    blocks: Sequence[Block],
    *,
    in_files: bool = False,
    hidden_in_memory: bool = True,
) -> dict[str, int]:
    """Bytes of tensors that a run has in memory at the same time, by phase.

    Args:
        model: the dense model.
        structures: its structures.
        batches: the calibration set.
        tensors: those of the smaller model, from :func:`~ace_triton.structures.smaller.kept_tensors`.
        settings: the settings of the run.
        blocks: its blocks.
        in_files: True if the weights are in files; then one block is in memory, and what is left of it.
        hidden_in_memory: False if the hidden states of the calibration set are in files too.
    """
    weights = sum(p.nbytes for p in set(model.parameters()))
    smaller = {id(tensor): tensor.nbytes for tensor in tensors.values()}
    kept = sum(smaller.values())
    if in_files:
        sizes = [sum(p.nbytes for p in block.module.parameters()) for block in blocks]
        weights, kept = weights - sum(sizes) + max(sizes), max(sizes)
    itemsize = next(model.parameters()).element_size()
    config: Any = getattr(model, "config", None)
    text = config.get_text_config()
    hidden, vocabulary = getattr(text, "hidden_size", 0), getattr(text, "vocab_size", 0)
    tokens = [batch.shape[0] * batch.shape[1] for batch in batches]
    # The logits of a batch, in the model's dtype and twice in fp32 for the loss.
    logits = max(tokens, default=0) * vocabulary * (itemsize + 2 * FP32)
    phases = {"rank the structures": weights + logits}
    if settings.needs_gradients:
        parts = [part.tensor for entry in structures.entries.values() for part in entry.parts(structures.layers)]
        of_blocks = [_gradient_bytes(block, structures, settings, max(tokens, default=0)) for block in blocks]
        both = max(tokens, default=0) * vocabulary * (2 * itemsize + 3 * FP32)  # The logits and their gradients.
        gradient = max((3 * FP32 * part.numel() for part in parts), default=0)
        if in_files:
            between = (len(blocks) + 1) * sum(tokens) * hidden * itemsize if hidden_in_memory else 0
            phases["gradients"] = weights + between + max(both, max(of_blocks) + gradient)
        else:
            phases["gradients"] = weights + both + sum(of_blocks) + gradient
    phases["build and check"] = weights + kept
    if settings.chosen_update != "none" and structures.columns:
        layers = [structures.layers[name].get_parameter("weight") for name in structures.columns]
        repaired = 2 * FP32 * max(layer.numel() for layer in layers)  # One layer, and its installed weight.
        wide = max(layer.numel() // hidden for layer in layers) if hidden else 0
        solved = 4 * FP32 * wide**2 if settings.chosen_update == "lstsq" else 0
        states = 3 * sum(tokens) * hidden * itemsize  # Before and after a block, and outputs of its attention.
        inside = 2 * sum(tokens) * wide * itemsize
        cached = inside if settings.chosen_update == "lstsq" and inside <= CACHED_BYTES else 0
        phases["update"] = weights + kept + repaired + states + cached + solved
    phases["save"] = weights + kept
    return phases


ACTIVATIONS = 1.25
"""Bytes that a block keeps for its backward, for each byte of the inputs and outputs of its linear layers."""


def _gradient_bytes(block: Block, structures: Structures, settings: ShrinkSettings, tokens: int) -> int:
    """Bytes of a block's activations, and of its sums over batches, while gradients are taken.

    Args:
        block: the block.
        structures: those of the model.
        settings: the settings of the run.
        tokens: number of tokens in a batch.
    """
    weights = [weight for _, layer in linears_of(block.module) if (weight := linear_weight(layer)) is not None]
    kept = int(ACTIVATIONS * tokens * sum(sum(weight.shape) * weight.element_size() for weight in weights))
    parts = [part.tensor for entry in structures.within(block) for part in entry.parts(structures.layers)]
    sums = len(SUMS[settings.terms]) if settings.method == "llm-pruner" else 0
    return kept + sums * FP32 * sum(part.numel() for part in parts)
