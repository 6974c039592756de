"""The packed layouts as torch operations, which torch.compile and torch.func do not trace into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels.packed_dense import PackedDense
from ..kernels.packed_nm import PackedNM
from ..kernels.packed_rows import PackedRows
from .dispatch import multiply
from .products import Packed, RowLimits
from .unpacked import unpacked_weight


class Operations:
    """Registers the operations of a layout.

    ``ace_triton::<product>`` multiplies tokens [n_tokens, in_features], ``ace_triton::<product>_input_gradient``
    computes dL/dx = dL/dy W, and ``ace_triton::<unpacking>`` the dense weight. The dense weight is in memory for the
    call only.

    Args:
        product: name of the product.
        unpacking: name of the operation that unpacks.
        parts: a packed weight as arguments of an operation: their schema, first the tensors, last ``in_features``.
        taken_apart: gives the parts of a packed weight.
        made: makes a packed weight from its parts.
        rows_of: number of the tensor that has a row for each output.
    """

    def __init__(
        self,
        product: str,
        unpacking: str,
        parts: str,
        taken_apart: Callable[[Any], tuple[Any, ...]],
        made: Callable[..., Packed],
        rows_of: int = 0,
    ) -> None:
        n_parts, n_tensors = len(parts.split(",")), parts.count("Tensor")

        def multiplied(tokens: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
            limits = limits_of_arguments(*arguments[n_parts:])
            return multiply(tokens, made(*arguments[:n_parts]), bias, limits)

        def outputs_like(tokens: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
            return tokens.new_empty(tokens.shape[0], arguments[rows_of].shape[0])

        def input_gradient(gradient: torch.Tensor, *arguments: Any) -> torch.Tensor:
            return gradient @ unpacked_weight(made(*arguments))

        def tokens_like(gradient: torch.Tensor, *arguments: Any) -> torch.Tensor:
            return gradient.new_empty(*gradient.shape[:-1], arguments[-1])

        def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            ctx.save_for_backward(*inputs[2 : 2 + n_tensors])
            ctx.numbers, ctx.n_inputs = inputs[2 + n_tensors : 2 + n_parts], len(inputs)

        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            of_tokens = of_bias = None
            if ctx.needs_input_grad[0]:
                of_tokens = self._input_gradient(gradient, *ctx.saved_tensors, *ctx.numbers)
            if ctx.needs_input_grad[1]:
                of_bias = gradient.sum(0)
            return of_tokens, of_bias, *[None] * (ctx.n_inputs - 2)

        self._taken_apart = taken_apart
        self._product = _register(product, f"Tensor tokens, Tensor? bias, {parts}, {_LIMITS}", multiplied)
        self._product.register_fake(outputs_like)
        self._product.register_autograd(backward, setup_context=keep_for_backward)
        self._input_gradient = _register(f"{product}_input_gradient", f"Tensor gradient, {parts}", input_gradient)
        self._input_gradient.register_fake(tokens_like)
        self._unpacking = _register(unpacking, parts, lambda *arguments: unpacked_weight(made(*arguments)))

    def product(
        self, tokens: torch.Tensor, bias: torch.Tensor | None, packed: Packed, limits: RowLimits | None
    ) -> torch.Tensor:
        """The product for tokens [n_tokens, in_features]."""
        outputs: torch.Tensor = self._product(tokens, bias, *self._taken_apart(packed), *limits_as_arguments(limits))
        return outputs

    def unpacked(self, packed: Packed) -> torch.Tensor:
        """The dense weight."""
        weight: torch.Tensor = self._unpacking(*self._taken_apart(packed))
        return weight


_LIMITS = 'SymInt? packed_rows, SymInt? semi_structured_rows, bool second_copy, str others=""'
"""The schema of :meth:`RowLimits.flat`; without ``packed_rows`` the limits are the device's defaults."""


def _register(name: str, arguments: str, function: Callable[..., torch.Tensor]) -> torch.library.CustomOpDef:
    schema = f"({arguments}) -> Tensor"
    return torch.library.custom_op(f"ace_triton::{name}", function, mutates_args=(), schema=schema)


def limits_as_arguments(limits: RowLimits | None) -> tuple[int | None, int | None, bool, str]:
    """The limits as arguments of a torch operation; nothing for the defaults."""
    return (None, None, False, "") if limits is None else limits.flat()


def limits_of_arguments(
    packed_rows: int | None, semi_structured_rows: int | None, second_copy: bool, others: str = ""
) -> RowLimits | None:
    """The inverse of :func:`limits_as_arguments`."""
    return None if packed_rows is None else RowLimits.from_flat(packed_rows, semi_structured_rows, second_copy, others)


_OPERATIONS: dict[type, Operations] = {
    PackedNM: Operations(
        "nm_linear",
        "unpack_nm",
        "Tensor values, Tensor meta, Tensor? absmax, SymInt n, SymInt m, SymInt group, SymInt in_features",
        lambda packed: (
            *(packed.values, packed.meta, packed.absmax),
            *(packed.n, packed.m, packed.group, packed.shape[1]),
        ),
        lambda values, meta, absmax, n, m, group, in_features: PackedNM(
            values, meta, n, m, (len(values), in_features), absmax, group
        ),
    ),
    PackedRows: Operations(
        "rows_linear",
        "unpack_rows",
        "Tensor values, Tensor meta, Tensor starts, SymInt in_features",
        lambda packed: (packed.values, packed.meta, packed.starts, packed.shape[1]),
        lambda values, meta, starts, in_features: PackedRows(values, meta, starts, (len(meta), in_features)),
        rows_of=1,
    ),
    PackedDense: Operations(
        "quantized_linear",
        "unpack_dense",
        "Tensor values, Tensor absmax, SymInt group, SymInt in_features",
        lambda packed: (packed.values, packed.absmax, packed.group, packed.shape[1]),
        lambda values, absmax, group, in_features: PackedDense(values, absmax, (len(values), in_features), group),
    ),
}


def operations_of(packed: Packed) -> Operations:
    """The operations of a packed weight's layout."""
    return _OPERATIONS[type(packed)]
