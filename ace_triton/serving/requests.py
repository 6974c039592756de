"""Requests of OpenAI's API: what is accepted, and the errors for what is not."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AceError

IGNORED = frozenset({"metadata", "model", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
"""Fields that do not change a completion here; ``model`` is checked before."""

UNCHANGED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that are not supported, and the values with which they have no effect. null is one of them."""

MOST_STOPS = 4
LONGEST_STOP = 256
COMPLETION_TOKENS = 16
"""Default of ``max_tokens`` for /v1/completions, as in OpenAI's API."""

GREEDY_BELOW = 1e-5
"""Below this temperature the most likely token is taken: divided by it, the model's predictions could overflow."""

_QUOTES = reprlib.Repr()
_QUOTES.maxstring = 200
_quoted = _QUOTES.repr
"""A value of a request for a message, shortened if it is long."""

ROLES = ("system", "developer", "user", "assistant", "tool")


class RequestError(AceError, ValueError):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        param: the field that is wrong, or None.
        code: OpenAI's code of the error, or None.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's JSON of an error."""
        return error_body(str(self), self.status, self.param, self.code)


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's JSON of an error. Characters of a request that UTF-8 does not have are escaped."""
    shown, field = (text and text.encode("utf-8", "backslashreplace").decode() for text in (message, param))
    kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "invalid_request_error")
    return {"error": {"message": shown, "type": kind, "param": field, "code": code}}


@dataclass(frozen=True)
class Completion:
    """A request for a completion.

    Attributes:
        prompt: a text, token ids, or the messages of a conversation.
        max_tokens: largest number of new tokens; None for as many as the server allows.
        temperature, top_p: how tokens are drawn; temperature 0 takes the most likely token.
        seed: random seed; None for a new one.
        stop: texts before which the completion ends.
        stream: True for server-sent events.
        usage: True if a stream ends with the numbers of tokens.
        chat: True for /v1/chat/completions.
    """

    prompt: str | list[int] | list[dict[str, str]]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    chat: bool


def parse(body: bytes, model: str, *, chat: bool) -> Completion:
    """Read a request.

    Args:
        body: JSON.
        model: name of the model that is served.
        chat: True for /v1/chat/completions.

    Raises:
        RequestError: if the request is invalid, or asks for what is not supported.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    named = fields.get("model", model)
    if named != model:
        raise RequestError(
            f"the model {_quoted(named)} does not exist: this server has {model!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    read = {"messages", "max_completion_tokens"} if chat else {"prompt"}
    known = read | {"max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"}
    for name, value in fields.items():
        if name in known or name in IGNORED:
            continue
        if name not in UNCHANGED:
            raise RequestError(f"unknown field {_quoted(name)}", param=name)
        if value not in UNCHANGED[name]:
            raise RequestError(f"{name} is not supported by this server: leave it out", param=name)
    options = _of_type(fields, "stream_options", {}, dict)
    temperature = _number(fields, "temperature", 1.0, 0, 2)
    return Completion(
        _messages(fields) if chat else _prompt(fields),
        _max_tokens(fields, chat),
        0.0 if temperature < GREEDY_BELOW else temperature,
        _number(fields, "top_p", 1.0, 0, 1),
        _integer(fields, "seed", None, -(2**63), 2**63 - 1),
        _stops(fields),
        _of_type(fields, "stream", False, bool),
        _of_type(options, "include_usage", False, bool),
        chat,
    )


def _prompt(fields: dict[str, Any]) -> str | list[int]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise RequestError("prompt must be one text, or one list of token ids that is not empty", param="prompt")


def _messages(fields: dict[str, Any]) -> list[dict[str, str]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list that is not empty", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"{where} must be an object with a role, one of {', '.join(ROLES)}", param=where)
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(map(str, texts)) if whole else None
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be a text, or a list of parts of type 'text'", param=where)
    return {"role": message["role"], "content": content}


def _max_tokens(fields: dict[str, Any], chat: bool) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    return _integer(fields, name, None if chat else COMPLETION_TOKENS, 1, 2**31)


def _stops(fields: dict[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stops)
    ):
        raise RequestError(
            f"stop must be a text or up to {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters", param="stop"
        )
    return tuple(stops)


def _of_type(fields: dict[str, Any], name: str, default: Any, kind: type) -> Any:
    value = fields.get(name, default)
    if not isinstance(value, kind):
        wanted = {bool: "true or false", dict: "an object"}[kind]
        raise RequestError(f"{name} must be {wanted}, got {_quoted(value)}", param=name)
    return value


def _integer(fields: dict[str, Any], name: str, default: int | None, least: int, most: int) -> int | None:
    value = fields.get(name, default)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} must be an integer from {least} to {most}, got {_quoted(value)}", param=name)
    return value


def _number(fields: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number, got {_quoted(value)}", param=name)
    if not least <= value <= most:
        raise RequestError(f"{name} must be from {least} to {most}, got {_quoted(value)}", param=name)
    return float(value)
