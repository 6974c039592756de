"""A callback of transformers' Trainer that keeps the zeros of a pruned model. It imports transformers."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from .zeros import KeptZeros


class MaskCallback(TrainerCallback):
    """Keeps every zero of a pruned model in a ``Trainer``: ``Trainer(..., callbacks=[ace_triton.MaskCallback()])``.

    The zeros are those of the weights that are trained when training begins or resumes. They are restored after each
    optimizer step, so before each save, and at the end, after the best model was loaded. A weight counts as pruned as
    for :func:`~ace_triton.keep_zeros`.

    Raises:
        ArgumentError: when training begins, if no weight that is trained is pruned.
    """

    _kept: KeptZeros | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        named = events["model"].named_parameters()
        self._kept = KeptZeros((name, parameter) for name, parameter in named if parameter.requires_grad)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        assert self._kept is not None
        self._kept.apply()

    def on_train_end(self, args: Any, state: Any, control: Any, **events: Any) -> None:
        if self._kept is not None:
            self._kept.apply()
            self._kept = None
