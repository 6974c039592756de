"""Linear layers that store their weight packed and multiply with the packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ..errors import ArgumentError, PackedWeightError
from ..kernels.written import version_of
from .bound_calls import BoundCalls
from .dense_copy import dense_copy_of, free_dense_copy
from .dispatch import multiply
from .operations import operations_of
from .products import Packed, RowLimits
from .unpacked import unpacked_weight
from .weight import PackedWeight

if TYPE_CHECKING:
    from .fused import Fused


class PackedLinear(nn.Module):
    """Computes y = x W^T + b from one packed copy of W, which is stored in ordinary buffers.

    Each call chooses its product by the number of rows (:func:`~ace_triton.packed.dispatch.choose_product`). The weight
    is frozen. Gradients flow to the input and the bias, in reverse and in forward mode.

    Attributes:
        in_features, out_features: as in ``nn.Linear``.
        values, meta: the kept weights, and one bit per weight.
        bias: [out_features] or None.
        limits: numbers of rows that choose the product; None for the defaults of the device.
    """

    in_features: int
    out_features: int
    values: torch.Tensor
    meta: torch.Tensor
    bias: nn.Parameter | None
    limits: RowLimits | None
    _bound: BoundCalls
    _fused: Fused | None = None

    def __init__(self) -> None:
        super().__init__()
        self._packed: Packed | None = None
        self._bound = BoundCalls()

    def __setattr__(self, name: str, value: Any) -> None:
        """As in ``nn.Module``; a replaced buffer, and a dense copy that the limits do not use, are freed at once."""
        if name in self.__dict__.get("_buffers", ()):
            self.__dict__["_packed"] = None
            if self._fused is not None:
                self._fused.part()
        if name == "limits":
            before = self.__dict__.get(name)
            if before is not None and before.dense_copy and not (value is not None and value.dense_copy):
                free_dense_copy(self.packed)
        super().__setattr__(name, value)

    @property
    def packed(self) -> Packed:
        """The packed weight for the kernels; it shares the buffers. It is made again if a buffer was replaced."""
        packed, buffers = self._packed, self._buffers
        if packed is None or any(getattr(packed, name, buffer) is not buffer for name, buffer in buffers.items()):
            packed = self._packed = self._made()
        return packed

    def _made(self) -> Packed:
        """The packed weight, from the buffers."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight, and of the tokens."""
        return self.values.dtype

    @property
    def pattern(self) -> str:
        """The pattern n:m as text, or "unstructured" if the zeros follow no pattern."""
        raise NotImplementedError

    def repacked(self, layer: nn.Module) -> PackedLinear:
        """A linear layer with the same zeros, packed as this one is."""
        raise NotImplementedError

    def _traced(self, tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product for tokens [n_tokens, in_features] as an operation that torch.compile does not trace into."""
        packed = self._made()
        return operations_of(packed).product(tokens, bias, packed, self.limits)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, read-only: shape, dtype and device cost nothing, reading it unpacks, writing raises."""
        return PackedWeight(self.packed)

    def unpack(self) -> torch.Tensor:
        """The dense weight [out_features, in_features]: as before packing, bit for bit, or rounded if quantized."""
        return unpacked_weight(self.packed)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute outputs [..., out_features] from tokens [..., in_features].

        Raises:
            ArgumentError: if the tokens do not have ``in_features`` columns, or do not have the weight's dtype outside
                autocast.
        """
        if not isinstance(tokens, torch.Tensor):
            raise ArgumentError(f"tokens must be a tensor [..., {self.in_features}], got {type(tokens).__name__}")
        if self.limits is not None and self.limits.dense_copy and not torch.compiler.is_compiling():
            copied = self._by_copy(tokens, self.limits)
            if copied is not None:
                return copied
        fused = self._fused  # Another thread may take the group apart.
        if fused is not None and not torch.compiler.is_compiling():
            part = fused.outputs(self, tokens)
            if part is not None:
                return part
        if not torch.compiler.is_compiling():
            bound = self._bound.outputs(self, tokens)
            if bound is not None:
                return bound
        kind = tokens.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self(tokens.to(self.dtype)).to(torch.get_autocast_dtype(kind))
        _check_tokens(tokens, self.in_features, self.dtype)
        rows, bias = tokens.reshape(-1, self.in_features), self._parameters["bias"]
        if torch.compiler.is_compiling():
            outputs = self._traced(rows, bias)
        elif _is_transformed(rows, bias):
            outputs = _Differentiable.apply(rows, bias, self.packed, self.limits)
        else:
            outputs = multiply(rows.resolve_neg(), self.packed, bias, self.limits)
        return outputs if tokens.dim() == 2 else outputs.view(*tokens.shape[:-1], self.out_features)

    def _by_copy(self, tokens: torch.Tensor, limits: RowLimits) -> torch.Tensor | None:
        """The outputs by a dense copy of the weight, with few checks; None if the usual way must take the call."""
        width = self.in_features
        if (
            type(tokens) is not torch.Tensor
            or not tokens.dim()
            or torch.is_grad_enabled()
            or tokens.device.type != "cpu"
            or not tokens.numel() > limits.packed * width
            or tokens.shape[-1] != width
            or tokens.dtype != self.dtype
            or tokens.is_neg()
            or limits.others
            or limits.semi_structured is not None
            or torch.is_autocast_enabled("cpu")
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        packed = self.packed
        if not packed.values.is_cpu:
            return None
        return torch.nn.functional.linear(tokens, dense_copy_of(packed), self._parameters["bias"])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """As in ``nn.Module``, but integers (metadata, quantized values) keep their dtype."""
        stored = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self._packed = None
        if self._fused is not None:
            self._fused.part()
        super()._apply(fn, recurse)
        for name, buffer in stored.items():
            applied = getattr(self, name)
            if not buffer.is_floating_point() and applied.dtype != buffer.dtype:
                setattr(self, name, buffer.to(applied.device))
        return self


def _check_tokens(tokens: torch.Tensor, in_features: int, dtype: torch.dtype) -> None:
    if not tokens.dim() or tokens.shape[-1] != in_features or tokens.dtype != dtype:
        raise ArgumentError(f"tokens must be [..., {in_features}] {dtype}, got {tuple(tokens.shape)} {tokens.dtype}")


def _is_transformed(tokens: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True if derivatives flow through a call, or a transform such as vmap wraps its tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    return _is_differentiated(tokens) or (bias is not None and _is_differentiated(bias))


def _is_differentiated(tensor: torch.Tensor) -> bool:
    """True if derivatives flow through ``tensor``, in reverse or in forward mode."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


class _Differentiable(torch.autograd.Function):
    """The product outside torch.compile, with gradients in reverse and forward mode and under torch.func.

    The packed weight is passed as one object, because torch.func would wrap tensors.
    """

    @staticmethod
    def forward(
        tokens: torch.Tensor, bias: torch.Tensor | None, packed: Packed, limits: RowLimits | None
    ) -> torch.Tensor:
        return multiply(tokens.resolve_neg(), packed, bias, limits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        tokens, _, ctx.packed, ctx.limits = inputs
        ctx.n_tokens, ctx.versions = len(tokens), _versions(ctx.packed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.versions != _versions(ctx.packed):
            raise PackedWeightError(
                "a packed weight was written between the forward and the backward pass: run the forward pass again"
            )
        of_tokens = gradient @ operations_of(ctx.packed).unpacked(ctx.packed) if ctx.needs_input_grad[0] else None
        return of_tokens, gradient.sum(0) if ctx.needs_input_grad[1] else None, None, None

    @staticmethod
    def jvp(ctx: Any, tokens: torch.Tensor | None, bias: torch.Tensor | None, *_: None) -> torch.Tensor:
        if tokens is None:
            assert bias is not None
            return bias.expand(ctx.n_tokens, -1)
        return _Differentiable.apply(tokens, bias, ctx.packed, ctx.limits)

    @staticmethod
    def vmap(
        info: Any,
        dimensions: tuple[int | None, ...],
        tokens: torch.Tensor,
        bias: torch.Tensor | None,
        packed: Packed,
        limits: RowLimits | None,
    ) -> tuple[torch.Tensor, int]:
        of_tokens, of_bias, *_ = dimensions
        tokens = tokens[None] if of_tokens is None else tokens.movedim(of_tokens, 0)
        outputs = _Differentiable.apply(tokens.flatten(0, 1), None, packed, limits).unflatten(0, tokens.shape[:2])
        if bias is not None:
            outputs = outputs + (bias if of_bias is None else bias.movedim(of_bias, 0)[:, None])
        return outputs, 0


def _versions(packed: Packed) -> tuple[int, ...]:
    """Version counters of the packed tensors; 0 for inference tensors, which have none."""
    return tuple(version_of(tensor) for tensor in packed.tensors.values())
