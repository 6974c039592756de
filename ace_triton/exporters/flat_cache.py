"""A causal model whose key-value cache is a flat list of tensors, as graph formats need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

INPUTS = ("input_ids", "attention_mask", "position_ids")


class FlatCacheModel(nn.Module):
    """Calls a model of transformers with a cache that is given and returned as tensors.

    Args:
        model: a decoder that keeps one key and one value tensor per layer.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Compute logits [batch, n_tokens, vocabulary], and the cache with the new tokens.

        Args:
            input_ids: int64 [batch, n_tokens].
            attention_mask: int64 [batch, n_past + n_tokens]; 0 for padding.
            position_ids: int64 [batch, n_tokens].
            past: key and value of each layer in turn, [batch, n_heads, n_past, head_size].
        """
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{cache_argument(self.model): cache},
            use_cache=True,
        )
        layers: Any = cache.layers
        return (found.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def cache_argument(model: Any) -> str:
    """The name that the model's forward has for the cache; transformers renames it."""
    import inspect

    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(n_heads, head_size) of the key and of the value of each layer in turn, from one forward of the model."""
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.zeros(1, 2, dtype=torch.int64, device="cpu")
    with torch.no_grad():
        model(ids, **{cache_argument(model): cache}, use_cache=True)
    layers: Any = cache.layers
    return [(tensor.shape[1], tensor.shape[3]) for layer in layers for tensor in (layer.keys, layer.values)]


def cache_names(count: int, kind: str) -> list[str]:
    """Names of the tensors of a cache, ``count`` of them; ``kind`` is "past_key_values" or "present"."""
    return [f"{kind}.{index // 2}.{('key', 'value')[index % 2]}" for index in range(count)]
