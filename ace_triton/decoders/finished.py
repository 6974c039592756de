"""Outputs of a block's modules that pruning is done with, so that later runs of the block need not compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .collect import InputCollector


class FinishedOutputs:
    """What finished modules of one block gave, by batch.

    An output is kept where no watched layer had read its input yet: what is still to be pruned comes later then, and
    cannot change it. Of a tuple the first tensor is kept, with None for the rest (attention's weights, which no
    block should need): of attention as much memory as the calibration set's hidden states take.
    """

    def __init__(self) -> None:
        self._kept: dict[nn.Module, dict[int, Any]] = {}

    def forget(self) -> None:
        """Drop all of it."""
        self._kept.clear()

    def of(self, modules: Sequence[nn.Module], number: int) -> list[nn.Module]:
        """The modules whose output for batch ``number`` is kept."""
        return [module for module in modules if number in self._kept.get(module, ())]

    @contextmanager
    def kept(self, modules: Sequence[nn.Module], number: int, collector: InputCollector) -> Iterator[None]:
        """Inside, batch ``number`` runs and outputs are kept.

        Args:
            modules: finished.
            number: of the batch.
            collector: watches the layers whose turn it is.
        """

        def note(module: nn.Module, _args: Any, output: Any) -> None:
            whole = output if isinstance(output, tuple) else (output,)
            if not collector.reading and whole and isinstance(whole[0], torch.Tensor):
                short = (whole[0], *[None] * (len(whole) - 1))
                self._kept.setdefault(module, {})[number] = short if isinstance(output, tuple) else short[0]

        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_hook(note).remove)
            yield

    @contextmanager
    def reused(self, modules: Sequence[nn.Module], number: int) -> Iterator[None]:
        """Inside, the modules give what they gave for batch ``number``, whatever they are called with."""
        with ExitStack() as replaced:
            for module in modules:
                replaced.enter_context(forward_replaced(module, _giving(self._kept[module][number])))
            yield


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of the module is one of ``forward``."""
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
