"""NMLinear: a linear layer that holds its n:m weight packed, and multiplies from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .dispatch import RowLimits, multiply
from .kernels.pack_nm import PackedNM, pack_nm
from .kernels.packed_nm import WORD
from .kernels.unpack_nm import unpack_nm
from .packed_weight import PackedWeight
from .prune import linear_weight


class NMLinear(nn.Module):
    """y = x W^T + b with one packed copy of W, in plain buffers.

    ``values`` and ``meta`` (layout: :mod:`ace_triton.kernels.packed_nm`) go where other buffers go:
    ``state_dict``, ``model.to``, ``deepcopy``. The weight is frozen; gradients flow to the input and the bias.
    A call picks its product by its number of rows (:func:`~ace_triton.dispatch.choose_product`). For adapters of
    peft: ``config._register_custom_module({NMLinear: peft.tuners.lora.Linear})``.

    Attributes:
        in_features, out_features: as of ``nn.Linear``.
        n, m: n of every m inputs are kept.
        bias: [out_features] or None.
        limits: number of rows from which on another product is taken; None for the device's own.
    """

    values: torch.Tensor
    meta: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedNM, bias: nn.Parameter | None = None, limits: RowLimits | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.n, self.m = packed.n, packed.m
        self.limits = limits
        self.register_buffer("values", packed.values)
        self.register_buffer("meta", packed.meta)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, layer: nn.Module, n: int, m: int, limits: RowLimits | None = None) -> NMLinear:
        """Pack an ``nn.Linear`` or Conv1D; the bias is shared, not copied.

        Raises:
            ValueError: no linear layer, or a shape or dtype that cannot be packed.
            PatternError: a group with more than n non-zeros.
        """
        weight = linear_weight(layer)
        if weight is None:
            raise ValueError(f"a {type(layer).__name__} is no nn.Linear or Conv1D: only linear layers can be packed")
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return cls(pack_nm(weight.contiguous(), n, m), bias, limits).train(layer.training)

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
    ) -> NMLinear:
        """A layer without numbers yet, for a weight of ``shape`` [out_features, in_features]."""
        rows, cols = shape
        values = torch.empty(rows, cols * n // m, dtype=dtype, device=device)
        meta = torch.empty(rows, -(-cols // WORD), dtype=torch.int32, device=device)
        offset = nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None
        return cls(PackedNM(values, meta, n, m, (rows, cols)), offset)

    @property
    def packed(self) -> PackedNM:
        """The weight as the kernels take it; shares the buffers."""
        return PackedNM(self.values, self.meta, self.n, self.m, (self.out_features, self.in_features))

    @property
    def weight(self) -> torch.Tensor:
        """Stands for the dense weight: shape, dtype and device are free, reading it unpacks, writing raises."""
        return PackedWeight(self.packed)

    def unpack(self) -> torch.Tensor:
        """The weight [out_features, in_features], bit for bit what was packed."""
        return unpack_nm(self.packed)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Outputs [..., out_features] of tokens [..., in_features].

        Raises:
            ValueError: tokens of another width, or of another dtype than the weight's outside autocast.
        """
        kind = tokens.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self(tokens.to(self.values.dtype)).to(torch.get_autocast_dtype(kind))
        learns = tokens.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if torch.compiler.is_compiling() or (learns and torch.is_grad_enabled()):
            return _product(
                tokens, self.values, self.meta, self.bias, self.n, self.m, self.in_features, *_arguments(self.limits)
            )
        return _multiply(tokens, self.packed, self.bias, self.limits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.n}:{self.m}"
        )


def _multiply(
    tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None, limits: RowLimits | None
) -> torch.Tensor:
    out_features, in_features = packed.shape
    if tokens.shape[-1] != in_features or tokens.dtype != packed.values.dtype:
        raise ValueError(
            f"tokens must be [..., {in_features}] {packed.values.dtype}, got {tuple(tokens.shape)} {tokens.dtype}"
        )
    outputs = multiply(tokens.reshape(-1, in_features), packed, bias, limits)
    return outputs.view(*tokens.shape[:-1], out_features)


def _arguments(limits: RowLimits | None) -> tuple[int | None, int | None, bool]:
    return (None, None, False) if limits is None else (limits.packed, limits.semi_structured, limits.second_copy)


@torch.library.custom_op("ace_triton::nm_linear", mutates_args=())
def _product(
    tokens: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    m: int,
    in_features: int,
    packed_rows: int | None,
    semi_structured_rows: int | None,
    second_copy: bool,
) -> torch.Tensor:
    """The product as one operation, which torch.compile sees nothing of and autograd can go back through."""
    limits = None if packed_rows is None else RowLimits(packed_rows, semi_structured_rows, second_copy)
    return _multiply(tokens, PackedNM(values, meta, n, m, (len(values), in_features)), bias, limits)


@_product.register_fake
def _(tokens: torch.Tensor, values: torch.Tensor, *_: Any) -> torch.Tensor:
    return tokens.new_empty(*tokens.shape[:-1], values.shape[0])


@torch.library.custom_op("ace_triton::nm_linear_input_gradient", mutates_args=())
def _input_gradient(
    gradient: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, n: int, m: int, in_features: int
) -> torch.Tensor:
    """dL/dx = dL/dy W, by way of the dense weight, which lives as long as this call."""
    return gradient @ unpack_nm(PackedNM(values, meta, n, m, (len(values), in_features)))


@_input_gradient.register_fake
def _(
    gradient: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, n: int, m: int, in_features: int
) -> torch.Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, values, meta, _, n, m, in_features, *_ = inputs
    ctx.save_for_backward(values, meta)
    ctx.pattern = n, m, in_features


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    values, meta = ctx.saved_tensors
    of_tokens = of_bias = None
    if ctx.needs_input_grad[0]:
        of_tokens = _input_gradient(gradient, values, meta, *ctx.pattern)
    if ctx.needs_input_grad[3]:
        of_bias = gradient.flatten(0, -2).sum(0)
    return of_tokens, None, None, of_bias, *[None] * 6


_product.register_autograd(_backward, setup_context=_keep_for_backward)
