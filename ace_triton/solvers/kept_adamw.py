"""AdamW for the nonzero entries of a model's weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import RecoveryError
from ..kernels.adamw import GradientMoments, Step, adamw
from ..processes import Processes

BETAS = (0.9, 0.95)

LEAST_ZEROS = 0.05
"""A weight with a smaller share of zeros counts as not pruned, and is not trained."""

_ROUNDED = (torch.float16, torch.bfloat16)
"""Dtypes of forwards in which the optimizer step itself writes the parameter."""

FIRST_RATE = 0.1
"""Learning rate of the first step, as a share of the peak."""

LARGEST_GRADIENT = 1.0
"""Norm that gradients are clipped to."""

LEAST_SCALE = 1e-3
"""Lower bound of a parameter's scale, so that biases of 0 move too; the value is Adafactor's."""


def scheduled_rate(peak: float, fraction: float, warmup: float) -> float:
    """The learning rate when ``fraction`` of the budget is spent.

    It rises linearly to ``peak`` during the share ``warmup``, then falls linearly to 0.
    """
    if fraction < warmup:
        return peak * max(FIRST_RATE, fraction / warmup)
    return peak * (1 - fraction) / (1 - warmup)


class Rounding(Protocol):
    """How a parameter is rounded for forwards: fp32 values to rounded ones of the same shape; 0 stays 0."""

    def __call__(self, values: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """The rounded values, in ``into`` or in a new tensor in fp32."""


class KeptAdamW:
    """AdamW on fp32 copies of parameters; the parameters themselves are in the dtype of forwards.

    Entries of 0 in a matrix stay 0; all entries of a vector (norms, biases) are trained. The learning rate is in units
    of each parameter's scale: the root mean square of its nonzero entries.

    Args:
        parameters: parameters to train, by name. They become contiguous and are converted to ``dtype``.
        dtype: dtype of forwards; None if each parameter keeps its own. Parameters in fp32 and their copies are the same
            tensors.
        processes: processes that train the same parameters; None for this one alone. They must make the same calls.
        roundings: how parameters are rounded for forwards, by name; the others are not. The gradient of a rounded value
            counts as that of its copy (straight-through estimator, Bengio et al., arXiv 1308.3432). Rounded parameters
            in fp32 and their copies are two tensors.
        own_dtype: names of parameters that keep their own dtype in forwards.
        dense: names of matrices whose entries of 0 are trained too.

    Attributes:
        values: the fp32 copies, by name; not rounded.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype | None,
        processes: Processes | None = None,
        roundings: Mapping[str, Rounding] | None = None,
        *,
        own_dtype: Collection[str] = (),
        dense: Collection[str] = (),
    ) -> None:
        self._parameters, self._processes = parameters, processes or Processes()
        self._dense = frozenset(dense)
        self._roundings = roundings or {}
        self.values = {n: p.detach().to(torch.float32, copy=True).contiguous() for n, p in parameters.items()}
        self._moments = {name: GradientMoments.like(value) for name, value in self.values.items()}
        self._scales = self._processes.broadcast({name: scale_of(value) for name, value in self.values.items()})
        self._steps = dict.fromkeys(parameters, 0)
        dtypes = {n: p.dtype if dtype is None or n in own_dtype else dtype for n, p in parameters.items()}
        held = {name: self.rounded(name).to(dtypes[name]) for name in parameters}
        for name, parameter in parameters.items():  # After all copies are made, since memory may run out.
            parameter.data = held[name]

    def rounded(self, name: str) -> torch.Tensor:
        """A parameter for forwards, fp32: its values, rounded if it has a rounding."""
        rounding = self._roundings.get(name)
        return self.values[name] if rounding is None else rounding(self.values[name])

    @property
    def has_stepped(self) -> bool:
        """True after the first optimizer step, also if it was taken before a resume."""
        return any(self._steps.values())

    def trained(self, name: str) -> torch.Tensor:
        """The result of training, fp32: the given values if no step was taken, else :meth:`rounded`."""
        return self.rounded(name) if self.has_stepped else self.values[name]

    @torch.no_grad()
    def step(self, rate: float, largest: float) -> None:
        """Update every parameter that has a gradient, and clear the gradients.

        The gradients of all processes are added up first.

        Args:
            rate: learning rate, in units of each parameter's scale.
            largest: norm that the gradients are clipped to, all together.
        """
        gradients = self._gradients()
        factor = (largest / (self._norm(gradients.values()).float() + 1e-6)).clamp_(max=1.0)
        self._processes.broadcast_into(factor, 0)  # Another kind of processor may round the norm in another way.
        for name, gradient in gradients.items():
            self._steps[name] += 1
            values, parameter, held = self.values[name], self._parameters[name], self._held(name)
            in_step = held.dtype in _ROUNDED and name not in self._roundings
            adamw(
                values,
                self._moments[name],
                gradient,
                Step(rate * self._scales[name], self._steps[name], BETAS),
                factor=factor.to(values.device),
                rounded=held if in_step else None,
                zeros_stay=values.dim() > 1 and name not in self._dense,
            )
            if (rounding := self._roundings.get(name)) is not None:
                rounding(values, held)
            elif held.dtype == torch.float64:
                held.copy_(values)
            parameter.grad = None

    def _held(self, name: str) -> torch.Tensor:
        """What this process holds of a parameter in the dtype of forwards."""
        return self._parameters[name].detach()

    def _gradients(self) -> dict[str, torch.Tensor]:
        """The gradients, by name, added up over all processes."""
        if self._processes.size > 1:
            self._add_up_gradients()
        given = {name: p.grad.contiguous() for name, p in self._parameters.items() if p.grad is not None}
        return {name: grad.float() if grad.dtype == torch.float64 else grad for name, grad in given.items()}

    def _norm(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """The norm of all gradients together."""
        return nn.utils.get_total_norm(gradients)

    def _add_up_gradients(self) -> None:
        """Replace each gradient with its sum over all processes; a process without that gradient adds 0."""
        given = self._processes.gather([p.grad is not None for p in self._parameters.values()])
        for parameter, anywhere in zip(self._parameters.values(), map(any, zip(*given, strict=True)), strict=True):
            if anywhere:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                total = own.to(torch.float32).contiguous()
                self._processes.add_up(total)
                parameter.grad = total.to(parameter.dtype)

    @torch.no_grad()
    def take_from_first(self) -> None:
        """Take the state of the first process's optimizer, in all processes."""
        for name, values in self.values.items():
            for tensor in (values, self._moments[name].first, self._moments[name].second):
                self._processes.broadcast_into(tensor, 0)
            self._parameters[name].copy_(self.rounded(name))
        self._steps = self._processes.broadcast(self._steps)

    def collect(self) -> None:
        """Get ready for :meth:`state_dict` in the first process. All processes call this."""

    def state_dict(self) -> dict[str, Any]:
        """The state that :meth:`load_state_dict` takes, of tensors and numbers; in the first process."""
        return {
            "values": self.values,
            "first": {name: moments.first for name, moments in self._moments.items()},
            "second": {name: moments.second for name, moments in self._moments.items()},
            "taken": self._steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Resume from the state of another optimizer with the same parameters.

        Raises:
            RecoveryError: the state is incomplete or does not fit these parameters; nothing is changed.
        """
        check_state(state, {name: values.shape for name, values in self.values.items()})
        for name, values in self.values.items():
            if (why := self._why_not_zeros(name, values, state["values"][name])) is not None:
                raise RecoveryError(why)
        for name, values in self.values.items():
            values.copy_(state["values"][name])
            self._moments[name].first.copy_(state["first"][name])
            self._moments[name].second.copy_(state["second"][name])
            self._parameters[name].copy_(self.rounded(name))
        self._steps = dict(state["taken"])

    def _why_not_zeros(self, name: str, values: torch.Tensor, saved: torch.Tensor) -> str | None:
        """A reason if saved values of a pruned matrix are not 0 where its present values are; None if they are."""
        if values.dim() < 2 or name in self._dense or not bool(saved.to(values.device)[values == 0].any()):
            return None
        return f"{name}: a pruned weight is not 0"


def check_state(state: Any, shapes: Mapping[str, torch.Size]) -> None:
    """Raise RecoveryError if an optimizer's state is incomplete or does not fit parameters of these shapes."""
    fields = {"values", "first", "second", "taken"}
    if not isinstance(state, dict) or state.keys() != fields:
        raise RecoveryError(f"the optimizer's state must be a dict of {', '.join(sorted(fields))}")
    for part in fields:
        if not isinstance(state[part], dict) or state[part].keys() != shapes.keys():
            raise RecoveryError(f"{part}: it belongs to other parameters")
    for name, shape in shapes.items():
        for part in ("values", "first", "second"):
            tensor = state[part][name]
            if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != (shape, torch.float32):
                raise RecoveryError(f"{name}, {part}: must be {torch.float32} of shape {tuple(shape)}")
            if not bool(tensor.isfinite().all()) or (part == "second" and bool((tensor < 0).any())):
                raise RecoveryError(f"{name}, {part}: invalid numbers")
        steps = state["taken"][name]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise RecoveryError(f"{name}: invalid number of steps")


def scale_of(values: torch.Tensor) -> float:
    """The root mean square of the nonzero values, but at least :data:`LEAST_SCALE`."""
    return max(LEAST_SCALE, float(values.norm()) / math.sqrt(max(1, int(values.count_nonzero()))))
