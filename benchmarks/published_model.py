"""A model pruned block by block in the published form: the package's forwards, everything else in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ace_triton.blocks import find_blocks, linears_of
from ace_triton.replay import Batch, calibration_mode, make_runner
from ace_triton.timing import Seconds, Stopwatch

from . import published


@dataclass
class LayerStatistics:
    """What the published hooks keep of one layer: every layer its own, also where several read one tensor.

    Attributes:
        norms: Wanda's and RIA's.
        squares: for VarP, sums of x^2 over every sequence, one tensor a batch.
        loss: for CosP, the sum over batches of its mean loss ("ace-paper": a matrix, "ace": a vector); None where it
            is not wanted.
        n_batches: in it.
    """

    norms: published.InputNorms
    squares: list[torch.Tensor] = field(default_factory=list)
    loss: torch.Tensor | None = None
    n_batches: int = 0

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
    """Statistics of some layers, taken as the published code does."""

    def __init__(self, layers: dict[str, nn.Module], method: str, clock: Stopwatch) -> None:
        self._layers, self._method, self._clock = layers, method, clock
        self.statistics = {
            name: LayerStatistics(published.InputNorms(torch.zeros(layer.in_features, device=layer.weight.device)))
            for name, layer in layers.items()
            if isinstance(layer, nn.Linear)
        }

    @contextmanager
    def batch(self, shape: tuple[int, int], valid: torch.Tensor | None) -> Iterator[None]:
        """Watch while one batch runs."""
        handles = [
            layer.register_forward_hook(lambda _, args, output, name=name: self._see(name, args[0], output))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, tokens: torch.Tensor, output: torch.Tensor) -> None:
        if self._method == "magnitude":
            return
        with self._clock.measure("statistics"):
            seen = self.statistics[name]
            seen.norms.add(tokens)
            if self._method in ("ace", "ace-paper"):
                seen.squares.append(tokens.float().square().sum(1))
                loss_of = published.exact_cosine_loss if self._method == "ace" else published.cosine_loss
                loss = loss_of(tokens.flatten(0, 1), output.flatten(0, 1))
                seen.loss = loss if seen.loss is None else seen.loss + loss
                seen.n_batches += 1


def prune_model(model: Any, ids: torch.Tensor, method: str, n: int, m: int, batch_size: int) -> Seconds:
    """Prune a decoder in place to n:m by "magnitude", "wanda", "ria", "ace" or "ace-paper"; seconds by stage.

    Args:
        model: a causal decoder of transformers.
        ids: int64 [n_sequences, length].
        method: whose score.
        n, m: n of every m are kept.
        batch_size: sequences of one forward, a divisor of n_sequences.
    """
    clock = Stopwatch(ids.device)
    blocks = find_blocks(model)
    batches = [Batch(part, None) for part in ids.split(batch_size)]
    with calibration_mode(model):
        runner = make_runner(model, blocks, batches, clock)
        for index, block in enumerate(blocks):
            layers = dict(linears_of(block.module, block.name))
            hooks = Hooks(layers, method, clock)
            runner.run(index, hooks, advance=False)  # type: ignore[arg-type]
            with clock.measure("select"):
                for name, layer in layers.items():
                    weight = layer.get_parameter("weight").data
                    published.prune_groups(weight, hooks.statistics[name].scores(method, weight), m - n, m)
            if index + 1 < len(blocks):
                runner.run(index, None, advance=True)
    return clock.seconds()
