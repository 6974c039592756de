"""Which blocks change their hidden states least: ShortGPT's block influence (arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Block, Tower
from ..decoders.calls import Call, NotReplayable, hidden_of
from ..errors import ArgumentError
from .forwards import BlockWatcher, watch_blocks
from .weights import Weights


def block_influences(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch],
    weights: Weights,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, list[int | None]]:
    """1 - cosine of the input and output of each block, mean over tokens.

    Returns:
        fp32 [n_blocks], on the CPU; and for each block the size of the tuple that it returns, None for a tensor.

    Raises:
        ArgumentError: if a block does not map hidden states to hidden states of the same shape.
    """
    watchers = {index: _Influence(block) for index, block in enumerate(tower.blocks)}
    watch_blocks(model, tower, batches, watchers, weights, progress)
    found = torch.tensor([w.sum / max(w.count, 1) for w in watchers.values()], dtype=torch.float64, device="cpu")
    return found.float(), [watcher.size for watcher in watchers.values()]


class _Influence(BlockWatcher):
    """Sums 1 - cosine of a block's input and output over tokens."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.sum, self.count = 0.0, 0
        self.size: int | None = None

    def watched(self, shape: tuple[int, int], valid: torch.Tensor | None, hooks: ExitStack) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            try:
                before, after = Call.of(args, kwargs).hidden, hidden_of(output)
            except NotReplayable as error:
                raise ArgumentError(f"{self._block.name} cannot be removed: {error}") from error
            if before.shape != after.shape:
                raise ArgumentError(f"{self._block.name} cannot be removed: it changes the shape of its hidden states")
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            chosen = cosine.flatten() if valid is None else cosine[valid]
            self.sum += float((1 - chosen).sum(dtype=torch.float64))
            self.count += chosen.numel()
            self.size = len(output) if isinstance(output, tuple) else None

        hooks.callback(self._block.module.register_forward_hook(hook, with_kwargs=True).remove)


def kept_blocks(influence: torch.Tensor, tower: Tower, needed: int) -> tuple[int, ...]:
    """The blocks that are kept: the least influential ones go until they have ``needed`` parameters.

    Raises:
        ArgumentError: if no block is left.
    """
    sizes = [sum(p.numel() for p in block.module.parameters()) for block in tower.blocks]
    removed, gone = 0, set()
    for index in influence.sort(stable=True).indices.tolist():
        if removed >= needed:
            break
        gone.add(index)
        removed += sizes[index]
    if len(gone) == len(sizes):
        raise ArgumentError(
            f"removing {needed:,} parameters leaves none of the {len(sizes)} blocks: give a smaller --ratio, or a "
            "larger --size"
        )
    return tuple(index for index in range(len(sizes)) if index not in gone)
