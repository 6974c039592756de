"""Layers whose weight is not pruned, in 8 or 4 bits: linear layers, and a head that shares the embedding's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..kernels.packed_dense import PackedDense, quantize_dense
from ..linears import linear_weight
from .loaded_values import why_not_loaded
from .manifest import DENSE
from .packed_linear import PackedLinear
from .products import RowLimits
from .quantized_embedding import QuantizedEmbedding


class _Quantized(PackedLinear):
    """What both kinds of layers share: ``packed`` is a :class:`~ace_triton.kernels.packed_dense.PackedDense`."""

    absmax: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.absmax.dtype

    @property
    def pattern(self) -> str:
        return DENSE

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def group(self) -> int:
        """Number of inputs that share a scale."""
        packed = self.packed
        assert isinstance(packed, PackedDense)
        return packed.group

    def repacked(self, layer: nn.Module) -> QuantizedLinear:
        return QuantizedLinear.from_linear(layer, self.bits, self.group, self.limits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group={self.group}"
        )


class QuantizedLinear(_Quantized):
    """Computes y = x W^T + b from a weight of 8 or 4 bits that is not pruned.

    The buffers ``values`` and ``absmax`` (layout: :mod:`ace_triton.kernels.packed_dense`) work with ``state_dict``,
    ``model.to`` and ``deepcopy``. The weight is frozen. Gradients flow to the input and the bias.

    Attributes:
        in_features, out_features: as in ``nn.Linear``.
        bits: bits of a value.
        group: number of inputs that share a scale.
        bias: [out_features] or None.
        limits: numbers of rows that choose the product; None for the defaults of the device.
    """

    def __init__(self, packed: PackedDense, bias: nn.Parameter | None = None, limits: RowLimits | None = None) -> None:
        super().__init__()
        packed.check_tensors()
        self.out_features, self.in_features = packed.shape
        self.limits = limits
        self._group = packed.group
        self.register_buffer("values", packed.values)
        self.register_buffer("absmax", packed.absmax)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, layer: nn.Module, bits: int, group: int, limits: RowLimits | None = None) -> QuantizedLinear:
        """Quantize an ``nn.Linear`` or Conv1D: each weight is rounded to the nearest value. The bias is shared.

        Args:
            layer: the layer.
            bits: 8 or 4.
            group: number of inputs that share a scale, a multiple of 32.
            limits: numbers of rows that choose the product; None for the defaults of the device.

        Raises:
            ArgumentError: if ``layer`` is not linear, its dtype is not supported, it holds NaN or infinity, or bits or
                group are invalid.
        """
        weight = linear_weight(layer)
        if weight is None:
            raise ArgumentError(f"only nn.Linear and Conv1D can be quantized, got a {type(layer).__name__}")
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return cls(quantize_dense(weight.resolve_neg(), bits, group), bias, limits).train(layer.training)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        bits: int,
        group: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> QuantizedLinear:
        """Make a layer with uninitialized tensors, for a weight of ``shape`` (out_features, in_features)."""
        packed = PackedDense.empty(shape, bits, group, dtype=dtype, device=device)
        offset = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device)) if bias else None
        return cls(packed, offset)

    def _made(self) -> PackedDense:
        return PackedDense(self.values, self.absmax, (self.out_features, self.in_features), self._group)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As in ``nn.Module``, but for invalid values and those of other bits ``load_state_dict`` raises."""
        why_not = why_not_loaded(state_dict, prefix, rest[0], self.values, self.absmax, self.in_features)
        if why_not is not None:
            errors: list[str] = rest[-1]
            errors.append(why_not)
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TiedLinear(_Quantized):
    """An output head that multiplies by the weight of a :class:`QuantizedEmbedding`. It has no weight of its own.

    Args:
        embedding: the embedding, which is also elsewhere in the model; it is no submodule of this layer.
        bias: [out_features] or None.
        limits: numbers of rows that choose the product; None for the defaults of the device.
    """

    def __init__(
        self, embedding: QuantizedEmbedding, bias: nn.Parameter | None = None, limits: RowLimits | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = embedding.num_embeddings, embedding.embedding_dim
        self.limits = limits
        self._tied_to = (embedding,)  # In a tuple, so that it is not registered as a submodule.
        self.register_parameter("bias", bias)

    def repacked(self, layer: nn.Module) -> QuantizedLinear:
        raise ArgumentError(
            "a head that shares the embedding's weight cannot be changed alone: merge the adapter before packing"
        )

    @property
    def embedding(self) -> QuantizedEmbedding:
        """The embedding that has the weight."""
        return self._tied_to[0]

    @property
    def packed(self) -> PackedDense:
        return self.embedding.packed

    def _made(self) -> PackedDense:
        return self.embedding.packed

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """The embedding's values."""
        return self.embedding.values

    @property
    def absmax(self) -> torch.Tensor:  # type: ignore[override]
        """The embedding's scales."""
        return self.embedding.absmax
