"""AdamW on what is not 0 in a model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import RecoveryError
from ..kernels.adamw import GradientMoments, Step, adamw

BETAS = (0.9, 0.95)

LEAST_SCALE = 1e-3
"""Root mean square that a weight counts with at least, so that biases which begin at 0 move too; Adafactor's."""


class KeptAdamW:
    """Holds fp32 values of parameters, which themselves hold them in the dtype of forwards.

    A matrix's entries of 0 stay 0; vectors (norms, biases) move whole. The learning rate counts in units of each
    parameter's scale, the root mean square of what is not 0 in it.

    Args:
        parameters: to train, by name; from here on contiguous, and in ``dtype``.
        dtype: of forwards. In fp32 parameters are the values themselves.

    Attributes:
        values: fp32, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self.values = {n: p.detach().to(torch.float32, copy=True).contiguous() for n, p in parameters.items()}
        self._moments = {name: GradientMoments.like(value) for name, value in self.values.items()}
        self._scales = {name: _scale_of(value) for name, value in self.values.items()}
        self._taken = dict.fromkeys(parameters, 0)
        self._rounds = dtype != torch.float32
        held = {name: value.to(dtype) for name, value in self.values.items()}
        for name, parameter in parameters.items():  # only when all are there: memory may run out
            parameter.data = held[name]

    @torch.no_grad()
    def step(self, rate: float, largest: float) -> None:
        """Move every parameter that has a gradient, and drop the gradients.

        Args:
            rate: of learning, in units of each parameter's scale.
            largest: norm that all gradients together are cut to.
        """
        gradients = {name: p.grad.contiguous() for name, p in self._parameters.items() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        factor = (largest / (norm.float() + 1e-6)).clamp_(max=1.0)
        for name, gradient in gradients.items():
            self._taken[name] += 1
            values, parameter = self.values[name], self._parameters[name]
            adamw(
                values,
                self._moments[name],
                gradient,
                Step(rate * self._scales[name], self._taken[name], BETAS),
                factor=factor.to(values.device),
                rounded=parameter.detach() if self._rounds else None,
                zeros_stay=values.dim() > 1,
            )
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: tensors and numbers."""
        return {
            "values": self.values,
            "first": {name: moments.first for name, moments in self._moments.items()},
            "second": {name: moments.second for name, moments in self._moments.items()},
            "taken": self._taken,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Resume from the state of another optimizer with the same parameters.

        Raises:
            ValueError: something is missing, or does not fit these parameters; nothing has changed then.
        """
        fields = {"values", "first", "second", "taken"}
        if not isinstance(state, dict) or state.keys() != fields:
            raise RecoveryError(f"the optimizer's state must be a dict of {', '.join(sorted(fields))}")
        for part in fields:
            if not isinstance(state[part], dict) or state[part].keys() != self.values.keys():
                raise RecoveryError(f"{part}: of other parameters")
        for name, values in self.values.items():
            for part in ("values", "first", "second"):
                tensor = state[part][name]
                if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != (values.shape, values.dtype):
                    raise RecoveryError(f"{name}, {part}: must be {values.dtype} of shape {tuple(values.shape)}")
                if not bool(tensor.isfinite().all()) or (part == "second" and bool((tensor < 0).any())):
                    raise RecoveryError(f"{name}, {part}: invalid numbers")
            if values.dim() > 1 and bool(state["values"][name].to(values.device)[values == 0].any()):
                raise RecoveryError(f"{name}: a pruned weight is not 0")
            taken = state["taken"][name]
            if isinstance(taken, bool) or not isinstance(taken, int) or taken < 0:
                raise RecoveryError(f"{name}: invalid number of steps")
        for name, values in self.values.items():
            values.copy_(state["values"][name])
            self._moments[name].first.copy_(state["first"][name])
            self._moments[name].second.copy_(state["second"][name])
            self._parameters[name].copy_(values)
        self._taken = dict(state["taken"])


def _scale_of(values: torch.Tensor) -> float:
    return max(LEAST_SCALE, float(values.norm()) / math.sqrt(max(1, int(values.count_nonzero()))))
