"""Keep the zeros of a pruned model in training loops that do not know of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from .checks import LEAST_ZEROS


class KeptZeros:
    """The zeros of a model's pruned weights, and the means to restore them.

    Args:
        parameters: the parameters to look at, by name. Those that are not pruned are left out.

    Attributes:
        names: names of the pruned parameters.

    Raises:
        ArgumentError: if no parameter is pruned.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        found = [(name, parameter, pruned_zeros(parameter)) for name, parameter in parameters]
        self._zeros = [(parameter, zeros) for _, parameter, zeros in found if zeros is not None]
        self.names = tuple(name for name, _, zeros in found if zeros is not None)
        self._hook: Any = None
        if not self.names:
            raise ArgumentError(
                f"no weight that is trained has {LEAST_ZEROS:.0%} zeros or more: prune the model first; if only "
                "adapters are trained, the zeros stay by themselves, and ace_triton.merge_lora merges with them"
            )

    @torch.no_grad()
    def apply(self) -> None:
        """Set the weights that were zero to zero again."""
        for place, (parameter, zeros) in enumerate(self._zeros):
            if zeros.device != parameter.device:
                zeros = zeros.to(parameter.device)
                self._zeros[place] = parameter, zeros
            parameter.masked_fill_(zeros, 0)

    def after_each_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Call :meth:`apply` after each step of an optimizer, until :meth:`remove`."""
        self._hook = optimizer.register_step_post_hook(lambda *_: self.apply())

    def remove(self) -> None:
        """No longer call :meth:`apply` after the steps of the optimizer."""
        if self._hook is not None:
            self._hook.remove()


def keep_zeros(model: nn.Module, optimizer: Any) -> KeptZeros:
    """Keep every zero of a pruned model's weights: after each step of the optimizer they are set to zero again.

    Call it once before the training loop. A weight counts as pruned if it is a matrix or a stack with at least 5 %
    zeros, not all of them. Each pruned weight takes one byte more.

    Args:
        model: the pruned model.
        optimizer: an optimizer of its parameters, as ``torch.optim`` or accelerate's ``prepare`` gives it.

    Returns:
        The zeros. ``remove()`` ends it, ``apply()`` restores them at any time.

    Raises:
        ArgumentError: if the optimizer trains no pruned weight of the model, or has no hooks after its step.
    """
    wrapped = getattr(optimizer, "optimizer", optimizer)  # accelerate's optimizer has no hooks of its own.
    if not isinstance(wrapped, torch.optim.Optimizer):
        raise ArgumentError(
            f"a {type(optimizer).__name__} is not a torch.optim.Optimizer: call apply() of "
            "ace_triton.KeptZeros(model.named_parameters()) after each step instead"
        )
    trained = {id(parameter) for group in wrapped.param_groups for parameter in group["params"]}
    kept = KeptZeros((name, p) for name, p in model.named_parameters() if id(p) in trained)
    kept.after_each_step(wrapped)
    return kept


def pruned_zeros(weight: torch.Tensor) -> torch.Tensor | None:
    """True where a pruned weight is zero; None if it is not pruned.

    A weight of zeros alone is not pruned: adapters start with one.
    """
    if weight.dim() < 2 or not weight.numel():
        return None
    zeros = weight.detach() == 0
    share = float(zeros.float().mean())
    return zeros if LEAST_ZEROS <= share < 1 else None
