"""Experts of a mixture, each a layer of its own, where their module had them stacked in one parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..decoders.experts import PRODUCTS, ExpertLinear, Stack

EAGER = "eager"


class ExpertStack(nn.Module):
    """Stands in for a parameter of a mixture's experts, [n_experts, out_features, in_features] or transposed.

    The module's own forward goes on as it is, ``F.linear(tokens, self.down_proj[i])``, or ``tokens @
    self.down_proj[i]`` where the parameter was transposed: what ``stack[i]`` returns hands the product to layer i,
    packed or dense. Anything else is asked of it by an implementation that wants all experts in one tensor
    (``grouped_mm``, ``batched_mm``), and is an error that says so. Its tensors go by the names
    ``<parameter>.<i>.<tensor>``, weights as [out_features, in_features].

    Args:
        layers: the experts'.
        transposed: whether the parameter was [n_experts, in_features, out_features].
    """

    def __init__(self, layers: Iterable[nn.Module], *, transposed: bool = False) -> None:
        super().__init__()
        self._transposed = transposed
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    @classmethod
    def take_place(cls, experts: nn.Module, stack: Stack, layers: Iterable[nn.Module]) -> None:
        """Put one layer for each expert where the module ``experts`` has ``stack``.

        An ``ExpertLinear`` among them gets a weight of its own, so that the stack is freed.
        The module takes its experts one by one from then on, whatever implementation the model is set to: it gets a
        copy of the configuration that says so. The model's own setting stays.
        """
        requires_grad = stack.weight.requires_grad
        own = [_alone(layer, requires_grad) if isinstance(layer, ExpertLinear) else layer for layer in layers]
        leaf = stack.name.rpartition(".")[2]
        delattr(experts, leaf)
        setattr(experts, leaf, cls(own, transposed=bool(stores_transposed(experts))).train(experts.training))
        config: Any = copy.deepcopy(experts.config)
        config._experts_implementation = EAGER
        experts.config = config

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> ExpertWeight:
        if isinstance(index, slice) or (isinstance(index, torch.Tensor) and index.dim() > 0):
            raise TypeError(f"experts are packed one by one and not to be had as one tensor: {_advice()}")
        layer = self._modules.get(str(int(index)))
        if layer is None:
            raise IndexError(f"expert {int(index)} of {len(self)}")
        return ExpertWeight(layer, self._transposed)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(f"packed experts have no {name!r}: {_advice()}") from None


class ExpertWeight:
    """What an expert's tokens are multiplied by: the product calls the expert's layer.

    Args:
        layer: the expert's.
        transposed: whether that is ``tokens @ weight``; else ``F.linear(tokens, weight)``.
    """

    def __init__(self, layer: nn.Module, transposed: bool) -> None:
        self._layer, self._transposed = layer, transposed

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        weight = args[1] if len(args) > 1 else None
        products = () if not isinstance(weight, cls) else PRODUCTS if weight._transposed else (F.linear,)
        if function not in products:
            name = getattr(function, "__name__", function)
            raise TypeError(f"{name}: packed experts are multiplied by their tokens alone, one by one; {_advice()}")
        assert isinstance(weight, cls)
        outputs: torch.Tensor = weight._layer(args[0])
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        return outputs if bias is None else outputs + bias


def stores_transposed(experts: nn.Module) -> bool | None:
    """Whether a module's eager forward is ``tokens @ stack[i]``, expert by expert, or ``F.linear(tokens, stack[i])``.

    None where it does not say of itself that it is one of them.
    """
    transposed = getattr(experts, "is_transposed", None)
    return transposed if isinstance(transposed, bool) and hasattr(experts, "config") else None


def _alone(expert: ExpertLinear, requires_grad: bool) -> nn.Linear:
    layer = nn.Linear(expert.in_features, expert.out_features, bias=False, device="meta")
    weight = expert.weight.detach().clone(memory_format=torch.contiguous_format)
    layer.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return layer


def _advice() -> str:
    return f"set config._experts_implementation of the module that holds them to {EAGER!r}"
