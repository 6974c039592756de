"""Continue a prompt, token by token, and measure how fast."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .decoders.batches import longest_sequence, vocabulary_of
from .decoding.generate import CompiledDecoding, NewStep
from .decoding.refusal import StepRefusedError
from .decoding.step import CompiledStep
from .dispatched.hooks import input_device
from .errors import AceError, GenerationError
from .inputs.beginnings import token_ids
from .inputs.model_source import reason
from .inputs.text import has_lone_surrogate

DECODERS = ("auto", "compiled", "transformers")
"""What runs the model for each new token: the compiled step if it takes the model, that step, or transformers."""

COMPILED_AFTER = 3
"""Tokens after which everything is compiled: a prompt, a first step and one more."""

INVALID_PROBABILITIES = "probability tensor contains"
"""In torch's message if it cannot sample."""


@dataclass(frozen=True)
class Generation:
    """A continued prompt.

    Attributes:
        text: the new text, without the prompt and special tokens.
        prompt_tokens, new_tokens: number of tokens in the prompt and in the new text.
        prompt_seconds: time from the start to the first new token.
        seconds: time from the first new token to the last.
        decoder: "compiled" if the compiled step decoded, else "transformers".
        refusal: why the compiled step did not decode; None if it did, or was not asked.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float
    decoder: str = "transformers"
    refusal: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: the new tokens after the first, by ``seconds``; 0 for a single token."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    chat: bool = False,
    compile: str | None = None,
    decoder: str = "auto",
    write: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: from transformers.
        tokenizer: its tokenizer.
        prompt: the text to continue; with ``chat``, a user's message for the tokenizer's chat template.
        max_new_tokens: largest number of new tokens.
        temperature: 0 takes the most likely token. Otherwise tokens are sampled with torch's global generator.
        top_p: sample from the most likely tokens whose probabilities reach this sum; None for the model's own default.
        top_k: sample from this many of the most likely tokens; None for the model's own default.
        chat: put the prompt into the chat template.
        compile: backend of torch.compile for the decoding step, as "inductor", which also gives the model a cache of
            fixed size; None to run it as it is. Compiling takes a minute or more and is not part of the times.
        decoder: "compiled" decodes with the compiled step (:mod:`ace_triton.decoding`), "transformers" without it, and
            "auto" with the compiled step if it takes the model and ``compile`` is None.
        write: called with every piece of text as soon as it is complete.

    Raises:
        GenerationError: the prompt has no token or one that the model does not know, there is no chat template, the
            tokens do not fit the model's positions, the model predicts NaN, or ``decoder`` is "compiled" and the
            compiled step does not take the model.
    """
    if compile is not None and decoder == "compiled":
        raise GenerationError("the compiled step does not use torch.compile: give only one of compile and decoder")
    chosen = checked_options(max_new_tokens, temperature, top_p, top_k, decoder)
    ids = tokens_of(model, tokenizer, prompt, max_new_tokens, chat=chat)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "decoder": decoder}
    options |= chosen
    if compile is not None:
        options["decoder"] = "transformers"
        options |= _compiled(model, compile)
        steps = iter(range(COMPILED_AFTER))
        with torch.random.fork_rng():
            decode(model, tokenizer, ids, stopped=lambda: next(steps, None) is None, **options)
    found = decode(model, tokenizer, ids, write=write, **options)
    start, *times = found.times
    decoded_by = "transformers" if found.step is None else "compiled"
    parts = times[0] - start, times[-1] - times[0]
    return Generation("".join(found.pieces), len(ids), len(times), *parts, decoded_by, found.refusal)


def checked_options(
    max_new_tokens: int, temperature: float, top_p: float | None, top_k: int | None, decoder: str
) -> dict[str, Any]:
    """Those of ``top_p`` and ``top_k`` that are given; GenerationError if an option of :func:`generate` is invalid."""
    if decoder not in DECODERS:
        raise GenerationError(f"decoder must be one of {', '.join(DECODERS)}; got {decoder!r}")
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise GenerationError(
            "max_new_tokens must be at least 1, and temperature finite and at least 0; "
            f"got {max_new_tokens} and {temperature}"
        )
    chosen = {name: value for name, value in (("top_p", top_p), ("top_k", top_k)) if value is not None}
    if chosen and not temperature:
        raise GenerationError(
            f"without a temperature above 0 nothing is sampled, so {' and '.join(chosen)} would do nothing: give a "
            "temperature, or leave it out"
        )
    return chosen


def tokens_of(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, chat: bool) -> list[int]:
    """The token ids of a prompt of :func:`generate`; GenerationError if they do not fit the model."""
    messages = [{"role": "user", "content": prompt}]
    ids = chat_ids(tokenizer, messages) if chat else prompt_ids(tokenizer, prompt)
    check_room(model, ids, max_new_tokens, "give a smaller --max-new-tokens")
    return ids


def _compiled(model: Any, backend: str) -> dict[str, Any]:
    """Options of transformers' ``generate`` that compile the decoding step."""
    from transformers import CompileConfig

    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    if backend == "inductor" and model.device.type == "cpu" and not any(map(shutil.which, filter(None, compilers))):
        raise GenerationError("to compile for a CPU, torch needs a C++ compiler: install g++, or name one in CXX")
    config: Any = CompileConfig(backend=backend, fullgraph=True, mode="default")
    config._compile_all_devices = True  # Else transformers compiles on GPUs alone.
    return {"cache_implementation": "static", "compile_config": config}


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt, at least one; GenerationError if it is invalid or empty."""
    _check_text(prompt)
    return _not_empty(token_ids(tokenizer, prompt), tokenizer)


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template, up to where the answer begins.

    Args:
        tokenizer: from transformers.
        messages: each has a "role" and a "content".

    Raises:
        GenerationError: there is no chat template, it does not accept the messages, or a text is invalid.
    """
    for message in messages:
        _check_text(message["content"])
    if not getattr(tokenizer, "chat_template", None):
        raise GenerationError("the tokenizer has no chat template: give a plain prompt (without --chat)")
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # A template is a program, and may raise anything.
        raise GenerationError(
            f"the chat template fails ({error}): give a plain prompt (without --chat), or repair the template"
        ) from error
    return _not_empty(rendered["input_ids"], tokenizer)


def check_room(model: Any, ids: list[int], max_new_tokens: int, otherwise: str) -> None:
    """Raise GenerationError if tokens do not fit the model.

    Args:
        model: from transformers.
        ids: tokens of the prompt.
        max_new_tokens: largest number of new tokens.
        otherwise: what to do instead of a shorter prompt.
    """
    longest = longest_sequence(model)
    if longest is not None and len(ids) + max_new_tokens > longest:
        raise GenerationError(
            f"{len(ids)} tokens of prompt and {max_new_tokens} new ones are more than the model's {longest} "
            f"positions: shorten the prompt, or {otherwise}"
        )
    if max(ids) >= vocabulary_of(model) or min(ids) < 0:
        largest = max(ids) if min(ids) >= 0 else min(ids)
        raise GenerationError(
            f"the prompt has token id {largest}, the model's vocabulary ends at {vocabulary_of(model) - 1}: use the "
            "model's own tokenizer"
        )


@dataclass
class Decoded:
    """What :func:`decode` produced.

    Attributes:
        pieces: the new text, in pieces as they were written.
        tokens: the new tokens.
        times: time of the start and of each new token, in seconds.
        step: the compiled step if it decoded, else None.
        refusal: why it did not decode; None if it did, or was not asked.
    """

    pieces: list[str]
    tokens: list[int]
    times: list[float]
    step: CompiledStep | None = None
    refusal: str | None = None


def decode(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    write: Callable[[str], object] | None = None,
    stopped: Callable[[], bool] | None = None,
    decoder: str = "auto",
    new_step: NewStep = CompiledStep,
    **options: Any,
) -> Decoded:
    """Continue tokens that :func:`check_room` allows.

    Args:
        model: from transformers.
        tokenizer: its tokenizer.
        ids: tokens of the prompt.
        max_new_tokens, temperature, write, decoder: as for :func:`generate`.
        stopped: called after each token; decoding ends if it returns True.
        new_step: makes the compiled step of the text.
        options: further arguments of transformers' ``generate``.

    Raises:
        GenerationError: the model predicts NaN, transformers cannot generate with it, or ``decoder`` is "compiled" and
            the compiled step does not take the model.
    """
    refusal = None
    common: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "write": write,
        "stopped": stopped,
    }
    if decoder != "transformers":
        try:
            return _decode(model, tokenizer, ids, new_step=new_step, **common, **options)
        except StepRefusedError as error:
            if decoder == "compiled":
                raise
            refusal = error.reason
    found = _decode(model, tokenizer, ids, new_step=None, **common, **options)
    found.refusal = refusal
    return found


def _decode(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    write: Callable[[str], object] | None,
    stopped: Callable[[], bool] | None,
    new_step: NewStep | None,
    **options: Any,
) -> Decoded:
    """As :func:`decode`, with the compiled step that ``new_step`` makes, or without it."""
    prompt = torch.tensor([ids], dtype=torch.int64, device=input_device(model))
    streamer = _Streamer(tokenizer, write)
    decoding = CompiledDecoding(streamer, new_step) if new_step is not None else None
    if stopped is not None:
        options["stopping_criteria"] = [
            lambda tokens, scores, **_: torch.full((1,), stopped(), dtype=torch.bool, device=tokens.device)
        ]
    with generation_errors(temperature), torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_of(tokenizer),
            streamer=streamer,
            custom_generate=decoding,
            **sampling_of(temperature),
            **options,
        )
    step = None if decoding is None else decoding.step
    return Decoded(streamer.pieces, streamer.tokens, streamer.times, step)


def sampling_of(temperature: float) -> dict[str, Any]:
    """Options of transformers' ``generate`` for a temperature."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def padding_of(tokenizer: Any) -> int | None:
    """The token that stands after an ended text and, in a batch, before a short prompt."""
    token: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return token


@contextmanager
def generation_errors(temperature: float) -> Iterator[None]:
    """Raise GenerationError for what transformers raises about a model or its predictions."""
    try:
        yield
    except AceError:
        raise
    except (ValueError, RuntimeError) as error:
        if INVALID_PROBABILITIES in str(error):
            raise GenerationError(
                f"the model's predictions at temperature {temperature} are NaN or infinite: give a larger temperature, "
                "or 0; if they stay so, the model's weights are damaged"
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise GenerationError(f"transformers does not generate with this model ({reason(error)})") from error


def _check_text(text: str) -> None:
    if has_lone_surrogate(text):
        raise GenerationError("the prompt is not valid Unicode text: write it in UTF-8, without lone surrogates")


def _not_empty(ids: list[int], tokenizer: Any) -> list[int]:
    if not ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    if not ids:
        raise GenerationError("the prompt has no token: give some text")
    return list(ids)


@dataclass
class _Streamer:
    """Receives tokens from transformers: the prompt first, then each new token.

    Attributes:
        times: time at which the prompt and then each token arrived, in seconds.
        pieces: the text so far, in pieces as they were written.
        tokens: the new tokens.
    """

    tokenizer: Any
    write: Callable[[str], object] | None
    times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    _line: list[int] = field(default_factory=list)
    _written: int = 0

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            new = value.flatten().tolist()
            self.tokens += new
            self._line += new
            self._write_new(last=False)

    def end(self) -> None:
        self._write_new(last=True)

    def _write_new(self, *, last: bool) -> None:
        text = self.tokenizer.decode(self._line, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return  # The next token completes this character.
        piece = text[self._written :]
        self._written = len(text)
        if text.endswith("\n"):
            self._line, self._written = [], 0
        if piece:
            self.pieces.append(piece)
            if self.write is not None:
                self.write(piece)
