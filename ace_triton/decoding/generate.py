"""Generation with the compiled step; transformers chooses the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import GenerationError
from .refusal import StepRefusedError
from .step import CompiledStep, step_together

NewStep = Callable[[Any, int], CompiledStep]
"""Makes the step of a text from the model and the largest number of tokens."""

KNOWN_INPUTS = frozenset({"use_cache", "logits_to_keep", "position_ids", "attention_mask"})
"""Arguments of a forward that transformers prepares for a plain text."""

REFUSED_OPTIONS = ("past_key_values", "cache", "assistant_model", "assistant_tokenizer", "custom_generate")
"""Arguments of ``generate`` that transformers does not pass on, or not so that they can be told from its own."""

_LENGTHS = "max_length max_new_tokens min_length min_new_tokens max_time"
_SCORES = """
    do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    guidance_scale watermarking_config encoder_repetition_penalty encoder_no_repeat_ngram_size
"""
_OUTPUTS = "output_attentions output_hidden_states output_scores output_logits"
_TOKENS = "pad_token_id bos_token_id eos_token_id decoder_start_token_id transformers_version"
_SPEED = "compile_config disable_compile continuous_batching_config prefill_chunk_size low_memory max_cache_len"
_BEAMS = "early_stopping length_penalty"
_ASSISTANTS = """
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    max_matching_ngram_size assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type
"""

PLAIN_OPTIONS = frozenset(" ".join((_LENGTHS, _SCORES, _OUTPUTS, _TOKENS, _SPEED, _BEAMS, _ASSISTANTS)).split())
"""Options of a GenerationConfig that transformers carries out outside the loop, or that act only in a mode that is
refused."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (True,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "cache_implementation": ("dynamic", "static"),
}
"""Values of all other options, besides None and False, with which the loop is right."""


def compiled_generate(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """As ``model.generate(input_ids, **options)`` on a CPU, with one call of the compiled library for each new token.

    Several texts get one call for a token of each, which reads the weights once. The texts may have padding on the
    left, with an ``attention_mask``, and may end at different times; each gets what it gets alone. Prompts run one
    after the other.

    The prompt runs through the model's own forward. A trial run first compares the step's logits with the model's; it
    is repeated if a weight has changed since the last one. Its sums are in fp32, so tokens may differ from those of
    ``model.generate`` if two logits agree up to rounding, most of all in fp16 and bf16.

    Args:
        model: a causal language model from transformers, dense or with packed layers, in evaluation mode.
        input_ids: int64 [n_texts, n_tokens], the prompts.
        options: of ``generate``, for greedy decoding and sampling. ``max_new_tokens`` or ``max_length`` bounds the
            cache.

    Returns:
        The tokens of the prompts and the new ones, int64 [n_texts, length].

    Raises:
        GenerationError: if the compiled step does not decode the model or the call; the message says why.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise GenerationError(f"input_ids must be [n_texts, n_tokens] with a token, got {list(input_ids.shape)}")
    for name in REFUSED_OPTIONS:
        if options.get(name) is not None:
            raise _option_refused(f"{name} is given")
    options = _with_stop_strings(model, options)
    decoding = CompiledDecoding(options.get("streamer"))
    result: torch.Tensor = model.generate(input_ids, custom_generate=decoding, **options)
    return result


class CompiledDecoding:
    """The argument ``custom_generate`` of transformers' ``generate``: decodes with the compiled step.

    Args:
        streamer: that of ``generate``, which does not pass it on.
        new_step: makes the step of a text from the model and the largest number of tokens.

    Attributes:
        step: the step of the last call, of its first text; None before the first.
    """

    def __init__(self, streamer: Any = None, new_step: NewStep = CompiledStep) -> None:
        self._streamer, self._new_step = streamer, new_step
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
        """Continue prompts; see transformers for the arguments.

        Raises:
            StepRefusedError: if the step does not decode the model or the call.
        """
        padding = _check_call(input_ids, generation_config, model_kwargs)
        streamer, longest = self._streamer, generation_config.max_length
        first = self.step = self._new_step(model, longest - padding[0])
        texts = [first, *(CompiledStep(model, longest - before, first.proven) for before in padding[1:])]
        prompts = (input_ids[k : k + 1, before:] for k, before in enumerate(padding))
        logits = torch.cat([text.prompt(prompt) for text, prompt in zip(texts, prompts, strict=True)])
        running = torch.ones(len(texts), dtype=torch.bool, device="cpu")
        while True:
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            if not running.all():
                tokens = tokens.where(running, generation_config._pad_token_tensor)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(tokens)
            running &= ~stopping_criteria(input_ids, None)
            if not running.any():
                break
            if len(texts) == 1:
                logits = first(tokens)
            else:
                logits[running] = step_together([texts[k] for k in running.nonzero()[:, 0].tolist()], tokens[running])
        if streamer is not None:
            streamer.end()
        return input_ids


def _with_stop_strings(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options with ``stop_strings`` as a stopping criterion: transformers does not use the tokenizer with its own.

    Raises:
        StepRefusedError: if the options need a tokenizer in another way.
    """
    configs = [config for config in (options.get("generation_config"), model.generation_config) if config is not None]
    if options.get("token_healing") or any(getattr(config, "token_healing", None) for config in configs):
        raise _option_refused("token_healing=True")
    if any(getattr(config, "stop_strings", None) for config in configs):
        raise _option_refused("a generation config has stop_strings: give them and the tokenizer as arguments instead")
    rest = {name: value for name, value in options.items() if name not in ("stop_strings", "tokenizer")}
    if options.get("stop_strings") is None:
        return rest
    if options.get("tokenizer") is None:
        raise _option_refused("stop_strings need the model's tokenizer as the argument tokenizer")
    from transformers import StoppingCriteriaList, StopStringCriteria

    criterion = StopStringCriteria(options["tokenizer"], options["stop_strings"])
    given = options.get("stopping_criteria") or ()
    return {**rest, "stopping_criteria": StoppingCriteriaList([*given, criterion])}


def _check_call(input_ids: torch.Tensor, config: Any, inputs: dict[str, Any]) -> list[int]:
    """Refuse what the loop does not do. Returns the number of tokens of padding before each text."""
    from transformers import GenerationConfig
    from transformers.cache_utils import Cache

    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise _option_refused(f"they ask for {mode.replace('_', ' ')}, and it takes greedy decoding and sampling")
    for name in sorted(set(vars(GenerationConfig())) - PLAIN_OPTIONS):
        value = getattr(config, name, None)
        if not (name.startswith("_") or value is None or value is False or value in NEUTRAL.get(name, ())):
            raise _option_refused(f"{name}={value!r}")
    if config.use_cache is False:
        raise _option_refused("use_cache=False, and it needs a cache")
    caches = [value for value in inputs.values() if isinstance(value, Cache)]
    given = {name for name, value in inputs.items() if value is not None and not isinstance(value, Cache)}
    if unknown := sorted(given - KNOWN_INPUTS):
        raise _option_refused(f"it does not take {', '.join(unknown)}")
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if "attention_mask" in given:
        mask = inputs["attention_mask"]
        real = mask.bool()
        if mask.shape != input_ids.shape or not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
            raise _option_refused("it takes padding on the left, and an attention_mask of the shape of input_ids")
    positions = inputs.get("position_ids")
    if positions is not None and not torch.equal((real.cumsum(-1) - 1)[real], positions.expand_as(real)[real]):
        raise _option_refused("position_ids must count from 0")
    if any(cache.get_seq_length() for cache in caches):
        raise _option_refused("it begins with an empty cache")
    padding: list[int] = (~real).sum(-1).tolist()
    return padding


def _option_refused(reason: str) -> StepRefusedError:
    return StepRefusedError(reason, "decode with these options")
