"""Experts of a mixture whose weights are stacked in one 3-D parameter, as linear layers of their own."""

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
    """

    def __init__(self, stack: nn.Parameter, index: int, *, transposed: bool) -> None:
        nn.Module.__init__(self)
        matrix = stack.detach()[index]
        self.weight = nn.Parameter(matrix.t() if transposed else matrix, requires_grad=False)
        self.out_features, self.in_features = self.weight.shape
        self.register_parameter("bias", None)


@dataclass(frozen=True)
class Stack:
    """A parameter that holds the same matrix of every expert of a mixture.

    Attributes:
        name: its dotted name in the model.
        weight: [n_experts, out_features, in_features], or [n_experts, in_features, out_features].
        concatenated: False where gate and up alternate in one matrix.
    """

    name: str
    weight: nn.Parameter
    concatenated: bool = True

    def expert_name(self, index: int) -> str:
        """``...experts.7.down_proj`` for ``...experts.down_proj``."""
        module, _, matrix = self.name.rpartition(".")
        return f"{module}.{index}.{matrix}"

    def linears(self, *, transposed: bool) -> dict[str, ExpertLinear]:
        """Its experts by name; ``transposed`` for a stack [n_experts, in_features, out_features]."""
        return {
            self.expert_name(i): ExpertLinear(self.weight, i, transposed=transposed)
            for i in range(self.weight.shape[0])
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


def find_layouts(run: Callable[[], object], stacks: Iterable[Stack]) -> dict[str, bool]:
    """How a model multiplies by its stacks: name -> whether they are stored [n_experts, in, out].

    Args:
        run: a forward of the model that reaches every block, with eager experts.
        stacks: what to look for; one that no product reads is not in the result.
    """
    owners = {matrix.data_ptr(): stack for stack in stacks for matrix in stack.weight.detach().unbind(0)}
    found: dict[str, bool] = {}

    def look(tokens: torch.Tensor, weight: torch.Tensor, transposed: bool, output: torch.Tensor) -> None:
        stack = owners.get(weight.data_ptr())
        if stack is not None and weight.shape[-2:] == stack.weight.shape[-2:]:
            found[stack.name] = transposed

    with _Products(look):
        run()
    return found


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
