"""Experts of a mixture, each a layer of its own, where their module had them stacked in one parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .experts import ExpertLinear, Stack

EAGER = "eager"


class ExpertStack(nn.Module):
    """Stands in for a parameter [n_experts, out_features, in_features] of a mixture's experts.

    The module's own forward goes on as it is, ``F.linear(tokens, self.down_proj[i])``: what ``stack[i]`` returns
    hands the product to layer i, packed or dense. Anything else is asked of it by an implementation that wants all
    experts in one tensor (``grouped_mm``, ``batched_mm``), and is an error that says so. Its tensors go by the names
    ``<parameter>.<i>.<tensor>``.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    @classmethod
    def take_place(cls, experts: nn.Module, stack: Stack, layers: Iterable[nn.Module]) -> None:
        """Put one layer for each expert where the module ``experts`` has ``stack``.

        An :class:`~ace_triton.experts.ExpertLinear` among them gets a weight of its own, so that the stack is freed.
        The module takes its experts one by one from then on, and with it the whole model, which shares that setting.
        """
        requires_grad = stack.weight.requires_grad
        own = [_alone(layer, requires_grad) if isinstance(layer, ExpertLinear) else layer for layer in layers]
        leaf = stack.name.rpartition(".")[2]
        delattr(experts, leaf)
        setattr(experts, leaf, cls(own).train(experts.training))
        config: Any = experts.config
        config._experts_implementation = EAGER

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> ExpertWeight:
        if isinstance(index, slice) or (isinstance(index, torch.Tensor) and index.dim() > 0):
            raise TypeError(f"experts are packed one by one and not to be had as one tensor: {_advice()}")
        layer = self._modules.get(str(int(index)))
        if layer is None:
            raise IndexError(f"expert {int(index)} of {len(self)}")
        return ExpertWeight(layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(f"packed experts have no {name!r}: {_advice()}") from None


class ExpertWeight:
    """What an expert's tokens are multiplied by: ``F.linear(tokens, weight)`` calls the expert's layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        if function is not F.linear or len(args) < 2 or not isinstance(args[1], cls):
            name = getattr(function, "__name__", function)
            raise TypeError(f"{name}: packed experts are multiplied by F.linear(tokens, weight) alone; {_advice()}")
        outputs = args[1]._layer(args[0])
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        return outputs if bias is None else outputs + bias


def takes_layers(experts: nn.Module) -> bool:
    """Whether a module says of itself that its eager forward is ``F.linear(tokens, stack[i])``, expert by expert."""
    return getattr(experts, "is_transposed", None) is False and hasattr(experts, "config")


def _alone(expert: ExpertLinear, requires_grad: bool) -> nn.Linear:
    layer = nn.Linear(expert.in_features, expert.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(expert.weight.detach().clone(), requires_grad=requires_grad)
    return layer


def _advice() -> str:
    return f"call model.set_experts_implementation({EAGER!r})"
