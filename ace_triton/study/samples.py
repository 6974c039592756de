"""Texts that a model writes, and the divergence of its next-token distributions from the dense model's."""

from __future__ import annotations

from typing import Any

import torch

from ..evaluate import windows_of
from ..inputs.beginnings import NO_BEGINNING, Beginning
from .records import QUANTILES, Divergence, Sample

PROMPTS = (
    "The history of the city begins in the twelfth century, when",
    "To make a good soup you need",
    "A computer stores numbers as",
)

NEW_TOKENS = 48

WINDOWS = 4
"""At most this many windows are used for divergence; their dense logits stay in memory."""


class Sampler:
    """Texts and divergence of one model that is pruned in different ways.

    Args:
        model: the model, still dense.
        tokenizer: the model's tokenizer.
        ids: int64 [n_tokens], the evaluation text; its first windows are used.
        window_length, windows: tokens of a window, and how many at most.
        beginning: what windows and prompts begin with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: torch.Tensor,
        window_length: int,
        windows: int,
        beginning: Beginning = NO_BEGINNING,
    ) -> None:
        from transformers import GenerationConfig

        self._model, self._tokenizer = model, tokenizer
        self.prompts = PROMPTS
        end = tokenizer.eos_token_id
        self._greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
        self._beginning = beginning.tokens
        self._windows = windows_of(ids, window_length, beginning, min(windows, WINDOWS)).to(model.device)
        self._dense = [self._logits(window) for window in self._windows]

    def dense(self) -> Sample:
        """The dense model's texts; call this while the model is dense."""
        return Sample(None, self.prompts, self._texts(), None)

    def texts_and_divergence(self) -> tuple[tuple[str, ...], Divergence]:
        """Texts and divergence of the model in its present state."""
        pairs = [
            next_token_divergence(dense, self._logits(window))
            for dense, window in zip(self._dense, self._windows, strict=True)
        ]
        far = torch.cat([kl for kl, _ in pairs])
        agree = torch.cat([same for _, same in pairs])
        quantiles = torch.quantile(far, torch.tensor(QUANTILES, dtype=far.dtype, device=far.device))
        divergence = Divergence(float(far.mean()), tuple(quantiles.tolist()), float(agree.double().mean()), far.numel())
        return self._texts(), divergence

    @torch.no_grad()
    def _logits(self, window: torch.Tensor) -> torch.Tensor:
        return self._model(window[None], use_cache=False).logits[0]

    @torch.no_grad()
    def _texts(self) -> tuple[str, ...]:
        return tuple(self._continue(prompt) for prompt in self.prompts)

    def _continue(self, prompt: str) -> str:
        given = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        given = torch.cat([torch.tensor([self._beginning], dtype=torch.int64, device="cpu"), given], 1)
        ids = given.to(self._model.device)
        written = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=self._greedy)
        return self._tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def next_token_divergence(dense: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(dense || pruned) and agreement at every position.

    Args:
        dense, pruned: logits [n_positions, vocabulary], any floating dtype.

    Returns:
        fp32 [n_positions], sum_v p_v (log p_v - log q_v) in nats, where p is the dense model's distribution; and bool
        [n_positions], True if both have the same largest logit.
    """
    log_p, log_q = dense.float().log_softmax(-1), pruned.float().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence.clamp(min=0), dense.argmax(-1) == pruned.argmax(-1)
