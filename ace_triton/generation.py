"""Continue a prompt, token by token, and measure how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .decoders.batches import longest_sequence
from .errors import GenerationError
from .inputs.text import has_lone_surrogate


@dataclass(frozen=True)
class Generation:
    """A continued prompt.

    Attributes:
        text: what was written, without the prompt and special tokens.
        prompt_tokens, new_tokens: how many.
        prompt_seconds: from the start to the first new token.
        seconds: from there to the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone: the new tokens after the first."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool = False,
    write: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        model, tokenizer: of transformers.
        prompt: text; with ``chat``, a user's message for the tokenizer's chat template.
        max_new_tokens: stop after so many.
        temperature: 0 takes the likeliest token; above, tokens are drawn from torch's global generator.
        write: called with every piece of text as soon as it is known.

    Raises:
        GenerationError: nothing to continue, no chat template, or more tokens than the model has positions.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise GenerationError(
            f"max_new_tokens must be at least 1 and temperature at least 0, got {max_new_tokens} and {temperature}"
        )
    ids = _encode(tokenizer, prompt, chat).to(model.device)
    longest = longest_sequence(model)
    if longest is not None and ids.shape[1] + max_new_tokens > longest:
        raise GenerationError(
            f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones pass the model's {longest} positions"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = _Streamer(tokenizer, write)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )
    start, *times = streamer.times
    return Generation("".join(streamer.pieces), ids.shape[1], len(times), times[0] - start, times[-1] - times[0])


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    if has_lone_surrogate(prompt):
        raise GenerationError("the prompt is not valid Unicode text: write it in UTF-8, without lone surrogates")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise GenerationError("the tokenizer has no chat template: leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        try:
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # A template is a program of the model's, and may raise anything.
            raise GenerationError(f"the chat template fails ({error}): leave --chat out, or repair it") from error
        encoded = rendered["input_ids"]
    else:
        encoded = tokenizer(prompt)["input_ids"]
    if not encoded and tokenizer.bos_token_id is not None:
        encoded = [tokenizer.bos_token_id]
    if not encoded:
        raise GenerationError("the prompt holds no token: give some text")
    return torch.tensor([encoded], dtype=torch.int64, device="cpu")


@dataclass
class _Streamer:
    """What transformers hands tokens to: the prompt first, then every new token.

    Attributes:
        times: when the prompt came, then each token, in seconds.
        pieces: the text so far, in the pieces that were written.
    """

    tokenizer: Any
    write: Callable[[str], object] | None
    times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    _line: list[int] = field(default_factory=list)
    _shown: int = 0

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self._line += value.flatten().tolist()
            self._show(last=False)

    def end(self) -> None:
        self._show(last=True)

    def _show(self, *, last: bool) -> None:
        text = self.tokenizer.decode(self._line, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return  # The rest of this character is still to come.
        piece = text[self._shown :]
        self._shown = len(text)
        if text.endswith("\n"):
            self._line, self._shown = [], 0
        if piece:
            self.pieces.append(piece)
            if self.write is not None:
                self.write(piece)
