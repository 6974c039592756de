"""The loss of a recovery and its gradient: how far a model's predictions are from another's.

It is the Kullback-Leibler divergence of the model's next-token distribution q from the teacher's p, at temperature 1
(Hinton et al., arXiv 1503.02531), mean over tokens:

    KL(p || q) = sum_v p_v (log p_v - log q_v),   d KL / d logits = q - p.

:mod:`~ace_triton.kernels.divergence` makes both, and writes the gradient over logits. Where a model's logits are its
head times its last hidden states h and nothing more, they are formed from h in chunks of tokens, d KL / dh =
(q - p) W_head: they never exist whole, and nothing of them is kept for a backward. A model that does more to
its logits (Gemma 2 caps them, Cohere scales them) has them whole, ``WHOLE_TOKENS`` at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..kernels.divergence import divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = 2**23
"""Logits formed at once on a CPU: 170 tokens of a vocabulary of 49,152; more of them fall out of its caches."""

GPU_CHUNK_LOGITS = 2**26
"""On a GPU: 512 tokens of a vocabulary of 131,072, enough to fill one."""

WHOLE_TOKENS = 1024
"""Tokens of one forward and backward where logits exist whole, since those of a step would fill the memory."""

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class Gap:
    """How far a tensor is from what is wanted of it.

    Attributes:
        loss: 0-d fp32, summed over tokens.
        gradient: of the loss, with respect to the tensor, of its shape.
    """

    loss: torch.Tensor
    gradient: torch.Tensor


class Distillation:
    """Of a model from a teacher with the same vocabulary.

    Args:
        model: in evaluation mode; the parameters to train require gradients, others do not.
        teacher: in evaluation mode.
        ids: int64 [n_sequences, length]; its first tokens show what the models do to their logits.
        dtype: of forwards; float32 for no autocast.

    Attributes:
        from_hidden: whether logits are formed in chunks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        ids: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._teacher, self._dtype = model, teacher, dtype
        trial = ids[:1, :TRIAL_TOKENS].to(model.device)
        with self._autocast(), torch.no_grad():
            self.from_hidden = all(logits_are_head_of_hidden(decoder, trial) for decoder in (model, teacher))

    def backward(self, ids: torch.Tensor) -> float:
        """Add the gradient of the mean loss over these tokens to the parameters'; the loss, in nats a token.

        Args:
            ids: int64 [n_sequences, length], on the model's device.
        """
        size = len(ids) if self.from_hidden else max(1, WHOLE_TOKENS // ids.shape[1])
        return sum(self._backward(part, 1 / ids.numel()) for part in ids.split(size))

    def _backward(self, part: torch.Tensor, weight: float) -> float:
        """The loss is summed over tokens and times ``weight``."""
        with self._autocast():
            with torch.no_grad():
                wanted = self._last(self._teacher, part)
            got = self._last(self._model, part)
            gap = self._divergence(got, wanted)
        got.backward(gap.gradient.mul_(weight))
        return float(gap.loss) * weight

    def _last(self, decoder: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """What the divergence is formed from: hidden states, or logits."""
        if self.from_hidden:
            return decoder.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return decoder(input_ids=ids, use_cache=False).logits

    def _divergence(self, got: torch.Tensor, wanted: torch.Tensor) -> Gap:
        if self.from_hidden:
            heads = self._model.get_output_embeddings(), self._teacher.get_output_embeddings()
            return divergence_of_hidden(got, heads[0], wanted, heads[1])
        loss, gradient = divergence(got.flatten(0, -2), wanted.flatten(0, -2))
        return Gap(loss.sum(), gradient.view_as(got))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._model.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)


@torch.no_grad()
def logits_are_head_of_hidden(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether a model's logits are its head of its last hidden states, bit for bit.

    Args:
        model: any causal decoder.
        ids: int64 [n_sequences, length] to try it on.
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
    """The divergence from hidden states, in chunks of tokens; its gradient is the hidden states'.

    Args:
        hidden, wanted: [..., width], of the model and of the teacher.
        head, wanted_head: from there to logits.
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
