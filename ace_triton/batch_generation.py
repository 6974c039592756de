"""Continue several prompts together, one token of each at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .decoding.generate import CompiledDecoding
from .decoding.refusal import StepRefusedError
from .decoding.several_texts import pays_in_step
from .dispatched.hooks import input_device
from .errors import GenerationError
from .generation import checked_options, generation_errors, padding_of, sampling_of, tokens_of


@dataclass(frozen=True)
class BatchGeneration:
    """Prompts that were continued together.

    Attributes:
        texts: the new texts, without the prompts and special tokens.
        prompt_tokens, new_tokens: number of tokens in each prompt and in each new text.
        prompt_seconds: time from the start to the first new token of each text.
        seconds: time from then to the last new token of all texts.
        decoder: "compiled" if the compiled step decoded, else "transformers".
        refusal: why the compiled step did not decode; None if it did, or was not asked.
    """

    texts: list[str]
    prompt_tokens: list[int]
    new_tokens: list[int]
    prompt_seconds: float
    seconds: float
    decoder: str
    refusal: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: the new tokens of all texts after the first of each, by ``seconds``; 0 without any."""
        later = sum(self.new_tokens) - len(self.new_tokens)
        return later / self.seconds if later else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    chat: bool = False,
    decoder: str = "auto",
) -> BatchGeneration:
    """Continue prompts together, so that the weights are read once for a token of each.

    Shorter prompts are padded on the left. The compiled step gives each text the tokens that it would get alone; in
    transformers a product may sum in another order, so tokens may differ at a near tie.

    Args:
        model, tokenizer, max_new_tokens, temperature, top_p, top_k, chat: as for
            :func:`~ace_triton.generation.generate`.
        prompts: texts to continue, at least one.
        decoder: as for :func:`~ace_triton.generation.generate`, but of several prompts "auto" takes the compiled step
            only if it is the faster one (:func:`~ace_triton.decoding.several_texts.pays_in_step`).

    Raises:
        GenerationError: as :func:`~ace_triton.generation.generate`, or if there is no prompt.
    """
    chosen = checked_options(max_new_tokens, temperature, top_p, top_k, decoder)
    if isinstance(prompts, str):
        raise GenerationError("prompts is one text: put it in a list, [text], or use generate")
    if not prompts:
        raise GenerationError("give at least one prompt")
    ids = [tokens_of(model, tokenizer, prompt, max_new_tokens, chat=chat) for prompt in prompts]
    padding, longest = padding_of(tokenizer) or 0, max(map(len, ids))
    device = input_device(model)
    padded = torch.tensor([[padding] * (longest - len(own)) + own for own in ids], dtype=torch.int64, device=device)
    mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in ids], dtype=torch.int64, device=device)

    def decoded(*, compiled: bool) -> tuple[list[list[int]], list[float]]:
        times = _Times()
        with generation_errors(temperature), torch.inference_mode():
            found = model.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                streamer=times,
                custom_generate=CompiledDecoding(times) if compiled else None,
                **sampling_of(temperature),
                **chosen,
            )
        return found[:, longest:].tolist(), times.seen

    refusal, compiled = None, decoder == "compiled"
    if decoder == "auto":
        compiled = len(ids) == 1 or pays_in_step(model)
    try:
        rows, times = decoded(compiled=compiled)
    except StepRefusedError as error:
        if decoder == "compiled":
            raise
        refusal, compiled = error.reason, False
        rows, times = decoded(compiled=False)
    rows = [_until_end(row, model.generation_config.eos_token_id) for row in rows]
    return BatchGeneration(
        [tokenizer.decode(row, skip_special_tokens=True) for row in rows],
        [len(own) for own in ids],
        [len(row) for row in rows],
        times[1] - times[0],
        times[-1] - times[1],
        "compiled" if compiled else "transformers",
        refusal,
    )


def _until_end(tokens: list[int], ends: int | list[int] | None) -> list[int]:
    """The tokens up to the first end token, which is the last of them."""
    last = {ends} if isinstance(ends, int) else set(ends or ())
    stop = next((place + 1 for place, token in enumerate(tokens) if token in last), len(tokens))
    return tokens[:stop]


class _Times:
    """Receives tokens from transformers.

    Attributes:
        seen: time at which the prompts and then each token of all texts arrived, in seconds.
    """

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
