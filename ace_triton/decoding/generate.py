"""Generation with the compiled step; transformers chooses the tokens."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import GenerationError
from .refusal import StepRefusedError
from .step import CompiledStep

KNOWN_INPUTS = frozenset({"use_cache", "logits_to_keep", "position_ids", "attention_mask"})
"""Arguments of a forward that transformers prepares for a plain text."""


def compiled_generate(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """As ``model.generate(input_ids, **options)`` on a CPU, with one call of the compiled library for each new token.

    The prompt runs through the model's own forward. A trial run first compares the step's logits with the model's; it
    is repeated if a weight has changed since the last one. Its sums are in fp32, so tokens may differ from those of
    ``model.generate`` if two logits agree up to rounding, most of all in fp16 and bf16.

    Args:
        model: a causal language model from transformers, dense or with packed layers, in evaluation mode.
        input_ids: int64 [1, n_tokens], the prompt.
        options: of ``generate``, for greedy decoding and sampling. ``max_new_tokens`` or ``max_length`` bounds the
            cache.

    Returns:
        The tokens of the prompt and the new ones, int64 [1, length].

    Raises:
        GenerationError: if the compiled step does not decode the model or the call; the message says why.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.numel():
        raise GenerationError(
            f"the compiled step decodes one text at a time: give input_ids [1, n_tokens], got {list(input_ids.shape)}"
        )
    decoding = CompiledDecoding(options.get("streamer"))
    result: torch.Tensor = model.generate(input_ids, custom_generate=decoding, **options)
    return result


class CompiledDecoding:
    """The argument ``custom_generate`` of transformers' ``generate``: decodes with the compiled step.

    Args:
        streamer: that of ``generate``, which does not pass it on.

    Attributes:
        step: the step of the last call; None before the first.
    """

    def __init__(self, streamer: Any = None) -> None:
        self._streamer = streamer
        self.step: CompiledStep | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Continue a prompt; see transformers for the arguments.

        Raises:
            StepRefusedError: if the step does not decode the model or the call.
        """
        _check_call(input_ids, generation_config, model_kwargs)
        streamer = self._streamer
        step = self.step = CompiledStep(model, generation_config.max_length)
        logits, ended = step.prompt(input_ids), False
        while not ended:
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                token = scores.argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
            ended = bool(stopping_criteria(input_ids, None).all())
            if streamer is not None:
                streamer.put(token)
            if not ended:
                logits = step(token)
        if streamer is not None:
            streamer.end()
        return input_ids


def _check_call(input_ids: torch.Tensor, config: Any, inputs: dict[str, Any]) -> None:
    """Refuse what the loop does not do."""
    from transformers.cache_utils import Cache

    caches = [value for value in inputs.values() if isinstance(value, Cache)]
    given = {name for name, value in inputs.items() if value is not None and not isinstance(value, Cache)}
    unknown = sorted(given - KNOWN_INPUTS)
    if unknown:
        raise StepRefusedError(f"it does not take {', '.join(unknown)}")
    if len(input_ids) != 1 or config.num_beams != 1 or "attention_mask" in given:
        raise StepRefusedError("it decodes one text without padding, without beams")
    if config.return_dict_in_generate or not config.use_cache:
        raise StepRefusedError("it returns tokens alone, and needs a cache")
    if any(cache.get_seq_length() for cache in caches):
        raise StepRefusedError("it begins with an empty cache")
