"""RowsLinear: a packed linear layer for weights whose zeros follow no pattern."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..kernels.memory import why_not_plain
from ..kernels.pack_rows import pack_rows
from ..kernels.packed_nm import WORD, check_meta_dtype
from ..kernels.packed_rows import UNSTRUCTURED, PackedRows
from ..linears import linear_weight
from .packed_linear import PackedLinear
from .products import RowLimits


class RowsLinear(PackedLinear):
    """A packed layer that stores the non-zeros of its weight, as many as each row has.

    As :class:`~ace_triton.packed.nm_linear.NMLinear`, with one more buffer, ``starts`` (layout:
    :mod:`ace_triton.kernels.packed_rows`).

    Attributes:
        in_features, out_features: as in ``nn.Linear``.
        bias: [out_features] or None.
        limits: numbers of rows that choose the product; None for the defaults of the device.
    """

    starts: torch.Tensor

    def __init__(self, packed: PackedRows, bias: nn.Parameter | None = None, limits: RowLimits | None = None) -> None:
        super().__init__()
        packed.check_tensors()
        self.out_features, self.in_features = packed.shape
        self.limits = limits
        self.register_buffer("values", packed.values)
        self.register_buffer("meta", packed.meta)
        self.register_buffer("starts", packed.starts)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, layer: nn.Module, limits: RowLimits | None = None) -> RowsLinear:
        """Pack the non-zeros of an ``nn.Linear`` or Conv1D. The bias is shared, not copied.

        Raises:
            ArgumentError: if ``layer`` is not linear, or its dtype cannot be packed.
        """
        weight = linear_weight(layer)
        if weight is None:
            raise ArgumentError(f"only nn.Linear and Conv1D can be packed, got a {type(layer).__name__}")
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return cls(pack_rows(weight.detach().resolve_neg().contiguous()), bias, limits).train(layer.training)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        n_values: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> RowsLinear:
        """Make a layer with uninitialized tensors, for a weight of ``shape`` (out_features, in_features)."""
        rows, cols = shape
        values = torch.empty(n_values, dtype=dtype, device=device)
        meta = torch.empty(rows, -(-cols // WORD), dtype=torch.int32, device=device)
        starts = torch.empty(rows + 1, dtype=torch.int64, device=device)
        offset = nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None
        return cls(PackedRows(values, meta, starts, shape), offset)

    def _made(self) -> PackedRows:
        return PackedRows(self.values, self.meta, self.starts, (self.out_features, self.in_features))

    @property
    def pattern(self) -> str:
        return UNSTRUCTURED

    def repacked(self, layer: nn.Module) -> RowsLinear:
        return RowsLinear.from_linear(layer, self.limits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As in ``nn.Module``, but a layer with invalid metadata is not loaded, and ``load_state_dict`` raises.

        The number of values may be another than the layer's, because it depends on the zeros.
        """
        values, meta, starts = (state_dict.get(f"{prefix}{name}") for name in ("values", "meta", "starts"))
        if values is not None and meta is not None and starts is not None:
            errors: list[str] = rest[-1]
            try:
                check_meta_dtype(meta)
                # The code that fills an empty layer checks it after all tensors are loaded.
                there = (values, meta, starts, self.meta)
                if not any(tensor.is_meta for tensor in there) and all(why_not_plain(t) is None for t in there[:3]):
                    PackedRows(values, meta, starts, self.packed.shape).check()
                    if values.shape != self.values.shape:
                        self.values = self.values.new_empty(values.shape)
            except ValueError as error:
                errors.append(f"{prefix}meta: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        kept = self.values.numel() / max(1, self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={kept:.1%}"
        )
