"""The settings of a recovery, and the report of what it did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import RecipeError, RecoveryError
from ..solvers.kept_adamw import scheduled_rate
from ..solvers.quantize import GROUP, Quantization

DEFAULT_MINUTES = 5.0
"""Budget if no settings are given."""

MEAN_STEPS = 10
"""Largest number of steps in a mean loss."""


@dataclass(frozen=True)
class GroupTuning:
    """Settings of group fine-tuning (:mod:`ace_triton.recovery.groups`), which trains adapters instead of weights.

    Attributes:
        bits: bits of a value in a group, from 2 to 8.
        group: number of columns of a group; it must divide the inputs of each layer.
        rank: rank of the adapters.

    Raises:
        RecoveryError: if a number is out of range.
    """

    bits: int = 4
    group: int = 32
    rank: int = 16

    def __post_init__(self) -> None:
        for name, least, most in (("bits", 2, 8), ("group", 2, 2**20), ("rank", 1, 2**20)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise RecoveryError(f"{name} of group fine-tuning must be from {least} to {most}; got {value!r}")


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of a recovery.

    Attributes:
        steps: number of optimizer steps; None if ``minutes`` is given.
        minutes: time to train; None if ``steps`` is given. Training stops after the step that exceeds it.
        tokens_per_step: number of tokens in an optimizer step, rounded to whole sequences; with several processes, of
            all of them together.
        learning_rate: peak learning rate, in units of each weight's root mean square. The rate rises linearly to the
            peak during ``warmup``, then falls linearly to 0.
        warmup: share of the budget.
        norms: also train the blocks' one-dimensional weights (norms, biases).
        hidden_states: weight of the distance of hidden states from the teacher's, which is added to the divergence of
            predictions (:mod:`ace_triton.recovery.hidden_states`). 0 leaves it out. For causal language models only.
        forward_dtype: dtype of forwards: bfloat16, or float32 if both models are in float32.
        seed: random seed of the order of sequences, or of the text that the teacher writes.
        groups: train adapters on quantized groups instead of all weights; None to train the weights.
        quantize: bits, 8 or 4, to which the weights are rounded at the start and after each optimizer step, or a
            :class:`~ace_triton.Quantization` with rule "absmax" to set the group too
            (:mod:`ace_triton.recovery.rounded_forwards`). The trained model has the rounded weights. None rounds none.

    Raises:
        RecoveryError: not exactly one of steps and minutes is given, or a number is out of range.
    """

    steps: int | None = None
    minutes: float | None = None
    tokens_per_step: int = 256
    learning_rate: float = 1.7e-3
    warmup: float = 0.04
    norms: bool = False
    hidden_states: float = 0.0
    forward_dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    groups: GroupTuning | None = None
    quantize: Quantization | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantize", _nearest(self.quantize))
        if (self.steps is None) == (self.minutes is None):
            raise RecoveryError(f"give steps or minutes, one of them; got steps={self.steps}, minutes={self.minutes}")
        budget = self.steps if self.minutes is None else self.minutes
        if not all(0 < n < math.inf for n in (budget or 0, self.tokens_per_step, self.learning_rate)):
            raise RecoveryError(
                f"steps, minutes, tokens_per_step and learning_rate must be above 0 and finite; got {self}"
            )
        weight = self.hidden_states
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise RecoveryError(f"hidden_states must be 0 or above, and finite; got {weight!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise RecoveryError(f"seed must fit into 64 bits, got {self.seed}")
        if self.groups is not None and self.norms:
            raise RecoveryError("group fine-tuning trains adapters alone: leave norms (--norms) out")
        if self.groups is not None and self.quantize is not None:
            raise RecoveryError(
                "group fine-tuning rounds weights to values of its own: leave quantize (--bits) out, or recover "
                "without groups (--tune weights)"
            )
        if not 0 <= self.warmup < 1:
            raise RecoveryError(f"warmup must lie in [0, 1), got {self.warmup}")
        if self.forward_dtype not in (torch.bfloat16, torch.float32):
            raise RecoveryError(f"forward_dtype must be torch.bfloat16 or torch.float32, got {self.forward_dtype}")

    @property
    def budget(self) -> float:
        """The budget in steps, or in seconds if it was given in minutes."""
        budget = self.steps if self.minutes is None else 60 * self.minutes
        assert budget is not None
        return budget

    @property
    def quantization(self) -> Quantization | None:
        """How forwards round the weights; None if they do not."""
        return _nearest(self.quantize)

    def rate(self, fraction: float) -> float:
        """The learning rate when ``fraction`` of the budget is spent."""
        return scheduled_rate(self.learning_rate, fraction, self.warmup)


def _nearest(given: Quantization | int | None) -> Quantization | None:
    """A quantization that rounds to the nearest value."""
    try:
        if isinstance(given, int):
            return Quantization(given, GROUP, "absmax")
        by = Quantization.of(given)
    except RecipeError as error:
        raise RecoveryError(str(error)) from error
    if by is not None and by.rule != "absmax":
        raise RecoveryError(
            f"quantize: a recovery rounds each weight to the nearest value, which is rule 'absmax'; got {by.rule!r}: "
            f"give Quantization({by.bits}, {by.group}, 'absmax')"
        )
    return by


@dataclass(frozen=True)
class RecoveryReport:
    """What :func:`recover` did.

    Attributes:
        steps, tokens, seconds: totals since the first start, resumed runs included.
        passes: number of epochs; above 1, training overfits. 1 if the teacher wrote the text.
        cpu_seconds: CPU time of all processes over the same span, all threads together.
        losses: mean loss of each step: nats per token, plus the weighted distance of hidden states if it is trained.
        trained: number of values that were trained: kept weights, with norms and biases if these were trained too; or
            the values of the adapters.
        zeros: number of weights that stayed 0.
    """

    steps: int
    tokens: int
    passes: float
    seconds: float
    cpu_seconds: float
    losses: tuple[float, ...]
    trained: int
    zeros: int

    @property
    def steps_of_mean(self) -> int:
        """Number of steps in each of the mean losses: MEAN_STEPS, or half of all steps if that is less."""
        return max(1, min(MEAN_STEPS, len(self.losses) // 2))

    @property
    def mean_losses(self) -> tuple[float, float]:
        """Mean loss of the first and of the last steps (:attr:`steps_of_mean`)."""
        most = self.steps_of_mean
        return sum(self.losses[:most]) / most, sum(self.losses[-most:]) / most

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "losses": list(self.losses)}
