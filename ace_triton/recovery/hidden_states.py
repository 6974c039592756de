"""The distance of a model's hidden states from its teacher's: the second term of a recovery's loss.

For each token and block, h are the hidden states [width] that the block returns, and h_t the teacher's:

    distance = mean over tokens and blocks of  mean((h - h_t)^2) / var(h_t),

with the mean and the variance over the width. A token whose h_t are all equal, so that var(h_t) is 0 up to rounding,
counts 0. The form is the SquareHead loss of Kurtic et al. (arXiv 2310.06927),
which divides by the mean square of h_t over all tokens. Here each token has its own variance, because a few tokens of a
decoder have hidden states many times as large as others (Sun et al., arXiv 2402.17762). With one variance for all
tokens, these few would hide the errors of the others. Also, the distance does not depend on how processes share the
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..decoders.batches import tensors_in
from ..decoders.blocks import find_blocks
from ..errors import RecoveryError

LEAST_VARIANCE = 1e-12
"""A token counts if the variance of the teacher's hidden states is above this share of their mean square."""


class HiddenStates:
    """The blocks of a student and its teacher, whose outputs are compared.

    Args:
        model: the student, a causal decoder.
        teacher: its dense model.

    Raises:
        RecoveryError: if they have blocks of different names.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        blocks = [find_blocks(decoder) for decoder in (model, teacher)]
        names = [[block.name for block in each] for each in blocks]
        if names[0] != names[1]:
            raise RecoveryError(
                f"hidden states: the pruned model has {len(names[0])} blocks, the teacher {len(names[1])}, or their "
                "names differ: leave hidden_states (--hidden-states) out"
            )
        self._of_model, self._of_teacher = ([block.module for block in each] for each in blocks)

    @contextmanager
    def of_model(self) -> Iterator[list[torch.Tensor]]:
        """The model's hidden states of a forward inside the context, one [n_sequences, length, width] per block."""
        with _outputs(self._of_model) as states:
            yield states

    @contextmanager
    def of_teacher(self) -> Iterator[list[torch.Tensor]]:
        """As :meth:`of_model`, for the teacher."""
        with _outputs(self._of_teacher) as states:
            yield states


def distance(states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """The distance of hidden states from the teacher's, summed over tokens; 0-d fp32.

    Args:
        states: one [n_sequences, length, width] per block.
        targets: the teacher's.

    Raises:
        RecoveryError: if the shapes differ.
    """
    total = torch.zeros((), dtype=torch.float32, device=targets[0].device)
    for given, wanted in zip(states, targets, strict=True):
        if given.shape != wanted.shape:
            raise RecoveryError(
                f"hidden states: the shapes of the pruned model and the teacher differ, {tuple(given.shape[-1:])} and "
                f"{tuple(wanted.shape[-1:])}: leave hidden_states (--hidden-states) out"
            )
        target = wanted.float()
        error = (given.float() - target).square().mean(-1)
        variance = target.var(-1)
        counts = variance > LEAST_VARIANCE * target.square().mean(-1)
        total = total + torch.where(counts, error / variance.where(counts, 1.0), 0.0).sum()
    return total / len(targets)


@contextmanager
def _outputs(blocks: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    found: list[torch.Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        hidden = next((t for t in tensors_in(output) if t.is_floating_point() and t.dim() == 3), None)
        if hidden is None:
            raise RecoveryError(
                f"hidden states: a {type(module).__name__} returns none: leave hidden_states (--hidden-states) out"
            )
        found.append(hidden)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_hook(record).remove)
        yield found
