"""Which blocks change their hidden states least: ShortGPT's block influence (arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch, run_model
from ..decoders.blocks import Block, Tower
from ..decoders.calibration_mode import calibration_mode
from ..decoders.calls import Call, NotReplayable, hidden_of
from ..errors import ArgumentError


def block_influences(
    model: nn.Module, tower: Tower, batches: Sequence[Batch], progress: Callable[[int, int], None] | None = None
) -> tuple[torch.Tensor, list[int | None]]:
    """1 - cosine of the input and output of each block, mean over tokens.

    Returns:
        fp32 [n_blocks], on the CPU; and for each block the size of the tuple that it returns, None for a tensor.

    Raises:
        ArgumentError: if a block does not map hidden states to hidden states of the same shape.
    """
    sums = torch.zeros(len(tower.blocks), dtype=torch.float64, device="cpu")
    counts = [0] * len(tower.blocks)
    sizes: list[int | None] = [None] * len(tower.blocks)
    current: list[Batch] = []

    def record(index: int, block: Block) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            try:
                before, after = Call.of(args, kwargs).hidden, hidden_of(output)
            except NotReplayable as error:
                raise ArgumentError(f"{block.name} cannot be removed: {error}") from error
            if before.shape != after.shape:
                raise ArgumentError(f"{block.name} cannot be removed: it changes the shape of its hidden states")
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            _, valid = tower.masks.of_hidden(current[0], before)
            chosen = cosine.flatten() if valid is None else cosine[valid]
            sums[index] += float((1 - chosen).sum(dtype=torch.float64))
            counts[index] += chosen.numel()
            sizes[index] = len(output) if isinstance(output, tuple) else None

        return hook

    with calibration_mode(model), ExitStack() as hooks:
        for index, block in enumerate(tower.blocks):
            handle = block.module.register_forward_hook(record(index, block), with_kwargs=True)
            hooks.callback(handle.remove)
        for number, batch in enumerate(batches):
            current[:] = [batch]
            run_model(model, batch)
            if progress is not None:
                progress(number + 1, len(batches))
    divisors = torch.tensor(counts, dtype=torch.float64, device="cpu").clamp_min(1)
    return (sums / divisors).float(), sizes


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
