"""Replace the stacked experts of a mixture by one layer per expert."""

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
    """Replaces a parameter that holds all experts, [n_experts, out_features, in_features] or transposed.

    The forward of the experts' module stays as it is: ``F.linear(tokens, self.down_proj[i])``, or ``tokens @
    self.down_proj[i]`` if the parameter was transposed. ``stack[i]`` returns an object that passes the product to layer
    i, packed or dense. Implementations that need all experts in one tensor (``grouped_mm``, ``batched_mm``) get an
    error that says what to set. Tensors are named ``<parameter>.<i>.<tensor>``. Weights are
    [out_features, in_features].

    Args:
        layers: one layer per expert.
        transposed: True if the parameter was [n_experts, in_features, out_features].
    """

    def __init__(self, layers: Iterable[nn.Module], *, transposed: bool = False) -> None:
        super().__init__()
        self._transposed = transposed
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    @classmethod
    def take_place(cls, experts: nn.Module, stack: Stack, layers: Iterable[nn.Module]) -> None:
        """Replace ``stack`` in the module ``experts`` by one layer per expert.

        The weight of each ``ExpertLinear`` is copied, so that the stack is freed. The module gets a copy of the
        configuration that selects the eager implementation, which computes one expert at a time. The model's own
        configuration is not changed.
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
            raise TypeError(f"packed experts cannot be read as one tensor: {_advice()}")
        layer = self._modules.get(str(int(index)))
        if layer is None:
            raise IndexError(f"expert {int(index)} of {len(self)}")
        return ExpertWeight(layer, self._transposed)

    def dense(self) -> torch.Tensor:
        """The experts as the parameter that this module replaced; its layers must be dense."""
        layers: list[Any] = list(self._modules.values())
        weights = [layer.weight.detach() for layer in layers]
        return torch.stack([weight.t() for weight in weights] if self._transposed else weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(f"packed experts have no {name!r}: {_advice()}") from None


class ExpertWeight:
    """Stands for the weight of one expert in a product. The product calls the expert's layer.

    Args:
        layer: the layer of the expert.
        transposed: True if the product is ``tokens @ weight``; False if it is ``F.linear(tokens, weight)``.
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
            raise TypeError(f"{name}: packed experts support only the product with their tokens: {_advice()}")
        assert isinstance(weight, cls)
        outputs: torch.Tensor = weight._layer(args[0])
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        return outputs if bias is None else outputs + bias


def stores_transposed(experts: nn.Module) -> bool | None:
    """Whether a module's eager forward is ``tokens @ stack[i]`` for each expert, instead of ``F.linear``.

    None if the module declares neither (it has no ``is_transposed`` or no ``config``).
    """
    transposed = getattr(experts, "is_transposed", None)
    return transposed if isinstance(transposed, bool) and hasattr(experts, "config") else None


def _alone(expert: ExpertLinear, requires_grad: bool) -> nn.Linear:
    layer = nn.Linear(expert.in_features, expert.out_features, bias=False, device="meta")
    weight = expert.weight.detach().clone(memory_format=torch.contiguous_format)
    layer.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return layer


def _advice() -> str:
    return f"set config._experts_implementation of the experts' module to {EAGER!r}"
