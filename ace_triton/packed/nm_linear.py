"""NMLinear: a packed linear layer for n:m."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..kernels.memory import why_not_plain
from ..kernels.pack_nm import PackedNM, pack_nm
from ..kernels.packed_nm import check_meta, check_meta_dtype
from ..kernels.quantize_nm import quantize_nm
from ..linears import linear_weight
from ..solvers.quantize import GROUP
from .loaded_values import why_not_loaded
from .packed_linear import PackedLinear
from .products import RowLimits


class NMLinear(PackedLinear):
    """Computes y = x W^T + b from one packed copy of W, which is stored in ordinary buffers.

    The buffers ``values`` and ``meta``, and ``absmax`` of a quantized weight (layout:
    :mod:`ace_triton.kernels.packed_nm`), work with ``state_dict``, ``model.to`` and ``deepcopy``. Metadata are bits, so
    they keep their dtype when the module is cast. ``load_state_dict`` refuses metadata that are damaged or were cast,
    and values that no quantization gives. The weight is frozen. Gradients flow to the input and the bias, in reverse
    and in forward mode.

    Each call chooses its product by the number of rows (:func:`~ace_triton.packed.dispatch.choose_product`).
    To use peft adapters: ``config._register_custom_module({PackedLinear: peft.tuners.lora.Linear})``.

    Attributes:
        in_features, out_features: as in ``nn.Linear``.
        n, m: n of every m inputs are kept.
        bits: bits of a quantized value; None if the weight is not quantized.
        bias: [out_features] or None.
        limits: numbers of rows that choose the product; None for the defaults of the device.
    """

    absmax: torch.Tensor | None

    def __init__(self, packed: PackedNM, bias: nn.Parameter | None = None, limits: RowLimits | None = None) -> None:
        super().__init__()
        packed.check_tensors()
        self.out_features, self.in_features = packed.shape
        self.n, self.m = packed.n, packed.m
        self.group = packed.group
        self.limits = limits
        self.register_buffer("values", packed.values)
        self.register_buffer("meta", packed.meta)
        self.register_buffer("absmax", packed.absmax)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        n: int,
        m: int,
        limits: RowLimits | None = None,
        *,
        bits: int | None = None,
        group: int = GROUP,
    ) -> NMLinear:
        """Pack an ``nn.Linear`` or Conv1D. The bias is shared, not copied.

        Args:
            layer: the layer.
            n: inputs kept of every m.
            m: size of a group of inputs.
            limits: numbers of rows that choose the product; None for the defaults of the device.
            bits: 8 or 4 to round the kept weights to that many bits; None to keep them.
            group: for ``bits``, the number of inputs that share a scale, a multiple of 32.

        Raises:
            ArgumentError: if ``layer`` is not linear, its shape or dtype cannot be packed, or bits or group are
                invalid.
            PatternError: if a group has more than n non-zeros.
        """
        weight = linear_weight(layer)
        if weight is None:
            raise ArgumentError(f"only nn.Linear and Conv1D can be packed, got a {type(layer).__name__}")
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        packed = pack_nm(weight.resolve_neg().contiguous(), n, m)
        if bits is not None:
            packed = quantize_nm(packed, bits, group)
        return cls(packed, bias, limits).train(layer.training)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        n: int,
        m: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        bits: int | None = None,
        group: int = 0,
    ) -> NMLinear:
        """Make a layer with uninitialized tensors, for a weight of ``shape`` (out_features, in_features)."""
        packed = PackedNM.empty(shape, n, m, dtype=dtype, device=device, bits=bits, group=group)
        offset = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device)) if bias else None
        return cls(packed, offset)

    @property
    def bits(self) -> int | None:
        """Bits of a quantized value; None if the weight is not quantized."""
        return self._made().bits

    def _made(self) -> PackedNM:
        shape = (self.out_features, self.in_features)
        return PackedNM(self.values, self.meta, self.n, self.m, shape, self.absmax, self.group)

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype if self.absmax is None else self.absmax.dtype

    def repacked(self, layer: nn.Module) -> NMLinear:
        return NMLinear.from_linear(layer, self.n, self.m, self.limits, bits=self.bits, group=self.group or GROUP)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As in ``nn.Module``, but invalid metadata or values are not loaded, and ``load_state_dict`` raises."""
        meta = state_dict.get(f"{prefix}meta")
        if isinstance(meta, torch.Tensor) and meta.shape == self.meta.shape:
            try:
                check_meta_dtype(meta)
                # The code that fills an empty layer checks it after all tensors are loaded.
                if not (meta.is_meta or self.meta.is_meta) and why_not_plain(meta) is None:
                    check_meta(meta, self.n, self.m, self.packed.shape)
            except ValueError as error:
                errors: list[str] = rest[-1]
                errors.append(f"{prefix}meta: {error}")
                return
        why_not = why_not_loaded(state_dict, prefix, rest[0], self.values, self.absmax, self._made().kept_of_a_row)
        if why_not is not None:
            errors = rest[-1]
            errors.append(why_not)
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.n}:{self.m}" + ("" if self.absmax is None else f", bits={self.bits}, group={self.group}")
        )
