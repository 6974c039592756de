"""Linear layers that store their weight packed and multiply with the packed weight; NMLinear is the one for n:m."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ..errors import ArgumentError, PackedWeightError
from ..kernels.memory import why_not_plain
from ..kernels.pack_nm import PackedNM, pack_nm
from ..kernels.pack_rows import unpack_rows
from ..kernels.packed_nm import check_meta, check_meta_dtype
from ..kernels.packed_rows import PackedRows
from ..kernels.quantize_nm import quantize_nm
from ..kernels.unpack_nm import unpack_nm
from ..linears import linear_weight
from ..solvers.quantize import GROUP
from .bound_calls import BoundCalls
from .dispatch import multiply
from .products import Packed, RowLimits
from .unpacked import unpacked_weight
from .weight import PackedWeight


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
    _bound: BoundCalls | None = None

    def __init__(self) -> None:
        super().__init__()
        self._packed: Packed | None = None

    @property
    def packed(self) -> Packed:
        """The packed weight for the kernels; it shares the buffers. It is made again if a buffer was replaced."""
        packed, buffers = self._packed, self._buffers
        if packed is None or any(getattr(packed, name) is not buffer for name, buffer in buffers.items()):
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
        raise NotImplementedError

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
        if self._bound is not None and not torch.compiler.is_compiling():
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
        elif _is_differentiated(rows) or (bias is not None and _is_differentiated(bias)):
            outputs = _Differentiable.apply(rows, bias, self.packed, self.limits)
        else:
            outputs = multiply(rows.resolve_neg(), self.packed, bias, self.limits)
        return outputs if tokens.dim() == 2 else outputs.view(*tokens.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """As in ``nn.Module``, but metadata change only their device, never their dtype."""
        meta, self._packed = self.meta, None
        super()._apply(fn, recurse)
        if self.meta.dtype != meta.dtype:
            self.meta = meta.to(self.meta.device)
        return self


class NMLinear(PackedLinear):
    """Computes y = x W^T + b from one packed copy of W, which is stored in ordinary buffers.

    The buffers ``values`` and ``meta``, and ``absmax`` of a quantized weight (layout:
    :mod:`ace_triton.kernels.packed_nm`), work with ``state_dict``, ``model.to`` and ``deepcopy``. Metadata are bits, so
    they keep their dtype when the module is cast, and ``load_state_dict`` refuses metadata that are damaged or were
    cast. The weight is frozen. Gradients flow to the input and the bias, in reverse and in forward mode.

    Each call chooses its product by the number of rows (:func:`~ace_triton.packed.dispatch.choose_product`).
    To use peft adapters: ``config._register_custom_module({NMLinear: peft.tuners.lora.Linear})``.

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
        if packed.absmax is None:
            self._bound = BoundCalls()
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
            n, m: n of every m inputs are kept.
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

    def _traced(self, tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _product(tokens, bias, *_parts(self._made()), *limits_as_arguments(self.limits))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As in ``nn.Module``, but a layer with invalid metadata is not loaded, and ``load_state_dict`` raises."""
        meta = state_dict.get(f"{prefix}meta")
        if meta is not None and meta.shape == self.meta.shape:
            try:
                check_meta_dtype(meta)
                # The code that fills an empty layer checks it after all tensors are loaded.
                if not (meta.is_meta or self.meta.is_meta) and why_not_plain(meta) is None:
                    check_meta(meta, self.n, self.m, self.packed.shape)
            except ValueError as error:
                errors: list[str] = rest[-1]
                errors.append(f"{prefix}meta: {error}")
                return
        values = state_dict.get(f"{prefix}values")
        if values is not None and values.is_floating_point() != self.values.is_floating_point():
            errors = rest[-1]
            errors.append(
                f"{prefix}values are {values.dtype}, but this layer has {self.values.dtype}: load the weights into a "
                "layer with the same bits"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.n}:{self.m}" + ("" if self.absmax is None else f", bits={self.bits}, group={self.group}")
        )


def _check_tokens(tokens: torch.Tensor, in_features: int, dtype: torch.dtype) -> None:
    if not tokens.dim() or tokens.shape[-1] != in_features or tokens.dtype != dtype:
        raise ArgumentError(f"tokens must be [..., {in_features}] {dtype}, got {tuple(tokens.shape)} {tokens.dtype}")


def _is_differentiated(tensor: torch.Tensor) -> bool:
    """True if derivatives flow through ``tensor``, in reverse or in forward mode."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def _parts(packed: PackedNM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, int, int, int]:
    """The packed weight as arguments of a torch operation; :func:`_of_parts` is the inverse."""
    return packed.values, packed.meta, packed.absmax, packed.n, packed.m, packed.group, packed.shape[1]


def _of_parts(
    values: torch.Tensor, meta: torch.Tensor, absmax: torch.Tensor | None, n: int, m: int, group: int, in_features: int
) -> PackedNM:
    return PackedNM(values, meta, n, m, (len(values), in_features), absmax, group)


def limits_as_arguments(limits: RowLimits | None) -> tuple[int | None, int | None, bool, str]:
    return (None, None, False, "") if limits is None else limits.flat()


@torch.library.custom_op("ace_triton::nm_linear", mutates_args=())
def _product(
    tokens: torch.Tensor,
    bias: torch.Tensor | None,
    values: torch.Tensor,
    meta: torch.Tensor,
    absmax: torch.Tensor | None,
    n: int,
    m: int,
    group: int,
    in_features: int,
    packed_rows: int | None,
    semi_structured_rows: int | None,
    second_copy: bool,
    others: str = "",
) -> torch.Tensor:
    """The product for tokens [n_tokens, in_features] as one operation that torch.compile does not trace into.

    The arguments from ``packed_rows`` on are :meth:`RowLimits.flat`; without ``packed_rows`` the device's defaults.
    """
    flat = semi_structured_rows, second_copy, others
    limits = None if packed_rows is None else RowLimits.from_flat(packed_rows, *flat)
    return multiply(tokens, _of_parts(values, meta, absmax, n, m, group, in_features), bias, limits)


@_product.register_fake
def _(tokens: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor, *_: Any) -> torch.Tensor:
    return tokens.new_empty(tokens.shape[0], values.shape[0])


@torch.library.custom_op("ace_triton::nm_linear_input_gradient", mutates_args=())
def _input_gradient(
    gradient: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor,
    absmax: torch.Tensor | None,
    n: int,
    m: int,
    group: int,
    in_features: int,
) -> torch.Tensor:
    """dL/dx = dL/dy W. The dense weight is unpacked for this call only."""
    return gradient @ unpack_nm(_of_parts(values, meta, absmax, n, m, group, in_features))


@torch.library.custom_op("ace_triton::unpack_nm", mutates_args=())
def _unpacked(
    values: torch.Tensor, meta: torch.Tensor, absmax: torch.Tensor | None, n: int, m: int, group: int, in_features: int
) -> torch.Tensor:
    """The dense weight, as one operation that torch.func does not trace into."""
    return unpack_nm(_of_parts(values, meta, absmax, n, m, group, in_features))


@torch.library.custom_op("ace_triton::unpack_rows", mutates_args=())
def _unpacked_rows(values: torch.Tensor, meta: torch.Tensor, starts: torch.Tensor, in_features: int) -> torch.Tensor:
    """The same for a weight with row starts."""
    return unpack_rows(PackedRows(values, meta, starts, (len(meta), in_features)))


def unpacked_operation(packed: Packed) -> torch.Tensor:
    """The dense weight, as one operation that torch.func does not trace into."""
    if isinstance(packed, PackedRows):
        return _unpacked_rows(packed.values, packed.meta, packed.starts, packed.shape[1])
    return _unpacked(*_parts(packed))


@_input_gradient.register_fake
def _(gradient: torch.Tensor, *parts: Any) -> torch.Tensor:
    return gradient.new_empty(*gradient.shape[:-1], parts[-1])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, values, meta, absmax, n, m, group, in_features, *_ = inputs
    ctx.save_for_backward(values, meta, absmax)
    ctx.pattern = n, m, group, in_features


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    of_tokens = of_bias = None
    if ctx.needs_input_grad[0]:
        of_tokens = _input_gradient(gradient, *ctx.saved_tensors, *ctx.pattern)
    if ctx.needs_input_grad[1]:
        of_bias = gradient.sum(0)
    return of_tokens, of_bias, *[None] * 11


_product.register_autograd(_backward, setup_context=_keep_for_backward)


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
        of_tokens = gradient @ unpacked_operation(ctx.packed) if ctx.needs_input_grad[0] else None
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
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in packed.tensors.values())
