"""Experts of a mixture whose weights are stacked in one parameter, as linear layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset(
    {torch.matmul, torch.mm, torch.bmm}
    | {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm}
)
"""Products with a second factor [in, out]; that of F.linear is [out, in]."""


class ExpertLinear(nn.Linear):
    """One expert's share of a stack: weight [out_features, in_features] is a view of it, so pruned with it.

    The stack's own bias, where the mixture has one, is added elsewhere: outputs are seen without it.

    Args:
        matrix: a view of the stack, [out_features, in_features], or [in_features, out_features] if ``transposed``.
    """

    def __init__(self, matrix: torch.Tensor, *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(matrix.t() if transposed else matrix, requires_grad=False)
        self.out_features, self.in_features = self.weight.shape
        self.register_parameter("bias", None)


@dataclass(frozen=True)
class Layout:
    """How the matrices of a stack are stored.

    Attributes:
        rows: of one matrix.
        transposed: True if a matrix is [in_features, out_features].
    """

    rows: int
    transposed: bool


@dataclass(frozen=True)
class Stack:
    """A parameter that holds the same matrix of every expert of a mixture.

    Attributes:
        name: its dotted name in the model.
        weight: [n_experts, rows, columns]; or [n_experts * rows, columns], one matrix below the other (DBRX).
        concatenated: False where gate and up alternate in one matrix.
    """

    name: str
    weight: nn.Parameter
    concatenated: bool = True

    def expert_name(self, index: int) -> str:
        """``...experts.7.down_proj`` for ``...experts.down_proj``."""
        module, _, matrix = self.name.rpartition(".")
        return f"{module}.{index}.{matrix}"

    def linears(self, *, transposed: bool, rows: int | None = None) -> dict[str, ExpertLinear]:
        """Its experts by name.

        Args:
            transposed: True if a matrix is [in_features, out_features].
            rows: of one matrix, for a weight of two dimensions.
        """
        weight = self.weight.detach()
        matrices = weight if rows is None or weight.dim() == 3 else weight.unflatten(0, (-1, rows))
        return {
            self.expert_name(index): ExpertLinear(matrix, transposed=transposed)
            for index, matrix in enumerate(matrices.unbind(0))
        }


class _Products(TorchFunctionMode):
    """Reports every matrix product, as (inputs, weight, whether that is [..., in, out], outputs)."""

    def __init__(self, report: Callable[[torch.Tensor, torch.Tensor, bool, torch.Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        transposed = func in PRODUCTS
        if (transposed or func is F.linear) and len(args) >= 2 and isinstance(args[1], torch.Tensor):
            self._report(args[0], args[1], transposed, output)
        return output


def find_layouts(run: Callable[[], object], stacks: Iterable[Stack]) -> dict[str, Layout]:
    """How a model multiplies by its stacks, by name; a stack that no product reads has no entry.

    Args:
        run: a forward of the model that reaches every block, with eager experts.
        stacks: stacks, and weights of two dimensions that may be: they have an entry if a product reads an equal part
            of their rows.
    """
    by_memory: dict[int, list[Stack]] = {}
    for stack in stacks:
        by_memory.setdefault(stack.weight.untyped_storage().data_ptr(), []).append(stack)
    found: dict[str, Layout] = {}

    def look(tokens: torch.Tensor, weight: torch.Tensor, transposed: bool, output: torch.Tensor) -> None:
        for stack in by_memory.get(weight.untyped_storage().data_ptr(), ()):
            layout = _layout(stack.weight, weight, transposed)
            if layout is not None:
                found[stack.name] = layout

    with _Products(look):
        run()
    return found


def _layout(stack: torch.Tensor, factor: torch.Tensor, transposed: bool) -> Layout | None:
    """The layout of a stack of which ``factor`` is one matrix or more; None if it is none of its matrices.

    Args:
        factor: second factor of a product, [..., in_features, out_features] if ``transposed``.
    """
    if factor.dim() not in (2, 3):
        return None
    stored = factor if factor.stride()[-2:] == stack.stride()[-2:] else factor.transpose(-1, -2)
    rows, columns = stored.shape[-2:]
    if stored.stride()[-2:] != stack.stride()[-2:] or columns != stack.shape[-1]:
        return None
    if stack.dim() == 3:
        spacing, count = stack.stride(0), stack.shape[0] if rows == stack.shape[1] else 0
    else:
        spacing, count = rows * stack.stride(0), stack.shape[0] // rows if stack.shape[0] % rows == 0 else 0
    start = stored.storage_offset() - stack.storage_offset()
    if count < 4 - stack.dim() or start % spacing or not 0 <= start // spacing < count:
        return None
    return Layout(rows, transposed == (stored is factor))


def watch_experts(
    layers: Mapping[str, nn.Module], see: Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
) -> AbstractContextManager[object]:
    """A context in which ``see(layer, inputs, outputs)`` is called for each product with an expert of ``layers``.

    Where there is none nothing is watched: every torch function costs a call more in there.
    """
    experts = {layer.weight.data_ptr(): layer for layer in layers.values() if isinstance(layer, ExpertLinear)}

    def look(tokens: torch.Tensor, weight: torch.Tensor, transposed: bool, output: torch.Tensor) -> None:
        if weight.dim() not in (2, 3):
            return
        stacked = weight.dim() == 3
        for index, matrix in enumerate(weight.unbind(0) if stacked else (weight,)):
            layer = experts.get(matrix.data_ptr())
            if layer is None or matrix.shape != (layer.weight.t() if transposed else layer.weight).shape:
                return
            see(layer, tokens[index] if stacked else tokens, output[index] if stacked else output)

    return _Products(look) if experts else nullcontext()
