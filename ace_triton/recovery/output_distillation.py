"""The loss of a recovery of any model: its blocks' outputs, and its embeddings or predictions, against the teacher's.

The loss of a batch is

    mean over blocks of |h - h_t|^2 / |h_t|^2  +  the distance of the outputs,

where h are the hidden states that a block returns and h_t those of the teacher's block, both without padding. The
distance of outputs is the mean Kullback-Leibler divergence of the predictions from the teacher's if the model has
logits, else 1 minus the mean cosine of its embeddings. A term that the model does not have is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..agreement import Pooling, embedding_of, logits_of
from ..decoders.batches import Batch, run_model, tensors_in
from ..decoders.blocks import Tower, find_towers
from ..errors import ArgumentError, RecoveryError

LEAST_SQUARE = 1e-12
"""Lower bound of the square that an error is divided by."""


class OutputDistillation:
    """The loss of a model against its dense teacher, on any inputs of their forwards.

    Args:
        model: the student; only the parameters to train require gradients.
        teacher: in evaluation mode.
        batch: a batch for a trial forward of both, which finds the terms of the loss.
        pooling: how hidden states become an embedding, for models without logits.
        dtype: dtype of forwards; float32 means no autocast.

    Attributes:
        terms: names of the terms: "hidden states", and "predictions" or "embeddings".

    Raises:
        RecoveryError: if the two models have no output to compare.
        ArgumentError: if a model cannot run on the batch.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, batch: Batch, pooling: Pooling, dtype: torch.dtype
    ) -> None:
        self._model, self._teacher, self._pooling, self._dtype = model, teacher, pooling, dtype
        self._towers = [find_towers(one, batch) for one in (model, teacher)]
        names = [[block.name for tower in towers for block in tower.blocks] for towers in self._towers]
        self._hidden = names[0] == names[1]
        with torch.no_grad():
            given, wanted = self._forward(0, batch), self._forward(1, batch)
        compared = list(zip(given[1], wanted[1], strict=False)) if self._hidden else []
        self._hidden = bool(compared) and all(one[0].shape == other[0].shape for one, other in compared)
        self._output = self._kind_of(batch, given[0], wanted[0])
        found = ["hidden states"] * self._hidden + [self._output] * (self._output is not None)
        self.terms = tuple(name for name in found if name)
        if not self.terms:
            raise RecoveryError(
                f"{type(model).__name__}: its outputs have no logits and no hidden states, and its blocks' outputs "
                "differ in shape from the teacher's: train it with your own loss and ace_triton.keep_zeros"
            )

    def backward(self, batch: Batch) -> float:
        """Add the gradient of the loss to the parameters' gradients; returns the loss."""
        with torch.no_grad():
            wanted = self._forward(1, batch)
        given = self._forward(0, batch)
        loss = torch.zeros((), dtype=torch.float32, device=given[1][0][0].device)
        if self._hidden:
            errors = [_relative(states, target) for (states, _), target in zip(given[1], wanted[1], strict=True)]
            loss = loss + torch.stack(errors).mean()
        if self._output == "predictions":
            loss = loss + _divergence(*(logits_of(batch.arguments, output) for output in (given[0], wanted[0])))
        elif self._output == "embeddings":
            one, other = (embedding_of(batch.arguments, output, self._pooling) for output in (given[0], wanted[0]))
            loss = loss + 1 - functional.cosine_similarity(one.float(), other.float(), dim=1).mean()
        loss.backward()
        return float(loss.detach())

    def _forward(self, which: int, batch: Batch) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """The output of the student (0) or the teacher (1), and its blocks' outputs with their padding masks."""
        model = (self._model, self._teacher)[which]
        device = next(iter(batch.inputs.values())).device.type
        autocast = torch.autocast(device, dtype=self._dtype, enabled=self._dtype != torch.float32)
        with autocast, _block_outputs(self._towers[which], batch) as hidden:
            output = run_model(model, batch)
        return output, hidden

    def _kind_of(self, batch: Batch, given: Any, wanted: Any) -> str | None:
        """The term of the outputs; None if they have none that both models share."""
        if not hasattr(given, "get"):
            return None
        for name, read in (("predictions", self._logits), ("embeddings", self._embeddings)):
            try:
                shapes = [read(batch, output).shape for output in (given, wanted)]
            except ArgumentError:
                continue
            if shapes[0] == shapes[1]:
                return name
            raise RecoveryError(
                f"the {name} of the two models differ in shape, {tuple(shapes[0])} and {tuple(shapes[1])}: give the "
                "dense model that the pruned one was made from as the teacher"
            )
        return None

    def _logits(self, batch: Batch, output: Any) -> torch.Tensor:
        return logits_of(batch.arguments, output)

    def _embeddings(self, batch: Batch, output: Any) -> torch.Tensor:
        return embedding_of(batch.arguments, output, self._pooling)


@contextmanager
def _block_outputs(towers: Sequence[Tower], batch: Batch) -> Iterator[list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """The hidden states that blocks return inside the context, in order, each with its padding mask or None."""
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def hook_of(tower: Tower) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            hidden = next((t for t in tensors_in(output) if t.is_floating_point() and t.dim() > 1), None)
            if hidden is not None:
                found.append((hidden, tower.masks.of_hidden(batch, hidden)[1]))

        return record

    with ExitStack() as hooks:
        for tower in towers:
            for block in tower.blocks:
                hooks.callback(block.module.register_forward_hook(hook_of(tower)).remove)
        yield found


def _relative(given: torch.Tensor, wanted: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """The squared error of hidden states relative to the square of the wanted ones, which have a padding mask."""
    target, valid = wanted[0].float(), wanted[1]
    error, square = (given.float() - target).square(), target.square()
    if valid is not None and valid.shape == target.shape[:-1]:
        error, square = error[valid], square[valid]
    return error.sum() / square.sum().clamp_min(LEAST_SQUARE)


def _divergence(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean divergence of predictions from the wanted ones, in nats."""
    logs = [rows.float().log_softmax(-1) for rows in (given, wanted)]
    return functional.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)
