"""QuantizedEmbedding: an embedding whose table is stored in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels.packed_dense import PackedDense, quantize_dense
from .loaded_values import why_not_loaded
from .weight import PackedWeight


class QuantizedEmbedding(nn.Module):
    """Looks up rows of a table of 8 or 4 bits, and scales them. The table is frozen.

    The buffers ``values`` and ``absmax`` (layout: :mod:`ace_triton.kernels.packed_dense`) work with ``state_dict``,
    ``model.to`` and ``deepcopy``.

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as in ``nn.Embedding``.
        bits: bits of a value.
        group: number of neighboring elements of a row that share a scale.
    """

    values: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, packed: PackedDense, padding_idx: int | None = None) -> None:
        super().__init__()
        packed.check_tensors()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx
        self.group = packed.group
        self.register_buffer("values", packed.values)
        self.register_buffer("absmax", packed.absmax)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int, group: int) -> QuantizedEmbedding:
        """Quantize an ``nn.Embedding``: each weight is rounded to the nearest value.

        Args:
            embedding: the embedding; :func:`why_not_quantized` must allow it.
            bits: 8 or 4.
            group: number of neighboring elements of a row that share a scale, a multiple of 32.
        """
        packed = quantize_dense(embedding.weight.detach(), bits, group)
        return cls(packed, embedding.padding_idx).train(embedding.training)

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def packed(self) -> PackedDense:
        """The table for the kernels; it shares the buffers."""
        return PackedDense(self.values, self.absmax, (self.num_embeddings, self.embedding_dim), self.group)

    @property
    def weight(self) -> torch.Tensor:
        """The dense table, read-only: shape, dtype and device cost nothing, reading it unpacks, writing raises."""
        return PackedWeight(self.packed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these ids [...]: [..., embedding_dim]."""
        return self.packed.rows(ids)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedEmbedding:
        """As in ``nn.Module``, but values keep their dtype."""
        values = self.values
        super()._apply(fn, recurse)
        if self.values.dtype != values.dtype:
            self.values = values.to(self.values.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As in ``nn.Module``, but for invalid values and those of other bits ``load_state_dict`` raises."""
        why_not = why_not_loaded(state_dict, prefix, rest[0], self.values, self.absmax, self.embedding_dim)
        if why_not is not None:
            errors: list[str] = rest[-1]
            errors.append(why_not)
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group={self.group}"


def why_not_quantized(embedding: nn.Module) -> str | None:
    """Why a module's table cannot be stored in few bits; None if it can."""
    if not isinstance(embedding, nn.Embedding):
        return f"a {type(embedding).__name__} is not an nn.Embedding"
    if type(embedding).forward is not nn.Embedding.forward or "forward" in vars(embedding):
        return f"a {type(embedding).__name__} changes the rows that it looks up"
    if embedding.max_norm is not None:
        return "its max_norm writes to the table in every call"
    if embedding._forward_hooks or embedding._forward_pre_hooks:
        return "it has hooks, which packing would remove"
    return None
