"""The loss of a recovery and its gradient: the divergence of a model's predictions from the teacher's.

The loss is the Kullback-Leibler divergence of the model's next-token distribution q from the teacher's p, at
temperature 1 (Hinton et al., arXiv 1503.02531), averaged over tokens:

    KL(p || q) = sum_v p_v (log p_v - log q_v),   d KL / d logits = q - p.

:mod:`~ace_triton.kernels.divergence` computes both, and overwrites the logits with the gradient. If a model's logits
are exactly its head times its last hidden states h, they are computed from h in chunks of tokens, with the gradient
d KL / dh = (q - p) W_head. Then the logits of all tokens never exist at once, and none are kept for a backward pass. If
a model changes its logits further (Gemma 2 caps them, Cohere scales them), the logits of up to ``WHOLE_TOKENS`` tokens
exist at once.

With a weight of hidden states, the weight times their distance from the teacher's is added
(:mod:`~ace_triton.recovery.hidden_states`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..kernels.divergence import divergence
from .hidden_states import HiddenStates, distance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = 2**23
"""Logits in a chunk on a CPU: 170 tokens with a vocabulary of 49,152. A larger chunk does not fit the caches."""

GPU_CHUNK_LOGITS = 2**26
"""Logits in a chunk on a GPU: 512 tokens with a vocabulary of 131,072, enough to occupy it."""

WHOLE_TOKENS = 1024
"""Tokens in one forward and backward pass if logits are not chunked: those of a whole step could fill the memory."""

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class Gap:
    """A loss and its gradient with respect to a tensor.

    Attributes:
        loss: 0-d fp32, summed over tokens.
        gradient: gradient of the loss, with the tensor's shape.
    """

    loss: torch.Tensor
    gradient: torch.Tensor


class Distillation:
    """The loss of a model against a teacher with the same vocabulary.

    Args:
        model: the student, in evaluation mode; only the parameters to train require gradients.
        teacher: in evaluation mode.
        ids: int64 [n_sequences, length]; a trial on the first tokens shows if the models change their logits.
        dtype: dtype of forwards; float32 means no autocast.
        hidden_states: weight of the distance of hidden states; 0 leaves them out.

    Attributes:
        from_hidden: True if logits are computed in chunks.

    Raises:
        RecoveryError: if hidden states are compared, and the blocks of the two models differ.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        ids: torch.Tensor,
        dtype: torch.dtype,
        hidden_states: float = 0.0,
    ) -> None:
        self._model, self._teacher, self._dtype = model, teacher, dtype
        self._weight = hidden_states
        self._hidden = HiddenStates(model, teacher) if hidden_states else None
        trial = ids[:1, :TRIAL_TOKENS].to(model.device)
        with self._autocast(), torch.no_grad():
            self.from_hidden = all(logits_are_head_of_hidden(decoder, trial) for decoder in (model, teacher))

    def most(self, length: int) -> int | None:
        """Number of sequences of a length in one forward and backward pass; None for any number."""
        return None if self.from_hidden else max(1, WHOLE_TOKENS // length)

    def backward(self, ids: torch.Tensor, tokens: int | None = None, *, passes: int | None = None) -> float:
        """Add the gradient of the loss over these tokens, divided by ``tokens``, to the parameters' gradients.

        Args:
            ids: int64 [n_sequences, length], on the model's device.
            tokens: number of tokens in the step, those of other processes included; None if ``ids`` are all of them.
            passes: number of forward and backward passes; None for as few as memory allows.

        Returns:
            The loss over these tokens divided by ``tokens``: nats, plus the weighted distance of hidden states.
        """
        parts = ids.split(self.most(ids.shape[1]) or len(ids)) if passes is None else ids.tensor_split(passes)
        return sum(self._backward(part, 1 / (tokens or ids.numel())) for part in parts)

    def _backward(self, part: torch.Tensor, weight: float) -> float:
        """Backward pass for some sequences; the loss is summed over their tokens and multiplied by ``weight``."""
        hidden = self._hidden
        with self._autocast():
            with torch.no_grad(), _unwatched() if hidden is None else hidden.of_teacher() as targets:
                target = self._last(self._teacher, part)
            with _unwatched() if hidden is None else hidden.of_model() as states:
                output = self._last(self._model, part)
            gap = self._divergence(output, target)
        slope = gap.gradient.mul_(weight)
        if hidden is None:
            output.backward(slope)
            return float(gap.loss) * weight
        term = distance(states, targets) * (self._weight * weight)
        torch.autograd.backward([output, term], [slope, torch.ones_like(term)])
        return float(gap.loss) * weight + float(term.detach())

    def _last(self, decoder: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states if logits are computed in chunks, else the logits."""
        if self.from_hidden:
            return decoder.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return decoder(input_ids=ids, use_cache=False).logits

    def _divergence(self, output: torch.Tensor, target: torch.Tensor) -> Gap:
        if self.from_hidden:
            heads = self._model.get_output_embeddings(), self._teacher.get_output_embeddings()
            return divergence_of_hidden(output, heads[0], target, heads[1])
        loss, gradient = divergence(output.flatten(0, -2), target.flatten(0, -2))
        return Gap(loss.sum(), gradient.view_as(output))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._model.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)


def _unwatched() -> AbstractContextManager[list[torch.Tensor]]:
    return nullcontext([])


@torch.no_grad()
def logits_are_head_of_hidden(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """True if a model's logits equal its head applied to its last hidden states, bit for bit.

    Args:
        model: any causal decoder.
        ids: int64 [n_sequences, length] for the trial.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return False
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return False
    return torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def divergence_of_hidden(hidden: torch.Tensor, head: nn.Linear, wanted: torch.Tensor, wanted_head: nn.Linear) -> Gap:
    """The divergence computed from hidden states in chunks of tokens, and its gradient with respect to ``hidden``.

    Args:
        hidden, wanted: hidden states [..., width] of the model and of the teacher.
        head, wanted_head: their heads, which map hidden states to logits.
    """
    most = CHUNK_LOGITS if hidden.device.type == "cpu" else GPU_CHUNK_LOGITS
    size = max(1, most // head.out_features)
    gradient = torch.empty_like(hidden)
    loss = hidden.new_zeros((), dtype=torch.float32)
    chunks = (states.flatten(0, -2).split(size) for states in (gradient, hidden, wanted))
    for into, states, wanted_states in zip(*chunks, strict=True):
        logits = head(states)
        losses, slope = divergence(logits, wanted_head(wanted_states), into=logits)
        loss += losses.sum()
        into.copy_(slope.to(head.weight.dtype) @ head.weight)
    return Gap(loss, gradient)
