"""A pattern that tightens while a model is recovered, as a trial: from 12:16 to 8:16 in the first half of the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ace_triton.recovery.checks import pruned_masks

LEVELS = (12, 11, 10, 9, 8)
"""Weights that are kept of each group; each level lasts for the same number of steps."""

GROUP = 16
UNTIL = 0.5
"""Share of the steps after which the last level holds."""

DECAY = 0.9
"""Decay of the sum of squared inputs at each step."""


class Tightening:
    """Sets more and more weights of a pruned model to 0, by Wanda's metric on the present weights.

    The inputs' norms are those of the steps so far, with a decay. The metric is |w| |x| (Sun et al., arXiv 2306.11695).

    Args:
        model: pruned to the first level; its forwards run in float32, so the optimizer trains these very weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: model.get_parameter(name) for name in pruned_masks(model)}
        self._layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in self._weights}
        self._squares: dict[str, torch.Tensor] = {}
        self._masks: dict[str, torch.Tensor] = {}
        self._kept = LEVELS[0]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sum up the squares of the layers' inputs inside the context."""
        hooks = [layer.register_forward_pre_hook(self._adder(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def after_step(self, spent: float, budget: float, loss: float) -> None:
        """Tighten if a level ends, and restore the zeros, which the optimizer's moments move; as ``progress``."""
        kept = LEVELS[min(len(LEVELS) - 1, int(spent / budget / UNTIL * len(LEVELS)))]
        if kept != self._kept:
            self._kept = kept
            self._masks = {name: self._mask(name, weight) for name, weight in self._weights.items()}
        for name, mask in self._masks.items():
            self._weights[name].masked_fill_(~mask, 0)

    def _mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        scores = (weight.abs() * self._squares[name].sqrt()).unflatten(1, (-1, GROUP))
        best = scores.topk(self._kept, dim=2).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True).flatten(1)

    def _adder(self, name: str) -> Any:
        def add(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                squares = args[0].detach().flatten(0, -2).square().sum(0)
                self._squares[name] = squares + DECAY * self._squares.get(name, torch.zeros_like(squares))

        return add
