"""Compares ways to meet a ratio by the loss without what each of them removes.

Each share runs on the same batches. One that is surely worse than the best one does not run on later batches: the mean
difference of their losses, over runs of :data:`RUN` tokens, is above :data:`SURE` of its standard errors. If the
weights are in files, all shares run on the first batch, and those that are left on all others: each of the two takes
one pass over the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Block, Tower
from ..decoders.calibration_mode import calibration_mode
from ..decoders.replay import Replay, make_runner
from ..errors import ArgumentError
from ..timing import Stopwatch
from .budget import Share, kept_structures
from .coupled import Structures, outputs_of
from .forwards import BlockWatcher
from .gradients import losses_of, token_losses
from .settings import ShrinkSettings
from .smaller import masked
from .weights import Weights

TRIED_BATCHES = 4
"""Number of batches on which shares are compared, at most."""

RUN = 64
"""Number of tokens whose mean loss is one sample of the comparison."""

SURE = 5.0
"""Number of standard errors by which a share is surely worse."""

Kept = Mapping[str, torch.Tensor]
Losses = Callable[[Sequence[int], int], list[torch.Tensor]]
"""Gives the losses of the tokens, fp32 [n_tokens], of each of some shares on a batch, by their indices."""


def best_share(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch],
    structures: Structures,
    importance: Mapping[str, torch.Tensor],
    shares: Sequence[Share],
    settings: ShrinkSettings,
    weights: Weights,
) -> tuple[Share, dict[int, float]]:
    """The share with the lowest loss on the first batches, and the mean loss of each by number of groups.

    Args:
        model: the dense model; unchanged at return.
        tower: its blocks.
        batches: the calibration set; without batches the first share is the best.
        structures: the structures.
        importance: of all structures, by name of the consumer.
        shares: possible shares, the fewest groups first.
        settings: with widths and multiple.
        weights: where the model's weights are.
    """
    if len(shares) == 1 or not batches:
        return shares[0], {}  # The fewest groups: heads are worth more than channels.
    kept = [kept_structures(structures, importance, share, settings) for share in shares]
    tried = batches[:TRIED_BATCHES]
    with calibration_mode(model):
        losses = _from_files(model, tower, tried, structures, kept, weights) if weights.in_files else None
        losses = losses or _in_memory(model, tried, structures, kept)
        found = compared(losses, len(shares), len(tried))
    best = min(range(len(shares)), key=lambda share: (-len(found[share]), _mean(found[share])))
    return shares[best], {share.groups: _mean(of) for share, of in zip(shares, found, strict=True)}


def compared(losses: Losses, n_shares: int, n_batches: int) -> list[list[torch.Tensor]]:
    """The losses of each share, batch by batch; a share that is surely worse than the best has fewer batches."""
    found: list[list[torch.Tensor]] = [[] for _ in range(n_shares)]
    left = list(range(n_shares))
    for batch in range(n_batches):
        for share, of_batch in zip(left, losses(left, batch), strict=True):
            found[share].append(of_batch)
        best = min(left, key=lambda share: _mean(found[share]))
        left = [share for share in left if share == best or not _surely_worse(found[share], found[best])]
        if len(left) == 1:
            break
    return found


def _mean(losses: Sequence[torch.Tensor]) -> float:
    """The mean over batches of their mean losses."""
    return sum(float(of_batch.mean()) for of_batch in losses) / len(losses)


def _surely_worse(losses: Sequence[torch.Tensor], best: Sequence[torch.Tensor]) -> bool:
    runs = [run.mean() for one, other in zip(losses, best, strict=True) for run in (one - other).split(RUN)]
    if len(runs) < 4:
        return False
    samples = torch.stack(runs)
    return bool(samples.mean() > SURE * samples.std() / len(runs) ** 0.5)


def _in_memory(model: nn.Module, batches: Sequence[Batch], structures: Structures, kept: Sequence[Kept]) -> Losses:
    """Losses by forwards of the whole model; for a model without logits, the error of its outputs."""

    def of_share(share: int, batch: Batch) -> torch.Tensor:
        try:
            with masked(structures, kept[share]):
                return token_losses(model, batch)
        except ArgumentError:
            dense = outputs_of(model, batch)
            with masked(structures, kept[share]):
                pairs = zip(outputs_of(model, batch), dense, strict=True)
                return torch.stack([(one.float() - two.float()).norm() / two.float().norm() for one, two in pairs])

    return lambda shares, number: [of_share(share, batches[number]) for share in shares]


class _Masking(BlockWatcher):
    """Hides what each share removes of a block, while the batches of all shares run, one share after the other."""

    def __init__(self, structures: Structures, block: Block, kept: Sequence[Kept], n_batches: int) -> None:
        names = [entry.consumer for entry in structures.within(block)]
        self._kept = [{name: of[name] for name in names if name in of} for of in kept for _ in range(n_batches)]
        self._structures, self._runs = structures, iter(self._kept)

    def watched(self, shape: tuple[int, int], valid: torch.Tensor | None, hooks: ExitStack) -> None:
        hooks.enter_context(masked(self._structures, next(self._runs)))


def _from_files(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch],
    structures: Structures,
    kept: Sequence[Kept],
    weights: Weights,
) -> Losses | None:
    """As :func:`_in_memory`, one block at a time; None if blocks cannot run one at a time."""
    first = _one_pass(model, tower, batches[:1], structures, kept, weights)
    if first is None:
        return None
    found = {(share, 0): of_share[0] for share, of_share in enumerate(first)}

    def losses(shares: Sequence[int], number: int) -> list[torch.Tensor]:
        if (shares[0], number) not in found:
            rest = _one_pass(model, tower, batches[1:], structures, [kept[share] for share in shares], weights)
            assert rest is not None
            for share, of_share in zip(shares, rest, strict=True):
                found.update({(share, later): of_batch for later, of_batch in enumerate(of_share, 1)})
        return [found[share, number] for share in shares]

    return losses


def _one_pass(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch],
    structures: Structures,
    kept: Sequence[Kept],
    weights: Weights,
) -> list[list[torch.Tensor]] | None:
    """The losses of each share on each batch, all through one block at a time; None if blocks cannot run so."""
    repeated = [batch for _ in kept for batch in batches]
    clock = Stopwatch(next(model.parameters()).device)
    with weights.loaded(model):
        runner = make_runner(
            model,
            tower.blocks,
            repeated,
            clock,
            tower.masks,
            batches[0].beginning(2, 8),
            keep=weights.keep,
            to_logits=True,
        )
    if not isinstance(runner, Replay):
        return None
    for index, block in enumerate(tower.blocks):
        with weights.loaded(block.module):
            runner.run(index, _Masking(structures, block, kept, len(batches)), advance=True)
    with weights.loaded(model):
        losses = [_losses(runner, number, batch) for number, batch in enumerate(repeated)]
    return [losses[start : start + len(batches)] for start in range(0, len(losses), len(batches))]


def _losses(runner: Replay, number: int, batch: Batch) -> torch.Tensor:
    """The losses of the tokens of a batch that has run through all blocks."""
    found, start = [], 0
    for logits in runner.logits(number):
        found.append(losses_of(logits, batch, start))
        start += logits.shape[1]
    whole = torch.cat(found, 1)
    return whole.flatten() if batch.valid is None else whole[batch.valid[:, 1:]]
