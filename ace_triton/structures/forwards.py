"""Runs the calibration set through the blocks while watchers collect what a ranking needs, and compares losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Tower
from ..decoders.calibration_mode import calibration_mode
from ..decoders.replay import Replay, WholeForward, make_runner
from ..decoders.watcher import Watcher
from ..timing import Stopwatch
from .weights import Weights

Progress = Callable[[int, int], None]


class BlockWatcher:
    """A :class:`~ace_triton.decoders.watcher.Watcher` that never ends a run early."""

    has_read = False

    @contextmanager
    def batch(
        self,
        shape: tuple[int, int],
        valid: torch.Tensor | None,
        *,
        others: Sequence[Any] = (),
        leave_early: bool = False,
    ) -> Iterator[None]:
        """A context in which one batch runs; see :meth:`watched`."""
        with ExitStack() as hooks:
            self.watched(shape, valid, hooks)
            yield

    def watched(self, shape: tuple[int, int], valid: torch.Tensor | None, hooks: ExitStack) -> None:
        """Watch a batch that runs next.

        Args:
            shape: n_sequences and length of the batch.
            valid: bool of that shape, False for padding; None if there is no padding.
            hooks: closes after the batch.
        """
        raise NotImplementedError


class _All(BlockWatcher):
    """All watchers of a model at once; it counts the batches."""

    def __init__(self, watchers: Sequence[Watcher], done: Callable[[], None]) -> None:
        self._watchers, self._done = watchers, done

    def watched(self, shape: tuple[int, int], valid: torch.Tensor | None, hooks: ExitStack) -> None:
        hooks.callback(self._done)
        for watcher in self._watchers:
            hooks.enter_context(watcher.batch(shape, valid))


def watch_blocks(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch],
    watchers: Mapping[int, Watcher],
    weights: Weights,
    progress: Progress | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Run the calibration set: each batch through the whole model, or all through one block at a time from files.

    Args:
        model: the dense model; unchanged at return.
        tower: its blocks.
        batches: the calibration set.
        watchers: watch the blocks of these indices.
        weights: where the model's weights are.
        progress: called with the number of steps done, and of all steps.
        after: called with the index of a block that has run on all batches, while its weights are in memory.
    """
    clock = Stopwatch(next(model.parameters()).device)
    tell = progress or (lambda *_: None)
    with calibration_mode(model):
        if weights.in_files:
            with weights.loaded(model):
                runner = make_runner(model, tower.blocks, batches, clock, tower.masks, keep=weights.keep)
            if isinstance(runner, Replay):
                for index, block in enumerate(tower.blocks):
                    with weights.loaded(block.module):
                        runner.run(index, watchers.get(index), advance=True)
                        if after is not None:
                            after(index)
                    tell(index + 1, len(tower.blocks))
                return
        done = iter(range(1, len(batches) + 1))
        whole = WholeForward(model, batches, clock, tower.blocks, tower.masks)
        whole.run_all(_All(list(watchers.values()), lambda: tell(next(done), len(batches))))
        if after is not None:
            for index, block in enumerate(tower.blocks):
                with weights.loaded(block.module):
                    after(index)
