"""A decoder that decodes with the compiled step, after a trial run has proven it."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..kernels.decode_step import DecodeStep
from ..kernels.errors import ArgumentError
from ..kernels.written import version_of
from .parts import Parts, parts_of
from .refusal import StepRefusedError

TRIAL_TOKENS = 8
"""Tokens of the trial run; the first half are its prompt."""

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest distance of the trial's logits from the model's, over the size of the model's, by the model's dtype. The step
sums in fp32, so in fp16 and bf16 the distance is the model's own rounding."""

_proven: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()
"""For each model, the weights with which its last trial run succeeded."""


class CompiledStep:
    """A model's decoding step, in one call of the compiled library a token, with a cache of fixed size.

    It reads the model's weights where they are, and belongs to one text: make a new one for the next. Do not train or
    move the model while it is in use.

    Args:
        model: a causal language model from transformers.
        capacity: largest number of tokens, prompt and new ones.

    Attributes:
        seconds: time spent in products, in attention and in all steps since the prompt.
        steps: number of these steps.

    Raises:
        StepRefusedError: if the step does not compute what the model does.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        self._model = model
        self._parts = parts_of(model)
        if self._parts.window is not None and capacity > self._parts.window:
            raise StepRefusedError(
                f"its sliding window of {self._parts.window} tokens is shorter than the {capacity} tokens of this text"
            )
        weights = _weights(self._parts)
        if _proven.get(model) != weights:
            _prove(model, self._parts)
            _proven[model] = weights
        self._step = _step(self._parts, capacity)
        self.seconds = [0.0, 0.0, 0.0]
        self.steps = 0

    @torch.no_grad()
    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        """Read a prompt with the model's own forward.

        Args:
            ids: int64 [1, n_tokens].

        Returns:
            The logits of the next token, fp32 [1, vocabulary].
        """
        logits = _fill(self._step, self._model, ids)
        self.seconds, self.steps = [0.0, 0.0, 0.0], 0
        return logits[:, -1].float()

    @torch.no_grad()
    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Read one token, int64 [1]. Returns the logits of the next one, fp32 [1, vocabulary]; they are overwritten by
        the next call."""
        logits = self._step(self._parts.embedding(token).float()[0])
        self.seconds = [sum(pair) for pair in zip(self.seconds, self._step.seconds, strict=True)]
        self.steps += 1
        return logits


def why_not_compiled(model: Any) -> str | None:
    """Why the compiled step does not decode a model; None if it does."""
    try:
        CompiledStep(model, 1)
    except StepRefusedError as error:
        return error.reason
    return None


def _step(parts: Parts, capacity: int) -> DecodeStep:
    numbers = torch.zeros(1, 1, 1, dtype=parts.dtype, device="cpu")
    cosines, sines = parts.rotary(numbers, position_ids=torch.arange(capacity, device="cpu")[None])
    try:
        return DecodeStep(parts.blocks, parts.norm, parts.head, parts.sizes, cosines[0], sines[0])
    except ArgumentError as error:
        raise StepRefusedError(str(error)) from error


def _fill(step: DecodeStep, model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Run the model on a prompt, and put its keys and values into the step's cache."""
    from transformers.cache_utils import Cache

    outputs = model(input_ids=ids, use_cache=True, **(options or {"logits_to_keep": 1}))
    caches = [value for value in outputs.values() if isinstance(value, Cache)]
    layers = caches[0].layers if len(caches) == 1 else []
    keys, values = (
        [part[0] for layer in layers if isinstance(part := getattr(layer, name, None), torch.Tensor)]
        for name in ("keys", "values")
    )
    unknown = "its cache of keys and values has a form that the step does not know"
    if len(keys) != len(step) or any(part.shape[1:2] != ids.shape[1:] for part in (*keys, *values)):
        raise StepRefusedError(unknown)
    try:
        step.fill(keys, values)
    except ArgumentError as error:
        raise StepRefusedError(unknown) from error
    logits: torch.Tensor = outputs.logits
    return logits


def _weights(parts: Parts) -> tuple[Any, ...]:
    """Changes if a weight is replaced, moved or written."""
    return tuple((tensor.data_ptr(), tensor.shape, tensor.dtype, version_of(tensor)) for tensor in parts.tensors)


@torch.inference_mode()
def _prove(model: Any, parts: Parts) -> None:
    """Compare the logits of the step with those of the model's own forward.

    Raises:
        StepRefusedError: if they differ by more than rounding.
    """
    length = min(TRIAL_TOKENS, parts.window or TRIAL_TOKENS)
    ids = (torch.arange(1, length + 1, device="cpu") * 7919 % parts.head.weight.shape[0])[None]
    half = (length + 1) // 2
    wanted = model(input_ids=ids, use_cache=False).logits[0, half:].float()
    if not bool(wanted.isfinite().all()):
        raise StepRefusedError("in a trial run it predicts NaN or infinity")
    step = _step(parts, length)
    _fill(step, model, ids[:, :half])
    given = torch.cat([step(parts.embedding(token[None]).float()[0]).clone() for token in ids[0, half:]])
    distance = float((given - wanted).norm() / wanted.norm())
    if not distance <= TOLERANCES[parts.dtype]:
        raise StepRefusedError(f"in a trial run its logits differ by {distance:.1g} of their size")
