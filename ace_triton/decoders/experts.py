"""Presents experts whose weights are stacked in one parameter as separate linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset(
    {torch.matmul, torch.mm, torch.bmm}
    | {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm}
)
"""Products whose second factor is [in_features, out_features]. That of F.linear is [out_features, in_features]."""


class ExpertLinear(nn.Linear):
    """One expert of a stack. Its weight [out_features, in_features] is a view, so pruning it prunes the stack.

    The layer has no bias. If a mixture has biases, it adds them after the product, so collected outputs exclude them.

    Args:
        stack: the stack.
        matrix: gives a view of the stack, [out_features, in_features], or [in_features, out_features] if
            ``transposed``.
        transposed: True if the view is [in_features, out_features].
    """

    def __init__(self, stack: Stack, matrix: Callable[[], torch.Tensor], *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.stack = stack
        self._matrix = (lambda: matrix().t()) if transposed else matrix
        self.weight = nn.Parameter(self._matrix(), requires_grad=False)
        self.out_features, self.in_features = self.weight.shape
        self.register_parameter("bias", None)

    def view_stack(self) -> None:
        """View the stack's present memory, after the stack was moved."""
        self.weight.data = self._matrix()

    @property
    def offset(self) -> int:
        """Where the expert begins in its stack, in bytes. It stays the same if the stack is moved."""
        matrix, stack = self._matrix(), self.stack.weight
        return int(matrix.storage_offset() - stack.storage_offset()) * stack.element_size()


@dataclass(frozen=True)
class Layout:
    """How the matrices of a stack are stored.

    Attributes:
        rows: number of rows of one matrix.
        transposed: True if a matrix is [in_features, out_features].
    """

    rows: int
    transposed: bool


@dataclass(frozen=True)
class Stack:
    """A parameter that contains one matrix of every expert of a mixture.

    Attributes:
        name: dotted name in the model.
        weight: [n_experts, rows, columns]; or [n_experts * rows, columns], one matrix below the other (DBRX).
        concatenated: False if gate and up are interleaved in one matrix.
    """

    name: str
    weight: nn.Parameter
    concatenated: bool = True

    def expert_name(self, index: int) -> str:
        """Name of an expert: ``...experts.7.down_proj`` for the stack ``...experts.down_proj``."""
        module, _, matrix = self.name.rpartition(".")
        return f"{module}.{index}.{matrix}"

    def linears(self, *, transposed: bool, rows: int | None = None) -> dict[str, ExpertLinear]:
        """The experts as linear layers, by name.

        Args:
            transposed: True if a matrix is [in_features, out_features].
            rows: number of rows of one matrix. Needed only for a weight of two dimensions.
        """

        def matrices() -> torch.Tensor:
            weight = self.weight.detach()
            return weight if rows is None or weight.dim() == 3 else weight.unflatten(0, (-1, rows))

        return {
            self.expert_name(index): ExpertLinear(self, partial(lambda i: matrices()[i], index), transposed=transposed)
            for index in range(len(matrices()))
        }


class _Products(TorchFunctionMode):
    """Calls ``report(inputs, weight, transposed, outputs)`` for each matrix product.

    ``transposed`` is True if ``weight`` is [..., in_features, out_features].
    """

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
    """Find the layout of stacks from the matrix products in a forward of the model.

    Args:
        run: runs a forward of the model that reaches every block, with eager experts.
        stacks: stacks, and weights of two dimensions that may be stacks.

    Returns:
        layouts by name of the stack. A stack that no product reads has no entry. A weight of two dimensions has an
        entry only if a product reads one of several equal parts of its rows.
    """
    known = list(stacks)
    found: dict[str, Layout] = {}

    def find(tokens: torch.Tensor, weight: torch.Tensor, transposed: bool, output: torch.Tensor) -> None:
        memory = weight.untyped_storage().data_ptr()
        for stack in known:
            # Read each time: a store of weights may move a stack while its block runs.
            if stack.weight.untyped_storage().data_ptr() == memory:
                layout = _layout(stack.weight, weight, transposed)
                if layout is not None:
                    found[stack.name] = layout

    with _Products(find):
        run()
    return found


def _layout(stack: torch.Tensor, factor: torch.Tensor, transposed: bool) -> Layout | None:
    """The layout of a stack if ``factor`` is one or more of its matrices, else None.

    Args:
        stack: the weight of the stack.
        factor: second factor of a product.
        transposed: True if ``factor`` is [..., in_features, out_features].
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


def observe_experts(
    layers: Mapping[str, nn.Module], report: Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
) -> AbstractContextManager[object]:
    """A context in which ``report(layer, inputs, outputs)`` is called for each product with an expert of ``layers``.

    Without experts in ``layers`` the context does nothing, because observing adds a call to every torch function.
    """
    stacks: dict[nn.Parameter, dict[int, ExpertLinear]] = {}
    for layer in layers.values():
        if isinstance(layer, ExpertLinear):
            stacks.setdefault(layer.stack.weight, {})[layer.offset] = layer

    def expert_at(address: int) -> ExpertLinear | None:
        # Read each time: a store of weights may move a stack while its block runs.
        offsets = ((address - stack.data_ptr(), experts) for stack, experts in stacks.items())
        return next((experts[offset] for offset, experts in offsets if offset in experts), None)

    def find(tokens: torch.Tensor, weight: torch.Tensor, transposed: bool, output: torch.Tensor) -> None:
        if weight.dim() not in (2, 3):
            return
        stacked = weight.dim() == 3
        for index, matrix in enumerate(weight.unbind(0) if stacked else (weight,)):
            layer = expert_at(matrix.data_ptr())
            if layer is None or matrix.shape != (layer.weight.t() if transposed else layer.weight).shape:
                return
            report(layer, tokens[index] if stacked else tokens, output[index] if stacked else output)

    return _Products(find) if stacks else nullcontext()
