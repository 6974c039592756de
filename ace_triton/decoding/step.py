"""Texts that are decoded with the compiled step, alone or together, after a trial run has proven it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..decoders.batches import longest_sequence
from ..errors import AceError
from ..inputs.model_source import reason
from ..kernels.cpu_library import exact_inputs
from ..kernels.decode_step import DecodeCache, DecodeStep
from ..kernels.errors import ArgumentError
from ..kernels.written import version_of
from .forwards import state_of
from .parts import Parts, parts_of
from .refusal import StepRefusedError

TRIAL_TOKENS = 8
"""Tokens of the trial run; the first half are its prompt."""

FIRST_CAPACITY = 256
"""Tokens for which a cache has room at first; it doubles if it is full."""

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest distance of the trial's logits from the model's, over the size of the model's, by the model's dtype. The step
sums in fp32, so in fp16 and bf16 the distance is the model's own rounding."""

_proven: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()
"""For each model, the weights and the state with which its last trial run succeeded."""


@dataclass(frozen=True)
class Proven:
    """What the compiled step computes of a model, after a trial run. Texts that share it can be decoded together.

    Attributes:
        parts: the parts of the model.
        step: the step.
        key: changes if the model does.
    """

    parts: Parts
    step: DecodeStep
    key: tuple[Any, ...]


def prove(model: Any, before: Proven | None = None) -> Proven:
    """Prove that the compiled step computes what a model does; after a trial run that succeeded, only changes count.

    Args:
        model: a causal language model from transformers.
        before: an earlier result for this model, which is returned if nothing has changed since.

    Raises:
        StepRefusedError: if the step does not compute what the model does.
    """
    parts = parts_of(model)
    key = _key(model, parts)
    if before is not None and before.key == key:
        return before
    step = _step(parts)
    if _proven.get(model) != key:
        _compare(model, parts, step)
        key = _proven[model] = _key(model, parts)  # The trial may have filled buffers.
    return Proven(parts, step, key)


class CompiledStep:
    """A model's decoding step, in one call of the compiled library a token, with a cache that grows.

    It reads the model's weights where they are, and belongs to one text: make a new one for the next. Do not train or
    move the model while it is in use.

    Args:
        model: a causal language model from transformers.
        capacity: largest number of tokens, prompt and new ones.
        proven: what :func:`prove` returned for the model; None to call it.

    Attributes:
        seconds: time spent in products, in attention and in all steps since the prompt.
        steps: number of these steps.

    Raises:
        StepRefusedError: if the step does not compute what the model does.
    """

    def __init__(self, model: Any, capacity: int, proven: Proven | None = None) -> None:
        self._model = model
        self.proven = prove(model) if proven is None else proven
        self._parts = parts = self.proven.parts
        if parts.window is not None and capacity > parts.window:
            raise StepRefusedError(
                f"its sliding window of {parts.window} tokens is shorter than the {capacity} tokens of this text"
            )
        self._capacity = capacity
        self._cache = self.proven.step.cache(*_positions(parts, min(capacity, FIRST_CAPACITY)))
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
        self._grow(ids.shape[1])
        logits = _fill(self._cache, self._model, ids)
        self.seconds, self.steps = [0.0, 0.0, 0.0], 0
        return logits[:, -1].float()

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Read one token, int64 [1]. Returns the logits of the next one, fp32 [1, vocabulary]; they are overwritten by
        the next call."""
        return step_together([self], token)

    def _grow(self, length: int) -> None:
        """Make room for this number of tokens, up to the capacity."""
        room = self._cache.capacity
        if room < min(length, self._capacity):
            self._cache.grow(*_positions(self._parts, min(max(length, 2 * room), self._capacity)))


@torch.no_grad()
def step_together(texts: Sequence[CompiledStep], tokens: torch.Tensor) -> torch.Tensor:
    """Read one token of each of several texts, in one call of the library, which reads each weight once.

    Args:
        texts: different texts with the same :class:`Proven`.
        tokens: int64 [n_texts].

    Returns:
        The logits of the next tokens, fp32 [n_texts, vocabulary]: for each text those that it would get alone. They are
        overwritten by the next call for a text with the same :class:`Proven`.
    """
    proven = texts[0].proven
    for text in texts:
        text._grow(text._cache.length + 1)
    logits = proven.step([text._cache for text in texts], proven.parts.embedding(tokens).float())
    for text in texts:
        text.seconds = [sum(pair) for pair in zip(text.seconds, proven.step.seconds, strict=True)]
        text.steps += 1
    return logits


def why_not_compiled(model: Any) -> str | None:
    """Why the compiled step does not decode a model; None if it does."""
    try:
        CompiledStep(model, 1)
    except StepRefusedError as error:
        return error.reason
    return None


def _positions(parts: Parts, capacity: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of some positions."""
    numbers = torch.zeros(1, 1, 1, dtype=parts.dtype, device="cpu")
    positions = torch.arange(first, first + capacity, device="cpu")
    cosines, sines = parts.rotary(numbers, position_ids=positions[None])
    return cosines[0], sines[0]


def _step(parts: Parts) -> DecodeStep:
    try:
        return DecodeStep(parts.blocks, parts.norm, parts.head, parts.sizes)
    except ArgumentError as error:
        raise StepRefusedError(str(error)) from error


def _fill(cache: DecodeCache, model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Run the model on a prompt, and put its keys and values into a cache."""
    from transformers.cache_utils import Cache

    outputs = model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
    caches = [value for value in outputs.values() if isinstance(value, Cache)]
    layers = caches[0].layers if len(caches) == 1 else []
    keys, values = (
        [part[0] for layer in layers if isinstance(part := getattr(layer, name, None), torch.Tensor)]
        for name in ("keys", "values")
    )
    unknown = "its cache of keys and values has a form that the step does not know"
    if len(keys) != cache.shape[0] or any(part.shape[1:2] != ids.shape[1:] for part in (*keys, *values)):
        raise StepRefusedError(unknown)
    try:
        cache.fill(keys, values)
    except ArgumentError as error:
        raise StepRefusedError(unknown) from error
    logits: torch.Tensor = outputs.logits
    return logits


def _key(model: Any, parts: Parts) -> tuple[Any, ...]:
    """Changes if a weight is replaced, moved or written, or if anything else changes that :func:`state_of` sees."""
    weights = ((tensor.data_ptr(), tensor.shape, tensor.dtype, version_of(tensor)) for tensor in parts.tensors)
    return *weights, *state_of(model)


@torch.inference_mode()
def _compare(model: Any, parts: Parts, step: DecodeStep) -> None:
    """Compare the logits of the step with those of the model's own forward, at the last positions of the model.

    Raises:
        StepRefusedError: if they differ by more than rounding, or the model's forward fails.
    """
    length = TRIAL_TOKENS if parts.window is None else min(TRIAL_TOKENS, parts.window)
    rows = parts.head.weight.shape[0]
    vocabulary = min(rows, getattr(parts.embedding, "num_embeddings", rows))
    if length < 2 or vocabulary < 1:
        raise StepRefusedError(
            f"a trial run needs 2 tokens and a vocabulary: it has a sliding window of {parts.window} tokens and "
            f"a vocabulary of {vocabulary}"
        )
    try:
        with exact_inputs():  # With inputs of few bits, rounding hides a wrong step.
            given, wanted = _trial(model, parts, step, length, vocabulary)
    except AceError:
        raise
    except Exception as error:  # The forward is the model's own, and may raise anything.
        raise StepRefusedError(f"its forward fails in a trial run ({reason(error)})") from error
    if not bool(wanted.isfinite().all()):
        raise StepRefusedError("in a trial run it predicts NaN or infinity")
    distance = float((given - wanted).norm() / wanted.norm())
    if not distance <= TOLERANCES[parts.dtype]:
        raise StepRefusedError(f"in a trial run its logits differ by {distance:.1g} of their size")


def _trial(
    model: Any, parts: Parts, step: DecodeStep, length: int, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the step and of the model for the same tokens.

    The positions are the model's last ones: a forward that scales by position passes at the first positions.
    """
    ids = (torch.arange(1, length + 1, device="cpu") * 7919 % vocabulary)[None]
    first = max(0, (longest_sequence(model) or 0) - length)
    positions = torch.arange(first, first + length, device="cpu")[None]
    half = (length + 1) // 2
    wanted = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, half:].float()
    cache = step.cache(*_positions(parts, length, first))
    _fill(cache, model, ids[:, :half], position_ids=positions[:, :half])
    given = torch.cat([step([cache], parts.embedding(token[None]).float()).clone() for token in ids[0, half:]])
    return given, wanted
