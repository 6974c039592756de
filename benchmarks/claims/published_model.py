"""Prunes a model block by block as published: forwards of the package, everything else in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ace_triton.decoders.batches import Batch, MaskedInput
from ace_triton.decoders.blocks import find_blocks, linears_of, stacks_of
from ace_triton.decoders.calibration_mode import calibration_mode
from ace_triton.decoders.replay import make_runner
from ace_triton.linears import linear_weight
from ace_triton.timing import Seconds, Stopwatch

from . import published

METHODS = ("magnitude", "wanda", "ria", "ace", "ace-paper", "sparsegpt")
"""The methods of :func:`prune_model`."""


@dataclass
class LayerStatistics:
    """Statistics of one layer as the published hooks keep them, also if several layers read one tensor.

    Attributes:
        norms: for Wanda and RIA.
        squares: for VarP, sums of x^2 over every sequence, one tensor per batch.
        loss: for CosP, the sum over batches of its mean loss ("ace-paper": a matrix, "ace": a vector); None for other
            methods.
        n_batches: number of batches in ``loss``.
        hessian: for SparseGPT; None for other methods.
    """

    norms: published.InputNorms
    squares: list[torch.Tensor] = field(default_factory=list)
    loss: torch.Tensor | None = None
    n_batches: int = 0
    hessian: published.Hessian | None = None

    def prune(self, method: str, weight: torch.Tensor, n_pruned: int, m: int) -> None:
        """Prune a layer's weight in place, as published."""
        if self.hessian is not None:
            published.prune_by_sparsegpt(weight, self.hessian.matrix, n_pruned, m)
        else:
            published.prune_groups(weight, self.scores(method, weight), n_pruned, m)

    def scores(self, method: str, weight: torch.Tensor) -> torch.Tensor:
        """The published score of every weight."""
        if method == "magnitude":
            return published.magnitude_scores(weight)
        if method == "wanda":
            return published.wanda_scores(weight, self.norms.mean_square)
        if method == "ria":
            return published.ria_scores(weight, self.norms.mean_square)
        if method == "ace-paper" and self.loss is not None:
            factor = published.variance_factor(torch.cat(self.squares))
            return published.ace_scores(weight, self.norms.mean_square, self.loss / self.n_batches, factor)
        if method == "ace" and self.loss is not None:
            factor = published.convergent_variance_factor(torch.cat(self.squares))
            return published.exact_ace_scores(weight, self.loss / self.n_batches, factor)
        raise ValueError(f"no published form of {method!r} here")


class Hooks:
    """Collects statistics of some layers like the published code.

    Attributes:
        has_read: True if a layer has run in the current batch.
    """

    def __init__(self, layers: dict[str, nn.Module], method: str, clock: Stopwatch) -> None:
        self._layers, self._method, self._clock = layers, method, clock
        self.has_read = False
        self.statistics = {
            name: LayerStatistics(
                published.InputNorms(torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device))
            )
            for name, weight in weights_of(layers).items()
        }

    @contextmanager
    def batch(
        self,
        shape: tuple[int, int],
        valid: torch.Tensor | None,
        *,
        others: Sequence[MaskedInput] = (),
        leave_early: bool = False,
    ) -> Iterator[None]:
        """Collect statistics while one whole batch runs, as the published form does."""
        self.has_read = False
        handles = [
            layer.register_forward_hook(lambda _, args, output, name=name: self._add(name, args[0], output))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, tokens: torch.Tensor, output: torch.Tensor) -> None:
        self.has_read = True
        if self._method == "magnitude":
            return
        with self._clock.measure("statistics"):
            seen = self.statistics[name]
            if self._method == "sparsegpt":
                if seen.hessian is None:
                    square = 2 * tokens.shape[-1:]
                    seen.hessian = published.Hessian(torch.zeros(square, dtype=torch.float32, device=tokens.device))
                seen.hessian.add(tokens)
                return
            seen.norms.add(tokens)
            if self._method in ("ace", "ace-paper"):
                seen.squares.append(tokens.float().square().sum(1))
                loss_of = published.exact_cosine_loss if self._method == "ace" else published.cosine_loss
                loss = loss_of(tokens.flatten(0, 1), output.flatten(0, 1))
                seen.loss = loss if seen.loss is None else seen.loss + loss
                seen.n_batches += 1


def weights_of(layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Each linear layer's weight, [out_features, in_features]."""
    found = {name: linear_weight(layer) for name, layer in layers.items()}
    return {name: weight for name, weight in found.items() if weight is not None}


def prune_model(model: Any, ids: torch.Tensor, method: str, n: int, m: int, batch_size: int) -> Seconds:
    """Prune a decoder in place to n:m by one of :data:`METHODS`.

    Args:
        model: a causal decoder of transformers.
        ids: int64 [n_sequences, length].
        method: method whose score is used.
        n, m: n of every m weights are kept.
        batch_size: number of sequences in a forward, a divisor of n_sequences.

    Returns:
        wall-clock seconds by stage.

    Raises:
        ValueError: if the method has no published form here, or the model has stacked experts; nothing is changed.
    """
    if method not in METHODS:
        raise ValueError(f"no published form of {method!r} here; use one of {', '.join(METHODS)}")
    if stacks_of(model):
        raise ValueError("the published code prunes linear layers only; this model's experts are stacked")
    clock = Stopwatch(ids.device)
    blocks = find_blocks(model)
    batches = [Batch.of_ids(part) for part in ids.split(batch_size)]
    with calibration_mode(model):
        runner = make_runner(model, blocks, batches, clock)
        for index, block in enumerate(blocks):
            layers = dict(linears_of(block.module, block.name))
            hooks = Hooks(layers, method, clock)
            runner.run(index, hooks, advance=False)
            with clock.measure("select"):
                for name, weight in weights_of(layers).items():
                    hooks.statistics[name].prune(method, weight, m - n, m)
            if index + 1 < len(blocks):
                runner.run(index, None, advance=True)
    return clock.seconds()
