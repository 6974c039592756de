"""The engine: threads that complete requests, together in one batch, and the queue of those that wait."""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..decoders.batches import longest_sequence
from ..decoding.step import CompiledStep
from ..errors import AceError, GenerationError
from ..generation import chat_ids, check_room, decode, prompt_ids
from .joint import Joint
from .requests import Completion, RequestError
from .stop_texts import StopTexts

Reason = Literal["stop", "length"]

CLOSED = "the server is shutting down"


@dataclass(frozen=True)
class Finished:
    """The end of a completion.

    Attributes:
        reason: "stop" if the model ended the text or a stop text was found, "length" if ``max_tokens`` were reached.
        new_tokens: number of tokens that the model generated.
    """

    reason: Reason
    new_tokens: int


Event = str | Finished | RequestError
"""A piece of text; the end; or the error that ended the completion."""


@dataclass
class Job:
    """A request that waits or runs.

    Attributes:
        request: the request.
        ids: tokens of the prompt.
        max_tokens: largest number of new tokens.
        loop: the event loop that reads ``events``.
        events: pieces of text, and at last a :class:`Finished` or a :class:`RequestError`.
    """

    request: Completion
    ids: list[int]
    max_tokens: int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _cut: RequestError | None = None
    _cancelled: bool = False

    def cancel(self) -> None:
        """End the job: nobody reads its events any more."""
        self._cancelled = True

    def cut(self, error: RequestError) -> None:
        """End the job with an error."""
        self._cut = error

    @property
    def ended(self) -> bool:
        """True if the job must not go on."""
        return self._cancelled or self._cut is not None

    @property
    def error(self) -> RequestError | None:
        """The error with which the job was cut."""
        return self._cut

    def put(self, event: Event) -> None:
        """Give an event to the reader, from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # The loop is closed: the server has ended, and nobody reads.
            self.cancel()


class Engine:
    """Completes requests in threads of its own, in the order in which they came.

    With a ``batch`` of 1 one request runs at a time. With more, requests that run at the same time are decoded in one
    batch (:class:`~.joint.Joint`), by the compiled step or by transformers.

    Args:
        model, tokenizer: from transformers.
        waiting: largest number of requests that wait while others run.
        batch: largest number of requests that run at the same time.
        decoder: as for :func:`~ace_triton.generation.generate`. In a batch, transformers decodes a text that the
            compiled step refuses, as one longer than a window.
        most_tokens: largest number of new tokens of a request.
        longest_prompt: largest number of tokens of a prompt; None for what the model allows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        waiting: int,
        most_tokens: int,
        longest_prompt: int | None = None,
        batch: int = 1,
        decoder: str = "auto",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.most_tokens, self.longest_prompt = most_tokens, longest_prompt
        self._joint = Joint(model) if batch > 1 else None
        self._decoder = "auto" if batch > 1 and decoder == "compiled" else decoder
        self._waiting: queue.Queue[Job | None] = queue.Queue(waiting + batch)
        self._free = threading.Semaphore(waiting + batch)
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._closed = False
        self._alive = batch
        for _ in range(batch):
            threading.Thread(target=self._work, name="ace-triton engine", daemon=True).start()

    def submit(self, request: Completion, loop: asyncio.AbstractEventLoop) -> Job:
        """Queue a request.

        Raises:
            RequestError: if the prompt is invalid, the tokens do not fit, the queue is full, or the engine is closed.
        """
        if self._closed:
            raise RequestError(CLOSED, status=503)
        ids = self._encode(request)
        job = Job(request, ids, self._room(request, ids), loop)
        if not self._free.acquire(blocking=False):
            raise RequestError("too many requests wait: try again later", status=429, code="queue_full")
        with self._lock:
            if self._closed:
                self._free.release()
                raise RequestError(CLOSED, status=503)
            self._jobs[id(job)] = job
            self._waiting.put_nowait(job)
        return job

    def close(self) -> None:
        """Refuse new requests, and cut those that wait; those that run go on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while True:
                try:
                    job = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if job is not None:
                    self._end(job, RequestError(CLOSED, status=503))
            for _ in range(self._alive):
                self._waiting.put_nowait(None)

    def cut(self) -> None:
        """End the requests that run with an error, after their next token."""
        for job in list(self._jobs.values()):
            job.cut(RequestError(CLOSED, status=503))

    @property
    def idle(self) -> bool:
        """True if no request waits or runs."""
        return not self._jobs

    def _encode(self, request: Completion) -> list[int]:
        prompt: Any = request.prompt
        where = "messages" if request.chat else "prompt"
        try:
            if request.chat:
                return chat_ids(self.tokenizer, prompt)
            return prompt_ids(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        except GenerationError as error:
            raise RequestError(str(error), param=where) from error

    def _room(self, request: Completion, ids: list[int]) -> int:
        """The largest number of new tokens; RequestError if the tokens do not fit."""
        where = "messages" if request.chat else "prompt"
        if self.longest_prompt is not None and len(ids) > self.longest_prompt:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, this server accepts {self.longest_prompt}",
                param=where,
                code="context_length_exceeded",
            )
        if request.max_tokens is not None and request.max_tokens > self.most_tokens:
            raise RequestError(
                f"max_tokens must be at most {self.most_tokens} on this server, got {request.max_tokens}",
                param="max_tokens",
            )
        longest = longest_sequence(self.model)
        rest = self.most_tokens if longest is None else max(1, min(self.most_tokens, longest - len(ids)))
        most = rest if request.max_tokens is None else request.max_tokens
        try:
            check_room(self.model, ids, most, "give a smaller max_tokens")
        except GenerationError as error:
            code = "context_length_exceeded" if "positions" in str(error) else None
            raise RequestError(str(error), param=where, code=code) from error
        return most

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            try:
                last: Event = self._complete(job)
            except RequestError as error:
                last = error
            except AceError as error:
                last = RequestError(str(error), status=500)
            except Exception:  # A bug, or a full memory: this request fails, and the server goes on.
                traceback.print_exc()
                last = RequestError("the server failed; its log has the traceback", status=500)
            self._end(job, last)
        with self._lock:
            self._alive -= 1
            if self._joint is not None and not self._alive:
                self._joint.close()

    def _end(self, job: Job, last: Event) -> None:
        self._jobs.pop(id(job), None)
        self._free.release()
        job.put(last)

    def _complete(self, job: Job) -> Finished:
        if job.ended:
            return self._finished(job, [], StopTexts(()))
        request, stops = job.request, StopTexts(job.request.stop)

        def write(piece: str) -> None:
            if text := stops.feed(piece):
                job.put(text)

        sampling = {"top_p": request.top_p, "top_k": 0} if request.temperature else {}
        joint = self._joint
        with nullcontext() if joint is None else joint.member():
            torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
            found = decode(
                self.model if joint is None else joint.model,
                self.tokenizer,
                job.ids,
                max_new_tokens=job.max_tokens,
                temperature=request.temperature,
                write=write,
                stopped=lambda: stops.found or job.ended,
                decoder=self._decoder,
                new_step=CompiledStep if joint is None else joint.step,
                **sampling,
            )
        if text := stops.end():
            job.put(text)
        return self._finished(job, found.tokens, stops)

    def _finished(self, job: Job, tokens: list[int], stops: StopTexts) -> Finished:
        if job.error is not None:
            raise job.error
        ends = self.model.generation_config.eos_token_id
        ended = bool(tokens) and tokens[-1] in (ends if isinstance(ends, list) else [ends])
        return Finished("stop" if stops.found or ended else "length", len(tokens))
