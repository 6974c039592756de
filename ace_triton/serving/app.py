"""The routes: /v1/models, /v1/completions, /v1/chat/completions and /health."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .engine import Engine, Event, Finished, Job
from .requests import RequestError, error_body, parse

LOOK_SECONDS = 0.5
"""How often a request that waits looks whether its client has gone."""


def build_app(engine: Engine, name: str, *, most_bytes: int) -> Starlette:
    """The application.

    Args:
        engine: completes the requests.
        name: the model's name in requests and answers.
        most_bytes: largest size of a request's body.
    """
    created = int(time.time())
    entry = {"id": name, "object": "model", "created": created, "owned_by": "ace-triton"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        wanted = request.path_params["name"]
        if wanted != name:
            message = f"the model {wanted!r} does not exist: this server has {name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        return JSONResponse(entry)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def complete(request: Request) -> Response:
        chat = request.url.path.endswith("/chat/completions")
        wanted = parse(await _body(request, most_bytes), name, chat=chat)
        loop = asyncio.get_running_loop()
        job = await loop.run_in_executor(None, engine.submit, wanted, loop)
        answer = Answer(name, job)
        if wanted.stream:
            return StreamingResponse(
                answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return await answer.whole(request)

    app = Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/health", health),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _http_error, ClientDisconnect: _gone},
    )
    app.state.engine = engine
    return app


class Answer:
    """The answer to one request, whole or as server-sent events.

    Args:
        model: the model's name.
        job: the request in the engine.
    """

    def __init__(self, model: str, job: Job) -> None:
        self._job, self._chat = job, job.request.chat
        self._facts = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, request: Request) -> Response:
        """Wait for the end, or for the client to go; the answer as JSON."""
        pieces: list[str] = []
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self._job.events.get(), LOOK_SECONDS)
                except TimeoutError:
                    if await request.is_disconnected():
                        self._job.cancel()
                        return Response(status_code=499)
                    continue
                if isinstance(event, RequestError):
                    raise event
                if isinstance(event, Finished):
                    break
                pieces.append(event)
        except asyncio.CancelledError:
            self._job.cancel()
            raise
        text = "".join(pieces)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        body = self._body(content, event.reason, "chat.completion" if self._chat else "text_completion")
        return JSONResponse({**body, "usage": self._usage(event)})

    async def events(self) -> AsyncIterator[str]:
        """The answer in pieces. An error ends the stream as an event of its own, without ``[DONE]``."""
        try:
            if self._chat:
                yield self._chunk({"delta": {"role": "assistant", "content": ""}}, None)
            while True:
                event: Event = await self._job.events.get()
                if isinstance(event, RequestError):
                    yield _event(event.to_dict())
                    return
                if isinstance(event, Finished):
                    break
                yield self._chunk({"delta": {"content": event}} if self._chat else {"text": event}, None)
            yield self._chunk({"delta": {}} if self._chat else {"text": ""}, event.reason)
            if self._job.request.usage:
                yield _event({**self._facts, "object": self._kind, "choices": [], "usage": self._usage(event)})
            yield "data: [DONE]\n\n"
        finally:
            self._job.cancel()  # The client has gone, or everything was sent.

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, content: dict[str, Any], reason: str | None) -> str:
        return _event(self._body(content, reason, self._kind))

    def _body(self, content: dict[str, Any], reason: str | None, kind: str) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self._facts, "object": kind, "choices": [choice]}

    def _usage(self, finished: Finished) -> dict[str, int]:
        prompt, new = len(self._job.ids), finished.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _body(request: Request, most: int) -> bytes:
    """The body of a request; RequestError if it is larger than ``most`` bytes, or not declared as JSON.

    A web page can send other types to this machine without being asked, so that it could make the model work.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the Content-Type must be application/json, got {kind or 'none'}", status=415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise RequestError(f"the body has more than {most} bytes", status=413, code="body_too_large")
    return body


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.to_dict(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(message, error.status_code), error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
