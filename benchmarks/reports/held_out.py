"""The divergence of a pruned model from the dense one, on text that it was not trained on."""

from __future__ import annotations

import torch

from ace_triton.study.samples import next_token_divergence
from ace_triton.study.workbench import Workbench


@torch.no_grad()
def divergence(bench: Workbench, ids: torch.Tensor) -> float:
    """Divergence of the bench's model from the dense one, mean over the tokens of int64 [n_sequences, length]."""
    total = 0.0
    for window in ids:
        dense, recovered = (
            decoder(window[None], use_cache=False).logits[0] for decoder in (bench.teacher, bench.model)
        )
        total += float(next_token_divergence(dense, recovered)[0].sum())
    return total / ids.numel()
